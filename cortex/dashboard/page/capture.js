// The capture of one key's requests: begun and ended here, listed, shown whole, and sent again to any model.

import { act, confirm } from "./acts.js";
import { dialects } from "./dialects.js";
import { $, h, shown, text } from "./dom.js";
import { sseEvents } from "./events.js";
import { curlOf } from "./export.js";
import { bytes, clock, plural, seconds } from "./format.js";
import { ask, complaint } from "./session.js";

const INTERVAL_MS = 3000;
const MIB = 1 << 20;

function pretty(given) {
  try { return JSON.stringify(JSON.parse(given), null, 2); } catch { return given; }
}

// What a model wrote in an answer: of its events by its dialect, or of a reply as it is.
function written(path, data, isStream) {
  const dialect = dialects.find((one) => `/${one.path}` === path);
  if (!dialect || !isStream) return pretty(data);
  let found = "";
  const ignore = () => {};
  const on = {
    text: (delta) => { found += delta; }, reasoning: ignore, argument: (_, delta) => { found += delta; },
    call: (_, name) => { found += `${found ? "\n" : ""}${name} `; }, usage: ignore, finish: ignore,
    fail: (message) => { found += `\n${message}`; },
  };
  for (const block of data.split("\n\n")) {
    const line = block.split("\n").find((one) => one.startsWith("data:"));
    if (line) dialect.read({ data: line.slice(5).trim() }, on);
  }
  return found;
}

export class Captures {
  constructor(requests) {
    this.requests = requests;
    this.timer = null;
    this.listed = [];
    $("capture-form").addEventListener("submit", (event) => { event.preventDefault(); this.begin(); });
    $("capture-end").addEventListener("click", () => this.change($("capture-end"), "capture/end", {}, "Ending the capture …", "Nothing more is captured.", "POST"));
    $("capture-remove").addEventListener("click", () => this.change($("capture-remove"), "capture", null, "Removing …", "The captured requests are removed.", "DELETE"));
    $("request-replay").addEventListener("click", () => this.replay());
    $("request-dialog").addEventListener("close", () => this.abort?.abort());
    $("capture-key").addEventListener("focus", () => this.look());
    requests.onShow = (id) => this.show(id);
  }

  // Begin to look, or stop and forget.
  watch(is) {
    clearInterval(this.timer);
    this.timer = is ? setInterval(() => { if (!document.hidden && this.state) this.look(); }, INTERVAL_MS) : null;
    if (is) { this.look(); return; }
    this.draw({ capture: null, size_bytes: 0, requests: [] });
    this.offer([], false);
    this.requests.forget();
    for (const place of $("request-captured").querySelectorAll("pre")) text(place, "");
  }

  // Follow the feed, which says when a capture begins or ends.
  follow() { if (this.timer !== null) this.look(); }

  // The names of the keys that can be captured; without keys, the requests of everybody.
  offer(keys, isOpen) {
    const names = [...(isOpen ? [["", "everybody: there are no keys"]] : []), ...keys.map(({ name }) => [name, name]), ["local", "local: the operator’s token"]];
    const listing = JSON.stringify(names);
    if (listing === this.names) return;
    this.names = listing;
    $("capture-key").replaceChildren(...names.map(([value, label]) => h("option", { value }, label)));
  }

  async look() {
    try {
      const [reply, keys] = await Promise.all([ask("admin/capture"), ask("admin/keys")]);
      if (!reply.ok || !keys.ok || this.timer === null) return;
      const { keys: rows, required } = await keys.json();
      this.offer(rows, !required);
      this.draw(await reply.json());
    } catch { /* the feed says why */ }
  }

  draw({ capture, size_bytes: size, requests }) {
    this.state = capture;
    const isOn = capture !== null && !capture.ended;
    text($("capture-count"), capture ? `${plural(requests.length, "request")}, ${bytes(size)} of ${bytes(capture.max_bytes)}` : "");
    const whose = capture?.key ? `the key ${capture.key}` : "everybody";
    text($("capture-told"), !capture ? "" : isOn ? `Requests of ${whose} are captured until ${clock(capture.until)}.` : `Requests of ${whose} were captured; it ended: ${capture.ended}.`);
    shown($("capture-form"), !isOn);
    shown($("capture-end"), isOn);
    shown($("capture-remove"), capture !== null);
    shown($("capture-list"), requests.length > 0);
    const drawn = JSON.stringify(requests);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.listed = requests;
    $("capture-rows").replaceChildren(...[...requests].reverse().map((one) => h(
      "tr", {},
      h("td", {}, h("button.link", { type: "button", "aria-label": `${clock(one.at)}: captured request`, onclick: () => this.requests.show({ id: one.id, at: one.at }) }, clock(one.at))),
      h("td", {}, String(one.status || "–")), h("td", {}, one.model || "–"), h("td.wide", {}, `${one.method} ${one.path}`),
      h("td.number", {}, seconds(one.ended_s)), h("td.wide", {}, one.is_cut ? "cut" : ""),
    )));
  }

  async begin() {
    const key = $("capture-key").value;
    const minutes = Number($("capture-minutes").value);
    const body = { key, seconds: 60 * minutes, max_bytes: Math.round(MIB * Number($("capture-size").value)) };
    const whose = key ? `the key ${key}` : "everybody";
    const what = `Prompts and answers of ${whose} are kept whole for ${plural(minutes, "minute")}, where every administrator can read them. Those captured before are removed. The log says that you began it.`;
    if (!(await confirm(`Capture ${whose}?`, what, "Capture"))) return;
    await this.change($("capture-begin"), "capture", body, "Beginning the capture …", `Requests of ${whose} are captured.`, "POST");
  }

  async change(button, path, body, doing, done, method) {
    await act(button, path, body, doing, done, method);
    await this.look();
  }

  // Fill the dialog of a request with what was captured of it.
  async show(id) {
    shown($("request-captured"), false);
    text($("request-again"), "");
    this.shown = null;
    if (!this.listed.some((one) => one.id === id)) return;
    const reply = await ask(`admin/capture/${encodeURIComponent(id)}`);
    if (!reply.ok || this.requests.shown.id !== id) return;
    const one = (this.shown = await reply.json());
    const isStream = (one.answer_headers["content-type"] ?? "text/event-stream").startsWith("text/event-stream");
    const answer = one.answer.map(([, piece]) => piece).join("");
    if (Object.keys(one.record).length) this.requests.fill({ at: one.at, ...one.record });
    text($("request-headers"), Object.entries(one.headers).map(([name, value]) => `${name}: ${value}`).join("\n"));
    text($("request-body"), pretty(one.body));
    text($("request-answer"), written(one.path, answer, isStream));
    text($("request-events"), one.answer.map(([at, piece]) => `${at.toFixed(3)} s  ${piece.trim()}`).join("\n"));
    text($("request-curl"), curlOf(one.path, one.body, new URL(".", location.href).href.replace(/\/$/, "")));
    const models = [...$("chat-model").options].map(({ value }) => value);
    const asked = this.model();
    $("request-model").replaceChildren(...[asked, ...models.filter((model) => model !== asked)].map((model) => h("option", {}, model)));
    shown($("request-replay-acts"), one.method === "POST" && asked !== "" && !one.is_cut);
    shown($("request-captured"), true);
  }

  model() {
    try { return JSON.parse(this.shown.body).model ?? ""; } catch { return ""; }
  }

  // Send the captured request again, with the key of this tab.
  async replay() {
    const { path, body, headers } = this.shown;
    const abort = (this.abort = new AbortController());
    const told = $("request-again");
    const sent = JSON.stringify({ ...JSON.parse(body), model: $("request-model").value });
    text(told, "Waiting …");
    const version = headers["anthropic-version"];
    try {
      const reply = await ask(path.slice(1), {
        method: "POST", body: sent, signal: abort.signal,
        headers: { "content-type": "application/json", ...(version && { "anthropic-version": version }) },
      });
      if (!reply.ok) { text(told, await complaint(reply)); return; }
      if (!reply.headers.get("content-type").startsWith("text/event-stream")) { text(told, pretty(await reply.text())); return; }
      let data = "";
      for await (const event of sseEvents(reply)) {
        data += `data: ${event.data}\n\n`;
        text(told, written(path, data, true) || "Waiting …");
      }
    } catch { if (!abort.signal.aborted) text(told, "The gateway does not answer."); }
  }
}
