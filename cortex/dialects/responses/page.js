// OpenAI Responses for the dashboard's playground. Pure.

const responsesItems = ({ role, text, calls = [] }) => [
  ...(text ? [{ role, content: text }] : []),
  ...calls.map(({ id, name, arguments: given }) => ({ type: "function_call", call_id: id, name, arguments: given })),
  ...calls.map(({ id, result }) => ({ type: "function_call_output", call_id: id, output: result })),
];

function body({ model, system, messages, limit, temperature, topP, schema, tools, choice }) {
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

function read({ data }, on) {
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

export const dialect = {
  name: "OpenAI responses", path: "v1/responses", body, read,
  python: { module: "openai", client: "OpenAI", path: "/v1", call: "responses.create", print: "print(answer.output_text)" },
};
