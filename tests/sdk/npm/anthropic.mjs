// The npm SDK of Anthropic against a server: Messages streamed and not must be equal.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const weather = { name: "weather", description: "d", input_schema: { type: "object", properties: { city: { type: "string" } } } };
const clock = { name: "clock", input_schema: { type: "object", properties: {} } };
let checks = 0;
const check = (actual, expected, what) => { assert.deepEqual(actual, expected, what); checks++; };

async function ask(prompt, fields = {}) {
  const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  const body = { model: "m", max_tokens: 2048, messages, ...fields };
  const whole = await client.messages.create(body);
  const gathered = await client.messages.stream(body).finalMessage();
  const shape = (message) => [message.stop_reason, message.stop_sequence, message.usage.output_tokens, message.usage.input_tokens,
    message.content.map((block) => [block.type, block.text, block.thinking, block.id, block.name, block.input])];
  check(shape(gathered), shape(whole), JSON.stringify(prompt).slice(0, 60));
  return whole;
}

check((await ask("hi")).content[0].text, "Hello");
await ask([{ role: "user", content: "hi" }, { role: "assistant", content: "x" }, { role: "user", content: "turns" }], { system: "s" });
const called = await ask("call it", { tools: [weather] });
const call = called.content.at(-1);
check([call.type, call.input], ["tool_use", { city: "Paris" }]);
const result = { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "rain" }] };
const history = [{ role: "user", content: "call it" }, { role: "assistant", content: called.content }, result];
check((await ask(history, { tools: [weather] })).content[0].text, "It says rain");
check((await ask("parallel", { tools: [weather, clock] })).content.length, 2);
await ask("forced", { tools: [weather], tool_choice: { type: "tool", name: "weather" } });
const thought = await ask("think", { thinking: { type: "enabled", budget_tokens: 1024 } });
check(thought.content[0].thinking, "I wonder.\n");
check(Boolean(thought.content[0].signature), true);
check((await ask("stop", { stop_sequences: ["</block>"] })).stop_sequence, "</block>");
check((await ask("length", { max_tokens: 3 })).stop_reason, "max_tokens");
await ask("long");
const counted = await client.messages.countTokens({ model: "m", messages: [{ role: "user", content: "hi there" }] });
const { usage } = await ask("hi there");
check(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);

async function fails(prompt, status, kind) {
  const body = { model: "m", max_tokens: 9, messages: [{ role: "user", content: prompt }] };
  await assert.rejects(() => client.messages.create(body), (error) => {
    check([error.status, error.error.error.type], [status, kind]);
    return true;
  });
  await assert.rejects(() => client.messages.stream(body).finalMessage(), (error) => { check(error.status, status); return true; });
}
await fails("full", 400, "invalid_request_error");
await fails("busy", 529, "overloaded_error");
const failing = client.messages.stream({ model: "m", max_tokens: 9, messages: [{ role: "user", content: "fail" }] });
await assert.rejects(() => failing.finalMessage(), /worker is gone/);

const waiting = client.messages.stream({ model: "m", max_tokens: 9, messages: [{ role: "user", content: "wait" }] });
for await (const event of waiting) if (event.type === "content_block_delta") { waiting.abort(); break; }
checks++;
console.log(`ok ${checks}`);
