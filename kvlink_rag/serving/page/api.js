// The server's own endpoints, as any client calls them. Knows no element of the page.

let key = sessionStorage.getItem("key") ?? "";

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

/** What the server said instead of an answer: `status` (0: no response of its own), and its words or ours. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const brokenOff = () => new Refusal(0, "The connection ended before the answer did.");

/** For `catch`: what `made` makes of a failure of the connection; that a person stopped it stays as it is. */
function unlessStopped(made) {
  return (error) => {
    throw error.name === "AbortError" ? error : made();
  };
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch(
    unlessStopped(() => new Refusal(0, "The server does not answer. Is it still running?")),
  );
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Refusal(response.status, told?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

async function get(path) {
  return (await request(path)).json();
}

function posted(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

/** All of a list, page after page. */
async function all(path) {
  const found = [];
  let page = { has_more: true, last_id: null };
  while (page.has_more) {
    page = await get(`${path}?limit=100${page.last_id ? `&after=${encodeURIComponent(page.last_id)}` : ""}`);
    found.push(...page.data);
  }
  return found;
}

export const models = async () => (await get("/v1/models")).data;
export const stores = () => all("/v1/vector_stores");
export const makeStore = async (name) => (await request("/v1/vector_stores", posted({ name }))).json();

/** Send a file and put it into a store; `told` hears of each change of what becomes of it. */
export async function addFile(store, file, told) {
  const form = new FormData();
  form.set("purpose", "assistants");
  form.set("file", file, file.name);
  const passages = async () => (await get(`/v1/vector_stores/${store}`)).kvlink_passages;
  told("sending");
  const sent = await (await request("/v1/files", { method: "POST", body: form })).json();
  const before = await passages();
  let state = await (await request(`/v1/vector_stores/${store}/files`, posted({ file_id: sent.id }))).json();
  while (state.status === "in_progress") {
    told(`reading and encoding, ${Math.max(0, (await passages()) - before)} passages so far`);
    await new Promise((next) => setTimeout(next, 500));
    state = await get(`/v1/vector_stores/${store}/files/${sent.id}`);
  }
  if (state.status === "failed") throw new Refusal(0, state.last_error?.message ?? "failed");
}

/** An answer as it comes: `piece` hears its text; resolves to the server's own field (sources, trace). */
export async function ask(model, question, mode, signal, piece) {
  const body = { model, mode, stream: true, messages: [{ role: "user", content: question }] };
  const response = await request("/v1/chat/completions", { ...posted(body), signal });
  let extension = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Refusal(0, event.error.message);
    extension = event.kvlink ?? extension;
    const text = event.choices?.[0]?.delta?.content;
    if (text) piece(text);
  }
  if (!extension) throw brokenOff();
  return extension;
}

/** The JSON of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch(unlessStopped(brokenOff));
      if (done) return;
      left += value;
      const lines = left.split("\n");
      left = lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
