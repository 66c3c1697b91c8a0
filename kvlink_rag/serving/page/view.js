// What is shown, made of elements and text: text of documents and answers is never HTML. Knows no server.

const STAGES = ["retrieval", "layout", "read", "encode", "assembly", "waiting", "prefill"];
const IN_WORDS = {
  retrieval: "search", layout: "lay out", read: "read snapshots", encode: "encode now",
  assembly: "place", waiting: "wait", prefill: "run the model",
};
const PLACES = ["page", "slide", "sheet", "chapter"];

export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [field, value] of Object.entries(fields)) {
    if (field in made) made[field] = value;
    else made.setAttribute(field, value);
  }
  made.append(...children);
  return made;
}

/** A card for one way to answer, and what fills it. */
export function answerCard(title) {
  const first = element("p", { className: "first", textContent: "…" });
  const text = element("div", { className: "text", dir: "auto" });
  const times = element("div");
  const card = element(
    "article", { className: "answer", "aria-busy": "true" },
    element("h3", { textContent: title }), first, text, times,
  );
  return {
    card,
    add: (piece) => text.append(piece),
    fail: (message) => {
      card.removeAttribute("aria-busy");
      first.replaceChildren(message);
    },
    end: (trace, fullest) => {
      card.removeAttribute("aria-busy");
      first.textContent = `${milliseconds(trace.first_token_ms)} to the first token`;
      times.replaceChildren(bar(trace, fullest), ...facts(trace));
    },
  };
}

/** The stages of a trace, as wide as their share of `fullest` milliseconds. */
function bar(trace, fullest) {
  const taken = STAGES.map((stage) => [stage, Number(trace[`${stage}_ms`] ?? 0)]);
  const parts = taken.map(([stage, time]) => {
    const part = element("span", { className: stage, title: `${IN_WORDS[stage]}: ${milliseconds(time)}` });
    part.style.flexGrow = time;
    return part;
  });
  const rest = element("span");
  rest.style.flexGrow = Math.max(0, fullest - taken.reduce((sum, [, time]) => sum + time, 0));
  return element("div", { className: "bar", "aria-hidden": "true" }, ...parts, rest);
}

function facts(trace) {
  const stages = STAGES.filter((stage) => trace[`${stage}_ms`] >= 0.05).map((stage) =>
    element("li", {}, element("i", { className: stage }), `${IN_WORDS[stage]} ${milliseconds(trace[`${stage}_ms`])}`),
  );
  const reused = trace.reused_tokens + trace.prefix_tokens;
  const kept = trace.prefix_tokens ? ` (${trace.prefix_tokens} of them as an earlier question left them)` : "";
  const told = `${trace.computed_tokens} tokens computed, ${reused} reused${kept}, ${trace.generated_tokens} said`;
  return [
    element("ul", { className: "stages", "aria-label": "Time by stage" }, ...stages),
    element("p", { className: "quiet", textContent: `${told}; ${milliseconds(trace.total_ms)} in all` }),
  ];
}

export function sourceItem(source) {
  const place = PLACES.filter((name) => name in source.metadata).map((name) => `${name} ${source.metadata[name]}`);
  const where = [source.filename.split("/").filter(Boolean).pop(), ...place].filter(Boolean).join(", ");
  const title = source.title || source.text.slice(0, 80);
  return element(
    "li", {},
    element("details", {},
      element(
        "summary", {},
        element("bdi", { textContent: title }),
        element("span", { className: "quiet", title: source.filename, textContent: where ? ` — ${where}` : "" }),
      ),
      element("blockquote", { textContent: source.text, dir: "auto" })),
  );
}

export function milliseconds(time) {
  return time >= 1000 ? `${(time / 1000).toFixed(2)} s` : `${time >= 10 ? Math.round(time) : time.toFixed(1)} ms`;
}
