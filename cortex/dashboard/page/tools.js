// The schema of an answer and the tools of a request, as they are typed. Pure.

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
