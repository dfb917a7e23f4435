// Use of keys and models: a bar for each day, and a table by key, by model or by day. Days are those of UTC.

import { $, h, shown, style, text } from "./dom.js";
import { ceiling } from "./charts.js";
import { count, money } from "./format.js";
import { Polled } from "./polled.js";

const DAY_MS = 24 * 3600e3;
const NAMES = { key: "Key", model: "Model", day: "Day" };
const NONE = { requests: 0, tokens_in: 0, tokens_out: 0, tokens_cached: 0, cost: 0 };

// Rows added up by one of their fields: a map from its value to the sums.
export function summed(rows, by) {
  const found = new Map();
  for (const row of rows) {
    const sum = found.get(row[by]) ?? { ...NONE };
    for (const name of Object.keys(NONE)) sum[name] += row[name] ?? 0;
    found.set(row[by], sum);
  }
  return found;
}

const utcDay = (at) => new Date(at).toISOString().slice(0, 10);

function days(first, last) {
  const found = [];
  for (let at = Date.parse(first); at <= Date.parse(last); at += DAY_MS) found.push(utcDay(at));
  return found;
}

function line(by, name, sum) {
  return h(
    "tr", {},
    h("th", { scope: "row" }, name || (by === "key" ? "no key" : "–")),
    h("td.number", {}, count(sum.requests)),
    h("td.number.wide", {}, count(sum.tokens_in)),
    h("td.number.wide", {}, count(sum.tokens_cached)),
    h("td.number.wide", {}, count(sum.tokens_out)),
    h("td.number.narrow", {}, count(sum.tokens_in + sum.tokens_out)),
    h("td.number", {}, sum.cost ? money(sum.cost) : "–"),
  );
}

export class Use extends Polled {
  constructor() {
    super(15000);
    this.by = "key";
    this.rows = [];
    for (const radio of document.querySelectorAll("input[name=use-by]")) {
      radio.addEventListener("change", () => { this.by = radio.value; this.look(); });
    }
    $("use-days").addEventListener("change", () => this.look());
  }

  path() {
    const from = utcDay(Date.now() - (Number($("use-days").value) - 1) * DAY_MS);
    return `admin/usage?from=${from}&by=${this.by === "day" ? "day" : `day,${this.by}`}`;
  }

  show(answer) {
    this.rows = answer?.rows ?? [];
    const total = [...summed(this.rows.map((row) => ({ ...row, all: "" })), "all").values()][0] ?? NONE;
    const cost = total.cost ? `, ${money(total.cost)}` : "";
    const requests = `${count(total.requests)} ${total.requests === 1 ? "request" : "requests"}`;
    text($("use-count"), `${requests}, ${count(total.tokens_in + total.tokens_out)} tokens${cost}`);
    shown($("use-memory"), answer !== null && !answer.persists);
    shown($("use-empty"), this.rows.length === 0);
    shown($("use-table"), this.rows.length > 0);
    this.chart(answer ? days(answer.first, answer.last) : []);
    this.table();
  }

  // A bar for each day: the tokens of prompts, and on them those of answers.
  chart(all) {
    const sums = summed(this.rows, "day");
    const tokens = all.map((day) => { const sum = sums.get(day) ?? NONE; return [sum.tokens_in, sum.tokens_out]; });
    const top = ceiling(tokens.map(([input, output]) => input + output), 1);
    const part = (kind, tokens) => {
      const element = h(`span.${kind}`);
      style(element, "height", `${(100 * tokens) / top}%`);
      return element;
    };
    $("use-bars").replaceChildren(...all.map((day, index) => {
      const [input, output] = tokens[index];
      return h("span.day", { title: `${day}: ${count(input)} tokens in, ${count(output)} out` }, part("out", output), part("in", input));
    }));
    const most = Math.max(0, ...tokens.map(([input, output]) => input + output));
    $("use-bars").setAttribute("aria-label", `Tokens of each day; at most ${count(most)}`);
    text($("use-first"), all[0] ?? "");
    text($("use-most"), most ? `at most ${count(most)} tokens a day` : "");
    text($("use-last"), all.at(-1) ?? "");
    shown($("use-chart"), this.rows.length > 0);
  }

  table() {
    const sums = [...summed(this.rows, this.by)];
    const weight = (sum) => [sum.cost, sum.tokens_in + sum.tokens_out, sum.requests];
    sums.sort(([a, one], [b, other]) => {
      if (this.by === "day") return b.localeCompare(a);
      const difference = weight(other).map((value, index) => value - weight(one)[index]).find(Boolean);
      return difference ?? a.localeCompare(b);
    });
    text($("use-name"), NAMES[this.by]);
    $("use-rows").replaceChildren(...sums.map(([name, sum]) => line(this.by, name, sum)));
  }
}
