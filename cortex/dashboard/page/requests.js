// The latest requests, newest first, with their usage and outcome, and without their text; one in detail on demand.

import { $, h, shown, text } from "./dom.js";
import { clock, cost, count, dollars, seconds } from "./format.js";
import { setPill, pill } from "./models.js";

const KEPT = 100;
const LEFT = 499;

function kind(status) {
  if (status === LEFT) return "left";
  return status >= 500 ? "error" : status >= 400 ? "refused" : "ok";
}

function row(entry, pricing, open) {
  const price = cost(pricing, { input: entry.tokens_in, cached: entry.tokens_cached ?? 0, output: entry.tokens_out });
  const status = pill();
  setPill(status, kind(entry.status), String(entry.status));
  const generated = entry.ttft_s === undefined ? 0 : entry.total_s - entry.ttft_s;
  const speed = entry.tokens_out > 1 && generated > 0 ? (entry.tokens_out - 1) / generated : null;
  const cached = entry.tokens_cached ? h("span.cached", { title: "of these from the prefix cache" }, ` (${count(entry.tokens_cached)})`) : "";
  return h(
    "tr", { title: entry.id, "data-kind": kind(entry.status) },
    h("td.time", {}, h("button.link", { type: "button", "aria-label": `${clock(entry.at)}: details`, onclick: () => open(entry) }, clock(entry.at))), h("td", {}, status), h("td.model", {}, entry.model || "–"),
    h("td.wide", {}, entry.node || "–"), h("td.wide", {}, entry.dialect.replace(/^(openai|anthropic)-/, "")), h("td.wide.key", {}, entry.key ?? ""), h("td.wide", {}, entry.finish),
    h("td.number.wide", {}, count(entry.tokens_in ?? 0), cached), h("td.number", {}, count(entry.tokens_out ?? 0)),
    h("td.number", {}, seconds(entry.ttft_s)), h("td.number.wide", {}, speed === null ? "–" : count(Math.round(10 * speed) / 10)),
    h("td.number", {}, seconds(entry.total_s)), h("td.number.wide.price", {}, price === null ? "–" : dollars(price)),
  );
}

export class Requests {
  constructor(store, logs) {
    this.store = store;
    this.logs = logs;
    this.open = (entry) => this.show(entry);
    this.body = $("requests-rows");
    this.which = "all";
    this.onShow = () => {};
    $("request-log").addEventListener("click", () => {
      $("request-dialog").close();
      this.logs.show(this.shown.id);
    });
  }

  // Show a request's own fields, as its line in the log has them; `onShow` adds what was captured of it.
  show(entry) {
    this.shown = entry;
    this.fill(entry);
    shown($("request-log"), this.logs.of(entry.id).length > 0);
    this.onShow(entry.id);
    $("request-dialog").showModal();
  }

  // Close the dialog, and leave nothing in it.
  forget() {
    $("request-dialog").close();
    $("request-fields").replaceChildren();
  }

  fill(entry) {
    const fields = { ended: new Date(1000 * entry.at).toLocaleString(), ...entry };
    delete fields.at;
    $("request-fields").replaceChildren(...Object.entries(fields).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
  }

  replace(entries) {
    this.body.replaceChildren();
    this.add(entries);
  }

  add(entries) {
    const fragment = document.createDocumentFragment();
    const { models } = this.store.state;
    for (const entry of entries.slice(-KEPT)) fragment.prepend(row(entry, models[entry.model]?.pricing, this.open));
    $("requests-table").classList.toggle("unpriced", !Object.values(models).some(({ pricing }) => pricing));
    if (entries.some((entry) => entry.key)) $("requests-table").classList.remove("keyless");
    this.body.prepend(fragment);
    while (this.body.children.length > KEPT) this.body.lastElementChild.remove();
    this.sift();
  }

  sift() {
    let number = 0;
    for (const element of this.body.children) {
      const fits = this.which === "all" || ["error", "refused"].includes(element.dataset.kind);
      shown(element, fits);
      number += fits ? 1 : 0;
    }
    text($("requests-count"), number ? `latest ${number}` : "");
    shown($("requests-empty"), number === 0);
    text($("requests-empty"), this.which === "all" ? "No request has ended yet." : "No errors among the latest.");
  }
}
