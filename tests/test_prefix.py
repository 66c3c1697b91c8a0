"""Runs kept between prompts: what comes back is exactly what was computed, and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ModelMaker, byte_spec, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, Passage, Text
from kvlink_rag.model.verify import TOLERANCE, compare
from kvlink_rag.snapshots.kept_runs import PrefixCache, Run
from kvlink_rag.snapshots.sources import EncodeNow, Reuse

F32 = torch.float32
DOCS = [Document(f"The harbour of {t} was built in 19{n}.", title=t) for n, t in enumerate("ABC")]
CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def run(tokens: int, value: float = 0.0) -> Run:
    return Run(*(torch.full((1, 1, tokens, 2), value) for _ in "kv"))


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_a_beginning_is_found_after_the_same_chain_only() -> None:
    cache = PrefixCache()
    cache.put("a", ids(1, 2, 3), run(3, 1.0))
    cache.put("a", ids(1, 5), run(2, 2.0))
    assert len(cache.get("a", ids(1, 2, 3))) == 3
    assert len(cache.get("a", ids(1, 2, 9, 9))) == 2
    assert len(cache.get("a", ids(1, 2))) == 2
    assert float(cache.get("a", ids(1, 5, 7)).keys.max()) == 2.0
    assert cache.get("a", ids(7, 2, 3)) is None
    assert cache.get("b", ids(1, 2, 3)) is None


def test_the_least_recently_used_go_first() -> None:
    size = run(4).nbytes
    cache = PrefixCache(2 * size)
    for i in range(3):
        cache.put("a", ids(i, 1, 1, 1), run(4))
        cache.get("a", ids(0))
    assert cache.nbytes == 2 * size
    assert cache.get("a", ids(1)) is None
    assert cache.get("a", ids(0)) is not None
    assert cache.get("a", ids(2)) is not None
    cache.put("a", ids(*range(100)), run(100))
    assert len(cache) == 2  # larger than the budget: not kept, and nothing goes for it
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get("a", ids(0))) == (0, 0, None)


def equals_masked(model: KVLinkModel, parts: list, reuse: Reuse) -> bool:
    got = model.prefill(parts, reuse=reuse).logits
    return compare(got, model.prefill(parts, "masked").logits, TOLERANCE[F32]).holds


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_only_what_differs_is_computed(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    reuse = Reuse(EncodeNow(model.encoder), PrefixCache())

    def ask(question: str) -> list:
        between = Text("\n\nUse the passages above. Question: " + question)
        return [Text("<bos>", special=True), Text("Read."), *map(Passage, DOCS), between]

    first = model.prefill(ask("who?"), reuse=reuse).trace
    again = model.prefill(ask("what is it?"), reuse=reuse).trace
    assert first.prefix_tokens == 0
    assert again.computed_tokens == len("at is it?")  # "wh" stood there already
    assert again.prefix_tokens + again.computed_tokens + again.reused_tokens == len(
        model.layout(ask("what is it?"))
    )
    same = model.prefill(ask("what is it?"), reuse=reuse).trace
    assert same.computed_tokens == 1
    for question in ("what is it?", "what was it?", "", "who?"):
        assert equals_masked(model, ask(question), reuse)


def chatty() -> KVLinkModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return KVLinkModel(random_model("llama", F32), tokenizer, byte_spec())


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_the_next_turn_reuses_the_answer(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the answer's text has the tokens that were generated: all but the last."""
    model = chatty()
    readable = list(range(65, 91))  # letters, so that the text has the generated tokens
    real = model.backbone.forward

    def forward(*args, **kwargs):  # type: ignore[no-untyped-def]
        logits = real(*args, **kwargs)
        kept = torch.full_like(logits, -1e9)
        kept[:, readable] = logits[:, readable]
        return kept

    monkeypatch.setattr(model.backbone, "forward", forward)
    turns = [{"role": "user", "content": [*map(Passage, DOCS), Text("what?")]}]
    said = model.stream(model.chat(turns), max_new_tokens=limit)
    answer = "".join(said)
    assert len(answer) == limit
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
    stream = model.stream(model.chat(turns), max_new_tokens=3)
    again = "".join(stream)
    rest = "<eos><bos>user\nand?<eos><bos>assistant\n"
    computed = len(rest.replace("<eos>", "#").replace("<bos>", "#"))
    assert stream.trace.computed_tokens == computed + 1
    assert again == model.generate(model.chat(turns), max_new_tokens=3, mode="masked")


def test_an_answer_that_tokenises_otherwise_is_not_reused() -> None:
    model = chatty()
    turns = [{"role": "user", "content": "what?"}]
    "".join(model.stream(model.chat(turns), max_new_tokens=9))
    before = model.prefill(model.chat(turns)).trace
    turns += [
        {"role": "assistant", "content": "\u00e9, other"},
        {"role": "user", "content": "and?"},
    ]
    trace = model.prefill(model.chat(turns)).trace
    assert trace.prefix_tokens <= before.prefix_tokens + 1
    assert model.verify(model.chat(turns)).holds
