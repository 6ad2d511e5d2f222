// Two charts of the last quarter of an hour, drawn from bins: how many were rejected, and where p-values lie.

import { byId, drawn, element, number, percent, put } from "/static/dom.js";

const BINS = 90;
const WIDTH = 360;
const HEIGHT = 120;
const LEFT = 34;
const BOTTOM = 18;
const TOP = 6;

function x(ago) {
  return LEFT + ((WIDTH - LEFT) * (BINS - ago - 0.5)) / BINS;
}

function y(share) {
  return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share);
}

function axes(marks) {
  const parts = [];
  for (const [share, text] of marks) {
    parts.push(drawn("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(share), y2: y(share) }));
    const label = drawn("text", { x: LEFT - 6, y: y(share) + 4, class: "end" });
    label.textContent = text;
    parts.push(label);
  }
  for (const [ago, text, anchor] of [[BINS - 0.5, "15 min ago", ""], [0, "now", "end"]]) {
    const label = drawn("text", { x: anchor ? WIDTH : LEFT, y: HEIGHT - 3, class: anchor });
    label.textContent = text;
    parts.push(label);
  }
  return parts;
}

// The axis ends at a round number above the largest bin, so that it does not dance.
function ceiling(largest) {
  return [0.05, 0.1, 0.25, 0.5, 1].find((limit) => largest <= limit) ?? 1;
}

export class Trend {
  constructor() {
    this.rate = byId("rate");
    this.p = byId("p");
    for (const svg of [this.rate, this.p]) svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.update([], 10);
  }

  update(bins, binSeconds) {
    this.drawRate(bins, binSeconds);
    this.drawP(bins);
  }

  drawRate(bins, binSeconds) {
    const top = ceiling(Math.max(0, ...bins.map(([, parts, rejected]) => rejected / parts)));
    const width = Math.max(1.5, ((WIDTH - LEFT) / BINS) * 0.7);
    const bars = bins.map(([ago, parts, rejected, held]) => {
      const share = rejected / parts;
      const height = Math.max(rejected ? 2 : 0.75, y(0) - y(share / top));
      const kind = rejected ? "bar" : held ? "bar held" : "bar none";
      return drawn("rect", { class: kind, x: x(ago) - width / 2, y: y(0) - height, width, height });
    });
    const round = top >= 0.1 ? 0 : 1;
    this.rate.replaceChildren(
      ...axes([[0, "0"], [0.5, `${(50 * top).toFixed(round)}`], [1, `${(100 * top).toFixed(0)} %`]]), ...bars);
    const last = bins.filter(([ago]) => ago * binSeconds < 300);
    const sum = (index) => last.reduce((total, bin) => total + bin[index], 0);
    put(byId("rate-now"), last.length ? `${percent(sum(2), sum(1))} in 5 min` : "no parts yet");
  }

  drawP(bins) {
    const known = bins.filter((bin) => bin[5] !== null);
    const parts = axes([[0, "0"], [0.5, "0.5"], [1, "1"]]);
    parts.push(drawn("line", { class: "middle", x1: LEFT, x2: WIDTH, y1: y(0.5), y2: y(0.5) }));
    for (const run of runs(known)) {
      const up = run.map((bin) => `${x(bin[0])} ${y(bin[6])}`);
      const down = run.map((bin) => `${x(bin[0])} ${y(bin[4])}`).reverse();
      const middle = run.map((bin) => `${x(bin[0])} ${y(bin[5])}`);
      parts.push(drawn("path", { class: "band", d: `M${[...up, ...down].join("L")}Z` }));
      parts.push(drawn("path", { class: "median", d: `M${middle.join("L")}` }));
      if (run.length === 1) parts.push(drawn("circle", { class: "dot", cx: x(run[0][0]), cy: y(run[0][5]), r: 2 }));
    }
    this.p.replaceChildren(...parts);
    const last = known.at(-1);
    put(byId("p-now"), last === undefined ? "no scores yet" : `median ${number(last[5])}`);
  }
}

// Bins that follow each other; a pause is a gap, not a line.
function runs(bins) {
  const found = [];
  for (const bin of bins) {
    const run = found.at(-1);
    if (run !== undefined && run.at(-1)[0] - bin[0] <= 2) run.push(bin);
    else found.push([bin]);
  }
  return found;
}
