"""Modes and batched decoding against the engine's own stream, and reuse against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvlink_rag import Document, KVLinkModel
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.errors import ConfigError
from kvlink_rag.evaluation.decoding import decode
from kvlink_rag.evaluation.modes import InMemory, Started, contenders

ModelMaker = Callable[..., KVLinkModel]
QUESTIONS = ["Who built it?", "When was the harbour of Orvale built, and by whom?", "Why?"]
MOST = 12


def documents(count: int) -> list[Document]:
    return [
        Document(f"The harbour number {i} was built in 19{i:02}.", title=f"H{i}")
        for i in range(count)
    ]


def started(model: KVLinkModel, mode: str) -> list[Started]:
    (contender,) = contenders(model, [mode])
    memory = InMemory(model)
    return [
        contender(contender.prompt(example), memory)
        for i, question in enumerate(QUESTIONS)
        for example in [Example(str(i), question, ("x",), tuple(documents(1 + 2 * i)))]
    ]


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("mode", ["unmasked", "masked", "reuse"])
def test_a_batch_says_what_each_prompt_alone_says(
    make_model: ModelMaker, family: str, mode: str
) -> None:
    """Prompts of different lengths; the reference is the engine's stream, one token at a time."""
    model = make_model(family)
    found = decode(model, started(model, mode), MOST)
    for i, question in enumerate(QUESTIONS):
        parts = model.prompt(documents(1 + 2 * i), question)
        engine_mode = "full" if mode == "unmasked" else mode
        assert found[i].text == model.generate(parts, mode=engine_mode, max_new_tokens=MOST)
        assert len(found[i].margins) == len(found[i].tokens) <= MOST


@pytest.mark.parametrize("links", [0, 5])
def test_reuse_and_masked_predict_the_same_in_float32(make_model: ModelMaker, links: int) -> None:
    model = make_model("llama", links=links)
    reuse, masked = (decode(model, started(model, m), MOST) for m in ("reuse", "masked"))
    unmasked = decode(model, started(model, "unmasked"), MOST)
    assert [a.tokens for a in reuse] == [a.tokens for a in masked]
    assert [a.tokens for a in unmasked] != [a.tokens for a in masked]


def test_full_attention_is_transformers_over_the_plain_text(make_model: ModelMaker) -> None:
    """The reference is transformers' own `generate` over ids that were put together by hand."""
    model = make_model("llama")
    hf, spec = model.tokenizer.hf, model.spec
    for answer, question, count in zip(
        decode(model, started(model, "full"), MOST), QUESTIONS, (1, 3, 5), strict=True
    ):
        text = "".join(f"{d.title}: {d.text}\n" for d in documents(count)) + question
        ids = [hf.bos_token_id, *hf(text)["input_ids"], *hf(spec.prompt_preset.after)["input_ids"]]
        said = model.backbone.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=MOST,
            do_sample=False,
            pad_token_id=hf.pad_token_id,
            suppress_tokens=[*model.end_ids, *model.spec.special_ids()],
        )[0, len(ids) :].tolist()
        assert answer.tokens == said


def test_closed_has_no_documents(make_model: ModelMaker) -> None:
    model = make_model("llama")
    for one, many in zip(started(model, "closed"), started(model, "full"), strict=True):
        assert one.trace.passages == 0
        assert one.position < many.position


def test_modes_cost_what_they_should(make_model: ModelMaker) -> None:
    model = make_model("llama")
    reuse, without, full = (started(model, m)[1].trace for m in ("reuse", "reuse:0", "unmasked"))
    assert (reuse.passages, reuse.snapshots_found, reuse.snapshots_encoded) == (3, 3, 0)
    assert reuse.reused_tokens > 0
    assert full.reused_tokens == 0
    assert full.computed_tokens == reuse.computed_tokens + reuse.reused_tokens
    assert without.computed_tokens == reuse.computed_tokens - 3 * 5
    assert reuse.first_token_ms > reuse.prefill_ms > 0


def test_the_window_ends_an_answer(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    first = started(model, "reuse")[0]
    room = 3
    window = first.position + room
    monkeypatch.setattr(model, "format", replace(model.format, window=window))
    (found,) = decode(model, [first], MOST)
    assert len(found.tokens) == room


@pytest.mark.parametrize("name", ["reus", "reuse:3", "reuse:x", "full:0", ""])
def test_unknown_modes_are_refused(make_model: ModelMaker, name: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        list(contenders(make_model("llama"), [name]))


def test_a_contender_leaves_the_model_as_it_was(make_model: ModelMaker) -> None:
    model = make_model("llama")
    (without,) = contenders(model, ["reuse:0"])
    assert without.model.spec.links_per_passage == 0
    assert model.spec.links_per_passage == 5
    assert without.model.backbone is model.backbone
    parts = model.prompt(documents(1), "?")
    assert len(model.layout(parts)) == len(without.model.layout(parts)) + 5


@pytest.mark.parametrize("mode", ["naive", "cacheblend", "epic"])
def test_baselines_say_what_they_say_by_themselves(make_model: ModelMaker, mode: str) -> None:
    baselines = pytest.importorskip(
        "kvlink_rag.compare.baselines", reason="no baselines in this tree"
    )
    model = make_model("llama")
    found = decode(model, started(model, mode), MOST)
    for i, question in enumerate(QUESTIONS):
        parts = model.prompt(documents(1 + 2 * i), question)
        ways = baselines.Baselines(model)
        assert found[i].text == ways.generate(mode, parts, max_new_tokens=MOST)
    traces = [each.trace for each in started(model, mode)]
    assert all(trace.reused_tokens > 0 and trace.first_token_ms > 0 for trace in traces)
    assert all(trace.snapshots_encoded == 0 for trace in traces)
