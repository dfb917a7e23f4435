// The tool runners of both npm SDKs: they run the tool themselves and send its result. Anthropic's would leave out what a
// server stores of the conversation, and sends all of it once the server answers that it stores none.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";
import OpenAI from "openai";

const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
let runs = 0;
const run = ({ city }) => { assert.equal(city, "Paris"); runs++; return "rain"; };

const anthropic = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const weather = betaTool({ name: "weather", description: "d", inputSchema: schema, run });
for (const stream of [false, true]) {
  const asked = { model: "m", max_tokens: 99, messages: [{ role: "user", content: "call it" }], tools: [weather], stream };
  const message = await anthropic.beta.messages.toolRunner(asked).runUntilDone();
  assert.equal(message.content.at(-1).text, "It says rain");
}
const openai = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const tool = { type: "function", function: { name: "weather", parameters: schema, parse: JSON.parse, function: run } };
for (const stream of [false, true]) {
  const runner = openai.chat.completions.runTools({ model: "m", messages: [{ role: "user", content: "call it" }], tools: [tool], stream });
  assert.equal(await runner.finalContent(), "It says rain");
}
assert.equal(runs, 4);
console.log(`ok ${runs}`);
