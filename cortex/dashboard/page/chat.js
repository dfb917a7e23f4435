// The playground: a conversation with a model, or the same with two side by side, its settings, and its requests as code.

import { toast } from "./acts.js";
import { Answer, Turn } from "./answer.js";
import { dialects } from "./dialects.js";
import { EXAMPLE_SCHEMA, EXAMPLE_TOOL, readSchema, readTools, signature } from "./tools.js";
import { $, attribute, copyField, h, text } from "./dom.js";
import { sseEvents } from "./events.js";
import { exports } from "./export.js";
import { cost, count, dollars, seconds } from "./format.js";
import { ask, complaint, key } from "./session.js";
import { byName } from "./store.js";

const NARROW_PX = 760; // as the style has it

const numberIn = (id) => ($(id).value === "" ? null : Number($(id).value));

// Show what is written in a field of JSON, or its fault, under it.
function tell(id, read, words) {
  let told = "";
  let fault = "";
  try { told = words(read($(id).value)); } catch (error) { fault = error.message; }
  text($(`${id}-told`), fault || told);
  $(`${id}-told`).classList.toggle("fault", Boolean(fault));
  attribute($(id), "aria-invalid", fault ? "true" : null);
}

export class Chat {
  constructor() {
    this.turns = [];
    this.abort = null;
    this.last = null;
    this.pricing = new Map();
    this.results = new Map();
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
    $("code-copy").addEventListener("click", () => copyField($("code-text"), $("code-copy")));
    $("chat-example").addEventListener("click", () => this.fill("chat-tools", EXAMPLE_TOOL));
    $("chat-schema-example").addEventListener("click", () => this.fill("chat-schema", EXAMPLE_SCHEMA));
    $("chat-settings").addEventListener("input", () => this.tellSettings());
    $("chat-expand").addEventListener("click", () => this.expand());
  }

  fill(id, example) {
    $(id).value = JSON.stringify(example, null, 2);
    this.tellSettings();
  }

  // Give the playground the whole page, with its settings beside the conversation, or its place beside the fleet.
  expand() {
    const is = document.body.classList.toggle("playing");
    attribute($("chat-expand"), "aria-pressed", is);
    if (is && innerWidth > NARROW_PX) $("chat-more").open = true;
    $("chat").scrollIntoView({ block: "nearest" });
  }

  // Say which settings are in force, in the line that hides or shows them.
  tellSettings() {
    tell("chat-schema", readSchema, (schema) => (schema ? Object.keys(schema.properties ?? {}).join(", ") : ""));
    tell("chat-tools", readTools, (tools) => tools.map(signature).join(", "));
    const names = { system: "system prompt", temperature: "temperature", "top-p": "top p", schema: "schema", tools: "tools" };
    text($("chat-set"), Object.keys(names).filter((name) => $(`chat-${name}`).value.trim()).map((name) => names[name]).join(" · "));
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
    this.results.clear();
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
        choice: $("chat-choice").value,
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

  async run(turn, { models, ...settings }) {
    const go = (answer, give) => this.goOn(turn, answer, give);
    turn.begin(models.map((model) => new Answer(this.talk, model, this.results, go)));
    await this.ask(turn, turn.answers, settings);
  }

  // Go on with an answer whose calls have their results; `give` takes these.
  async goOn(turn, answer, give) {
    if (this.abort) { toast("Another answer is being written.", "busy"); return; }
    const settings = this.settings();
    if (!settings) return;
    give();
    await this.ask(turn, [answer], settings);
    if (document.activeElement === document.body) $("chat-text").focus(); // the button that had the focus is gone
  }

  // Have answers to a message written, each by its model after its own history.
  async ask(turn, answers, { dialect, ...settings }) {
    const abort = (this.abort = new AbortController());
    const before = this.turns.slice(0, this.turns.indexOf(turn));
    this.talk.scrollTop = this.talk.scrollHeight;
    text($("chat-send"), "Stop");
    const bodies = answers.map((answer) => {
      const column = turn.answers.indexOf(answer);
      const messages = [...before.flatMap((earlier) => earlier.history(column)), { role: "user", text: turn.message }, ...answer.history()];
      return dialect.body({ ...settings, model: answer.model, messages });
    });
    this.last = { dialect, body: bodies[0] };
    this.offer();
    await Promise.all(answers.map((answer, index) => this.follow(dialect, bodies[index], answer, abort)));
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

  async follow(dialect, body, answer, abort) {
    const began = performance.now();
    const step = answer.begin();
    let first = null;
    let usage = null;
    let reason = "";
    let failure = "";
    const note = (kind) => (...given) => { first ??= performance.now(); step.take(kind, ...given); };
    const on = {
      text: note("text"), reasoning: note("reasoning"), call: note("call"), argument: note("argument"),
      usage: (given) => { usage = given; }, finish: (given) => { reason = given ?? ""; }, fail: (message) => { failure = message; },
    };
    try {
      const reply = await ask(dialect.path, {
        method: "POST", body: JSON.stringify(body), signal: abort.signal,
        headers: { "content-type": "application/json", ...dialect.headers },
      });
      if (!reply.ok) failure = await complaint(reply);
      else for await (const event of sseEvents(reply, { onComment: (comment) => step.wait(comment) })) dialect.read(event, on);
      if (!failure && !reason) failure = "The answer broke off.";
    } catch {
      if (abort.signal.aborted) reason = "stopped";
      else failure = "The gateway does not answer.";
    }
    const price = usage && cost(this.pricing.get(body.model), usage);
    const line = failure || figures({ began, first, usage, reason, price });
    answer.end(step, line, Boolean(failure), !abort.signal.aborted);
  }
}

// The timing, usage and cost of a step, and why it ended.
function figures({ began, first, usage, reason, price }) {
  const now = performance.now();
  const parts = [];
  if (first !== null) parts.push(`first token ${seconds((first - began) / 1000)}`);
  if (usage?.output > 1 && first !== null && now > first) parts.push(`${count(Math.round((10000 * (usage.output - 1)) / (now - first)) / 10)} tokens/s`);
  if (usage) parts.push(`${count(usage.input ?? 0)} in${usage.cached ? ` (${count(usage.cached)} cached)` : ""}, ${count(usage.output ?? 0)} out`);
  if (price !== null) parts.push(dollars(price));
  if (reason) parts.push(reason);
  return parts.join(" · ");
}
