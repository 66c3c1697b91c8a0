"""Keys and values in pages, read back by attention as vLLM does it, against the masked prefill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import NoEmbedder
from torch import Tensor
from vllm_kvlink import Handover, Options
from vllm_kvlink.pages import find_layers, slots, write
from vllm_kvlink.prefilling import Prefiller

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError, PromptTooLong

BLOCK, BLOCKS = 16, 64


class HeadsFirst:
    """Pages [blocks, kv_heads, block, 2 * head_dim], as vLLM's CPU back end has them."""

    def new(self, heads: int, dim: int) -> Tensor:
        return torch.full((BLOCKS, heads, BLOCK, 2 * dim), torch.nan)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        both = torch.cat([key, value], -1)
        kv_cache[slot_mapping // BLOCK, :, slot_mapping % BLOCK] = both

    def read(self, pages: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        both = pages[at // BLOCK, :, at % BLOCK]
        return both.chunk(2, -1)  # type: ignore[return-value]


class TokensFirst(HeadsFirst):
    """Pages [2, blocks, block, kv_heads, head_dim]."""

    def new(self, heads: int, dim: int) -> Tensor:
        return torch.full((2, BLOCKS, BLOCK, heads, dim), torch.nan)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        kv_cache[0].flatten(0, 1)[slot_mapping] = key
        kv_cache[1].flatten(0, 1)[slot_mapping] = value

    def read(self, pages: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return pages[0].flatten(0, 1)[at], pages[1].flatten(0, 1)[at]


def layers(back_end: HeadsFirst, model: Any) -> list[Any]:
    core = model.backbone
    return [
        SimpleNamespace(impl=back_end, kv_cache=back_end.new(core.kv_heads, core.head_dim))
        for _ in range(core.layers)
    ]


@pytest.mark.parametrize("back_end", [HeadsFirst(), TokensFirst()])
@pytest.mark.parametrize("first", [0, 32])
def test_pages_hold_the_masked_prefill(rag: KVLinkRAG, back_end: HeadsFirst, first: int) -> None:
    """Blocks in any order, from any token on; nothing else is touched."""
    layout = rag.model.layout(rag.model.prompt(tiny.documents(), "When was it built?"))
    tokens = len(layout) - 1
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    paged = layers(back_end, rag.model)
    states = Prefiller(rag).states(Handover.of(layout))
    at = slots(blocks, BLOCK, first, tokens - first)
    write(paged, states.keys[:, :, first:tokens], states.values[:, :, first:tokens], at)

    expected = rag.model.states(layout, "masked")
    everywhere = slots(blocks, BLOCK, 0, BLOCKS * BLOCK)
    for number, layer in enumerate(paged):
        keys, values = back_end.read(layer.kv_cache, everywhere)
        for found, states_ in ((keys, expected.keys), (values, expected.values)):
            wanted = states_[number].transpose(0, 1)[first:tokens]
            torch.testing.assert_close(found[first:tokens], wanted, atol=1e-4, rtol=0)
            assert found[:first].isnan().all()
            assert found[tokens:].isnan().all()


def test_slots() -> None:
    assert slots([5, 0, 3], 4, 2, 7).tolist() == [22, 23, 0, 1, 2, 3, 12]


def test_the_store_is_read_and_a_miss_is_encoded(rag: KVLinkRAG) -> None:
    handover = Handover.of(rag.model.layout(rag.model.prompt(tiny.documents(), "When?")))
    prefiller = Prefiller(rag)
    found = prefiller.states(handover).trace
    assert (found.snapshots_found, found.snapshots_encoded) == (4, 0)
    (key,) = {rag.snapshots.key(rag.model.passage_tokens(tiny.documents()[0]))}
    rag.store.delete(key)
    again = prefiller.states(handover)
    assert (again.trace.snapshots_found, again.trace.snapshots_encoded) == (3, 1)
    expected = rag.model.states(handover.layout(rag.model.spec.header), "masked")
    torch.testing.assert_close(again.keys, expected.keys, atol=1e-4, rtol=0)


def test_computed_runs_are_each_tenants_own(rag: KVLinkRAG) -> None:
    layout = rag.model.layout(rag.model.prompt(tiny.documents(), "When was it built?"))
    prefiller = Prefiller(rag)
    computed = [
        prefiller.states(Handover.of(layout, tenant)).trace.computed_tokens
        for tenant in ("one", "one", "another")
    ]
    assert computed[0] == computed[2] > computed[1]


def test_a_prompt_of_another_model_is_refused(rag: KVLinkRAG) -> None:
    with pytest.raises(PromptTooLong, match="laid out for another model"):
        Prefiller(rag).states(Handover((1, 10_000, 2)))
    with pytest.raises(PromptTooLong, match=str(tiny.WINDOW)):
        Prefiller(rag).states(Handover((1,) * tiny.WINDOW))


def context(*numbers: int, impl: object = HeadsFirst()) -> dict[str, Any]:
    layer = SimpleNamespace(impl=impl)
    return {f"model.layers.{n}.self_attn.attn": layer for n in numbers}


def test_layers_are_found_by_their_numbers() -> None:
    known = {
        name: SimpleNamespace(impl=HeadsFirst(), name=name) for name in context(10, 9, *range(9))
    }
    found = find_layers(known, list(known), 11)
    assert [layer.name.split(".")[2] for layer in found] == [str(n) for n in range(11)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2, 3), (1, 2, 3)])
def test_other_layers_than_the_models_are_refused(numbers: tuple[int, ...]) -> None:
    known = context(*numbers)
    with pytest.raises(ConfigError, match="expected one for each of the 3 layers"):
        find_layers(known, list(known), 3)


def test_a_back_end_that_writes_otherwise_is_refused() -> None:
    known = context(0, impl=SimpleNamespace())
    with pytest.raises(ConfigError, match="no do_kv_cache_update"):
        find_layers(known, list(known), 1)


def test_the_shared_tier_is_read_where_the_store_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one machine encoded, another's connector takes from the tier, as the options say."""
    monkeypatch.setenv("KVLINK_REMOTE_SECRET", "0123456789abcdef" * 4)
    (tmp_path / "tier").mkdir()
    remote = f"file://{tmp_path / 'tier'}?namespace=shared&timeout=60"
    source = tiny.saved(tmp_path / "model")
    made = {"model": source, "embedder": NoEmbedder(), "dtype": "float32", "codec": "exact"}
    with KVLinkRAG.open(tmp_path / "one", remote=remote, **made) as one:
        one.register(tiny.documents())
        layout = one.model.layout(one.model.prompt(tiny.documents(), "When was it built?"))
        expected = one.model.states(layout, "masked")
    with KVLinkRAG.open(tmp_path / "two", **made) as two:  # remembers the model, holds nothing
        two.register(tiny.documents()[:1])
        two.delete([tiny.TOWNS[0]])

    options = Options.of({"collection": str(tmp_path / "two"), "device": "cpu", "remote": remote})
    prefiller = Prefiller(options.open("float32"))
    found = prefiller.states(Handover.of(layout))
    prefiller.close()
    assert (found.trace.snapshots_found, found.trace.snapshots_encoded) == (4, 0)
    torch.testing.assert_close(found.keys, expected.keys, atol=1e-4, rtol=0)
