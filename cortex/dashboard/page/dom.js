// Elements without markup in strings, so that text of models and nodes is never parsed.

export const $ = (id) => document.getElementById(id);

// h("td.number", {title: "…"}, "text", element, …)
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// The setters touch the document only where something has changed: reading a property back is cheap, layout is not.
export function text(element, value) {
  if (element.lastText !== value) { element.lastText = value; element.textContent = value; }
}

export function attribute(element, name, value) {
  if (value === null || value === undefined || value === false) { if (element.hasAttribute(name)) element.removeAttribute(name); }
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function shown(element, is) {
  if (element.hidden === is) element.hidden = !is;
}

// Copy a field, and say so on the button. Without TLS a browser gives a page no clipboard: the text is selected then.
export async function copyField(field, button) {
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    text(button, "Copied");
  } catch { text(button, "Selected: press Ctrl+C"); }
}

// A width or a place in percent; by the object model, which a policy without inline styles allows.
export function style(element, name, value) {
  if (element.style.getPropertyValue(name) !== value) element.style.setProperty(name, value);
}

// Elements by key, in order, each made once and kept. `make(key)` returns {element, update(value)}.
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.views = new Map();
  }

  get(key) { return this.views.get(key); }

  // Insert the elements of new keys and remove those of missing keys; the others are not moved.
  keep(keys) {
    const wanted = new Set(keys);
    for (const [key, view] of this.views) {
      if (!wanted.has(key)) { view.element.remove(); this.views.delete(key); }
    }
    let after = null;
    for (const key of keys) {
      let view = this.views.get(key);
      if (!view) { view = this.make(key); this.views.set(key, view); }
      const next = after ? after.nextElementSibling : this.parent.firstElementChild;
      if (next !== view.element) this.parent.insertBefore(view.element, next);
      after = view.element;
    }
  }
}
