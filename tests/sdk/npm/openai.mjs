// The npm SDK of OpenAI against a server: chat and Responses, streamed and not, must be equal.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const schema = { type: "object", properties: { city: { type: "string" } } };
const weather = { type: "function", function: { name: "weather", parameters: schema } };
const clock = { type: "function", function: { name: "clock", parameters: { type: "object", properties: {} } } };
const flat = (tool) => ({ type: "function", strict: false, ...tool.function });
let checks = 0;
const check = (actual, expected, what) => { assert.deepEqual(actual, expected, what); checks++; };

async function chat(prompt, fields = {}) {
  const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  const whole = await client.chat.completions.create({ model: "m", messages, ...fields });
  const stream = client.chat.completions.stream({ model: "m", messages, stream_options: { include_usage: true }, ...fields });
  const gathered = await stream.finalChatCompletion();
  const shape = (answer) => answer.choices.map((choice) => [
    choice.finish_reason, choice.message.content || "", // the helper does not put reasoning together
    (choice.message.tool_calls ?? []).map((call) => [call.id, call.function.name, call.function.arguments]),
    (choice.logprobs?.content ?? []).map((token) => [token.token, token.logprob]),
  ]);
  check(shape(gathered), shape(whole), `chat ${JSON.stringify(prompt).slice(0, 60)}`);
  check(gathered.usage.total_tokens, whole.usage.total_tokens);
  return whole;
}

async function respond(input, fields = {}) {
  const whole = await client.responses.create({ model: "m", input, ...fields });
  let gathered;
  if (whole.status === "incomplete") {
    for await (const event of await client.responses.create({ model: "m", input, stream: true, ...fields }))
      if (event.type === "response.incomplete") gathered = event.response;
  } else {
    gathered = await client.responses.stream({ model: "m", input, ...fields }).finalResponse();
  }
  const shape = (response) => [response.status, response.output_text ?? "", response.usage.total_tokens, response.output.map((item) =>
    [item.type, item.call_id, item.name, item.arguments, item.input, item.content?.map((part) => part.text), item.summary])];
  const prompt = shape(whole);
  prompt[1] = prompt[1] || whole.output.flatMap((item) => item.type === "message" ? item.content.map((part) => part.text) : []).join("");
  const streamed = shape(gathered);
  streamed[1] = streamed[1] || prompt[1];
  check(streamed, prompt, `responses ${JSON.stringify(input).slice(0, 60)}`);
  return whole;
}

async function fails(make, status, code) {
  for (const stream of [false, true]) {
    await assert.rejects(async () => {
      const answer = await make(stream);
      if (stream) for await (const _ of answer) { /* until it breaks */ }
    }, (error) => { check(error.status, status); check(error.code, code); return true; });
  }
}

check((await chat("hi")).choices[0].message.content, "Hello");
await chat([{ role: "system", content: "s" }, { role: "user", content: "hi" }, { role: "assistant", content: "x" }, { role: "user", content: "turns" }]);
const called = await chat("call it", { tools: [weather] });
const call = called.choices[0].message.tool_calls[0];
check(JSON.parse(call.function.arguments), { city: "Paris" });
const history = [{ role: "user", content: "call it" }, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "rain" }];
check((await chat(history, { tools: [weather] })).choices[0].message.content, "It says rain");
check((await chat("parallel", { tools: [weather, clock] })).choices[0].message.tool_calls.length, 2);
await chat("forced", { tools: [weather], tool_choice: { type: "function", function: { name: "weather" } } });
check((await chat("think")).choices[0].message.reasoning_content, "I wonder.\n");
await chat("stop", { stop: ["x"] });
await chat("long");
await chat("choices", { n: 3 });
await chat("logprobs", { logprobs: true, top_logprobs: 2 });
await chat("json", { response_format: { type: "json_schema", json_schema: { name: "n", schema } } });

check((await respond("hi")).output_text, "Hello");
const asked = await respond("call it", { tools: [flat(weather)] });
const made = asked.output.at(-1);
check(JSON.parse(made.arguments), { city: "Paris" });
const items = [{ role: "user", content: "call it" }, ...asked.output, { type: "function_call_output", call_id: made.call_id, output: "rain" }];
check((await respond(items, { tools: [flat(weather)] })).output_text, "It says rain");
check((await respond([{ type: "function_call_output", call_id: made.call_id, output: "rain" }], { previous_response_id: asked.id })).output_text, "It says rain");
check((await respond("parallel", { tools: [flat(weather), flat(clock)] })).output.length, 2);
await respond("patch it", { tools: [{ type: "custom", name: "patch" }] });
await respond("think");
await respond("think", { reasoning: { summary: "auto" }, include: ["reasoning.encrypted_content"], store: false });
check((await respond("length", { max_output_tokens: 3 })).status, "incomplete");
await respond("long");
const kept = await client.responses.retrieve((await respond("hi")).id);
check(kept.output_text, "Hello");
await client.responses.delete(kept.id);
await assert.rejects(() => client.responses.retrieve(kept.id), OpenAI.NotFoundError);

const content = (text) => [{ role: "user", content: text }];
await fails((stream) => client.chat.completions.create({ model: "m", messages: content("full"), stream }), 400, "context_length_exceeded");
await fails((stream) => client.chat.completions.create({ model: "m", messages: content("busy"), stream }), 429, "rate_limit_exceeded");
await fails((stream) => client.responses.create({ model: "nobody", input: "hi", stream }), 404, "model_not_found");
await assert.rejects(async () => {
  for await (const _ of await client.chat.completions.create({ model: "m", messages: content("fail"), stream: true })) { /* */ }
}, /worker is gone/);

const controller = new AbortController();
const waiting = await client.responses.create({ model: "m", input: "wait", stream: true }, { signal: controller.signal });
for await (const event of waiting) if (event.type === "response.output_text.delta") controller.abort();
checks++;
console.log(`ok ${checks}`);
