// The six charts at the top: the fleet's activity of the last minutes.

import { Chart } from "./charts.js";
import { bytes, count, percent, seconds } from "./format.js";

const SMOOTH = 10; // seconds that a rate of requests is averaged over
const ERRORS_OVER = 60;

export class Overview {
  constructor(parent) {
    this.parent = parent;
    this.points = [];
    this.charts = [];
  }

  // Begin with a history; `series` names the numbers of a point, `slots` is how many points are kept.
  begin(series, points, slots) {
    this.at = Object.fromEntries(series.map((name, index) => [name, index]));
    this.slots = slots;
    this.points = points;
    if (!this.charts.length) {
      this.charts = this.make();
      this.parent.replaceChildren(...this.charts.map((chart) => chart.element));
    }
    this.draw();
  }

  clear() {
    this.points = [];
    this.charts = [];
    this.parent.replaceChildren();
  }

  add(point) {
    this.points.push(point);
    if (this.points.length > this.slots) this.points.splice(0, this.points.length - this.slots);
    if (!document.hidden) this.draw();
  }

  draw() { for (const chart of this.charts) chart.draw(this.points); }

  get(index, name) { return this.points[index]?.[this.at[name]] ?? null; }

  // The sum of a series over the seconds that end with a point.
  sum(name, index, over) {
    let total = 0;
    for (let i = Math.max(0, index - over + 1); i <= index; i += 1) total += this.points[i][this.at[name]];
    return total;
  }

  make() {
    const of = (name) => (points) => points.map((point) => point[this.at[name]]);
    const rate = (name) => (points) => points.map((_, index) => this.sum(name, index, SMOOTH) / Math.min(SMOOTH, index + 1));
    const share = (points) => points.map((_, index) => {
      const all = this.sum("requests", index, ERRORS_OVER);
      return all ? (100 * this.sum("errors", index, ERRORS_OVER)) / all : 0;
    });
    return [
      new Chart({
        title: "Tokens out", least: 10, lines: [{ of: of("tokens_per_s"), kind: "area accent" }],
        say: (index) => ({
          value: count(this.get(index, "tokens_per_s")), unit: "/s",
          note: `most ${count(Math.max(...of("tokens_per_s")(this.points)))}/s`,
        }),
      }),
      new Chart({
        title: "Time to first token", least: 0.05,
        lines: [{ of: of("ttft_p95_s"), kind: "faint" }, { of: of("ttft_p50_s"), kind: "accent" }],
        say: (index) => {
          const [value, unit] = seconds(this.get(index, "ttft_p50_s")).split(" ");
          return { value, unit: unit ?? "", note: `95th ${seconds(this.get(index, "ttft_p95_s"))}` };
        },
      }),
      new Chart({
        title: "Requests", least: 1, lines: [{ of: rate("requests"), kind: "area accent" }],
        say: (index) => ({
          value: count(Math.round((10 * this.sum("requests", index, SMOOTH)) / Math.min(SMOOTH, index + 1)) / 10), unit: "/s",
          note: `${count(this.sum("requests", index, ERRORS_OVER))} in the last minute`,
        }),
      }),
      new Chart({
        title: "Errors", least: 5, lines: [{ of: share, kind: "area bad" }],
        say: (index) => {
          const errors = this.sum("errors", index, ERRORS_OVER);
          const [value, unit] = percent(errors, this.sum("requests", index, ERRORS_OVER)).split(" ");
          return { value, unit, note: `${count(errors)} in the last minute` };
        },
      }),
      new Chart({
        title: "Running and waiting", least: 4,
        lines: [{ of: of("running"), kind: "area accent" }, { of: of("waiting"), kind: "warn" }],
        say: (index) => ({
          value: count(this.get(index, "running")), unit: "running", note: `${count(this.get(index, "waiting"))} waiting`,
        }),
      }),
      new Chart({
        title: "Device memory", least: 1, lines: [{ of: of("used"), kind: "area accent" }],
        fixed: (points) => Math.max(1, ...of("total")(points)),
        say: (index) => {
          const used = this.get(index, "used");
          const total = this.get(index, "total");
          const [value, unit] = bytes(used).split(" ");
          return { value, unit: unit ?? "B", note: `${percent(used, total)} of ${bytes(total)}` };
        },
      }),
    ];
  }
}
