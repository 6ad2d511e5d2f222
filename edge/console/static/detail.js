// One part: its picture with heat map and contour, the numbers, "score again", and what a person says about it.

import { Frame, WORDS, address, byId, clock, element, glyph, mark, number, put } from "/static/dom.js";

export class Detail {
  constructor(strip) {
    this.strip = strip;
    this.dialog = byId("detail");
    this.frame = new Frame(byId("picture"));
    this.heat = element("img", "heat");
    this.heat.alt = "";
    this.heat.hidden = true;
    this.frame.holder.insertBefore(this.heat, this.frame.svg);
    this.able = { pictures: false, rescore: false, annotate: false };
    this.shown = null;
    this.scored = new Map();
    this.scoring = null;
    byId("close").addEventListener("click", () => this.dialog.close());
    byId("newer").addEventListener("click", () => this.step(-1));
    byId("older").addEventListener("click", () => this.step(1));
    byId("rescore").addEventListener("click", () => this.rescore());
    for (const id of ["show-contour", "show-heatmap"]) {
      byId(id).addEventListener("click", (event) => this.toggle(event.currentTarget));
    }
    for (const button of byId("labels").querySelectorAll("[data-label]")) {
      button.addEventListener("click", () => this.label(button));
    }
    byId("labels").addEventListener("submit", (event) => event.preventDefault());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    this.frame.image.addEventListener("load", () => this.note(""));
    this.frame.image.addEventListener("error", () => this.note("The picture is not kept (any more)."));
  }

  open(shown) {
    this.shown = shown;
    this.draw();
    if (!this.dialog.open) this.dialog.showModal();
  }

  draw() {
    const shown = this.shown;
    const picture = this.able.pictures && shown.decision === "reject";
    mark(this.dialog, "decision", shown.decision);
    mark(this.dialog, "id", shown.id);
    glyph(byId("detail-glyph"), shown.decision);
    put(byId("detail-word"), WORDS[shown.decision]);
    this.frame.show(shown, picture ? `${address("picture", shown.id)}?size=full` : null);
    this.note(picture ? "" : !this.able.pictures ? "Pictures: start the console with --log or --config." : "Pictures are kept of rejected parts only.");
    this.facts();
    this.again();
    byId("labels").hidden = !this.able.annotate;
    byId("note").value = "";
    put(byId("labeled"), "");
    this.press();
    const at = this.place();
    byId("newer").disabled = at <= 0;
    byId("older").disabled = at >= 0 ? at >= this.strip.rejects.length - 1 : this.strip.rejects.length === 0;
  }

  note(text) {
    put(byId("picture-note"), text);
  }

  facts() {
    const shown = this.shown;
    const rows = [
      ["Camera", shown.camera],
      ["Time", clock(shown.at_ms)],
      ["Score", number(shown.score)],
      ["Threshold", `${number(shown.threshold)}${shown.certified ? "" : " (not certified)"}`],
      ["p-value", number(shown.p)],
    ];
    if (shown.decision === "inconclusive") rows.splice(2, 3, ["Reason", shown.detail ? `${shown.reason}: ${shown.detail}` : shown.reason]);
    if (shown.part) rows.splice(1, 0, ["Part", shown.part]);
    if (shown.decision !== "inconclusive" && shown.detail) rows.push(["Rules", shown.detail]);
    shown.regions.slice(0, 4).forEach(([box, area, , mm2, length, zone], index) => {
      const size = [`${box[2] - box[0]} × ${box[3] - box[1]} px`, mm2 === null ? `${area} px²` : `${number(mm2)} mm²`];
      if (length !== null) size.push(`${number(length)} mm long`);
      if (zone !== null) size.push(`passed over in ${zone}`);
      rows.push([index ? "" : "Size", size.join(", ")]);
    });
    const more = Math.max(0, shown.regions.length - 4) + shown.more_regions;
    if (more) rows.push(["", `and ${more} more`]);
    rows.push(["Frame", shown.width ? `${shown.width} × ${shown.height} px` : "–"], ["Latency", `${number(shown.latency_ms)} ms`]);
    rows.push(["Model", shown.model, "id"], ["Event", shown.id, "id"]);
    const made = rows.map(([name, text, kind]) => {
      const row = element("div", kind ?? "");
      row.append(element("dt", "", name), element("dd", "", text));
      return row;
    });
    byId("facts").replaceChildren(...made);
  }

  // --- score again ---

  again() {
    const shown = this.shown;
    const button = byId("rescore");
    const busy = this.scoring !== null;
    button.disabled = !this.able.rescore || shown.decision !== "reject" || busy;
    button.title = this.able.rescore ? "" : "Start the console with --config LINE.toml to score again.";
    put(button, this.scoring === shown.id ? "Scoring…" : "Score again");
    const answer = this.scored.get(shown.id);
    const text = byId("rescored");
    mark(text, "kind", answer === undefined ? null : answer.error ? "error" : answer.identical ? "same" : "differs");
    put(text, answer === undefined ? "" : told(answer));
    const has = answer !== undefined && answer.heatmap;
    byId("show-heatmap").disabled = !has;
    const source = has ? `${address("heatmap", shown.id)}?at=${answer.at}` : "";
    if (has && this.heat.getAttribute("src") !== source) this.heat.src = source;
    this.heat.hidden = !has || byId("show-heatmap").getAttribute("aria-pressed") !== "true";
  }

  async rescore() {
    const id = this.shown.id;
    this.scoring = id;
    this.again();
    let answer;
    try {
      answer = await (await fetch(address("rescore", id), { method: "POST" })).json();
    } catch (refused) {
      answer = { error: "the console did not answer" };
    }
    this.scored.set(id, { ...answer, at: Math.round(performance.now()) });
    if (this.scored.size > 16) this.scored.delete(this.scored.keys().next().value);
    this.scoring = null;
    if (this.shown !== null) this.again();
  }

  // --- labels ---

  press() {
    for (const button of byId("labels").querySelectorAll("[data-label]")) {
      button.setAttribute("aria-pressed", String(button.dataset.label === this.shown.label));
      button.hidden = button.dataset.label === "false_reject" && this.shown.decision !== "reject";
    }
  }

  async label(button) {
    const shown = this.shown;
    const word = button.getAttribute("aria-pressed") === "true" ? "withdrawn" : button.dataset.label;
    const body = JSON.stringify({ id: shown.id, label: word, note: byId("note").value });
    let answer;
    try {
      const headers = { "content-type": "application/json" };
      answer = await (await fetch("/label", { method: "POST", headers, body })).json();
    } catch (refused) {
      answer = { error: "not saved, the console did not answer" };
    }
    if (!answer.error) {
      shown.label = answer.label;
      this.strip.relabel(shown.id, answer.label);
    }
    if (this.shown !== shown) return;
    mark(byId("labeled"), "kind", answer.error ? "error" : null);
    put(byId("labeled"), answer.error || (answer.label === null ? "Taken back." : "Saved."));
    this.press();
  }

  // --- walking ---

  place() {
    return this.strip.rejects.findIndex((one) => one.id === this.shown.id);
  }

  step(by) {
    const at = this.place();
    const next = this.strip.rejects[at < 0 ? 0 : at + by];
    if (next !== undefined) this.open(next);
  }

  key(event) {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      this.step(event.key === "ArrowLeft" ? -1 : 1);
    }
  }

  toggle(button) {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    this.frame.svg.classList.toggle("off", byId("show-contour").getAttribute("aria-pressed") !== "true");
    this.again();
  }
}

function told(answer) {
  if (answer.error) return answer.error;
  if (answer.identical) return `Identical: ${answer.decision}, score ${number(answer.score)}.`;
  return `Differs: ${answer.differences.join("; ")}`;
}
