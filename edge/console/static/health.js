// How daemon, model, cameras and this console are doing: one word on top, facts at the side, notices where it matters.

import { byId, clock, duration, element, mark, percent, put } from "/static/dom.js";

const CERTIFICATES = { valid: "certified", void: "void", paused: "not on the CPU", none: "not certified", "": "–" };

export class Health {
  constructor() {
    this.notices = byId("notices");
    this.facts = byId("health");
    this.last = null;
    this.lost = null;
    this.shown = new Map();
    this.rows = new Map();
  }

  update(health) {
    this.last = health;
    this.lost = null;
    this.draw();
  }

  // The console itself does not answer: this page knows since when by its own stopwatch.
  gone() {
    if (this.lost === null) this.lost = { at: performance.now(), ms: Date.now() };
    this.draw();
  }

  draw() {
    const health = this.last;
    const [state, word] = this.word();
    mark(byId("state"), "state", state);
    put(byId("state"), word);
    mark(document.body, "away", state === "away" ? "" : null);
    this.tell(this.found());
    if (health === null) return;
    put(byId("line"), health.line);
    document.title = health.line ? `${health.line} · Kizu` : "Kizu";
    const sum = (key) => health.cameras.reduce((total, camera) => total + camera[key], 0);
    put(byId("total-parts"), String(sum("parts")));
    put(byId("total-rejected"), percent(sum("rejected"), sum("parts")));
    put(byId("total-inconclusive"), percent(sum("inconclusive"), sum("parts")));
    const silent = health.cameras.filter((camera) => camera.silent).length;
    const count = health.cameras.length;
    this.row("Daemon", state === "away" ? "away" : health.state || "live", state !== "live");
    this.row("Cameras", silent ? `${silent} of ${count} silent` : `${count} deliver`, silent > 0);
    this.row("Model", health.model ? health.model.slice(0, 12) : "–", false, health.model);
    this.row("Certificate", CERTIFICATES[health.certificate] ?? "–", health.certificate === "void");
    this.row("Engine", health.fallback ? "CPU instead of GPU" : "as configured", Boolean(health.fallback));
    if (health.challenge) this.row("Challenge", `${health.challenge} ${duration(health.challenge_s)} ago`, health.challenge === "failed", health.challenge_detail);
    this.row("Behind", health.lag ? `${health.lag} events` : "no", health.lag > 100);
    this.row("Missed", health.lost ? `${health.lost} events` : "none", health.lost > 0);
    if (health.refused) this.row("Refused", `${health.refused} messages`, true);
  }

  word() {
    if (this.lost !== null) return ["away", "no console"];
    if (this.last === null) return ["wait", "connecting"];
    if (this.last.away_s !== null) return ["away", "daemon away"];
    // Also a state that a daemon of tomorrow invents.
    if (this.last.state && this.last.state !== "ready") return ["warn", this.last.state];
    return ["live", "live"];
  }

  found() {
    if (this.lost !== null) {
      const seconds = (performance.now() - this.lost.at) / 1000;
      return [["bad", "console", `The console does not answer since ${clock(this.lost.ms)} (${duration(seconds)}). This page goes on by itself when it is back.`]];
    }
    const health = this.last;
    if (health === null) return [];
    const told = [];
    if (health.away_s !== null) {
      const since = `since ${clock(health.since_ms)} (${duration(health.away_s)})`;
      told.push(["bad", "away", health.heard ? `The daemon is away ${since}. What is below is the last that was heard; it goes on by itself.` : `No daemon was heard ${since}. The page goes on by itself when it starts.`]);
    }
    if (health.state === "stalled") told.push(["bad", "stalled", "The line is stalled: it holds frames and gets nowhere."]);
    if (health.state === "withheld") told.push(["bad", "withheld", "The line holds every part until its challenge is passed."]);
    if (health.certificate === "void") told.push(["warn", "void", `The certificate has been void for ${duration(health.certificate_s)}: parts are no longer like those it stands on. Calibrate again.`]);
    if (health.fallback) told.push(["warn", "fallback", `The GPU cannot be used (${health.fallback}); the CPU takes its place.`]);
    else if (health.state === "degraded") told.push(["warn", "degraded", "The line is degraded: the engine is lost, parts are held."]);
    if (health.challenge === "failed") told.push(["bad", "challenge", `The line's last challenge failed ${duration(health.challenge_s)} ago. ${health.challenge_detail}`]);
    const silent = health.cameras.filter((camera) => camera.silent).map((camera) => camera.camera);
    if (silent.length && health.away_s === null) told.push(["warn", "silent", `Silent: ${silent.slice(0, 6).join(", ")}${silent.length > 6 ? ` and ${silent.length - 6} more` : ""}.`]);
    if (health.lag > 100) told.push(["warn", "lag", `This console is ${health.lag} events behind the line.`]);
    if (health.log_replaced_s !== null) told.push(["note", "log", `The event log was replaced ${duration(health.log_replaced_s)} ago: what was rejected before is no longer in it.`]);
    if (health.clock_step_s !== null) told.push(["note", "step", `The line's clock was set back by ${duration(-health.clock_step_s)}.`]);
    if (health.clock_off_s !== null) told.push(["note", "clock", `The line's clock is ${duration(Math.abs(health.clock_off_s))} ${health.clock_off_s > 0 ? "behind" : "ahead of"} this console's.`]);
    if (health.further_cameras) told.push(["note", "further", `${health.further_cameras} more cameras are not shown.`]);
    if (health.failure) told.push(["bad", "failure", health.failure]);
    return told;
  }

  // Notices are kept and reworded, so that a reader hears a new one once and not every second.
  tell(found) {
    const wanted = new Set(found.map(([, key]) => key));
    for (const [key, node] of this.shown) {
      if (!wanted.has(key)) {
        node.remove();
        this.shown.delete(key);
      }
    }
    for (const [kind, key, text] of found) {
      let node = this.shown.get(key);
      if (node === undefined) {
        node = element("p", `notice ${kind}`);
        this.shown.set(key, node);
        this.notices.append(node);
      }
      put(node, text);
    }
  }

  row(name, text, bad, title = "") {
    let row = this.rows.get(name);
    if (row === undefined) {
      row = element("div");
      row.append(element("dt", "", name), element("dd"));
      this.rows.set(name, row);
      this.facts.append(row);
    }
    put(row.lastChild, text);
    if (row.lastChild.title !== title) row.lastChild.title = title;
    mark(row, "bad", bad ? "" : null);
  }
}
