// The keys of clients: what each may do and has used; a new key, which is shown once; the end of a key.

import { button, revoke } from "./acts.js";
import { $, copyField, h, shown, text } from "./dom.js";
import { ago, count, plural } from "./format.js";
import { Polled } from "./polled.js";
import { post } from "./session.js";

const DAY_MS = 24 * 3600e3;
const LIMITS = ["requests_per_minute", "max_concurrent", "tokens_per_window", "balance_tokens"];

// Use of a limit; a dash where there is none.
const of = (used, limit) => (limit ? `${count(used ?? 0)} / ${count(limit)}` : "–");

function about({ admin, expires_s }) {
  const parts = admin ? ["administrator"] : [];
  const date = new Date(expires_s * 1000).toLocaleDateString();
  if (expires_s) parts.push(expires_s * 1000 > Date.now() ? `until ${date}` : `expired on ${date}`);
  return parts.length ? h("span.also", {}, parts.join(", ")) : "";
}

export class ClientKeys extends Polled {
  constructor() {
    super(5000);
    this.dialog = $("new-key-dialog");
    $("new-key").addEventListener("click", () => this.open());
    $("new-key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.make();
    });
    $("new-key-no").addEventListener("click", () => this.dialog.close());
    $("made-key-copy").addEventListener("click", () => copyField($("made-key"), $("made-key-copy")));
    // The key is in this field, and gone with it.
    $("made-key-dialog").addEventListener("close", () => { $("made-key").value = ""; });
  }

  path() { return "admin/keys"; }

  row({ name, models, priority, used, added, created_s, last_used_s, ...rest }) {
    const since = created_s ? `made on ${new Date(created_s * 1000).toLocaleString()}` : null;
    const end = button("Revoke", async (element) => { await revoke(element, name); this.look(); }, { "aria-label": `Revoke ${name}` });
    return h(
      "tr", { "data-key": name },
      h("th", { scope: "row", title: since }, name, about(rest)),
      h("td.wide", {}, models.includes("*") ? "all" : models.join(", ")),
      h("td.number.wide", {}, String(priority)),
      h("td.number.wide", {}, of(used.requests, rest.requests_per_minute)),
      h("td.number.wide", {}, of(used.running, rest.max_concurrent)),
      h("td.number.wide", {}, of(used.tokens, rest.tokens_per_window)),
      h("td.number.wide", {}, of(used.spent_tokens, rest.balance_tokens)),
      h("td.number", {}, last_used_s ? ago(last_used_s) : "never"),
      h("td.acts", {}, added ? end : h("span.note", {}, "configured")),
    );
  }

  show(answer) {
    const keys = answer?.keys ?? [];
    text($("client-keys-count"), keys.length ? plural(keys.length, "key") : "");
    this.required = answer?.required ?? true;
    shown($("client-keys-table"), keys.length > 0);
    shown($("client-keys-empty"), keys.length === 0);
    text($("client-keys-empty"), this.required
      ? "There is no key: every request is refused."
      : "Every client that reaches this gateway may use it. From the first key on, every client needs one.");
    $("client-keys-rows").replaceChildren(...keys.map((key) => this.row(key)));
  }

  open() {
    $("new-key-form").reset();
    text($("new-key-fault"), "");
    shown($("new-key-first"), !this.required);
    this.dialog.showModal();
    $("new-key-name").focus();
  }

  // The body of the request that makes the key; limits that are not given are left out.
  asked() {
    const models = $("new-key-models").value.split(",").map((model) => model.trim()).filter(Boolean);
    const days = Number($("new-key-expires").value);
    const limits = LIMITS.map((name) => [name, Number($(`new-key-${name}`).value)]).filter(([, limit]) => limit > 0);
    return {
      name: $("new-key-name").value.trim(),
      models: models.length ? models : ["*"],
      admin: $("new-key-admin").checked,
      ...(days && { expires_at: new Date(Date.now() + days * DAY_MS).toISOString() }),
      ...Object.fromEntries(limits),
    };
  }

  async make() {
    $("new-key-yes").disabled = true;
    try {
      const { name, key } = await post("keys", this.asked());
      this.dialog.close();
      text($("made-key-title"), `The key of ${name}`);
      $("made-key").value = key;
      text($("made-key-copy"), "Copy");
      $("made-key-dialog").showModal();
      $("made-key").select();
      this.look();
    } catch (error) {
      text($("new-key-fault"), error instanceof TypeError ? "The gateway does not answer." : error.message);
    } finally { $("new-key-yes").disabled = false; }
  }
}
