"""Tokens to text: valid Unicode at every step, stop strings whole; and sampling."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvlink_rag.engine.sampling import Sampling, sample
from kvlink_rag.engine.text_pieces import TextPieces
from kvlink_rag.errors import ConfigError
from kvlink_rag.prompt.tokenizer import PartTokenizer

ENCODER = PartTokenizer(byte_tokenizer())
TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)


def pieces_of(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextPieces]:
    pieces = TextPieces(ENCODER.decode, stop)
    out = []
    for token in ENCODER.encode(text):
        out.append(pieces.push(token))
        if pieces.stopped:
            break
    out.append(pieces.finish())
    return out, pieces


@given(TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    out, _ = pieces_of(text)
    assert "".join(out) == text
    for piece in out:
        piece.encode("utf-8")
        assert "\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in text


@given(
    TEXTS,
    st.lists(st.text(alphabet="abé漢", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text(alphabet="abé漢", max_size=30),
)
def test_stop_strings_are_never_split(head: str, stops: list[str], tail: str) -> None:
    """What is yielded is the text before the earliest stop string, and never part of one."""
    text = head + tail
    out, pieces = pieces_of(text, tuple(stops))
    joined = "".join(out)
    first = min((text.find(stop) for stop in stops if stop in text), default=-1)
    if first < 0:
        assert joined == text
        assert not pieces.stopped
    else:
        # one token may bring several characters: the first stop found when its token came
        assert pieces.stopped
        assert text.startswith(joined)
        assert not any(stop in joined for stop in stops)
    seen = ""
    for piece in out:
        seen += piece
        assert not any(stop in seen for stop in stops)


def test_half_a_character_is_held_back() -> None:
    pieces = TextPieces(ENCODER.decode)
    tokens = ENCODER.encode("漢")
    assert [pieces.push(token) for token in tokens] == ["", "", "漢"]


def test_bytes_that_are_no_text_come_out_at_the_end() -> None:
    pieces = TextPieces(ENCODER.decode)
    tokens = [ENCODER.encode("a")[0], *ENCODER.encode("漢")[:2]]
    assert "".join(pieces.push(token) for token in tokens) == "a"
    assert pieces.finish() == "\N{REPLACEMENT CHARACTER}"


def test_held_back_text_comes_out_when_no_stop_follows() -> None:
    out, _ = pieces_of("abc", ("bcd",))
    assert out[-1] == "bc"


def test_the_earliest_stop_string_counts_not_the_first_listed() -> None:
    """Both are there once "b" came: "a" was held back because it may begin one."""
    for stops in (("b", "ab"), ("ab", "b")):
        out, pieces = pieces_of("xabc", stops)
        assert "".join(out) == "x"
        assert pieces.stopped


def test_greedy_and_sampling() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    greedy = Sampling()
    assert sample(logits, greedy, greedy.generator()) == 1
    drawn = Sampling(temperature=1.0, seed=7)
    one, two = drawn.generator(), drawn.generator()
    first = [sample(logits, drawn, one) for _ in range(20)]
    assert first == [sample(logits, drawn, two) for _ in range(20)]
    assert len(set(first)) > 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7, 2e-6])
def test_however_small_the_temperature_the_best_token_is_taken(temperature: float) -> None:
    logits = torch.tensor([-900.0, 900.0, 899.0])
    drawn = Sampling(temperature=temperature, seed=0)
    assert sample(logits, drawn, drawn.generator()) == 1


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = Sampling(temperature=0.5, seed=0)
    generator = drawn.generator()
    draws = torch.tensor([sample(logits, drawn, generator) for _ in range(4000)])
    expected = torch.softmax(logits / 0.5, 0)
    found = draws.bincount(minlength=3) / 4000
    assert torch.allclose(found, expected, atol=0.03)  # four standard deviations of 4000 draws


def test_top_p_keeps_the_smallest_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = Sampling(temperature=1.0, top_p=0.7, seed=0)
    generator = drawn.generator()
    assert {sample(logits, drawn, generator) for _ in range(300)} == {0, 1}
    tiny = Sampling(temperature=1.0, top_p=1e-9, seed=0)
    assert {sample(logits, tiny, tiny.generator()) for _ in range(5)} == {0}


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_stops_where_the_probability_is_reached(top_p: float, kept: int) -> None:
    """Four tokens of 1/4 each, exactly."""
    drawn = Sampling(temperature=1.0, top_p=top_p, seed=0)
    generator = drawn.generator()
    assert len({sample(torch.zeros(4), drawn, generator) for _ in range(300)}) == kept


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"stop": ("",)},
    ],
)
def test_impossible_sampling_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=40),
    st.integers(0, 6),
    st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([1.0, 1.3, 0.8]),
)
def test_what_is_sampled_from_is_what_transformers_leaves(
    numbers: list[float], top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """Each way to cut, and all together, beside transformers' own processors in its order."""
    logits, seen = torch.tensor(numbers), torch.tensor([0, 2, 2])
    ways = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(top_k or len(numbers)),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ]
    left = LogitsProcessorList(ways)(seen[None], logits[None].clone())[0]
    possible = {int(i) for i in left.isfinite().nonzero()}
    sampling = Sampling(
        temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(logits, sampling, generator, seen) for _ in range(100)}
    edge = (logits[:, None] - logits[None, :]).abs()  # ties are cut in no order
    if (edge + torch.eye(len(logits)) > 1e-3).all():
        assert drawn <= possible
        best = left.softmax(0).argmax()
        assert int(best) in drawn or left.softmax(0).max() < 0.1


def test_a_penalty_counts_without_sampling_too() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    generator = torch.Generator()
    plain, strict = Sampling(), Sampling(repetition_penalty=1.5)
    assert sample(logits, plain, generator, torch.tensor([0])) == 0
    assert sample(logits, strict, generator, torch.tensor([0])) == 1
