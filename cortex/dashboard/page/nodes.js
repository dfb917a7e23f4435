// The nodes, a card each: state, device memory, running and waiting requests, speed; details when it is opened.

import { button, drain } from "./acts.js";
import { $, attribute, h, Keyed, shown, style, text } from "./dom.js";
import { bytes, count, plural } from "./format.js";
import { pill, setPill } from "./models.js";

const MANY_DEVICES = 2; // more of them are bars side by side and a sum, until the card is opened

export const running = (node) => Object.values(node.models ?? {}).reduce((sum, status) => sum + (status.running ?? 0), 0);
export const waiting = (node) => Object.values(node.devices ?? {}).reduce((sum, device) => sum + (device.waiting ?? 0), 0);

// Whether a node needs attention.
export function isTrouble(node) {
  return (
    node.state !== "ready" ||
    Boolean(node.failed_polls) ||
    Object.values(node.devices ?? {}).some((device) => ["poisoned", "recovering", "stopped"].includes(device.worker)) ||
    Object.values(node.models ?? {}).some((status) => ["failed", "recovering"].includes(status.state))
  );
}

class Device {
  constructor(id) {
    this.name = h("span.device-name", {}, id);
    this.figures = h("span.device-figures");
    this.bar = h("span.bar-fill");
    this.more = h("span.device-more");
    this.element = h("li.device", {}, this.name, h("span.bar-track", { "aria-hidden": "true" }, this.bar), this.figures, this.more);
  }

  update(device) {
    const used = device.total - (device.free ?? 0);
    style(this.bar, "width", `${device.total ? (100 * used) / device.total : 0}%`);
    attribute(this.bar, "data-full", device.total && used / device.total > 0.92);
    text(this.figures, `${bytes(used)} of ${bytes(device.total)}`);
    const worker = device.worker ?? "not used";
    attribute(this.element, "data-worker", worker);
    const parts = [device.name, worker];
    if (device.cores) parts.push(plural(device.cores, "core"));
    if (device.capability) parts.push(`sm ${device.capability}`);
    if (device.restarts) parts.push(plural(device.restarts, "restart"));
    if (device.recycles) parts.push(plural(device.recycles, "recycle"));
    if (device.fault) parts.push(device.fault);
    text(this.more, parts.join(" · "));
  }
}

class Node {
  constructor(name) {
    const more = `node-${Node.next++}`;
    this.pill = pill();
    this.toggle = h("button.name", { type: "button", "aria-expanded": "false", "aria-controls": more, onclick: () => this.open(!this.opened) }, name);
    this.draining = false;
    this.drain = button("Drain", (self) => drain(self, name, !this.draining));
    this.name = name;
    this.list = h("ul.devices");
    this.devices = new Keyed(this.list, (id) => new Device(id));
    this.sum = h("p.sum");
    this.figures = h("p.figures");
    this.running = h("b");
    this.waiting = h("b");
    this.speed = h("b");
    this.figures.append(h("span", {}, this.running, " running"), h("span", {}, this.waiting, " waiting"), h("span", {}, this.speed, " tokens/s"));
    this.fault = h("p.fault");
    this.models = h("p.on-node");
    this.about = h("p.about");
    this.more = h("div.node-more", { id: more }, this.models, this.about);
    this.more.hidden = true;
    this.opened = false;
    this.element = h(
      "article.card", { "data-node": name, "aria-label": `Node ${name}` },
      h("header", {}, h("h3", {}, this.toggle), this.pill, this.drain), this.list, this.sum, this.figures, this.fault, this.more,
    );
  }

  open(is) {
    this.opened = is;
    this.more.hidden = !is;
    this.toggle.setAttribute("aria-expanded", String(is));
    this.element.classList.toggle("open", is);
  }

  update(node) {
    attribute(this.element, "data-state", node.state);
    setPill(this.pill, node.state);
    this.draining = node.state === "draining";
    text(this.drain, this.draining ? "Open" : "Drain");
    attribute(this.drain, "aria-label", `${this.draining ? "Open" : "Drain"} ${this.name}`);
    shown(this.drain, node.state === "ready" || this.draining);
    const devices = node.devices ?? {};
    this.devices.keep(Object.keys(devices));
    for (const [id, device] of Object.entries(devices)) this.devices.get(id).update(device);
    this.addUp(Object.values(devices));
    text(this.running, count(running(node) || node.in_flight || 0));
    text(this.waiting, count(waiting(node)));
    text(this.speed, count(node.tokens_per_s ?? 0));
    const up = node.state !== "down" && node.state !== "unknown";
    shown(this.figures, up);
    shown(this.list, up);
    if (!up) shown(this.sum, false);
    text(this.fault, node.fault ? `${node.fault}${node.failed_polls ? ` (missed ${plural(node.failed_polls, "poll")})` : ""}` : "");
    shown(this.fault, Boolean(node.fault));
    const names = Object.entries(node.models ?? {}).map(([id, status]) => (status.state === "ready" ? id : `${id} (${status.state})`));
    text(this.models, names.length ? names.join(", ") : "No model is loaded here.");
    this.tellAbout(node);
  }

  addUp(devices) {
    const many = devices.length > MANY_DEVICES;
    this.list.classList.toggle("many", many);
    shown(this.sum, many);
    if (!many) return;
    const total = devices.reduce((sum, device) => sum + device.total, 0);
    const free = devices.reduce((sum, device) => sum + (device.free ?? 0), 0);
    text(this.sum, `${bytes(total - free)} of ${bytes(total)} on ${devices.length} devices`);
  }

  tellAbout(node) {
    text(this.about, [node.endpoint, node.hostname, node.version && `version ${node.version}`, node.activating?.length && `activating ${node.activating.join(", ")}`].filter(Boolean).join(" · "));
  }
}
Node.next = 1;

export class Nodes {
  constructor(store) {
    this.store = store;
    this.filter = "";
    this.which = "all";
    this.cards = new Keyed($("nodes-cards"), (name) => new Node(name));
  }

  update(names = null) {
    const all = this.store.nodes();
    if (!names || names.some((name) => Boolean(this.cards.get(name)) !== name in this.store.state.nodes)) this.cards.keep(all);
    for (const name of names ?? all) {
      const node = this.store.state.nodes[name];
      if (node) this.cards.get(name).update(node);
    }
    const counts = new Map();
    for (const name of all) {
      const { state } = this.store.state.nodes[name];
      counts.set(state, (counts.get(state) ?? 0) + 1);
    }
    text($("nodes-count"), [...counts].map(([state, number]) => `${number} ${state}`).join(", "));
    this.sift();
  }

  sift() {
    let number = 0;
    for (const [name, view] of this.cards.views) {
      const node = this.store.state.nodes[name];
      const fits =
        (!this.filter || name.toLowerCase().includes(this.filter) || Object.keys(node.models ?? {}).some((id) => id.toLowerCase().includes(this.filter))) &&
        (this.which === "all" || (this.which === "busy" ? running(node) + waiting(node) > 0 : isTrouble(node)));
      shown(view.element, fits);
      number += fits ? 1 : 0;
    }
    shown($("nodes-empty"), number === 0);
  }
}
