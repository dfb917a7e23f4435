// The keys of clients: what each may do, and its use of its limits. Fetched now and then, since the feed does not have it.

import { $, h, shown, text } from "./dom.js";
import { count, plural } from "./format.js";
import { ask } from "./session.js";

const INTERVAL_MS = 5000;

// Use of a limit; a dash where there is none.
const of = (used, limit) => (limit ? `${count(used ?? 0)} / ${count(limit)}` : "–");

function row({ name, admin, models, priority, used, ...limits }) {
  return h(
    "tr", { "data-key": name },
    h("th", { scope: "row" }, name, admin ? h("span.also", {}, "administrator") : ""),
    h("td.wide", {}, models.includes("*") ? "all" : models.join(", ")),
    h("td.number.wide", {}, String(priority)),
    h("td.number", {}, of(used.requests, limits.requests_per_minute)),
    h("td.number", {}, of(used.running, limits.max_concurrent)),
    h("td.number", {}, of(used.tokens, limits.tokens_per_window)),
    h("td.number.wide", {}, of(used.spent_tokens, limits.balance_tokens)),
  );
}

export class ClientKeys {
  constructor() {
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.lookAgain());
  }

  // Begin to look at them, or stop and forget them.
  watch(is) {
    clearInterval(this.timer);
    this.timer = is ? setInterval(() => this.lookAgain(), INTERVAL_MS) : null;
    if (is) this.look(); else this.show([]);
  }

  // A gateway without keys is not asked again, nor for a page that nobody sees.
  lookAgain() {
    if (this.timer !== null && !document.hidden && !$("client-keys").hidden) this.look();
  }

  async look() {
    try {
      const reply = await ask("admin/keys");
      if (!reply.ok) return; // the feed says why
      const { keys } = await reply.json();
      if (this.timer !== null) this.show(keys);
    } catch { /* likewise */ }
  }

  show(keys) {
    shown($("client-keys"), keys.length > 0);
    text($("client-keys-count"), plural(keys.length, "key"));
    const drawn = JSON.stringify(keys);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    $("client-keys-rows").replaceChildren(...keys.map(row));
  }
}
