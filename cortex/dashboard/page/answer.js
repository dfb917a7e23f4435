// A conversation as it is shown: turns of the user, the answer of each model, and its steps. A model that calls tools
// stops after a step; the user gives the results, and its next step follows in the same answer. Text is never rendered
// as markup.

import { h, shown, text } from "./dom.js";

const NEAR_END_PX = 40;

// JSON with line breaks; anything else as it is.
function pretty(given) {
  try { return JSON.stringify(JSON.parse(given), null, 2); } catch { return given; }
}

// A call of a tool: its arguments as they arrive, then a field for its result.
class Call {
  constructor(id, name) {
    Object.assign(this, { id, name, arguments: "" });
    this.given = h("pre");
    this.field = h("textarea.result", { rows: 2, spellcheck: "false" });
    this.asked = h("label", {}, `Result of ${name}`, this.field);
    this.asked.hidden = true;
    this.element = h("div.call", {}, h("p", {}, "Calls ", h("code", {}, name)), this.given, this.asked);
  }

  // Ask for the result; `known` is the result of the same call before.
  ask(known = "") {
    text(this.given, pretty(this.arguments));
    this.field.value = known;
    shown(this.asked, true);
  }

  // Take the result, which can no longer be changed.
  close() {
    this.result = this.field.value;
    this.asked.replaceWith(h("p", {}, "Result"), h("pre.result", {}, this.result));
  }
}

// What a model writes in one go. The deltas between two animation frames are drawn once.
class Step {
  constructor(talk) {
    this.talk = talk;
    this.text = "";
    this.thought = "";
    this.calls = new Map();
    this.hasEnded = this.hasFailed = this.isDue = false;
    this.reasoning = h("pre.reasoning");
    this.thinking = h("details.thinking", {}, h("summary", {}, "Reasoning"), this.reasoning);
    this.thinking.hidden = true;
    this.body = h("pre.text");
    this.list = h("div.calls");
    this.foot = h("p.cost", {}, "Waiting …");
    this.element = h("div.step", {}, this.thinking, this.body, this.list, this.foot);
  }

  take(kind, ...given) {
    if (kind === "text") this.text += given[0];
    else if (kind === "reasoning") this.thought += given[0];
    else if (kind === "call") this.calls.set(given[0], new Call(given[2], given[1]));
    else if (kind === "argument" && this.calls.has(given[0])) this.calls.get(given[0]).arguments += given[1];
    if (this.isDue) return;
    this.isDue = true;
    // A hidden page gets no animation frames; the answer is written all the same.
    if (document.hidden) setTimeout(() => this.draw(), 200);
    else requestAnimationFrame(() => this.draw());
  }

  // While the model is being loaded, the gateway sends the progress in comments.
  wait(comment) {
    const [, percent] = /^loading .* (\d+)%$/.exec(comment) ?? [];
    if (percent) text(this.foot, `Loading the model, ${percent} % …`);
  }

  draw() {
    this.isDue = false;
    if (this.hasEnded) return;
    const { talk } = this;
    const follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_END_PX;
    text(this.body, this.text);
    shown(this.body, this.text !== "");
    text(this.reasoning, this.thought);
    if (this.thought && this.thinking.hidden) { this.thinking.hidden = false; this.thinking.open = true; }
    for (const call of this.calls.values()) {
      if (!call.element.parentNode) this.list.append(call.element);
      text(call.given, call.arguments);
    }
    if (follow) talk.scrollTop = talk.scrollHeight;
  }

  // End with a line of figures, or a failure.
  end(line, hasFailed) {
    this.draw();
    this.hasEnded = true;
    this.hasFailed = hasFailed;
    text(this.foot, line);
    this.foot.classList.toggle("fault", hasFailed);
    if (this.text) this.thinking.open = false; // its answer is what one reads now
  }

  // Its place in a conversation. Calls without results are left out, with a step that has nothing else.
  history() {
    const calls = [...this.calls.values()].filter(({ result }) => result !== undefined);
    const given = calls.map(({ id, name, arguments: written, result }) => ({ id, name, arguments: written || "{}", result }));
    return this.text || calls.length ? [{ role: "assistant", text: this.text, ...(calls.length && { calls: given }) }] : [];
  }
}

// A model's answer to a message: one step, and one more after each round of results.
export class Answer {
  // `go(answer, give)` is called when the user has written the results of a step; `give` takes them. `results` are those
  // of earlier calls.
  constructor(talk, model, results, go) {
    Object.assign(this, { talk, model, results, go, steps: [] });
    this.element = h("article.message.assistant", {}, h("h3", {}, model));
  }

  begin() {
    const step = new Step(this.talk);
    this.steps.push(step);
    this.element.append(step.element);
    delete this.element.dataset.done;
    return step;
  }

  end(step, line, hasFailed, hasCalled) {
    step.end(line, hasFailed);
    if (hasCalled && step.calls.size && !hasFailed) this.askResults(step);
    this.element.dataset.done = hasFailed ? "failed" : "yes";
  }

  history() { return this.steps.flatMap((step) => step.history()); }

  askResults(step) {
    const calls = [...step.calls.values()];
    const send = h("button.primary", { type: "button" }, calls.length > 1 ? "Send the results" : "Send the result");
    const give = () => {
      for (const call of calls) this.close(call);
      send.remove();
    };
    const submit = () => this.go(this, give);
    send.addEventListener("click", submit);
    for (const [index, call] of calls.entries()) {
      call.ask(this.results.get(`${call.name} ${call.arguments}`));
      call.field.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        const next = calls[index + 1];
        if (next) next.field.focus(); else submit();
      });
    }
    step.list.append(send);
    step.list.scrollIntoView({ block: "nearest" });
    // The focus does not leave a message that is being written, nor another field.
    const { activeElement: focused } = document;
    if (focused === document.body || (focused.id === "chat-text" && !focused.value)) calls[0].field.focus({ preventScroll: true });
  }

  // The same call is likely to get the same result when the answer is made again.
  close(call) {
    call.close();
    this.results.set(`${call.name} ${call.arguments}`, call.result);
  }
}

// A message of the user and its answers, one of each model: a row of the conversation.
export class Turn {
  constructor(message) {
    this.message = message;
    this.answers = [];
    this.row = h("div.answers");
    this.element = h("div.turn", {}, h("article.message.user", {}, h("h3", {}, "You"), h("pre.text", {}, message)), this.row);
  }

  begin(answers) {
    this.answers = answers;
    this.row.replaceChildren(...answers.map(({ element }) => element));
  }

  // Its place in a conversation with the model of a column, or with the other where only one was asked. A message
  // without an answer would leave two of the user's in a row.
  history(column) {
    const answered = (this.answers[column] ?? this.answers[0])?.history() ?? [];
    return answered.length ? [{ role: "user", text: this.message }, ...answered] : [];
  }
}
