// The actions of an administrator, with a confirmation where they affect running requests, and their results.

import { $, h } from "./dom.js";
import { ask, complaint } from "./session.js";

const TOAST_MS = 6000;
const ERROR_MS = 15000;

export function toast(message, kind = "good") {
  const element = h(`p.toast.${kind}`, {}, message, h("button.quiet", { type: "button", "aria-label": "Dismiss", onclick: () => element.remove() }, "×"));
  $("toasts").append(element);
  while ($("toasts").children.length > 4) $("toasts").firstElementChild.remove();
  setTimeout(() => element.remove(), kind === "bad" ? ERROR_MS : TOAST_MS);
}

export function confirm(title, body, yes) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = body;
  $("ask-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// Send an action; its button is busy until it is done. The feed then shows the result.
export async function act(button, path, body, doing, done, method = "POST") {
  button.setAttribute("aria-busy", "true");
  button.setAttribute("aria-disabled", "true");
  toast(doing, "busy");
  try {
    const reply = await ask(`admin/${path}`, {
      method, headers: { "content-type": "application/json" }, ...(body && { body: JSON.stringify(body) }),
    });
    if (reply.ok) toast(done, "good");
    else toast(await complaint(reply), "bad");
  } catch {
    toast("The gateway does not answer.", "bad");
  } finally {
    button.removeAttribute("aria-busy");
    button.removeAttribute("aria-disabled");
  }
}

// A button that runs one action at a time.
export function button(label, does, attributes = {}) {
  const element = h("button.act", { type: "button", ...attributes }, label);
  element.addEventListener("click", () => { if (element.getAttribute("aria-disabled") !== "true") does(element); });
  return element;
}

export function load(button, model, node) {
  const where = node ? ` on ${node}` : "";
  return act(button, "models/load", { model, node }, `Loading ${model}${where} …`, `${model} is ready${where}.`);
}

export async function unload(button, model, nodes, node) {
  const where = node || nodes.join(", ");
  if (!(await confirm(`Unload ${model}?`, `From ${where}. Requests that run there have 30 seconds to finish.`, "Unload"))) return;
  await act(button, "models/unload", { model, node }, `Unloading ${model} …`, `${model} is gone from ${where}.`);
}

export async function remove(button, model) {
  if (!(await confirm(`Remove ${model}?`, "It is unloaded and no longer offered. Its files stay on the nodes.", "Remove"))) return;
  await act(button, `models/${encodeURIComponent(model)}`, null, `Removing ${model} …`, `${model} is removed.`, "DELETE");
}

export async function revoke(button, name) {
  const what = "It is refused from now on, for good. Answers that have begun are finished.";
  if (!(await confirm(`Revoke the key ${name}?`, what, "Revoke"))) return;
  await act(button, `keys/${encodeURIComponent(name)}`, null, `Revoking ${name} …`, `${name} is revoked.`, "DELETE");
}

export function pin(button, model, node, pinned) {
  const done = pinned ? `${model} stays on ${node}.` : `${model} may be evicted from ${node} again.`;
  return act(button, "models/pin", { model, node, pinned }, `${pinned ? "Pinning" : "Unpinning"} ${model} …`, done);
}

export async function drain(button, node, draining) {
  const sure = !draining || (await confirm(`Drain ${node}?`, "It takes nothing new. What runs there goes on.", "Drain"));
  if (!sure) return;
  const done = draining ? `${node} takes nothing new.` : `${node} is open again.`;
  await act(button, "nodes/drain", { node, draining }, `${draining ? "Draining" : "Opening"} ${node} …`, done);
}
