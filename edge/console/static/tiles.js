// One tile a camera: verdict, score against threshold, the last parts, and where the last flaw was.

import { Frame, WORDS, address, byId, clock, duration, element, glyph, mark, number, put } from "/static/dom.js";

const RECENT = 60;
const REDRAW_MS = 400;
const ALARM_MS = 3000;
const MANY = 12;

class Tile {
  constructor(name, open) {
    this.name = name;
    this.recent = [];
    this.shown = null;
    this.flaw = null;
    this.threshold = null;
    this.health = null;
    this.dirty = true;
    this.alarm = 0;
    this.item = element("li");
    this.button = element("button", "tile");
    this.button.type = "button";
    this.button.addEventListener("click", () => this.shown && open(this.shown));
    const head = element("span", "tile-head");
    this.camera = element("span", "camera", name);
    this.rate = element("span", "rate");
    head.append(this.camera, this.rate);
    const body = element("span", "tile-body");
    const holder = element("span", "frame");
    this.frame = new Frame(holder);
    this.when = element("span", "when");
    holder.append(this.when);
    const verdict = element("span", "verdict");
    this.glyph = element("span", "glyph");
    this.glyph.setAttribute("aria-hidden", "true");
    this.word = element("span", "word");
    this.score = element("span", "score");
    this.against = element("span", "against");
    verdict.append(this.glyph, this.word, this.score, this.against);
    body.append(holder, verdict);
    this.canvas = element("canvas", "recent");
    this.canvas.setAttribute("aria-hidden", "true");
    this.button.append(head, body, this.canvas);
    this.item.append(this.button);
  }

  update(tile, pictures) {
    this.shown = tile.shown;
    this.recent.push(...tile.recent);
    if (this.recent.length > RECENT) this.recent.splice(0, this.recent.length - RECENT);
    this.dirty = true;
    if (tile.shown.threshold !== null) this.threshold = tile.shown.threshold;
    if (this.flaw === null || this.flaw.decision !== "reject") this.find(tile.shown, pictures);
    this.draw();
  }

  // The last reject stays in the window, dimmed, until the next one: at ten parts a second nobody sees a single frame,
  // and the newest part is seldom the one that matters.
  reject(shown, pictures, fresh) {
    if (fresh) this.alarm = performance.now() + ALARM_MS;
    this.find(shown, pictures);
    this.draw();
  }

  find(shown, pictures) {
    this.flaw = shown;
    const has = pictures && shown.decision === "reject";
    this.frame.show(shown, has ? `${address("picture", shown.id)}?size=thumb` : null);
  }

  draw() {
    const shown = this.shown;
    const silent = this.health !== null && this.health.silent;
    const kind = silent ? "silent" : shown.decision;
    mark(this.button, "decision", kind);
    mark(this.button, "number", shown.id);
    glyph(this.glyph, kind);
    put(this.word, silent ? "SILENT" : WORDS[shown.decision]);
    put(this.score, silent ? duration(this.health.age_s) : shown.score === null ? shown.reason : number(shown.score));
    put(this.against, silent ? "since its last part" : shown.score === null ? "inconclusive" : `threshold ${number(shown.threshold)}`);
    mark(this.button, "alarm", performance.now() < this.alarm ? "" : null);
    const old = this.flaw.id !== shown.id && this.flaw.decision === "reject";
    mark(this.frame.holder, "old", old ? "" : null);
    mark(this.frame.holder, "empty", this.flaw.decision !== "reject" && !this.flaw.outline ? "" : null);
    put(this.when, old ? clock(this.flaw.at_ms) : "");
  }

  // Once a second or so: what changes by itself.
  age(health) {
    this.health = health;
    put(this.rate, health.silent ? "" : `${health.fps.toFixed(1)} /s`);
    this.draw();
    this.button.setAttribute(
      "aria-label",
      `Camera ${this.name}: ${health.silent ? "silent for " + duration(health.age_s) : this.shown.decision}` +
        `, ${health.rejected} of ${health.parts} rejected in the last minute`,
    );
  }

  paint(colors) {
    if (!this.dirty) return;
    this.dirty = false;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (width < 2 || height < 2) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const threshold = this.threshold;
    const scores = this.recent.map(([score]) => score).filter((score) => score !== null);
    // The lowest score still has a bar; the threshold stays at one height whatever comes.
    const lowest = Math.min(...scores, threshold ?? Infinity);
    const low = threshold !== null && threshold > lowest ? lowest - 0.25 * (threshold - lowest) : lowest - 1;
    const line = 0.42;
    const span = threshold !== null && threshold > low ? (threshold - low) / (1 - line) : 1;
    const pitch = width / RECENT;
    const bar = Math.max(1, Math.floor(pitch * 0.62));
    this.recent.forEach(([score, kind], index) => {
      const x = Math.round((RECENT - this.recent.length + index) * pitch);
      const level = score === null ? 0.16 : Math.min(1, Math.max(0.06, (score - low) / span));
      context.fillStyle = kind === "r" ? colors.reject : kind === "i" ? colors.inconclusive : colors.quiet;
      const top = Math.round(height * (1 - level));
      context.fillRect(x, top, bar, height - top);
    });
    context.fillStyle = colors.line;
    const y = Math.round(height * line);
    for (let x = 0; x < width; x += 6 * ratio) context.fillRect(x, y, 3 * ratio, Math.max(1, ratio));
  }
}

function columns(count) {
  if (count === 1) return 1;
  if (count === 2 || count === 4) return 2;
  return count <= 6 ? 3 : count <= 12 ? 4 : 0;
}

export class Tiles {
  constructor(open) {
    this.list = byId("tiles");
    this.tiles = new Map();
    this.open = open;
    this.pictures = false;
    this.recolor();
    setInterval(() => this.paint(), REDRAW_MS);
    window.addEventListener("resize", () => this.again());
    this.list.addEventListener("keydown", (event) => this.walk(event));
  }

  update(tiles) {
    for (const tile of tiles) {
      let one = this.tiles.get(tile.camera);
      if (one === undefined) one = this.add(tile.camera);
      one.update(tile, this.pictures);
    }
  }

  // Each camera's last one among these, oldest first.
  rejects(rejects, fresh) {
    const last = new Map(rejects.map((one) => [one.camera, one]));
    for (const [camera, one] of last) this.tiles.get(camera)?.reject(one, this.pictures, fresh);
  }

  clear() {
    for (const tile of this.tiles.values()) tile.recent = [];
  }

  add(name) {
    const one = new Tile(name, this.open);
    this.tiles.set(name, one);
    // By name, numbers in them as numbers, so that cam10 follows cam9 and a camera keeps its place.
    const order = [...this.tiles.values()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    const next = order[order.indexOf(one) + 1];
    this.list.insertBefore(one.item, next === undefined ? null : next.item);
    this.list.dataset.columns = columns(this.tiles.size);
    mark(document.querySelector("main"), "many", this.tiles.size > MANY ? "" : null);
    byId("no-cameras").hidden = true;
    this.reach(this.list.querySelector(".tile"));
    return one;
  }

  age(cameras) {
    for (const health of cameras) {
      const tile = this.tiles.get(health.camera);
      if (tile !== undefined) tile.age(health);
    }
  }

  recolor() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    this.colors = { reject: color("--reject"), inconclusive: color("--hold"), quiet: color("--quiet"), line: color("--ink-2") };
    this.again();
  }

  again() {
    for (const tile of this.tiles.values()) tile.dirty = true;
  }

  paint() {
    if (document.hidden) return;
    for (const tile of this.tiles.values()) tile.paint(this.colors);
  }

  // One stop for Tab, arrows within: the second camera is one key away, the strip behind them is too.
  reach(button) {
    for (const tile of this.tiles.values()) tile.button.tabIndex = tile.button === button ? 0 : -1;
  }

  walk(event) {
    const buttons = [...this.list.querySelectorAll(".tile")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const top = buttons[0].offsetTop;
    const columns = Math.max(1, buttons.filter((one) => one.offsetTop === top).length);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : at + (steps[event.key] ?? NaN);
    if (Number.isNaN(to)) return;
    event.preventDefault();
    if (buttons[to] === undefined) return;
    this.reach(buttons[to]);
    buttons[to].focus();
  }
}
