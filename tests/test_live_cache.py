"""Live caches: filled in place up to their capacity, grown beyond it, named as models name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ModelMaker
from test_oracle import F32, difference, fresh, prompt

from kvlink_rag import Trace
from kvlink_rag.engine.live_cache import LiveCache, LiveLayer, as_argument
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.verify import TOLERANCE


def states(tokens: int, value: float) -> torch.Tensor:
    return torch.full((1, 1, tokens, 2), value)


def test_a_layer_is_filled_to_the_brim_in_place_and_grows_beyond() -> None:
    layer = LiveLayer(states(4, 0.0), states(4, 0.0), length=2)
    buffer = layer.keys
    layer.update(states(2, 1.0), states(2, 2.0))
    assert layer.keys is buffer
    keys, values = layer.update(states(1, 3.0), states(1, 4.0))
    assert layer.keys is not buffer
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1, 1, 3]
    assert values[0, 0, :, 0].tolist() == [0, 0, 2, 2, 4]


def buffers(cache: LiveCache) -> list[int]:
    return [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("mode", ["reuse", "masked"])
def test_the_room_asked_for_is_there_and_no_more(make_model: ModelMaker, mode: str) -> None:
    """Three tokens without new memory, a fourth one all the same."""
    model = make_model("llama", F32)
    parts = prompt(model, 3)
    model.backbone._spare = None  # an earlier answer's memory may be larger
    run = PromptRun(model.backbone, model.layout(parts), Trace(mode=mode), fresh(model))
    oracle = PromptRun(model.backbone, model.layout(parts), Trace(mode="masked"), fresh(model))
    logits, expected = run.start(room=3), oracle.start(room=9)
    assert run.cache is not None
    assert run.cache.buffers[0].shape[2] == len(run.prompt) + 3
    before = buffers(run.cache)
    for step in range(4):
        assert difference(logits, expected) < TOLERANCE[F32]
        assert buffers(run.cache) == before, step
        token = int(expected.argmax())
        logits, expected = run.step(token), oracle.step(token)
    assert difference(logits, expected) < TOLERANCE[F32]
    assert buffers(run.cache) != before


class Newer(torch.nn.Module):
    def forward(self, hidden: Any, cache: Any = None, **kwargs: Any) -> Any:
        return cache


class Older(torch.nn.Module):
    def forward(self, hidden: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return past_key_values


@pytest.mark.parametrize("kind", [Newer, Older])
def test_a_forward_gets_its_cache_by_the_name_it_knows(kind: type[torch.nn.Module]) -> None:
    """It would swallow any other name."""
    module, cache = kind(), object()
    assert module(None, **as_argument(cache, module)) is cache  # type: ignore[arg-type]
