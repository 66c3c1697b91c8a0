"""The baselines against transformers' own forward: plain, under the rule's mask, and with hooks.

The hooked forward is the independent statement of selective recompute: one causal forward of plain
transformers in which, from the second layer on, the tokens that are not computed again are given
the keys (before RoPE) and values they have when encoded alone. It knows nothing of caches, places
or rotation. Tolerances as in `test_oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ModelMaker
from test_oracle import as_given, by_token, difference, documents, givers, rule_logits

from kvlink_rag import KVLinkModel, Passage, Text
from kvlink_rag.compare.baselines import BLOCK, METHODS, Baselines
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.prompt.layout import Layout

F32 = torch.float32
NAMES = sorted(FAMILIES)


def prompt(model: KVLinkModel, count: int = 4, seed: int = 0, question: str = "what?") -> list[Any]:
    """Short passages, so that a sliding window of 24 reaches over several."""
    return model.prompt(documents(count, seed, longest=14), question)


def plain_logits(model: KVLinkModel, laid: Layout) -> torch.Tensor:
    with torch.inference_mode():
        output = model.backbone.model(input_ids=laid.token_ids[None], use_cache=False)
    return output.logits[0, -1].float()


def stretch(backbone: Any) -> torch.Tensor:
    """[head_dim]: what RoPE multiplies the numbers of each key by, besides turning them."""
    rotary, factors = backbone.model.model.rotary_emb, torch.ones(backbone.head_dim)
    if (scaling := getattr(rotary, "attention_scaling", 1.0)) != 1.0:
        factors[: 2 * len(rotary.inv_freq)] = scaling
    return factors


def hooked_logits(
    model: KVLinkModel, laid: Layout, choose: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits of a causal forward in which the passage tokens not marked have keys and values given.

    choose: marks tokens, bool [tokens], by their squared deviation in the second layer.
    """
    backbone = model.backbone
    alone: dict[str, torch.Tensor] = {}
    for name in ("keys", "values"):
        alone[name] = torch.zeros(backbone.layers, backbone.kv_heads, len(laid), backbone.head_dim)
        for span in laid.passages:
            snapshot = model.encoder.one(laid.passage_ids(span))
            alone[name][:, :, span.start : span.stop] = getattr(snapshot, name)

    def deviation() -> torch.Tensor:
        """Of the second layer, whose keys and values depend on the first alone."""
        handles, found = [], {}
        layer = backbone.model.model.layers[1].self_attn
        for name, (module, columns) in givers(layer).items():

            def keep(
                _: Any, __: Any, output: torch.Tensor, name: str = name, part: slice = columns
            ) -> None:
                states = by_token(output.detach(), part, laid, backbone.kv_heads)
                found[name] = states.transpose(0, 1)

            handles.append(module.register_forward_hook(keep))
        plain_logits(model, laid)
        for handle in handles:
            handle.remove()
        differ = {name: found[name] - alone[name][1] for name in found}
        differ["keys"] *= stretch(backbone)
        return sum(each.square().sum(dim=(0, 2)) for each in differ.values())  # type: ignore[return-value]

    own = (laid.segments == 0) | choose(deviation().masked_fill(laid.segments == 0, -1))
    handles = []
    for number, layer in enumerate(backbone.model.model.layers[1:], 1):
        for name, (module, columns) in givers(layer.self_attn).items():
            given = alone[name][number].transpose(0, 1)

            def replace(
                _: Any, __: Any, output: torch.Tensor, given: Any = given, part: slice = columns
            ) -> torch.Tensor:
                states = by_token(output, part, laid, backbone.kv_heads).clone()
                states[~own] = given[~own]
                return as_given(states, output, part)

            handles.append(module.register_forward_hook(replace))
    try:
        return plain_logits(model, laid)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", NAMES)
def test_recomputing_all_is_the_full_prefill(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=2)
    ways = Baselines(model, fraction=1.0, first_tokens=1000)
    expected = plain_logits(model, ways.layout(parts))
    for method in ("full", "prefix", "cacheblend", "epic"):
        ways.forget()
        started = ways.start(method, parts)
        assert difference(started.logits, expected) < TOLERANCE[F32], method
        assert started.computed_tokens == len(started.prompt), method
    assert difference(ways.start("naive", parts).logits, expected) > 100 * TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_naive_is_the_masked_prefill_without_link_tokens(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=3)
    ways = Baselines(model)
    started = ways.start("naive", parts)
    assert started.computed_tokens == len(started.prompt) - started.prompt.reused_tokens
    assert difference(started.logits, rule_logits(model, started.prompt)) < TOLERANCE[F32]


@pytest.mark.parametrize("fraction", [0.15, 0.5])
@pytest.mark.parametrize("family", NAMES)
def test_cacheblend_is_a_forward_with_stored_keys_and_values(
    make_model: ModelMaker, family: str, fraction: float
) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=4)
    ways = Baselines(model, fraction=fraction)
    started = ways.start("cacheblend", parts)
    count = math.ceil(fraction * started.prompt.reused_tokens)

    def most(deviation: torch.Tensor) -> torch.Tensor:
        return torch.isin(torch.arange(len(deviation)), deviation.argsort(descending=True)[:count])

    def least(deviation: torch.Tensor) -> torch.Tensor:
        deviation = deviation.masked_fill(deviation < 0, torch.inf)
        return torch.isin(torch.arange(len(deviation)), deviation.argsort()[:count])

    text = len(started.prompt) - started.prompt.reused_tokens
    assert started.computed_tokens == text + count
    assert difference(started.logits, hooked_logits(model, started.prompt, most)) < TOLERANCE[F32]
    other = hooked_logits(model, started.prompt, least)
    assert difference(started.logits, other) > 10 * TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_epic_is_a_forward_with_stored_keys_and_values(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=5)
    ways = Baselines(model, first_tokens=4)
    started = ways.start("epic", parts)
    first = torch.zeros(len(started.prompt), dtype=torch.bool)
    for span in started.prompt.passages:
        first[span.start : min(span.start + 4, span.stop)] = True
    text = len(started.prompt) - started.prompt.reused_tokens
    assert started.computed_tokens == text + int(first.sum())
    expected = hooked_logits(model, started.prompt, lambda _: first)
    assert difference(started.logits, expected) < TOLERANCE[F32]
    fewer = hooked_logits(model, started.prompt, lambda _: first & False)
    assert difference(started.logits, fewer) > 10 * TOLERANCE[F32]


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_prefix_caching_is_exact_and_reuses_whole_blocks(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family, F32)
    ways = Baselines(model)
    first = ways.start("prefix", prompt(model, seed=6))
    assert first.computed_tokens == len(first.prompt)
    ways.generate("prefix", prompt(model, seed=6), max_new_tokens=4)  # grows into the kept cache
    for question in ("what?", "and who?", "what else is there?"):
        parts = prompt(model, seed=6, question=question)
        again = ways.start("prefix", parts)
        passages = again.prompt.passages[-1].stop
        assert len(again.prompt) - again.computed_tokens >= passages // BLOCK * BLOCK
        assert (len(again.prompt) - again.computed_tokens) % BLOCK == 0
        assert again.computed_tokens > 0
        assert difference(again.logits, plain_logits(model, again.prompt)) < TOLERANCE[F32]
    moved = [*parts[:1], *parts[2:5], parts[1], *parts[5:]]
    assert isinstance(moved[4], Passage)
    other = ways.start("prefix", moved)
    assert other.computed_tokens > again.computed_tokens
    assert difference(other.logits, plain_logits(model, other.prompt)) < TOLERANCE[F32]
    ways.forget()
    assert ways.start("prefix", parts).computed_tokens == len(again.prompt)


@pytest.mark.parametrize("family", NAMES)
def test_the_text_before_the_passages_is_kept(make_model: ModelMaker, family: str) -> None:
    """The second question computes that much less and gives what it gave without."""
    model = make_model(family, F32)
    docs = documents(4, seed=1, longest=14)
    head = Text("You are an assistant; the documents follow.")
    one, two = ([head, *map(Passage, docs), Text(q)] for q in ("what is it?", "and who is that?"))
    ways = Baselines(model, fraction=0.3, first_tokens=3)
    for method in ("naive", "cacheblend", "epic"):
        ways.forget()
        fresh = ways.start(method, two)
        ways.forget()
        ways.start(method, one)
        again = ways.start(method, two)
        assert again.computed_tokens == fresh.computed_tokens - len(again.prompt.spans[0])
        assert difference(again.logits, fresh.logits) < TOLERANCE[F32], method
        other = ways.start(method, [Text("Another head."), *two[1:]])
        assert other.computed_tokens > again.computed_tokens


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_the_models_own(make_model: ModelMaker, method: str) -> None:
    """Where nothing is left out, every method's answer is that of plain causal attention."""
    model = make_model("llama", F32, links=0)
    parts = prompt(model, 1, seed=7) if method == "naive" else prompt(model, 3, seed=7)
    ways = Baselines(model, fraction=1.0, first_tokens=1000)
    mode = "masked" if method == "naive" else "full"
    expected = model.generate(parts, max_new_tokens=20, mode=mode)
    assert ways.generate(method, parts, max_new_tokens=20) == expected  # type: ignore[arg-type]


def test_what_cannot_be_is_refused(make_model: ModelMaker) -> None:
    model = make_model("llama", F32)
    for arguments in ({"fraction": 1.5}, {"fraction": -0.1}, {"first_tokens": -1}):
        with pytest.raises(ConfigError, match="expected"):
            Baselines(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected one of full, prefix, naive, cacheblend, epic"):
        Baselines(model).start("turbo", prompt(model))  # type: ignore[arg-type]
