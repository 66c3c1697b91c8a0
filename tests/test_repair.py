"""Repair at question time against the hooked forward of `test_baselines`, links and markers in.

That forward is plain transformers in which the tokens that are not computed again are given the
keys (before RoPE) and values they have when encoded alone; it knows no cache, run or place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ModelMaker, WordEmbedder
from test_baselines import hooked_logits, plain_logits, prompt
from test_oracle import difference, documents

from kvlink_rag import KVLinkModel, KVLinkRAG, Passage, Text
from kvlink_rag.arguments import UNREPAIRED, parse_repair
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.repair import heads
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.sources import EncodeNow, Reuse
from kvlink_rag.trace import Trace

F32 = torch.float32
NAMES = sorted(FAMILIES)


def fresh(model: KVLinkModel) -> Reuse:
    return Reuse(EncodeNow(model.encoder), PrefixCache())


@pytest.mark.parametrize("family", NAMES)
def test_first_tokens_see_all_and_the_rest_keeps_what_it_saw(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=11)
    laid = model.layout(parts)
    first = torch.zeros(len(laid), dtype=torch.bool)
    for span in laid.passages:
        first[span.start : min(span.start + 4, span.stop)] = True
    found = model.prefill(parts, repair="first:4", reuse=fresh(model))
    assert difference(found.logits, hooked_logits(model, laid, lambda _: first)) < TOLERANCE[F32]
    fewer = hooked_logits(model, laid, lambda _: first & False)
    assert difference(found.logits, fewer) > 10 * TOLERANCE[F32]
    trace = found.trace
    assert trace.repaired_tokens == int(first.sum())
    assert trace.reused_tokens == laid.reused_tokens - trace.repaired_tokens
    assert trace.computed_tokens == len(laid) - trace.reused_tokens


@pytest.mark.parametrize("family", NAMES)
def test_those_that_deviate_most_are_selected(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=12)
    laid = model.layout(parts)
    count = math.ceil(0.3 * laid.reused_tokens)

    def most(deviation: torch.Tensor) -> torch.Tensor:
        return torch.isin(torch.arange(len(deviation)), deviation.argsort(descending=True)[:count])

    def least(deviation: torch.Tensor) -> torch.Tensor:
        deviation = deviation.masked_fill(deviation < 0, torch.inf)
        return torch.isin(torch.arange(len(deviation)), deviation.argsort()[:count])

    found = model.prefill(parts, repair="select:30%", reuse=fresh(model))
    assert difference(found.logits, hooked_logits(model, laid, most)) < TOLERANCE[F32]
    assert difference(found.logits, hooked_logits(model, laid, least)) > 10 * TOLERANCE[F32]
    assert found.trace.repaired_tokens == count
    assert found.trace.computed_tokens == len(laid) - laid.reused_tokens + count


@pytest.mark.parametrize("repair", ["first:9999", "select:100%"])
@pytest.mark.parametrize("family", NAMES)
def test_all_of_it_is_the_full_prefill_of_the_same_layout(
    make_model: ModelMaker, family: str, repair: str
) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=13)
    found = model.prefill(parts, repair=repair, reuse=fresh(model))
    assert difference(found.logits, plain_logits(model, model.layout(parts))) < TOLERANCE[F32]
    assert found.trace.reused_tokens == 0


@pytest.mark.parametrize("repair", ["first:3", "select:40%"])
def test_kept_runs_change_nothing(make_model: ModelMaker, repair: str) -> None:
    """Another question, another last passage, a next turn: as without anything kept."""
    model = make_model("llama", F32)
    docs = documents(4, seed=14, longest=14)
    head = Text("You are an assistant; the documents follow.")
    prompts = [
        [head, *map(Passage, chosen), Text(question)]
        for chosen in (docs[:3], [*docs[:2], docs[3]], docs[:3])
        for question in ("what is it?", "what was that?")
    ]
    reuse = fresh(model)
    for mode in (repair, "none", repair):
        for parts in prompts:
            found = model.prefill(parts, repair=mode, reuse=reuse)
            alone = model.prefill(parts, repair=mode, reuse=fresh(model))
            assert difference(found.logits, alone.logits) < TOLERANCE[F32]
    before = model.layout(prompts[0]).passages[0].start
    if repair.startswith("first"):  # a link run depends on nothing behind it
        assert found.trace.prefix_tokens > before
    else:
        assert found.trace.prefix_tokens == before


@pytest.mark.parametrize("repair", ["first:4", "select:25%"])
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_an_answer_goes_on_from_it(make_model: ModelMaker, family: str, repair: str) -> None:
    """Each step as the hooked forward over the prompt and the answer so far."""
    model, asked = make_model(family, F32), parse_repair(repair)
    laid = model.layout(prompt(model, 4, seed=15))
    count = math.ceil(asked.share * laid.reused_tokens)
    run = PromptRun(model.backbone, laid, Trace(mode="reuse"), replace(fresh(model), repair=asked))
    run.start(room=1)
    for said in range(1, 4):
        logits = run.step(64 + said)
        grown = replace(
            laid,
            token_ids=torch.cat([laid.token_ids, torch.arange(65, 65 + said)]),
            positions=torch.arange(len(laid) + said),
            segments=torch.cat([laid.segments, torch.zeros(said, dtype=torch.int64)]),
        )

        def chosen(deviation: torch.Tensor) -> torch.Tensor:
            if asked.share:
                best = deviation.argsort(descending=True)[:count]
                return torch.isin(torch.arange(len(deviation)), best)
            return torch.cat([heads(laid, asked.first), torch.zeros(said, dtype=torch.bool)])  # noqa: B023

        assert difference(logits, hooked_logits(model, grown, chosen)) < TOLERANCE[F32]


def collection(
    directory: Path, model: KVLinkModel, embedder: WordEmbedder, **asked: Any
) -> KVLinkRAG:
    return KVLinkRAG.open(directory, model=model, embedder=embedder, **asked)


def test_a_collection_repairs_and_remembers_how(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    model = make_model("llama", F32)
    with collection(tmp_path / "c", model, embedder) as rag:
        rag.add(documents(5, seed=16))
        plain = rag.ask("what?", k=3, max_new_tokens=2)
        asked = rag.ask("what?", k=3, max_new_tokens=2, repair="first:2")
        chat = rag.complete(f"{plain.hits[0].document.text}\n\nwhat?", repair="first:2")
        list(chat)
    assert (plain.trace.repaired_tokens, asked.trace.repaired_tokens) == (0, 6)
    assert chat.trace.repaired_tokens == 2 * chat.trace.passages
    with collection(tmp_path / "c", model, embedder, repair="select:50%") as rag:
        first = rag.ask("what?", k=3, max_new_tokens=2)
        stored = first.trace.reused_tokens + first.trace.repaired_tokens
        assert first.trace.repaired_tokens == math.ceil(stored / 2)
        assert first.trace.snapshots_encoded == 0
        assert rag.ask("what?", k=3, max_new_tokens=2, mode="full").trace.repaired_tokens == 0
    with collection(tmp_path / "c", model, embedder) as rag:
        assert rag.ask("what?", k=3, max_new_tokens=2).trace.repaired_tokens
        assert rag.ask("what?", k=3, max_new_tokens=2, repair="none").trace.repaired_tokens == 0


@pytest.mark.parametrize("repair", ["first:2", "select:50%"])
def test_what_is_verified_are_the_snapshots_whatever_is_repaired(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path, repair: str
) -> None:
    model = make_model("llama", F32)
    with collection(tmp_path, model, embedder, repair=repair) as rag:
        rag.add(documents(5, seed=17))
        assert rag.ask("what?", k=3, max_new_tokens=1).trace.repaired_tokens
        assert rag.verify().holds


@pytest.mark.parametrize("repair", ["first:4", "select:30%"])
@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_snapshots_in_device_memory_are_repaired_alike(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path, codec: str, repair: str
) -> None:
    model, docs = make_model("llama", F32), documents(4, seed=16)
    parts = model.prompt(docs, "what?")
    with collection(tmp_path, model, embedder, codec=codec, device_budget="1GB") as rag:
        rag.add(docs)
        kept = [model.prefill(parts, repair=repair, reuse=rag.reuse) for _ in range(2)]
    alone = Reuse(EncodeNow(model.encoder, codec))
    expected = model.prefill(parts, repair=repair, reuse=alone).logits
    for found in kept:  # on the way there, then there
        assert difference(found.logits, expected) < TOLERANCE[F32]


@pytest.mark.parametrize("name", ["first", "first:-1", "select:101%", "select:15", "all", "", 16])
def test_a_repair_that_there_is_not_is_told(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path, name: Any
) -> None:
    with pytest.raises(ConfigError, match=r"expected none, first:N .* or select:P%"):
        parse_repair(name)
    with pytest.raises(ConfigError, match=r"expected none"):
        collection(tmp_path / "c", make_model("llama", F32), embedder, repair=name)
    assert parse_repair("none") is UNREPAIRED
