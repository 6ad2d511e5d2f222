// Small helpers. Whatever comes from the line enters the page through textContent or an attribute of a fixed kind.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function drawn(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

// Writes only what changed: most of a tile stays the same from part to part.
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, key, value) {
  if (value === null || value === undefined || value === false) {
    if (key in node.dataset) delete node.dataset[key];
  } else if (node.dataset[key] !== String(value)) {
    node.dataset[key] = String(value);
  }
}

export const WORDS = { accept: "ACCEPT", reject: "REJECT", inconclusive: "HOLD" };

const GLYPHS = {
  accept: "M5 12.500l4.500 4.500L19 7.500",
  reject: "M6 6l12 12M18 6L6 18",
  inconclusive: "M9 5v14M15 5v14",
  silent: "M5 12h14",
};

export function glyph(holder, kind) {
  if (holder.dataset.glyph === kind) return;
  holder.dataset.glyph = kind;
  const svg = drawn("svg", { viewBox: "0 0 24 24" });
  svg.append(drawn("path", { d: GLYPHS[kind] }));
  holder.replaceChildren(svg);
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.01 || size >= 100000)) return value.toExponential(2);
  return size < 10 ? value.toFixed(2) : size < 1000 ? value.toFixed(1) : value.toFixed(0);
}

export function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(part && part * 10 < whole ? 1 : 0)} %` : "–";
}

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

// A clock that was never set, or set wildly, is told with its date.
export function clock(ms) {
  const date = new Date(ms);
  if (Number.isNaN(date.getTime())) return "?";
  const near = Math.abs(Date.now() - ms) < 12 * 3600 * 1000;
  return near ? CLOCK.format(date) : `${DAY.format(date)} ${CLOCK.format(date)}`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

export function address(kind, id) {
  return `/${kind}/${id.split("/").map(encodeURIComponent).join("/")}`;
}

// A frame with what was found on it: picture if there is one, contour over it. `shown` needs width, height, outline.
export class Frame {
  constructor(holder) {
    this.holder = holder;
    this.image = element("img");
    this.image.alt = "";
    this.image.decoding = "async";
    this.image.hidden = true;
    this.svg = drawn("svg", { "aria-hidden": "true", preserveAspectRatio: "xMidYMid meet" });
    this.path = drawn("path", { class: "contour" });
    this.svg.append(this.path);
    holder.append(this.image, this.svg);
    this.source = null;
    this.retries = 0;
    this.image.addEventListener("load", () => {
      this.image.hidden = false;
    });
    // The daemon writes the picture beside the event, so it may be a moment late.
    this.image.addEventListener("error", () => {
      this.image.hidden = true;
      const source = this.source;
      if (source && this.retries < 2) {
        this.retries += 1;
        setTimeout(() => {
          if (this.source === source) this.image.src = `${source}&try=${this.retries}`;
        }, 700 * this.retries);
      }
    });
  }

  show(shown, source) {
    const width = shown.width > 0 ? shown.width : 4;
    const height = shown.height > 0 ? shown.height : 3;
    const box = `0 0 ${width} ${height}`;
    if (this.svg.getAttribute("viewBox") !== box) {
      this.svg.setAttribute("viewBox", box);
      // Where the window follows the frame: line scans, very long or tall, still get one that shows both sides.
      const ratio = Math.min(4, Math.max(0.5, width / height));
      this.holder.style.setProperty("--ratio", ratio.toFixed(4));
    }
    if (this.path.getAttribute("d") !== shown.outline) this.path.setAttribute("d", shown.outline);
    if (this.source !== source) {
      this.source = source;
      this.retries = 0;
      this.image.hidden = true;
      if (source) this.image.src = source;
      else this.image.removeAttribute("src");
    }
  }
}
