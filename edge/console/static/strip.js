// The last rejects, newest first. Stands still while somebody points at it or walks in it.

import { Frame, address, byId, clock, element, glyph, mark, number, put } from "/static/dom.js";

const SHOWN = 24;
export const KEPT = 240;
const REDRAW_MS = 500;
const LABELS = { false_reject: "false reject", real_defect: "real defect", seen: "seen" };

export class Strip {
  constructor(open) {
    this.list = byId("strip");
    this.note = byId("rejects-note");
    this.rejects = [];
    this.cards = new Map();
    this.open = open;
    this.pictures = false;
    this.skipped = 0;
    this.fresh = 0;
    this.pointed = false;
    this.due = null;
    this.list.addEventListener("pointerenter", () => (this.pointed = true));
    this.list.addEventListener("pointerleave", () => {
      this.pointed = false;
      this.later();
    });
    this.list.addEventListener("focusout", () => this.later());
    this.list.addEventListener("keydown", (event) => this.walk(event));
  }

  get held() {
    return this.pointed || this.list.contains(document.activeElement);
  }

  update(rejects, skipped) {
    const known = new Set(this.rejects.map((one) => one.id));
    for (const one of rejects) {
      if (known.has(one.id)) continue;
      this.rejects.unshift(one);
      this.fresh += 1;
    }
    this.skipped += skipped;
    this.rejects.length = Math.min(this.rejects.length, KEPT);
    // A burst is drawn twice a second, whatever its size; a single reject at once.
    if (this.due === null) {
      this.draw();
      this.due = setTimeout(() => {
        this.due = null;
        this.draw();
      }, REDRAW_MS);
    }
  }

  relabel(id, label) {
    for (const one of this.rejects) if (one.id === id) one.label = label;
    const card = this.cards.get(id);
    if (card !== undefined) this.tag(card, label);
  }

  later() {
    setTimeout(() => this.draw(), 0);
  }

  draw() {
    const waiting = this.held && this.cards.size > 0 && this.fresh > 0;
    const missed = this.skipped ? `${this.skipped} came too fast to show · ` : "";
    put(this.note, missed + (waiting ? `held · ${this.fresh} new` : this.rejects.length ? `${this.rejects.length} kept here` : ""));
    if (waiting) return;
    this.fresh = 0;
    byId("no-rejects").hidden = this.rejects.length > 0;
    const wanted = this.rejects.slice(0, SHOWN);
    const ids = new Set(wanted.map((one) => one.id));
    for (const [id, card] of this.cards) {
      if (!ids.has(id)) {
        card.item.remove();
        this.cards.delete(id);
      }
    }
    let before = this.list.firstChild;
    for (const one of wanted) {
      let card = this.cards.get(one.id);
      if (card === undefined) {
        card = this.card(one);
        this.cards.set(one.id, card);
      }
      if (card.item === before) before = before.nextSibling;
      else this.list.insertBefore(card.item, before);
    }
    this.reach(this.list.querySelector("button"));
  }

  card(one) {
    const item = element("li");
    const button = element("button", "card");
    button.type = "button";
    button.addEventListener("click", () => this.open(one));
    const holder = element("span", "frame");
    new Frame(holder).show(one, this.pictures ? `${address("picture", one.id)}?size=thumb` : null);
    const tag = element("span", "tag");
    const words = element("span", "words");
    const sign = element("span", "glyph");
    glyph(sign, "reject");
    words.append(sign, element("span", "camera", one.camera));
    const beneath = element("span", "beneath");
    beneath.append(element("span", "time", clock(one.at_ms)), element("span", "score", number(one.score)));
    button.append(holder, words, beneath, tag);
    button.setAttribute("aria-label", `Reject of camera ${one.camera} at ${clock(one.at_ms)}, score ${number(one.score)}`);
    item.append(button);
    const card = { item, button, tag };
    this.tag(card, one.label);
    return card;
  }

  tag(card, label) {
    put(card.tag, LABELS[label] ?? "");
    mark(card.button, "label", label ?? null);
  }

  reach(button) {
    for (const one of this.list.querySelectorAll("button")) one.tabIndex = one === button ? 0 : -1;
  }

  walk(event) {
    const buttons = [...this.list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : at + (steps[event.key] ?? NaN);
    if (at < 0 || Number.isNaN(to)) return;
    event.preventDefault();
    if (buttons[to] === undefined) return;
    this.reach(buttons[to]);
    buttons[to].focus();
  }
}
