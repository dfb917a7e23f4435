// The page: the feed fills the store, the store's changes are drawn, keys and buttons are bound.

import { toast } from "./acts.js";
import { AddModel } from "./add.js";
import { Captures } from "./capture.js";
import { Chat } from "./chat.js";
import { $, shown, text } from "./dom.js";
import { Feed } from "./feed.js";
import { clock } from "./format.js";
import { Logs } from "./logs.js";
import { Models, summary } from "./models.js";
import { Nodes } from "./nodes.js";
import { Overview } from "./overview.js";
import { Requests } from "./requests.js";
import { ClientKeys } from "./keys.js";
import { key, setKey } from "./session.js";
import { Store } from "./store.js";
import { Use } from "./use.js";

const HISTORY = 300;
const store = new Store();
const overview = new Overview($("overview"));
const models = new Models(store);
const nodes = new Nodes(store);
const logs = new Logs();
const requests = new Requests(store, logs);
const captures = new Captures(requests);
const chat = new Chat();
const clientKeys = new ClientKeys();
const use = new Use();
new AddModel();
let build = "";

// Measurements of the last updates, for tests and for the console.
const timings = [];
window.cortexTimings = timings;

function measured(draw) {
  const began = performance.now();
  draw();
  timings.push(performance.now() - began);
  if (timings.length > 600) timings.shift();
}

function notice(message, action) {
  const element = $("notice");
  shown(element, Boolean(message));
  if (element.lastNotice === message) return;
  element.lastNotice = message;
  element.replaceChildren(message);
  if (action) element.append(" ", action);
}

function tellNotice() {
  if (stale) {
    const reload = document.createElement("button");
    reload.type = "button";
    reload.textContent = "Reload";
    reload.addEventListener("click", () => location.reload());
    notice("The gateway has another version of this page.", reload);
  } else {
    const { config_error: error, capture } = store.state;
    const captured = capture?.until ? `Requests of ${capture.key ? `the key ${capture.key}` : "everybody"} are captured until ${clock(capture.until)}.` : "";
    notice(error ? `The configuration was changed and is not in force: ${error}` : captured);
  }
}

let stale = false;
const feed = new Feed({
  state(name, detail) {
    const words = { connecting: "Connecting", live: "Live", lost: "Reconnecting", refused: "Signed out" };
    $("link").dataset.state = name;
    text($("link-text"), words[name]);
    $("link").title = detail;
    $("fleet").classList.toggle("stale", name === "lost");
    shown($("locked"), name === "refused");
    shown($("fleet"), name !== "refused");
    document.body.classList.toggle("guest", name === "refused");
    if (name === "refused") forget(detail);
  },
  whole(data) {
    measured(() => {
      stale = build !== "" && build !== data.build;
      build ||= data.build;
      document.title = `cortex ${data.version}`;
      store.replace(data.state);
      overview.begin(data.series, data.points, HISTORY);
      models.update();
      nodes.update();
      requests.replace(data.requests);
      logs.replace(data.log);
      clientKeys.watch(true);
      use.watch(true);
      captures.watch(true);
      talkables();
      tellNotice();
    });
  },
  tick(data) {
    measured(() => {
      overview.add(data.point);
      if (data.patch) {
        const changed = store.patch(data.patch);
        if (changed.models.length) { models.update(changed.models); talkables(); }
        if (changed.nodes.length) nodes.update(changed.nodes);
        if ("config_error" in data.patch || "capture" in data.patch) tellNotice();
        if ("capture" in data.patch) captures.follow();
      }
      if (data.requests) requests.add(data.requests);
      if (data.log) logs.add(data.log);
    });
  },
});

// Without the permission to see the fleet, the page shows nothing of it.
function forget(why) {
  text($("locked-text"), why);
  store.replace({ nodes: {}, models: {} });
  models.update();
  nodes.update();
  requests.replace([]);
  logs.replace([]);
  clientKeys.watch(false);
  use.watch(false);
  captures.watch(false);
  overview.clear();
  talked = "";
  chat.refresh();
}

// The list of models is fetched again when models appear, disappear or become ready; not at every update.
let talked = "";
let due = null;
function talkables() {
  const key = store.models().map((id) => `${id}/${summary(store.placed(id)).state === "ready"}`).join();
  if (key === talked) return;
  talked = key;
  due ??= setTimeout(() => { due = null; chat.refresh(); }, 1000);
}

function showSign() { text($("sign"), key() ? "Sign out" : "Sign in"); }

function signIn() {
  $("key").value = "";
  $("key-dialog").returnValue = "no";
  $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", (event) => {
  // Enter in the field confirms, though Cancel comes first.
  if (event.submitter?.value === "no" && document.activeElement === $("key")) { event.preventDefault(); $("key-dialog").close("yes"); }
});
$("key-dialog").addEventListener("close", () => {
  const given = $("key").value.trim();
  $("key").value = "";
  if ($("key-dialog").returnValue !== "yes" || !given) return;
  setKey(given);
  showSign();
  feed.open();
});
$("sign").addEventListener("click", () => {
  if (!key()) { signIn(); return; }
  setKey("");
  showSign();
  chat.clear();
  toast("Signed out.");
  feed.open();
});
$("locked-sign").addEventListener("click", signIn);
$("theme").addEventListener("click", () => window.cortexChoices.nextTheme());
$("help").addEventListener("click", () => $("help-dialog").showModal());
$("keys-on").addEventListener("change", () => window.cortexChoices.setKeys($("keys-on").checked));

$("filter").addEventListener("input", () => {
  models.filter = nodes.filter = $("filter").value.trim().toLowerCase();
  models.sift();
  nodes.sift();
});
for (const radio of document.querySelectorAll("input[name=which]")) {
  radio.addEventListener("change", () => { nodes.which = radio.value; nodes.sift(); });
}
for (const radio of document.querySelectorAll("input[name=ended]")) {
  radio.addEventListener("change", () => { requests.which = radio.value; requests.sift(); });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const field = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (chat.abort) chat.stop();
    else field?.blur();
    return;
  }
  if ((field && !["radio", "checkbox"].includes(field.type)) || !window.cortexChoices.keys) return;
  const does = {
    "/": () => $("filter").focus(),
    c: () => { $("chat-text").focus(); $("chat").scrollIntoView({ block: "nearest" }); },
    p: () => chat.expand(),
    t: () => window.cortexChoices.nextTheme(),
    "?": () => $("help-dialog").showModal(),
  }[event.key];
  if (does) { event.preventDefault(); does(); }
});

// A link of `cortex dashboard` has the key behind its #, which no browser sends anywhere; it is not kept in the address.
function takeKey() {
  const given = /^#key=([\w-]+)$/.exec(location.hash);
  if (!given) return false;
  history.replaceState(null, "", location.pathname + location.search);
  setKey(given[1]);
  return true;
}
addEventListener("hashchange", () => { if (takeKey()) { showSign(); feed.open(); } });

takeKey();
window.cortexChoices.showTheme();
$("keys-on").checked = window.cortexChoices.keys;
showSign();
feed.open();
