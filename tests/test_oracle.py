"""Reuse equals the masked full prefill of the same layout, through the public API.

The oracle is checked twice: against `mode="masked"`, and against a mask written here, token by
token, from the rule as the paper states it. Tolerances: float32 differs by the order of sums only
(relative 1e-4 leaves room for three layers at hidden size 64); in 16-bit types a passage's keys
are rounded at other positions than the oracle's, so a difference is some tens of rounding steps
(2**-8 for bfloat16, 2**-11 for float16) of the largest logit.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MAX_PASSAGES, ModelMaker

import kvlink_rag.engine.backbone
import kvlink_rag.model.prompt_run
from kvlink_rag import Document, KVLinkModel, Part, Passage, Text, Trace
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.sources import EncodeNow, Reuse

F32 = torch.float32
NAMES = sorted(FAMILIES)


def documents(count: int, seed: int = 0, longest: int = 60) -> list[Document]:
    """Random passages, some of one character."""
    rng = random.Random(seed)
    letters = "abcdefghij klmnop. é漢"
    lengths = [1 if rng.random() < 0.2 else rng.randint(2, longest) for _ in range(count)]
    return [Document("".join(rng.choices(letters, k=n)), title="") for n in lengths]


def prompt(model: KVLinkModel, count: int, seed: int = 0, longest: int = 60) -> list[Part]:
    return model.prompt(documents(count, seed, longest), "what is it?")


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def fresh(model: KVLinkModel) -> Reuse:
    return Reuse(EncodeNow(model.encoder))


def heads_first(output: torch.Tensor) -> bool:
    """Whether a hook was given [1, kv_heads, tokens, head_dim]: two heads, and more tokens."""
    return output.dim() == 4 and output.shape[1] == 2


def givers(attention: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, slice]]:
    """What gives keys before RoPE, and values, and the columns of its output that they are."""
    if (fused := getattr(attention, "qkv_proj", None)) is None:
        keys = getattr(attention, "k_norm", attention.k_proj)
        return {"keys": (keys, slice(None)), "values": (attention.v_proj, slice(None))}
    queries = attention.config.num_attention_heads * attention.head_dim
    behind = queries + attention.config.num_key_value_heads * attention.head_dim
    return {"keys": (fused, slice(queries, behind)), "values": (fused, slice(behind, None))}


def by_token(output: torch.Tensor, columns: slice, laid: Layout, heads: int) -> torch.Tensor:
    """[tokens, kv_heads, head_dim] of what a hook was given."""
    if heads_first(output):
        return output[0].transpose(0, 1)
    return output[..., columns].view(len(laid), heads, -1)


def as_given(states: torch.Tensor, output: torch.Tensor, columns: slice) -> torch.Tensor:
    """What a hook was given, with `states` [tokens, kv_heads, head_dim] in these columns."""
    if heads_first(output):
        return states.transpose(0, 1)[None]
    changed = output.clone()
    changed[..., columns] = states.reshape(changed[..., columns].shape)
    return changed


def rule_mask(laid: Layout, window: int | None) -> torch.Tensor:
    """The visibility rule of the paper, written out for each pair of tokens."""
    n = len(laid)
    position, segment = laid.positions.tolist(), laid.segments.tolist()
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            own = abs(segment[q]) == abs(segment[k])  # below 0 stands the header of a passage
            sees = own if segment[q] else segment[k] >= 0
            sees = sees and position[k] <= position[q]
            if window is not None and position[q] - position[k] >= window:
                sees = False
            mask[q, k] = sees
    return mask


def rule_logits(model: KVLinkModel, laid: Layout) -> torch.Tensor:
    """Next-token logits of a plain transformers forward under the mask written above."""
    config = model.backbone.config
    kinds = getattr(config, "layer_types", None) or []
    window = config.sliding_window if getattr(config, "sliding_window", None) else None
    if config.model_type in ("mistral", "starcoder2", "phi3"):  # one mask, with its window
        mask = rule_mask(laid, window)[None, None]
    elif "sliding_attention" in kinds:
        mask = {
            "full_attention": rule_mask(laid, None)[None, None],
            "sliding_attention": rule_mask(laid, window)[None, None],
        }
    else:
        mask = rule_mask(laid, None)[None, None]
    with torch.inference_mode():
        output = model.backbone.model(
            input_ids=laid.token_ids[None],
            position_ids=laid.positions[None],
            attention_mask=mask,
            use_cache=False,
        )
    return output.logits[0, -1].float()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("links", [0, 5])
@pytest.mark.parametrize("count", [1, 2, 7, MAX_PASSAGES])
def test_reuse_equals_masked_float32(
    make_model: ModelMaker, family: str, links: int, count: int
) -> None:
    model = make_model(family, F32, links=links)
    parts = prompt(model, count, seed=count)
    reuse = model.prefill(parts, reuse=fresh(model))
    masked = model.prefill(parts, mode="masked")
    assert reuse.trace.passages == count
    assert reuse.trace.reused_tokens > 0
    assert difference(reuse.logits, masked.logits) < TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_both_equal_a_mask_written_from_the_rule(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    parts = prompt(model, 5, seed=3)
    expected = rule_logits(model, model.layout(parts))
    for mode in ("reuse", "masked"):
        got = model.prefill(parts, mode=mode, reuse=fresh(model))
        assert difference(got.logits, expected) < TOLERANCE[F32], mode


def behind_headers(laid: Layout, header: list[int]) -> Layout:
    """`laid` with a header before each passage, written out token by token."""
    rows: list[tuple[int, int, int]] = []
    for span in laid.spans:
        segment = int(laid.segments[span.start])
        if segment > 0:
            first = span.start - len(header)
            rows += [(token, first + i, -segment) for i, token in enumerate(header)]
        ids = laid.token_ids[span.start : span.stop].tolist()
        rows += [(token, span.start + i, segment) for i, token in enumerate(ids)]
    return Layout(*torch.tensor(rows).T, spans=())


@pytest.mark.parametrize("links", [0, 5])
@pytest.mark.parametrize("family", NAMES)
def test_passages_behind_headers_equal_the_rule(
    make_model: ModelMaker, family: str, links: int
) -> None:
    plain = make_model(family, F32, links=links)
    header = [3, 250, 7]
    model = plain.with_spec(replace(plain.spec, header=tuple(header)))
    parts = [Text("abc", special=True), *prompt(model, 5, seed=3)]
    laid = model.layout(parts)
    expected = rule_logits(model, behind_headers(laid, header))
    for mode in ("reuse", "masked"):
        got = model.prefill(parts, mode=mode, reuse=fresh(model))
        assert difference(got.logits, expected) < TOLERANCE[F32], mode
    ids = laid.passage_ids(laid.passages[0])
    with_header, without = model.encoder.one(ids), plain.encoder.one(ids)
    assert difference(with_header.values, without.values) > TOLERANCE[F32]
    assert len(plain.layout(parts)) == len(laid)  # it takes no place
    texts = {m: model.generate(parts, max_new_tokens=8, mode=m) for m in ("reuse", "masked")}
    assert texts["reuse"] == texts["masked"]


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_a_codec_behind_headers_is_verified_as_everywhere(
    make_model: ModelMaker, codec: str
) -> None:
    plain = make_model("llama", F32)
    model = plain.with_spec(replace(plain.spec, header=(3, 250, 7)))
    found = model.verify(prompt(model, 4, seed=1), reuse=Reuse(EncodeNow(model.encoder, codec)))
    assert found.holds
    assert (found.price is not None) == (codec == "int8")


def test_a_header_is_part_of_what_a_snapshot_is(make_model: ModelMaker) -> None:
    plain = make_model("llama", F32)
    headers: list[tuple[int, ...]] = [(), (3,), (3, 250), (250, 3)]
    models = [plain.with_spec(replace(plain.spec, header=header)) for header in headers]
    assert len({model.fingerprint for model in models}) == len(headers)
    assert models[0].fingerprint == plain.backbone.fingerprint  # as it was before headers
    runs = {id(model.reuse.prefix) for model in models}
    assert len(runs) == len(headers)


@pytest.mark.parametrize("family", NAMES)
def test_a_loaded_model_equals_the_rule(
    make_model: ModelMaker, family: str, tmp_path: Path
) -> None:
    """`from_pretrained` brings our attention; the rule is run by transformers' own."""
    plain = make_model(family, F32)
    plain.backbone.model.save_pretrained(tmp_path)
    plain.tokenizer.hf.save_pretrained(tmp_path)
    loaded = KVLinkModel.from_pretrained(tmp_path, device="cpu", spec=plain.spec)
    parts = prompt(loaded, 5, seed=3)
    expected = rule_logits(plain, plain.layout(parts))
    for mode in ("reuse", "masked"):
        got = loaded.prefill(parts, mode=mode, reuse=fresh(loaded))
        assert difference(got.logits, expected) < TOLERANCE[F32], mode
    texts = {m: loaded.generate(parts, max_new_tokens=12, mode=m) for m in ("reuse", "masked")}
    assert texts["reuse"] == texts["masked"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_reuse_equals_masked_in_16_bits(
    make_model: ModelMaker, family: str, dtype: torch.dtype
) -> None:
    model = make_model(family, dtype)
    for seed in range(3):
        parts = prompt(model, 6, seed=seed)
        reuse = model.prefill(parts, reuse=fresh(model))
        masked = model.prefill(parts, mode="masked")
        assert difference(reuse.logits, masked.logits) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(4))
def test_any_arrangement_of_parts(make_model: ModelMaker, seed: int) -> None:
    """Text before, between and after passages, several messages, repeats, any order."""
    rng = random.Random(seed)
    model = make_model("llama", F32)
    pool = documents(4, seed=seed)
    parts: list[Part] = [Text("<bos>", special=True)]
    for _ in range(rng.randint(4, 12)):
        choice = rng.random()
        if choice < 0.5:
            parts.append(Passage(rng.choice(pool)))
        elif choice < 0.8:
            parts.append(Text(rng.choice(["and then ", "x", "the same again: "])))
        else:
            parts.append(Text("<eos>", special=True))
    parts.append(Text("so?"))
    reuse = model.prefill(parts, reuse=fresh(model)).logits
    assert difference(reuse, model.prefill(parts, mode="masked").logits) < TOLERANCE[F32]
    assert difference(reuse, rule_logits(model, model.layout(parts))) < TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_kept_runs_are_exact(make_model: ModelMaker, family: str) -> None:
    """The second question over the same passages computes only what differs, and equals masked."""
    model = make_model(family, F32)
    docs = documents(5, seed=9)
    first = model.prefill(model.prompt(docs, "what is it?"))
    again = model.prefill(model.prompt(docs, "and who was that?"))
    assert again.trace.prefix_tokens > 0
    assert again.trace.computed_tokens < first.trace.computed_tokens
    masked = model.prefill(model.prompt(docs, "and who was that?"), mode="masked")
    assert difference(again.logits, masked.logits) < TOLERANCE[F32]
    swapped = model.prefill(model.prompt(docs[::-1], "and who was that?"))
    masked = model.prefill(model.prompt(docs[::-1], "and who was that?"), mode="masked")
    assert difference(swapped.logits, masked.logits) < TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_full_equals_plain_transformers(make_model: ModelMaker, family: str) -> None:
    """mode="full" is the model's own causal attention, sliding windows included."""
    model = make_model(family, F32)
    parts = prompt(model, 4, seed=1)
    ids = model.layout(parts).token_ids
    with torch.inference_mode():
        expected = model.backbone.model(input_ids=ids[None], use_cache=False).logits[0, -1]
    assert difference(model.prefill(parts, mode="full").logits, expected) < TOLERANCE[F32]


@pytest.mark.parametrize("family", NAMES)
def test_greedy_text_is_the_same_in_float32(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, F32)
    for seed in range(3):
        parts = prompt(model, 4, seed=seed)
        texts = {m: model.generate(parts, max_new_tokens=24, mode=m) for m in ("reuse", "masked")}
        assert texts["reuse"] == texts["masked"]


def greedy(model: KVLinkModel, parts: list[Part], mode: str, steps: int) -> list[torch.Tensor]:
    """The logits of each step of a greedy answer."""
    run = PromptRun(model.backbone, model.layout(parts), Trace(mode=mode), fresh(model))
    logits = [run.start(room=steps)]
    while len(logits) < steps:
        logits.append(run.step(int(logits[-1].argmax())))
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_text_in_16_bits_differs_only_at_near_ties(
    make_model: ModelMaker, family: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the two texts part, the two best logits of the masked run nearly tie; counted."""
    model = make_model(family, dtype)
    prompts, steps, same, parted = 6, 12, 0, 0
    for seed in range(prompts):
        parts = prompt(model, 3, seed=seed)
        reuse, masked = (greedy(model, parts, mode, steps) for mode in ("reuse", "masked"))
        for ours, oracle in zip(reuse, masked, strict=True):
            assert difference(ours, oracle) < TOLERANCE[dtype]
            if ours.argmax() != oracle.argmax():
                best = oracle.topk(2).values
                assert float(best[0] - best[1]) <= 2 * TOLERANCE[dtype] * float(oracle.abs().max())
                parted += 1
                break
            same += 1
    with capsys.disabled():
        print(f"\n{family} {dtype}: {parted} of {prompts} answers part at a near tie")
    assert same > prompts * steps / 4  # random weights: near ties are many, but not the rule


# Mutations: what the oracle must catch.


def broken(model: KVLinkModel, parts: list[Part]) -> float:
    return difference(
        model.prefill(parts, reuse=fresh(model)).logits,
        rule_logits(model, model.layout(parts)),
    )


def test_a_shifted_position_is_caught(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", F32)
    parts = prompt(model, 4)
    plain = kvlink_rag.engine.backbone.Backbone.rotary
    monkeypatch.setattr(
        kvlink_rag.engine.backbone.Backbone, "rotary", lambda self, at: plain(self, at + 1)
    )
    assert broken(model, parts) > 10 * TOLERANCE[F32]


def test_a_swapped_slot_is_caught(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", F32)
    docs = [Document("abcdefgh"), Document("ponmlkji")]
    parts = model.prompt(docs, "what is it?")
    plain = kvlink_rag.model.prompt_run.assemble

    def swapped(backbone, laid, snapshots, runs, *, room=0):  # type: ignore[no-untyped-def]
        return plain(backbone, laid, snapshots[::-1], runs, room=room)

    monkeypatch.setattr(kvlink_rag.model.prompt_run, "assemble", swapped)
    assert broken(model, parts) > 10 * TOLERANCE[F32]


def test_a_swapped_link_slot_is_caught(make_model: ModelMaker) -> None:
    model = make_model("llama", F32)
    parts = prompt(model, 4)
    laid = model.layout(parts)
    right = rule_logits(model, laid)
    ids = laid.token_ids.clone()
    first = int((ids >= model.spec.first_link_id).nonzero()[0])
    ids[first] = model.spec.link_ids(1)[0]
    assert difference(rule_logits(model, replace(laid, token_ids=ids)), right) > 1e-3


def test_a_mask_by_index_is_caught(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages come first in the cache: by index, each link token would see all of them."""
    model = make_model("llama", F32)
    parts = prompt(model, 4)

    def by_index(q_at, q_seg, k_at, k_seg, *, window=None):  # type: ignore[no-untyped-def]
        queries, keys = len(q_at), len(k_at)
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    monkeypatch.setattr(kvlink_rag.engine.backbone, "visibility", by_index)
    assert broken(model, parts) > 10 * TOLERANCE[F32]


def test_an_ignored_window_is_caught(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mistral-window", F32)
    parts = prompt(model, 4)
    plain = kvlink_rag.engine.backbone.visibility

    def no_window(*tensors, window=None):  # type: ignore[no-untyped-def]
        return plain(*tensors)

    monkeypatch.setattr(kvlink_rag.engine.backbone, "visibility", no_window)
    assert broken(model, parts) > 10 * TOLERANCE[F32]


def test_verify_says_when_reuse_does_not_hold(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen3", F32)
    parts = prompt(model, 3)
    good = model.verify(parts)
    assert good.holds
    assert "equals" in good.message
    plain = kvlink_rag.engine.backbone.Backbone.rotary
    monkeypatch.setattr(
        kvlink_rag.engine.backbone.Backbone, "rotary", lambda self, at: plain(self, at + 3)
    )
    bad = model.verify(parts)
    assert not bad.holds
    assert "NOT" in bad.message
