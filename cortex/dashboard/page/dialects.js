// The three dialects: their request bodies, and the readers of their SSE events. Pure.
//
// A conversation is a list of {role, text, calls}: a message of the user, or one of the model with its calls, each {id,
// name, arguments, result}. A reader takes an SSE event and calls its callbacks: text(delta), reasoning(delta),
// call(index, name, id), argument(index, delta), usage({input, output, cached}), finish(reason), fail(message).

const chatMessages = ({ role, text, calls = [] }) => [
  {
    role,
    content: text,
    ...(calls.length && { tool_calls: calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } })) }),
  },
  ...calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })),
];

function chat({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.flatMap(chatMessages)],
    stream: true,
    stream_options: { include_usage: true },
    ...(limit && { max_completion_tokens: limit }),
    ...(temperature !== null && { temperature }),
    ...(topP !== null && { top_p: topP }),
    ...(schema && { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } }),
    ...(tools.length && { tools: tools.map((tool) => ({ type: "function", function: tool })), ...(choice && { tool_choice: choice }) }),
  };
}

function readChat({ data }, on) {
  if (data === "[DONE]") return;
  const chunk = JSON.parse(data);
  if (chunk.error) { on.fail(chunk.error.message); return; }
  for (const { delta = {}, finish_reason: reason } of chunk.choices ?? []) {
    if (delta.reasoning_content) on.reasoning(delta.reasoning_content);
    if (delta.content) on.text(delta.content);
    for (const call of delta.tool_calls ?? []) {
      if (call.function?.name) on.call(call.index, call.function.name, call.id);
      if (call.function?.arguments) on.argument(call.index, call.function.arguments);
    }
    if (reason) on.finish(reason);
  }
  if (chunk.usage) {
    on.usage({
      input: chunk.usage.prompt_tokens, output: chunk.usage.completion_tokens,
      cached: chunk.usage.prompt_tokens_details?.cached_tokens ?? 0,
    });
  }
}

const responsesItems = ({ role, text, calls = [] }) => [
  ...(text ? [{ role, content: text }] : []),
  ...calls.map(({ id, name, arguments: given }) => ({ type: "function_call", call_id: id, name, arguments: given })),
  ...calls.map(({ id, result }) => ({ type: "function_call_output", call_id: id, output: result })),
];

function responses({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
  return {
    model,
    ...(system && { instructions: system }),
    input: messages.flatMap(responsesItems),
    stream: true,
    store: false,
    ...(limit && { max_output_tokens: limit }),
    ...(temperature !== null && { temperature }),
    ...(topP !== null && { top_p: topP }),
    ...(schema && { text: { format: { type: "json_schema", name: "answer", schema } } }),
    ...(tools.length && { tools: tools.map((tool) => ({ type: "function", ...tool })), ...(choice && { tool_choice: choice }) }),
  };
}

function readResponses({ data }, on) {
  const event = JSON.parse(data);
  const { response } = event;
  switch (event.type) {
    case "response.output_text.delta": on.text(event.delta); break;
    case "response.reasoning_text.delta":
    case "response.reasoning_summary_text.delta": on.reasoning(event.delta); break;
    case "response.output_item.added":
      if (event.item.type === "function_call") on.call(event.output_index, event.item.name, event.item.call_id);
      break;
    case "response.function_call_arguments.delta": on.argument(event.output_index, event.delta); break;
    case "response.completed":
    case "response.incomplete":
      on.finish(response.incomplete_details?.reason ?? response.status);
      on.usage({
        input: response.usage?.input_tokens, output: response.usage?.output_tokens,
        cached: response.usage?.input_tokens_details?.cached_tokens ?? 0,
      });
      break;
    case "response.failed": on.fail(response.error?.message ?? "The response failed."); break;
    case "error": on.fail(event.message ?? event.error?.message ?? "The response failed."); break;
    default:
  }
}

// A model may write arguments that are no object; here they have to be one.
function objectOf(given) {
  try {
    const parsed = JSON.parse(given);
    return parsed !== null && typeof parsed === "object" && !Array.isArray(parsed) ? parsed : {};
  } catch { return {}; }
}

const anthropicMessages = ({ role, text, calls = [] }) => {
  if (!calls.length) return [{ role, content: text }];
  const used = calls.map(({ id, name, arguments: given }) => ({ type: "tool_use", id, name, input: objectOf(given) }));
  return [
    { role, content: [...(text ? [{ type: "text", text }] : []), ...used] },
    { role: "user", content: calls.map(({ id, result }) => ({ type: "tool_result", tool_use_id: id, content: result })) },
  ];
};

function messages({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
  return {
    model,
    ...(system && { system }),
    messages: messages.flatMap(anthropicMessages),
    stream: true,
    max_tokens: limit || 4096, // this dialect asks for a limit
    ...(temperature !== null && { temperature: Math.min(1, temperature) }),
    ...(topP !== null && { top_p: topP }),
    ...(schema && { output_config: { format: { type: "json_schema", schema } } }),
    ...(tools.length && {
      tools: tools.map(({ name, description, parameters }) => ({ name, description, input_schema: parameters ?? { type: "object" } })),
      ...(choice && { tool_choice: { type: choice === "required" ? "any" : choice } }),
    }),
  };
}

function readMessages({ data }, on) {
  const event = JSON.parse(data);
  switch (event.type) {
    case "content_block_start":
      if (event.content_block.type === "tool_use") on.call(event.index, event.content_block.name, event.content_block.id);
      break;
    case "content_block_delta":
      if (event.delta.type === "text_delta") on.text(event.delta.text);
      else if (event.delta.type === "thinking_delta") on.reasoning(event.delta.thinking);
      else if (event.delta.type === "input_json_delta") on.argument(event.index, event.delta.partial_json);
      break;
    case "message_delta":
      on.finish(event.delta.stop_reason);
      if (event.usage) {
        const cached = event.usage.cache_read_input_tokens ?? 0;
        on.usage({ input: (event.usage.input_tokens ?? 0) + cached, output: event.usage.output_tokens, cached });
      }
      break;
    case "error": on.fail(event.error.message); break;
    default:
  }
}

// `python` says how the dialect's SDK makes the same request, and prints the answer. Parameters in `unknown` are this
// server's and not, or no longer, the SDK's.
export const dialects = [
  {
    name: "OpenAI chat", path: "v1/chat/completions", body: chat, read: readChat,
    python: {
      module: "openai", client: "OpenAI", path: "/v1", call: "chat.completions.create",
      print: "print(answer.choices[0].message.content)",
    },
  },
  {
    name: "OpenAI responses", path: "v1/responses", body: responses, read: readResponses,
    python: { module: "openai", client: "OpenAI", path: "/v1", call: "responses.create", print: "print(answer.output_text)" },
  },
  {
    name: "Anthropic messages", path: "v1/messages", body: messages, read: readMessages,
    python: {
      module: "anthropic", client: "Anthropic", path: "", call: "messages.create", unknown: ["temperature", "top_p"],
      print: 'print("".join(block.text for block in answer.content if block.type == "text"))',
    },
  },
];

// Parse the JSON Schema that an answer must match; null if there is none. Throws on an invalid one.
export function readSchema(typed) {
  if (!typed.trim()) return null;
  let parsed;
  try { parsed = JSON.parse(typed); } catch (error) { throw new Error(`The schema is not JSON: ${error.message}`); }
  if (parsed === null || typeof parsed !== "object" || Array.isArray(parsed)) throw new Error("The schema is no JSON object.");
  return parsed;
}

// Parse the tools of a request: a list, in the form of any of the dialects. Throws on an invalid list.
export function readTools(typed) {
  if (!typed.trim()) return [];
  let parsed;
  try { parsed = JSON.parse(typed); } catch (error) { throw new Error(`The tools are not JSON: ${error.message}`); }
  return (Array.isArray(parsed) ? parsed : [parsed]).map((given) => {
    const tool = given.function ?? given;
    if (typeof tool.name !== "string" || !tool.name) throw new Error("A tool has no name.");
    return { name: tool.name, description: tool.description ?? "", parameters: tool.parameters ?? tool.input_schema ?? { type: "object", properties: {} } };
  });
}

// A tool as a person reads it: its name and its parameters.
export const signature = ({ name, parameters }) => `${name}(${Object.keys(parameters.properties ?? {}).join(", ")})`;

export const EXAMPLE_TOOL = [{
  name: "weather",
  description: "Tell the weather of a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
}];

export const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, country: { type: "string" } },
  required: ["city", "country"],
  additionalProperties: false,
};
