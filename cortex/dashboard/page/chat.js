// A conversation with a model, or the same with two side by side: text, reasoning and calls as they arrive. Text is never
// rendered as markup.

import { toast } from "./acts.js";
import { dialects, EXAMPLE_SCHEMA, EXAMPLE_TOOL, readSchema, readTools } from "./dialects.js";
import { $, h, text } from "./dom.js";
import { sseEvents } from "./events.js";
import { exports } from "./export.js";
import { cost, count, dollars, seconds } from "./format.js";
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

// A message of the user and its answers, one of each model: a row of the conversation.
class Turn {
  constructor(message) {
    this.message = message;
    this.answers = [];
    this.row = h("div.answers");
    this.element = h("div.turn", {}, h("article.message.user", {}, h("h3", {}, "You"), h("pre.text", {}, message)), this.row);
  }

  begin(talk, models) {
    this.answers = models.map((model) => new Answer(talk, model));
    this.row.replaceChildren(...this.answers.map(({ element }) => element));
  }

  // The text of a model's answer, or of the other's where only one was asked.
  text(column) { return (this.answers[column] ?? this.answers[0])?.text ?? ""; }
}

const numberIn = (id) => ($(id).value === "" ? null : Number($(id).value));

export class Chat {
  constructor() {
    this.turns = [];
    this.abort = null;
    this.last = null;
    this.pricing = new Map();
    this.talk = $("talk");
    this.empty = this.talk.firstElementChild;
    $("chat-dialect").append(...dialects.map(({ name }, index) => h("option", { value: index }, name)));
    $("code-kind").append(...Object.keys(exports).map((name) => h("option", {}, name)));
    $("chat-form").addEventListener("submit", (event) => { event.preventDefault(); if (this.abort) this.stop(); else this.send(); });
    $("chat-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!this.abort) this.send(); }
    });
    $("chat-clear").addEventListener("click", () => { this.clear(); $("chat-text").focus(); });
    $("chat-again").addEventListener("click", () => this.again());
    $("chat-code").addEventListener("click", () => this.showCode());
    $("code-kind").addEventListener("change", () => this.writeCode());
    $("code-copy").addEventListener("click", () => this.copyCode());
    $("chat-example").addEventListener("click", () => { $("chat-tools").value = JSON.stringify(EXAMPLE_TOOL, null, 2); });
    $("chat-schema-example").addEventListener("click", () => { $("chat-schema").value = JSON.stringify(EXAMPLE_SCHEMA, null, 2); });
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
    this.pricing = new Map(listed.map(({ id, pricing }) => [id, pricing]));
    const models = listed.filter((model) => !model.alias_of && chats(model)).sort((a, b) => byName(a.id, b.id));
    const ready = models.filter((model) => model.state === "ready");
    const listing = models.map((model) => `${model.id}/${model.state === "ready"}`).join();
    if (listing === this.listing) return;
    this.listing = listing;
    const chosen = select.value;
    const group = (label, some) => (some.length ? [h("optgroup", { label }, ...some.map(({ id }) => h("option", { value: id }, id)))] : []);
    const groups = () => [...group("Ready", ready), ...group("Loaded when asked", models.filter((model) => model.state !== "ready"))];
    const other = $("chat-other");
    const compared = other.value;
    select.replaceChildren(...groups());
    other.replaceChildren(h("option", { value: "" }, "no other"), ...groups());
    if (models.some(({ id }) => id === chosen)) select.value = chosen;
    if (models.some(({ id }) => id === compared)) other.value = compared;
    if (listed.length) text($("chat-count"), "");
  }

  clear() {
    this.stop();
    this.turns = [];
    this.last = null;
    this.talk.replaceChildren(this.empty);
    this.offer();
  }

  stop() { this.abort?.abort(); }

  // Enable the buttons that need something to work with.
  offer() {
    $("chat-again").disabled = Boolean(this.abort) || !this.turns.length;
    $("chat-code").disabled = !this.last;
  }

  // The request's settings as they stand on the page; null after a complaint.
  settings() {
    const models = [$("chat-model").value, $("chat-other").value].filter(Boolean);
    if (!$("chat-model").value) { toast("There is no model to talk to.", "bad"); return null; }
    try {
      return {
        models, dialect: dialects[Number($("chat-dialect").value)], system: $("chat-system").value.trim(),
        limit: Number($("chat-limit").value) || 0, temperature: numberIn("chat-temperature"), topP: numberIn("chat-top-p"),
        schema: readSchema($("chat-schema").value), tools: readTools($("chat-tools").value),
      };
    } catch (error) { toast(error.message, "bad"); return null; }
  }

  async send() {
    const typed = $("chat-text").value.trim();
    const settings = typed && this.settings();
    if (!settings) return;
    const turn = new Turn(typed);
    this.empty.remove();
    this.turns.push(turn);
    this.talk.append(turn.element);
    $("chat-text").value = "";
    await this.run(turn, settings);
  }

  // Answer the last message anew, with the settings as they are now.
  async again() {
    const settings = this.turns.length && !this.abort && this.settings();
    if (settings) await this.run(this.turns.at(-1), settings);
  }

  async run(turn, { models, dialect, ...settings }) {
    const abort = (this.abort = new AbortController());
    const before = this.turns.slice(0, this.turns.indexOf(turn));
    turn.begin(this.talk, models);
    this.talk.scrollTop = this.talk.scrollHeight;
    text($("chat-send"), "Stop");
    const bodies = models.map((model, column) => {
      // A message without an answer would leave two of the user's in a row.
      const messages = before.filter((earlier) => earlier.text(column)).flatMap((earlier) => [
        { role: "user", text: earlier.message }, { role: "assistant", text: earlier.text(column) },
      ]);
      return dialect.body({ ...settings, model, messages: [...messages, { role: "user", text: turn.message }] });
    });
    this.last = { dialect, body: bodies[0] };
    this.offer();
    await Promise.all(turn.answers.map((answer, column) => this.follow(dialect, bodies[column], answer, abort)));
    if (this.abort === abort) this.abort = null;
    text($("chat-send"), "Send");
    this.offer();
  }

  showCode() {
    this.writeCode();
    text($("code-copy"), "Copy");
    $("code-dialog").showModal();
  }

  writeCode() {
    const base = new URL(".", location.href).href.replace(/\/$/, "");
    $("code-text").value = exports[$("code-kind").value](this.last.dialect, this.last.body, base);
  }

  // Without TLS a browser gives a page no clipboard: the text is selected then, for the keyboard.
  async copyCode() {
    $("code-text").select();
    try {
      await navigator.clipboard.writeText($("code-text").value);
      text($("code-copy"), "Copied");
    } catch { text($("code-copy"), "Selected: press Ctrl+C"); }
  }

  async follow(dialect, body, answer, abort) {
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
    this.tell(answer, { began, first, usage, reason, failure, price: usage && cost(this.pricing.get(body.model), usage) });
  }

  // The usage, timing and cost of the answer, under it.
  tell(answer, { began, first, usage, reason, failure, price }) {
    const now = performance.now();
    const parts = [];
    if (first !== null) parts.push(`first token ${seconds((first - began) / 1000)}`);
    if (usage?.output > 1 && first !== null && now > first) parts.push(`${count(Math.round((10000 * (usage.output - 1)) / (now - first)) / 10)} tokens/s`);
    if (usage) parts.push(`${count(usage.input ?? 0)} in${usage.cached ? ` (${count(usage.cached)} cached)` : ""}, ${count(usage.output ?? 0)} out`);
    if (price !== null) parts.push(dollars(price));
    if (reason) parts.push(reason);
    text(answer.foot, failure || parts.join(" · "));
    answer.foot.classList.toggle("fault", Boolean(failure));
    answer.element.dataset.done = failure ? "failed" : "yes";
    if (answer.text) answer.thinking.open = false; // its answer is what one reads now
  }
}
