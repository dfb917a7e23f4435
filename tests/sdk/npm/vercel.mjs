// The Vercel AI SDK by each of its three providers: text, a tool in a loop, an object; streamed and not.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

const baseURL = `${process.argv[2]}/v1`;
const models = {
  chat: createOpenAICompatible({ name: "cortex", baseURL, apiKey: "none", supportsStructuredOutputs: true })("m"),
  openaiChat: createOpenAI({ baseURL, apiKey: "none" }).chat("m"),
  responses: createOpenAI({ baseURL, apiKey: "none" }).responses("m"),
  messages: createAnthropic({ baseURL, apiKey: "none" })("m"),
};
const inputSchema = jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] });
const tools = { weather: tool({ description: "d", inputSchema, execute: async ({ city }) => (city === "Paris" ? "rain" : "?") }) };
let checks = 0;
for (const [name, model] of Object.entries(models)) {
  const common = { model, maxRetries: 0 };
  assert.equal((await generateText({ ...common, prompt: "hi" })).text, "Hello", name);
  assert.equal(await streamText({ ...common, prompt: "hi" }).text, "Hello", name);
  const looped = { ...common, prompt: "call it", tools, stopWhen: stepCountIs(3) };
  const whole = await generateText(looped);
  assert.match(whole.text, /^It says .*rain/, name);
  const streamed = streamText(looped);
  assert.match(await streamed.text, /^It says .*rain/, name);
  assert.equal((await streamed.steps).length, 2, name);
  checks += 5;
  if (name !== "messages") { // which makes an object by a tool, and the script only by a form
    const { output } = await generateText({ ...common, prompt: "json", output: Output.object({ schema: inputSchema }) });
    assert.deepEqual(output, { city: "Paris" }, name);
    checks++;
  }
}
console.log(`ok ${checks}`);
