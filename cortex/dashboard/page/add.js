// The dialog that adds a model: what it would take and where, asked of the fleet before anything changes.

import { load, toast } from "./acts.js";
import { $, h, shown, text } from "./dom.js";
import { bytes, count } from "./format.js";
import { ask, post } from "./session.js";

function chosen({ profile, offered, node, weights }) {
  if (offered) return `${profile.id} is in the catalogue already, from ${profile.source}.`;
  if (!weights) return `${profile.id} on ${node}, from ${profile.source}. Its size is known once it is downloaded.`;
  return `${profile.id} on ${node} (${weights.devices.join(", ")}): ${weights.choice}, ${bytes(weights.size_bytes)} to download, `
    + `${bytes(weights.required_bytes)} of memory on each device with a context of ${count(weights.context_tokens)} tokens`
    + `${weights.evicts ? ". Idle models are evicted for it" : ""}.`;
}

export class AddModel {
  constructor() {
    this.report = null;
    this.dialog = $("add-dialog");
    $("models-add").addEventListener("click", () => this.open());
    $("add-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.report) this.add(); else this.look();
    });
    $("add-no").addEventListener("click", () => this.dialog.close());
    for (const id of ["add-name", "add-context"]) $(id).addEventListener("input", () => this.show(null));
  }

  async open() {
    this.show(null);
    this.dialog.showModal();
    $("add-name").focus();
    if ($("add-known").children.length) return;
    try {
      const reply = await ask("admin/models/known");
      if (!reply.ok) return; // the names are suggestions only
      const { models } = await reply.json();
      $("add-known").append(...models.map(({ name, title }) => h("option", { value: name }, title)));
    } catch { /* likewise */ }
  }

  // Show what the fleet has answered, or a complaint; with neither, the next step is to ask it.
  show(report, failure = "") {
    this.report = report;
    const passed = report?.passed_over ?? [];
    text($("add-result"), failure || (report ? chosen(report) : ""));
    $("add-result").classList.toggle("fault", Boolean(failure));
    shown($("add-passed"), passed.length > 0);
    $("add-passed-rows").replaceChildren(...passed.map(({ node, choice, reason }) => h("li", {}, `${node}: ${choice ? `${choice}: ` : ""}${reason}`)));
    text($("add-yes"), report?.offered ? "Load" : report ? "Add and load" : "Look");
  }

  async busily(does) {
    $("add-yes").disabled = true;
    try { await does(); } catch (error) {
      this.show(null, error instanceof TypeError ? "The gateway does not answer." : error.message);
    } finally { $("add-yes").disabled = false; }
  }

  async look() {
    const model = $("add-name").value.trim();
    if (!model) return;
    text($("add-result"), "Asking every node …");
    await this.busily(async () => {
      this.show(await post("models/fit", { model, context_tokens: Number($("add-context").value) || 0 }));
    });
  }

  async add() {
    const { profile, offered, node } = this.report;
    await this.busily(async () => {
      if (!offered) {
        await post("models", profile);
        toast(`${profile.id} is in the catalogue.`);
      }
      this.dialog.close();
      $("add-name").value = "";
      load($("models-add"), profile.id, node);
    });
  }
}
