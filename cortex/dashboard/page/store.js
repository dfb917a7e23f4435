// The state from the gateway: a tree, patched as in RFC 7386, and its index by model.

export function merge(target, patch) {
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete target[key];
    else if (typeof value === "object" && !Array.isArray(value)) {
      if (typeof target[key] !== "object" || target[key] === null || Array.isArray(target[key])) target[key] = {};
      merge(target[key], value);
    } else target[key] = value;
  }
  return target;
}

export class Store {
  constructor() {
    this.state = { nodes: {}, models: {} };
    this.placements = new Map();
  }

  // Replace the whole state.
  replace(state) {
    this.state = state;
    this.index();
  }

  // Apply a patch; returns the names of the nodes and models to be drawn again, and whether any appeared or disappeared.
  patch(patch) {
    const before = this.placements;
    merge(this.state, patch);
    const nodes = Object.keys(patch.nodes ?? {});
    const models = new Set(Object.keys(patch.models ?? {}));
    if (patch.nodes || patch.models) {
      this.index();
      for (const [model, placed] of this.placements) {
        if (nodes.some((node) => placed.has(node) || before.get(model)?.has(node))) models.add(model);
      }
      for (const model of before.keys()) if (!this.placements.has(model)) models.add(model);
    }
    return { nodes, models: [...models] };
  }

  // Models that are offered or listed, in order of name.
  models() {
    return [...new Set([...Object.keys(this.state.models), ...this.placements.keys()])].sort(byName);
  }

  nodes() { return Object.keys(this.state.nodes).sort(byName); }

  // The nodes on which a model is more than available: a map from node to status.
  placed(model) { return this.placements.get(model) ?? new Map(); }

  index() {
    const found = new Map();
    for (const [name, node] of Object.entries(this.state.nodes)) {
      for (const [model, status] of Object.entries(node.models ?? {})) {
        if (!found.has(model)) found.set(model, new Map());
        found.get(model).set(name, status);
      }
    }
    this.placements = found;
  }
}

const collator = new Intl.Collator("en", { numeric: true });
export const byName = (a, b) => collator.compare(a, b);
