// The table of models: a row for each model that clients may use, and under it its nodes, when it is opened.

import { button, load, pin, remove, unload } from "./acts.js";
import { $, attribute, h, Keyed, shown, style, text } from "./dom.js";
import { bytes, clock, count, plural } from "./format.js";
import { byName } from "./store.js";

const BEST_FIRST = ["ready", "loading", "recovering", "draining", "failed"];
const CHIPS = 4;

export function pill() { return h("span.pill", {}); }

export function setPill(element, state, label = state) {
  attribute(element, "data-state", state);
  text(element, label);
}

// A model's state over all its nodes: the best state, and the progress of the furthest load.
export function summary(placed) {
  const states = [...placed.values()];
  const state = BEST_FIRST.find((name) => states.some((status) => status.state === name)) ?? "available";
  const loading = states.filter((status) => status.state === "loading" || status.state === "recovering");
  const progress = loading.length ? Math.max(...loading.map((status) => status.progress ?? 0)) : null;
  return { state, progress };
}

const total = (placed, of) => [...placed.values()].reduce((sum, status) => sum + (of(status) ?? 0), 0);
const memory = (status) => (status.weights ?? 0) + (status.cache ?? 0);

class Placement {
  constructor(model, node) {
    this.pill = pill();
    this.devices = h("td.wide");
    this.memory = h("td.number.wide");
    this.running = h("td.number");
    this.used = h("td.wide");
    this.pinned = false;
    this.pin = button("Pin", (self) => pin(self, model, node, !this.pinned), { "aria-label": `Pin ${model} on ${node}` });
    const gone = button("Unload", (self) => unload(self, model, [node], node), { "aria-label": `Unload ${model} from ${node}` });
    this.meter = h("span.meter", { "aria-hidden": "true" }, h("span"));
    this.error = h("span.fault");
    this.element = h(
      "tr", { "data-node": node }, h("th", { scope: "row" }, node), h("td", {}, this.pill, this.meter, this.error),
      this.devices, this.memory, this.running, this.used, h("td.acts", {}, this.pin, gone),
    );
  }

  update(status) {
    const far = status.state === "loading" || status.state === "recovering";
    setPill(this.pill, status.state, far ? `${status.state} ${Math.round(100 * (status.progress ?? 0))} %` : status.state);
    shown(this.meter, far);
    style(this.meter.firstElementChild, "width", `${100 * (status.progress ?? 0)}%`);
    text(this.error, status.error ?? "");
    text(this.devices, (status.devices ?? []).join(", "));
    text(this.memory, memory(status) ? bytes(memory(status)) : "");
    text(this.running, count(status.running ?? 0));
    text(this.used, status.used_at ? `used ${clock(status.used_at)}` : "");
    this.pinned = Boolean(status.pinned);
    text(this.pin, this.pinned ? "Unpin" : "Pin");
    attribute(this.pin, "aria-pressed", this.pinned);
  }
}

class Model {
  constructor(id, store) {
    this.id = id;
    this.store = store;
    const place = `places-${Model.next++}`;
    this.pill = pill();
    this.meter = h("span.meter", { role: "progressbar", "aria-label": `Load of ${id}`, "aria-valuemin": 0, "aria-valuemax": 100 }, h("span"));
    this.also = h("span.also");
    this.where = h("td.wide");
    this.context = h("td.number.wide");
    this.memory = h("td.number.wide");
    this.running = h("td.number.wide");
    this.load = button("Load", (self) => load(self, id, ""), { "aria-label": `Load ${id}` });
    this.unload = button("Unload", (self) => unload(self, id, [...this.store.placed(id).keys()].sort(byName), ""), { "aria-label": `Unload ${id}` });
    this.toggle = h("button.name", { type: "button", "aria-expanded": "false", "aria-controls": place, onclick: () => this.open(!this.opened) }, id);
    this.row = h(
      "tr.model", { "data-model": id },
      h("th", { scope: "row" }, this.toggle, this.also),
      h("td", {}, this.pill, this.meter),
      this.where, this.context, this.memory, this.running, h("td.acts", {}, this.load, this.unload),
    );
    this.select = h("select", { "aria-label": `Where to load ${id}` });
    const there = button("Load there", (self) => load(self, id, this.select.value), { "aria-label": `Load there: ${id}` });
    this.source = h("span.source");
    this.remove = button("Remove", (self) => remove(self, id), { "aria-label": `Remove ${id}` });
    this.rows = h("tbody");
    this.places = new Keyed(this.rows, (node) => new Placement(id, node));
    this.table = h("table.places", { "aria-label": `Where ${id} is` }, this.rows);
    this.detail = h(
      "tr.detail", { id: place },
      h("td", { colspan: 7 }, this.table, h("p.more", {}, h("label", {}, "Load on ", this.select), there, this.remove, this.source)),
    );
    this.detail.hidden = true;
    this.opened = false;
  }

  open(is) {
    this.opened = is;
    this.detail.hidden = !is;
    this.toggle.setAttribute("aria-expanded", String(is));
    if (is) this.update();
  }

  update() {
    const model = this.store.state.models[this.id] ?? {};
    const placed = this.store.placed(this.id);
    const { state, progress } = summary(placed);
    setPill(this.pill, state, progress === null || state === "ready" ? state : `${state} ${Math.round(100 * progress)} %`);
    shown(this.meter, progress !== null);
    if (progress !== null) {
      style(this.meter.firstElementChild, "width", `${100 * progress}%`);
      attribute(this.meter, "aria-valuenow", Math.round(100 * progress));
    }
    text(this.also, (model.aliases ?? []).join(", "));
    this.chips(placed);
    const context = Math.max(0, ...[...placed.values()].map((status) => status.context ?? 0));
    text(this.context, context ? count(context) : "");
    const held = total(placed, memory);
    text(this.memory, held ? bytes(held) : "");
    text(this.running, placed.size ? count(total(placed, (status) => status.running)) : "");
    const active = [...placed.values()].some((status) => status.state !== "failed");
    shown(this.load, !active);
    shown(this.unload, active);
    if (this.opened) this.updateDetail(model, placed);
  }

  chips(placed) {
    const names = [...placed.keys()].sort(byName);
    const key = names.map((name) => `${name}/${placed.get(name).state}/${placed.get(name).pinned ? 1 : 0}`).join();
    if (key === this.chipKey) return;
    this.chipKey = key;
    this.where.replaceChildren(
      ...names.slice(0, CHIPS).map((name) => {
        const status = placed.get(name);
        return h("span.chip", { "data-state": status.state, title: `${status.state}${status.pinned ? ", pinned" : ""}` }, name, status.pinned ? h("span.pinned", {}, " pinned") : "");
      }),
      ...(names.length > CHIPS ? [h("span.chip.rest", {}, `+${names.length - CHIPS}`)] : []),
    );
  }

  updateDetail(model, placed) {
    const names = [...placed.keys()].sort(byName);
    this.places.keep(names);
    for (const name of names) this.places.get(name).update(placed.get(name));
    shown(this.table, names.length > 0);
    shown(this.remove, Boolean(model.added));
    text(this.source, model.source ? `from ${model.source}` : "");
    const nodes = this.store.nodes().filter((name) => this.store.state.nodes[name].state === "ready" && !placed.has(name));
    const key = nodes.join();
    if (key !== this.nodeKey) {
      this.nodeKey = key;
      const chosen = this.select.value;
      this.select.replaceChildren(h("option", { value: "" }, "the best node"), ...nodes.map((name) => h("option", { value: name }, name)));
      if (nodes.includes(chosen)) this.select.value = chosen;
    }
  }
}
Model.next = 1;

export class Models {
  constructor(store) {
    this.store = store;
    this.filter = "";
    this.views = new Map();
    this.body = $("models-rows");
  }

  // Draw these models again, or all.
  update(ids = null) {
    const all = this.store.models();
    const known = all.length === this.views.size && all.every((id) => this.views.has(id));
    if (!known) this.arrange(all);
    for (const id of ids ?? all) this.views.get(id)?.update();
    const ready = all.filter((id) => summary(this.store.placed(id)).state === "ready").length;
    text($("models-count"), `${ready} of ${plural(all.length, "model")} ready`);
    this.sift();
  }

  arrange(all) {
    for (const [id, view] of this.views) {
      if (!all.includes(id)) { view.row.remove(); view.detail.remove(); this.views.delete(id); }
    }
    let after = null;
    for (const id of all) {
      let view = this.views.get(id);
      if (!view) { view = new Model(id, this.store); this.views.set(id, view); }
      const next = after ? after.nextElementSibling : this.body.firstElementChild;
      if (next !== view.row) this.body.insertBefore(view.row, next);
      if (view.row.nextElementSibling !== view.detail) view.row.after(view.detail);
      after = view.detail;
    }
  }

  sift() {
    let number = 0;
    for (const [id, view] of this.views) {
      const fits = !this.filter || id.toLowerCase().includes(this.filter) || [...this.store.placed(id).keys()].some((name) => name.toLowerCase().includes(this.filter));
      shown(view.row, fits);
      shown(view.detail, fits && view.opened);
      number += fits ? 1 : 0;
    }
    shown($("models-empty"), number === 0);
  }
}
