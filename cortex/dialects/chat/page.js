// OpenAI Chat Completions for the dashboard's playground. Pure.

const chatMessages = ({ role, text, calls = [] }) => [
  {
    role,
    content: text,
    ...(calls.length && { tool_calls: calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } })) }),
  },
  ...calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })),
];

function body({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
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

function read({ data }, on) {
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

export const dialect = {
  name: "OpenAI chat", path: "v1/chat/completions", body, read,
  python: {
    module: "openai", client: "OpenAI", path: "/v1", call: "chat.completions.create",
    print: "print(answer.choices[0].message.content)",
  },
};
