// The page: listens to the console's stream and hands each change to the part that shows it.

import { byId, put } from "/static/dom.js";
import { Detail } from "/static/detail.js";
import { Health } from "/static/health.js";
import { Strip } from "/static/strip.js";
import { Tiles } from "/static/tiles.js";
import { Trend } from "/static/trend.js";

const QUIET_MS = 4000;
const SPEAK_MS = 3000;

const strip = new Strip((shown) => detail.open(shown));
const detail = new Detail(strip);
const tiles = new Tiles((shown) => detail.open(shown));
const trend = new Trend();
const health = new Health();
let heard = performance.now();
let spoken = -Infinity;

function take(delta) {
  heard = performance.now();
  // After a pause of this page or of the console everything comes again.
  if (delta.first) tiles.clear();
  if (delta.tiles) tiles.update(delta.tiles);
  if (delta.rejects) tiles.rejects(delta.rejects, !delta.first);
  if (delta.rejects || delta.skipped) strip.update(delta.rejects ?? [], delta.skipped ?? 0);
  if (delta.trend) trend.update(delta.trend, delta.bin_s);
  if (delta.health) {
    health.update(delta.health);
    tiles.age(delta.health.cameras);
  }
  if (delta.rejects && !delta.first) speak(delta.rejects.at(-1));
}

// For those who listen: at most one every few seconds, or a burst would talk for minutes.
function speak(reject) {
  if (performance.now() - spoken < SPEAK_MS) return;
  spoken = performance.now();
  put(byId("spoken"), `Reject, camera ${reject.camera}`);
}

function listen() {
  const stream = new EventSource("/events");
  stream.onmessage = (message) => take(JSON.parse(message.data));
  stream.onerror = () => {
    health.gone();
    // A refusal (signed out, too many pages) ends an EventSource for good; an outage it heals itself.
    if (stream.readyState === EventSource.CLOSED) {
      setTimeout(again, 2000);
    }
  };
}

async function again() {
  const answer = await fetch("/abilities").catch(() => null);
  if (answer !== null && answer.status === 401) location.assign("/sign-in");
  else listen();
}

// A console that is stopped but not gone keeps its connection open and says nothing.
setInterval(() => {
  if (performance.now() - heard > QUIET_MS || health.lost !== null) health.gone();
}, 1000);

// --- theme ---

const THEMES = ["auto", "light", "dark"];

function theme() {
  return document.documentElement.dataset.theme ?? "auto";
}

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("kizu-theme", next);
  } catch (refused) {
    // Lasts as long as this page.
  }
  put(byId("theme-name"), next);
  tiles.recolor();
});
put(byId("theme-name"), theme());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => tiles.recolor());

fetch("/abilities")
  .then((answer) => answer.json())
  .then((able) => {
    detail.able = able;
    tiles.pictures = strip.pictures = able.pictures;
  })
  .catch(() => undefined)
  .finally(listen);
