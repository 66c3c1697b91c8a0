"""8-bit weights for generated tokens: what they change, and what they must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ModelMaker
from test_oracle import difference, documents

import kvlink_rag.engine.quick_weights
from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Trace
from kvlink_rag.engine.quick_weights import QuickWeights
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.sources import EncodeNow, Reuse

F32 = torch.float32
NAMES = sorted(FAMILIES)


def in_few_bits(row: torch.Tensor, weight: torch.Tensor, most: int) -> torch.Tensor:
    """The product by its definition, in float64: weights by channel, the row over its range in
    steps from 0 to `most`."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    weights = (weight / scale).round() * scale
    low, high = min(0.0, row.min().item()), max(0.0, row.max().item())
    step = (high - low) / most
    zero = round(-low / step)
    states = ((row / step).round() + zero).clamp(0, most) - zero
    return (states * step) @ weights.T


@pytest.mark.parametrize("vnni", [True, False], ids=["8-bit", "7-bit"])
def test_products_are_of_weights_and_rows_in_8_bits(
    monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    monkeypatch.setattr(kvlink_rag.engine.quick_weights, "adds_products_of_bytes", lambda: vnni)
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    row = torch.randn(3, 96)
    plain = linear(row)
    quick = QuickWeights(linear)
    assert torch.equal(linear(row), plain)  # not in use
    with quick.in_use():
        found = linear(row)
    expected = torch.stack(
        [
            in_few_bits(r, linear.weight.detach().double(), 255 if vnni else 127)
            for r in row.double()
        ]
    )
    expected += linear.bias.detach().double()
    assert difference(found.double(), expected) < 1e-5
    assert not torch.equal(found, plain)


def test_a_row_is_the_same_in_company() -> None:
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 64)
    rows = torch.randn(5, 1, 64) * torch.tensor([1, 1000, 1, 0.001, 1])[:, None, None]
    with QuickWeights(linear).in_use():
        together, alone = linear(rows), torch.cat([linear(row[None]) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("family", NAMES)
def test_reuse_answers_as_the_masked_prefill_with_the_same_weights(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family, F32)
    parts = model.prompt(documents(5, seed=3), "what is it?")
    own = model.prefill(parts, reuse=Reuse(EncodeNow(model.encoder)))
    one = model.encoder.one([7])
    model.backbone.quick = QuickWeights(model.backbone.model)
    try:
        found = model.prefill(parts, reuse=Reuse(EncodeNow(model.encoder)))
        assert torch.equal(found.logits, own.logits)  # the prompt has its own weights
        assert found.trace.weights == "int8"
        again = model.encoder.one([7])  # and so has a passage of one token
        assert torch.equal(again.values, one.values)
        said = {m: model.generate(parts, mode=m, max_new_tokens=10) for m in ("reuse", "masked")}
        assert said["reuse"] == said["masked"]
    finally:
        model.backbone.quick = None


def test_generated_tokens_take_them_until_weights_change(make_model: ModelMaker) -> None:
    model = make_model("llama", F32, seed=8)
    parts = model.prompt(documents(3, seed=1), "what?")

    def second() -> torch.Tensor:
        """Logits behind the first generated token."""
        run = PromptRun(
            model.backbone,
            model.layout(parts),
            Trace(mode="reuse"),
            Reuse(EncodeNow(model.encoder)),
        )
        run.start(4)
        return run.step(9)

    own = second()
    model.backbone.quick = QuickWeights(model.backbone.model)
    quick = second()
    assert 0 < difference(quick, own) < 0.1
    with torch.no_grad():
        for module in model.backbone.model.modules():
            if type(module) is torch.nn.Linear:
                module.weight.mul_(1)  # written to: no longer what was rounded
    assert torch.equal(second(), own)
    model.backbone.quick = None


def test_an_answer_is_no_beginning_of_a_prompt(make_model: ModelMaker) -> None:
    """Its entries come from other weights than a prompt's would."""
    model = make_model("llama", F32, seed=8)
    parts = model.prompt(documents(2, seed=2), "and?")
    kept = {}
    for name in ("own", "int8"):
        if name == "int8":
            model.backbone.quick = QuickWeights(model.backbone.model)
        cache = PrefixCache()
        model.generate(parts, max_new_tokens=6, reuse=Reuse(EncodeNow(model.encoder), cache))
        kept[name] = len(cache)
    model.backbone.quick = None
    assert kept["int8"] == kept["own"] - 1


def test_where_there_are_none_it_is_said(
    saved_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="found weights 'int3', expected one of own, int8"):
        KVLinkModel.from_pretrained(saved_pair[0], device="cpu", weights="int3")
    with pytest.raises(ConfigError, match="found a model on meta"):
        QuickWeights(torch.nn.Linear(2, 2, device="meta"))
    model = KVLinkModel.from_pretrained(saved_pair[0], device="cpu", weights="int8")
    with pytest.raises(ConfigError, match="a model that is loaded"):
        KVLinkRAG.open(tmp_path / "c", model=model, weights="int8")
    monkeypatch.setattr(kvlink_rag.engine.quick_weights, "ENGINES", ())
    with pytest.raises(ConfigError, match="no products of 8-bit weights"):
        KVLinkModel.from_pretrained(saved_pair[0], device="cpu", weights="int8")


def test_a_collection_answers_with_them(saved_pair: tuple[Path, Path], tmp_path: Path) -> None:
    reader, embedder = saved_pair
    with KVLinkRAG.open(
        tmp_path / "c", model=reader, embedder=embedder, device="cpu", weights="int8"
    ) as rag:
        rag.add([Document("The harbour was built in 1911.")])
        assert rag.model.backbone.quick is not None
        answer = rag.ask("When?", max_new_tokens=4)
        assert answer.trace.weights == "int8"
