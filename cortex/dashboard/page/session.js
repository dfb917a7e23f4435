// The key of this tab. It is kept in the tab's own storage, goes into a header and nowhere else.

const NAME = "cortex-key";

export function key() {
  try { return sessionStorage.getItem(NAME) ?? ""; } catch { return ""; }
}

export function setKey(value) {
  try {
    if (value) sessionStorage.setItem(NAME, value);
    else sessionStorage.removeItem(NAME);
  } catch { /* storage is off: there is no key */ }
}

// Call fetch with the key of this tab.
export function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  return fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
}

// Send a body to a path of /admin, and return the answer. Throws with the gateway's message.
export async function post(path, body) {
  const reply = await ask(`admin/${path}`, {
    method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" },
  });
  if (!reply.ok) throw new Error(await complaint(reply));
  return reply.json();
}

// Return the message of an error response, in any dialect.
export async function complaint(reply) {
  try {
    const body = await reply.json();
    return body.error?.message ?? `The gateway answered ${reply.status}.`;
  } catch {
    return `The gateway answered ${reply.status}.`;
  }
}
