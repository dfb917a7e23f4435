// A small chart of the last minutes: lines over an area, a ruler under the pointer. Vectors, coloured by the style sheet.

import { h, style, text } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 48;
const LEAST_SLOTS = 60; // a chart that has just begun fills from the right

function s(name, attributes = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// A path through values, newest at the right; null is a gap. With `floor` it is closed to an area.
export function path(values, top, slots, floor = false) {
  const x = (index) => (((index + slots - values.length) * WIDTH) / (slots - 1)).toFixed(1);
  const y = (value) => (HEIGHT - 1 - (value / top) * (HEIGHT - 3)).toFixed(1);
  let d = "";
  let from = null;
  const close = (index) => { if (floor && from !== null) d += `L${x(index)} ${HEIGHT}L${x(from)} ${HEIGHT}Z`; from = null; };
  values.forEach((value, index) => {
    if (value === null) { close(index - 1); return; }
    d += `${from === null ? "M" : "L"}${x(index)} ${y(value)}`;
    if (from === null) { from = index; if (!floor) d += `h0.01`; }
  });
  close(values.length - 1);
  return d;
}

// A round number at or above the greatest value, so that the scale does not change with every point.
export function ceiling(values, least) {
  const greatest = values.reduce((most, value) => (value !== null && value > most ? value : most), least);
  const power = 10 ** Math.floor(Math.log10(greatest));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((step) => step * power).find((step) => step >= greatest * 0.999) ?? greatest;
}

export class Chart {
  // lines: [{of(points) -> values, kind}]; `say(point index | null)` returns {value, unit, note}; least: of the scale.
  constructor({ title, lines, say, least, fixed }) {
    this.lines = lines;
    this.say = say;
    this.least = least;
    this.fixed = fixed;
    this.hover = null;
    this.num = 0;
    this.slots = LEAST_SLOTS;
    this.paths = lines.map(({ kind }) => [
      kind.includes("area") ? s("path", { class: `area ${kind}` }) : null,
      s("path", { class: `line ${kind}`, "vector-effect": "non-scaling-stroke" }),
    ]);
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" });
    this.svg.append(...this.paths.flat().filter(Boolean));
    this.ruler = h("span.ruler", { "aria-hidden": "true" });
    this.ruler.hidden = true;
    this.value = h("span.value");
    this.unit = h("span.unit");
    this.note = h("span.note");
    this.age = h("span.age");
    this.element = h(
      "div.tile", {},
      h("h2", {}, title),
      h("p.now", {}, this.value, " ", this.unit),
      h("div.plot", {}, this.svg, this.ruler),
      h("p.foot", {}, this.note, this.age),
    );
    this.element.addEventListener("pointermove", (event) => this.point(event));
    this.element.addEventListener("pointerleave", () => { this.hover = null; this.ruler.hidden = true; this.tell(); });
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const index = Math.round(share * (this.slots - 1)) - (this.slots - this.num);
    this.hover = index >= 0 && index < this.num ? index : null;
    this.ruler.hidden = this.hover === null;
    style(this.ruler, "left", `${((index + this.slots - this.num) / (this.slots - 1)) * 100}%`);
    this.tell();
  }

  draw(points) {
    this.num = points.length;
    this.slots = Math.max(LEAST_SLOTS, this.num);
    const series = this.lines.map(({ of }) => of(points));
    const top = this.fixed?.(points) ?? ceiling(series.flat(), this.least);
    series.forEach((values, index) => {
      const [area, line] = this.paths[index];
      area?.setAttribute("d", path(values, top, this.slots, true));
      line.setAttribute("d", path(values, top, this.slots));
    });
    this.tell();
  }

  tell() {
    if (!this.num) return;
    const shown = this.say(this.hover ?? this.num - 1, this.hover !== null);
    text(this.value, shown.value);
    text(this.unit, shown.unit ?? "");
    text(this.note, shown.note ?? "");
    text(this.age, this.hover === null ? "" : `${this.num - 1 - this.hover} s ago`);
  }
}
