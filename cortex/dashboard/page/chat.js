// A conversation with a model: text, reasoning and calls as they arrive. Text is never rendered as markup.

import { toast } from "./acts.js";
import { dialects, EXAMPLE_TOOL, readTools } from "./dialects.js";
import { $, h, text } from "./dom.js";
import { sseEvents } from "./events.js";
import { count, seconds } from "./format.js";
import { ask, complaint, key } from "./session.js";
import { byName } from "./store.js";

const NEAR_END_PX = 40;

// One streamed answer. The deltas between two animation frames are drawn once.
class Answer {
  constructor(talk, model) {
    this.talk = talk;
    this.text = "";
    this.thought = "";
    this.calls = new Map();
    this.reasoning = h("pre.reasoning");
    this.thinking = h("details.thinking", {}, h("summary", {}, "Reasoning"), this.reasoning);
    this.thinking.hidden = true;
    this.body = h("pre.text");
    this.list = h("div.calls");
    this.foot = h("p.cost", {}, "Waiting …");
    this.element = h("article.message.assistant", {}, h("h3", {}, model), this.thinking, this.body, this.list, this.foot);
    this.waiting = false;
  }

  take(kind, ...given) {
    if (kind === "text") this.text += given[0];
    else if (kind === "reasoning") this.thought += given[0];
    else if (kind === "call") this.calls.set(given[0], { name: given[1], arguments: "", element: null });
    else if (kind === "argument" && this.calls.has(given[0])) this.calls.get(given[0]).arguments += given[1];
    if (!this.waiting) {
      this.waiting = true;
      // A hidden page gets no animation frames; the answer is written all the same.
      if (document.hidden) setTimeout(() => this.draw(), 200);
      else requestAnimationFrame(() => this.draw());
    }
  }

  // While the model is being loaded, the gateway sends the progress in comments.
  wait(comment) {
    const [, percent] = /^loading .* (\d+)%$/.exec(comment) ?? [];
    if (percent) text(this.foot, `Loading the model, ${percent} % …`);
  }

  draw() {
    this.waiting = false;
    const { talk } = this;
    const follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_END_PX;
    text(this.body, this.text);
    text(this.reasoning, this.thought);
    if (this.thought && this.thinking.hidden) { this.thinking.hidden = false; this.thinking.open = true; }
    for (const call of this.calls.values()) {
      if (!call.element) {
        call.element = h("pre");
        this.list.append(h("div.call", {}, h("p", {}, "Calls ", h("code", {}, call.name)), call.element));
      }
      text(call.element, call.arguments);
    }
    if (follow) talk.scrollTop = talk.scrollHeight;
  }
}

export class Chat {
  constructor() {
    this.messages = [];
    this.abort = null;
    this.talk = $("talk");
    this.empty = this.talk.firstElementChild;
    $("chat-dialect").append(...dialects.map(({ name }, index) => h("option", { value: index }, name)));
    $("chat-form").addEventListener("submit", (event) => { event.preventDefault(); if (this.abort) this.stop(); else this.send(); });
    $("chat-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!this.abort) this.send(); }
    });
    $("chat-clear").addEventListener("click", () => { this.clear(); $("chat-text").focus(); });
    $("chat-example").addEventListener("click", () => { $("chat-tools").value = JSON.stringify(EXAMPLE_TOOL, null, 2); });
  }

  // Fetch the models that the signed-in key may use.
  async refresh() {
    const select = $("chat-model");
    let listed = [];
    try {
      const reply = await ask("v1/models");
      if (reply.ok) listed = (await reply.json()).data;
      else text($("chat-count"), reply.status === 401 && !key() ? "Sign in to chat" : await complaint(reply));
    } catch { return; }
    // A model's capabilities are known once it has been loaded: a model that cannot chat is left out.
    const chats = ({ capabilities }) => !capabilities?.length || capabilities.includes("chat");
    const models = listed.filter((model) => !model.alias_of && chats(model)).sort((a, b) => byName(a.id, b.id));
    const ready = models.filter((model) => model.state === "ready");
    const listing = models.map((model) => `${model.id}/${model.state === "ready"}`).join();
    if (listing === this.listing) return;
    this.listing = listing;
    const chosen = select.value;
    const group = (label, some) => (some.length ? [h("optgroup", { label }, ...some.map(({ id }) => h("option", { value: id }, id)))] : []);
    select.replaceChildren(...group("Ready", ready), ...group("Loaded when asked", models.filter((model) => model.state !== "ready")));
    if (models.some(({ id }) => id === chosen)) select.value = chosen;
    if (listed.length) text($("chat-count"), "");
  }

  clear() {
    this.stop();
    this.messages = [];
    this.talk.replaceChildren(this.empty);
  }

  stop() { this.abort?.abort(); }

  async send() {
    const typed = $("chat-text").value.trim();
    const model = $("chat-model").value;
    if (!typed || !model) { if (!model) toast("There is no model to talk to.", "bad"); return; }
    let tools;
    try { tools = readTools($("chat-tools").value); } catch (error) { toast(error.message, "bad"); return; }
    const temperature = $("chat-temperature").value === "" ? null : Number($("chat-temperature").value);
    const dialect = dialects[Number($("chat-dialect").value)];
    this.messages.push({ role: "user", text: typed });
    const body = dialect.body({
      model, system: $("chat-system").value.trim(), messages: this.messages, limit: Number($("chat-limit").value) || 0, temperature, tools,
    });
    this.empty.remove();
    const answer = new Answer(this.talk, model);
    this.talk.append(h("article.message.user", {}, h("h3", {}, "You"), h("pre.text", {}, typed)), answer.element);
    this.talk.scrollTop = this.talk.scrollHeight;
    $("chat-text").value = "";
    await this.follow(dialect, body, answer);
    if (answer.text) this.messages.push({ role: "assistant", text: answer.text });
    else this.messages.pop(); // a message without an answer would leave two of the user's in a row
  }

  async follow(dialect, body, answer) {
    const abort = (this.abort = new AbortController());
    text($("chat-send"), "Stop");
    const began = performance.now();
    let first = null;
    let usage = null;
    let reason = "";
    let failure = "";
    const note = (kind) => (...given) => { first ??= performance.now(); answer.take(kind, ...given); };
    const on = {
      text: note("text"), reasoning: note("reasoning"), call: note("call"), argument: note("argument"),
      usage: (given) => { usage = given; }, finish: (given) => { reason = given ?? ""; }, fail: (message) => { failure = message; },
    };
    try {
      const reply = await ask(dialect.path, {
        method: "POST", body: JSON.stringify(body), signal: abort.signal,
        headers: { "content-type": "application/json", ...(dialect.path === "v1/messages" && { "anthropic-version": "2023-06-01" }) },
      });
      if (!reply.ok) failure = await complaint(reply);
      else for await (const event of sseEvents(reply, { onComment: (comment) => answer.wait(comment) })) dialect.read(event, on);
      if (!failure && !reason) failure = "The answer broke off.";
    } catch {
      if (abort.signal.aborted) reason = "stopped";
      else failure = "The gateway does not answer.";
    }
    answer.draw();
    this.abort = null;
    text($("chat-send"), "Send");
    this.tell(answer, { began, first, usage, reason, failure });
  }

  // The usage and timing of the answer, under it.
  tell(answer, { began, first, usage, reason, failure }) {
    const now = performance.now();
    const parts = [];
    if (first !== null) parts.push(`first token ${seconds((first - began) / 1000)}`);
    if (usage?.output > 1 && first !== null && now > first) parts.push(`${count(Math.round((10000 * (usage.output - 1)) / (now - first)) / 10)} tokens/s`);
    if (usage) parts.push(`${count(usage.input ?? 0)} in${usage.cached ? ` (${count(usage.cached)} cached)` : ""}, ${count(usage.output ?? 0)} out`);
    if (reason) parts.push(reason);
    text(answer.foot, failure || parts.join(" · "));
    answer.foot.classList.toggle("fault", Boolean(failure));
    answer.element.dataset.done = failure ? "failed" : "yes";
    if (answer.text) answer.thinking.open = false; // its answer is what one reads now
  }
}
