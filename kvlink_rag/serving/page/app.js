// The page: what a person does, what the server is asked, what is shown.

import * as api from "/page/api.js";
import { answerCard, element, milliseconds, sourceItem } from "/page/view.js";

const $ = (id) => document.getElementById(id);
let stores = [];
let running = null;

function told(error) {
  if (error?.name === "AbortError") return;
  $("error").textContent = error?.message ?? String(error);
  if (error?.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

/** Run what a person asked for; whatever fails is told. */
function guarded(action) {
  return async (event) => {
    event?.preventDefault();
    $("error").textContent = "";
    try {
      await action(event);
    } catch (error) {
      told(error);
    }
  };
}

// Collections

async function refresh(made) {
  const [models, found] = await Promise.all([api.models(), api.stores()]);
  stores = found;
  const names = models.map((model) => model.id).filter((id) => id.startsWith("kvlink/"));
  const readers = models.map((model) => model.id).filter((id) => !id.startsWith("kvlink/"));
  $("reader").textContent = `reader and embedder: ${readers.join(", ")}`;
  const chosen = made ?? $("collection").value;
  $("collection").replaceChildren(
    ...names.map((id) => element("option", { value: id, textContent: id.slice("kvlink/".length) })),
  );
  if (names.includes(chosen)) $("collection").value = chosen;
  showFacts();
}

function current() {
  return stores.find((store) => store.kvlink_model === $("collection").value);
}

function showFacts() {
  const store = current();
  $("collection-facts").textContent = store
    ? `${store.kvlink_passages} passages, ${(store.usage_bytes / 2 ** 20).toFixed(1)} MiB of snapshots`
    : "none yet: make one and add files";
}

async function addFiles(files) {
  const store = current();
  if (!store) throw new Error("no collection is chosen; make one first");
  for (const file of files) {
    const state = element("span", { className: "quiet" });
    const item = element("li", {}, `${file.name} `, state);
    $("uploads").prepend(item);
    try {
      await api.addFile(store.id, file, (step) => (state.textContent = step));
      state.textContent = "done";
    } catch (error) {
      item.className = "failed";
      state.textContent = error.message;
    }
    await refresh();
  }
}

// Questions

async function answer(title, mode, question, signal, fullest) {
  const shown = answerCard(title);
  $("answers").append(shown.card);
  try {
    const { sources, trace } = await api.ask($("collection").value, question, mode, signal, shown.add);
    shown.end(trace, Math.max(fullest(trace), trace.first_token_ms));
    return { sources, trace, shown };
  } catch (error) {
    shown.fail(error.name === "AbortError" ? "stopped" : "no answer");
    throw error;
  }
}

async function ask() {
  const question = $("question").value.trim();
  if (!question || running) return;
  if (!$("collection").value) throw new Error("no collection is chosen; make one and add files first");
  running = new AbortController();
  $("ask").setAttribute("aria-disabled", "true"); // a button that is disabled loses the keyboard's place
  $("stop").hidden = false;
  $("answers").replaceChildren();
  $("sources-part").hidden = true;
  $("status").textContent = "answering";
  try {
    const reuse = await answer("Reuse of snapshots", "reuse", question, running.signal, () => 0);
    $("sources").replaceChildren(...reuse.sources.map(sourceItem));
    $("sources-part").hidden = !reuse.sources.length;
    $("status").textContent = "";
    if ($("compare").checked) {
      $("status").textContent = "now with full prefill";
      const first = reuse.trace.first_token_ms;
      const full = await answer("Full prefill", "full", question, running.signal, () => first);
      const fullest = Math.max(first, full.trace.first_token_ms);
      reuse.shown.end(reuse.trace, fullest);
      const share = (100 * first) / full.trace.first_token_ms;
      $("status").textContent =
        `First token after ${milliseconds(first)} instead of ${milliseconds(full.trace.first_token_ms)}: ${share.toFixed(0)} %`;
    }
  } finally {
    running = null;
    $("ask").removeAttribute("aria-disabled");
    if (document.activeElement === $("stop")) $("ask").focus();
    $("stop").hidden = true;
    if (!$("status").textContent.startsWith("First token")) $("status").textContent = "";
  }
}

// What a person can do

$("collection").addEventListener("change", showFacts);
$("key-form").addEventListener("submit", guarded(async () => {
  api.useKey($("key").value);
  await refresh();
  $("key-form").hidden = true;
}));
$("new-form").addEventListener("submit", guarded(async () => {
  const store = await api.makeStore($("new-name").value.trim());
  $("new-name").value = "";
  await refresh(store.kvlink_model);
}));
$("files").addEventListener("change", guarded(async () => {
  const files = [...$("files").files];
  $("files").value = "";
  await addFiles(files);
}));
$("ask-form").addEventListener("submit", guarded(ask));
$("stop").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask-form").requestSubmit();
  }
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
// A file dropped beside the place for it would replace the page.
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", guarded(async (event) => {
  $("drop").classList.remove("over");
  await addFiles([...event.dataTransfer.files]);
}));

guarded(() => refresh())();
