// Anthropic Messages for the dashboard's playground. Pure.

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

function body({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
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

function read({ data }, on) {
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

export const dialect = {
  name: "Anthropic messages", path: "v1/messages", body, read,
  headers: { "anthropic-version": "2023-06-01" },
  python: {
    module: "anthropic", client: "Anthropic", path: "", call: "messages.create", unknown: ["temperature", "top_p"],
    print: 'print("".join(block.text for block in answer.content if block.type == "text"))',
  },
};
