// A request of the chat as code: a command of curl, or Python by the SDK of its dialect. Pure; no key is in it.

const KEY = "CORTEX_KEY";

// A value of JSON as Python's.
function literal(value, indent = "    ") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = `${indent}    `;
  const rows = Array.isArray(value)
    ? value.map((item) => `${inner}${literal(item, inner)},\n`)
    : Object.entries(value).map(([name, item]) => `${inner}${JSON.stringify(name)}: ${literal(item, inner)},\n`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return rows.length ? `${open}\n${rows.join("")}${indent}${close}` : open + close;
}

// A command of curl for a body as it was sent.
export function curlOf(path, body, base) {
  return [
    `curl -N ${base}${path} \\`,
    "  -H 'content-type: application/json' \\",
    `  -H "authorization: Bearer $\{${KEY}:-none}" \\`,
    `  -d '${body.replaceAll("'", "'\\''")}'\n`,
  ].join("\n");
}

function curl(dialect, body, base) { return curlOf(`/${dialect.path}`, JSON.stringify(body, null, 2), base); }

function python(dialect, body, base) {
  const { module, client, path, call, print, unknown = [] } = dialect.python;
  const left = new Set(["stream", "stream_options", ...unknown]);
  const more = unknown.filter((name) => name in body).map((name) => [name, body[name]]);
  const rest = Object.entries(body).filter(([name]) => !left.has(name));
  if (more.length) rest.push(["extra_body", Object.fromEntries(more)]);
  const given = rest.map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  return [
    `import os\n\nfrom ${module} import ${client}\n`,
    `client = ${client}(base_url="${base}${path}", api_key=os.environ.get("${KEY}", "none"))`,
    `answer = client.${call}(\n${given})`,
    `${print}\n`,
  ].join("\n");
}

export const exports = { curl, Python: python };
