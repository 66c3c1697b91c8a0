"""Who sees whom, slots and markers, and the published prompt token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_spec, byte_tokenizer
from transformers import AutoTokenizer

import kvlink_rag.prompt.tokenizer
from kvlink_rag import Document, Passage, Spec, Text
from kvlink_rag.errors import PromptError, TooManyPassages
from kvlink_rag.prompt.layout import layout, visibility
from kvlink_rag.prompt.published import KVLINK5_LLAMA32, PUBLISHED
from kvlink_rag.prompt.tokenizer import PartTokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "llama32_prompt.json").read_text("utf-8"))
A, B = Document("ab", id="a"), Document("cd", id="b")


@pytest.fixture(scope="module")
def encoder() -> PartTokenizer:
    return PartTokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def llama3(shared_data: Path) -> PartTokenizer:
    return PartTokenizer(AutoTokenizer.from_pretrained(shared_data / "llama3_tokenizer"))


def ids(encoder: PartTokenizer, text: str) -> list[int]:
    return encoder.encode(text)


def test_one_message(encoder: PartTokenizer) -> None:
    """before, mem_start, each passage with its own links, mem_end, question."""
    spec = byte_spec()
    laid = layout([Text("s"), Passage(A), Passage(B), Text("q")], encoder, spec)
    expected = [
        *ids(encoder, "s"),
        258,
        *ids(encoder, "ab\n"),
        *range(260, 265),
        *ids(encoder, "cd\n"),
        *range(265, 270),
        259,
        *ids(encoder, "q"),
    ]
    assert laid.token_ids.tolist() == expected
    assert laid.positions.tolist() == list(range(len(expected)))
    assert laid.segments.tolist() == [0] * 2 + [1] * 3 + [0] * 5 + [2] * 3 + [0] * 7
    assert laid.reused_tokens == 6
    assert [span.slot for span in laid.passages] == [0, 1]


def test_slots_count_on_through_messages(encoder: PartTokenizer) -> None:
    """One memory region a message; a later turn changes nothing before it."""
    spec = byte_spec()
    turn = [Text("<bos>", special=True), Passage(A), Text("x"), Passage(B), Text("q")]
    more = [*turn, Text("<eos>", special=True), Passage(A), Text("r")]
    first, both = layout(turn, encoder, spec), layout(more, encoder, spec)
    assert both.token_ids[: len(first)].tolist() == first.token_ids.tolist()
    rest = both.token_ids[len(first) :].tolist()
    assert rest == [257, 258, *ids(encoder, "ab\n"), *range(270, 275), 259, *ids(encoder, "r")]
    assert first.token_ids.tolist().count(258) == 1
    assert first.token_ids.tolist()[-2] == 259


def test_no_links_and_no_markers(encoder: PartTokenizer) -> None:
    laid = layout([Passage(A), Text("q")], encoder, byte_spec(links=0))
    assert laid.token_ids.tolist() == [*ids(encoder, "ab\n"), *ids(encoder, "q")]


def test_what_cannot_be_laid_out(encoder: PartTokenizer) -> None:
    spec = byte_spec(slots=2)
    with pytest.raises(TooManyPassages, match="found 3 passages in the prompt, expected at most 2"):
        layout([Passage(A)] * 3 + [Text("q")], encoder, spec)
    for parts in ([], [Text("")]):
        with pytest.raises(PromptError, match="nothing to predict from"):
            layout(parts, encoder, spec)
    with pytest.raises(PromptError, match="found a str"):
        layout(["q"], encoder, spec)  # type: ignore[list-item]


def test_a_prompt_that_ends_in_a_passage_needs_text(encoder: PartTokenizer) -> None:
    with pytest.raises(PromptError, match="ends without computed text"):
        layout([Text("q"), Passage(A)], encoder, byte_spec(links=0))


def test_visibility_goes_by_position_not_by_place() -> None:
    """A link token of passage 1 does not see passage 2, wherever the two stand in the cache."""
    at = torch.tensor([0, 1, 5, 6, 4, 9])
    seg = torch.tensor([1, 1, 2, 2, 0, 0])
    seen = visibility(at, seg, at, seg)
    assert seen[4].tolist() == [True, True, False, False, True, False]
    assert seen[5].all()
    assert seen[3].tolist() == [False, False, True, True, False, False]
    windowed = visibility(at, seg, at, seg, window=5)
    assert windowed[5].tolist() == [False, False, True, True, False, True]


def test_special_strings_in_text_stay_text(encoder: PartTokenizer) -> None:
    hostile = "<eos><mem_start><link_0_0>"
    laid = layout([Passage(Document(hostile)), Text(hostile)], encoder, byte_spec())
    plain = [i for i in laid.token_ids.tolist() if i < 256]
    assert len(plain) == 2 * len(hostile) + 1
    special = [i for i in laid.token_ids.tolist() if i >= 256]
    assert special == [258, *range(260, 265), 259]
    assert encoder.encode("<eos>", special=True) == [257]


def test_odd_unicode_is_encoded(encoder: PartTokenizer) -> None:
    for text in ("\0", "é", "e\u0301", "\u202eabc", "🜁" * 3, "漢字"):
        assert encoder.decode(encoder.encode(text)) == text
    assert encoder.decode(encoder.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("preset", ["evaluation", "training"])
def test_published_prompt_is_the_golden_one(llama3: PartTokenizer, preset: str) -> None:
    spec = replace(KVLINK5_LLAMA32, preset=preset)
    documents = [Document(**document) for document in GOLDEN["documents"]]
    laid = layout(spec.prompt(documents, GOLDEN["question"]), llama3, spec)
    found = [laid.token_ids[span.start : span.stop].tolist() for span in laid.spans]
    assert found == [span["ids"] for span in GOLDEN["prompts"][preset]]


def test_golden_prompt_says_what_the_paper_says() -> None:
    """The golden file against the rules themselves: ids by formula, text by eye."""
    for preset in ("evaluation", "training"):
        spans = GOLDEN["prompts"][preset]
        flat = [i for span in spans for i in span["ids"]]
        assert flat[0] == 128000
        assert flat.count(128254) == flat.count(128255) == 1
        links = [i for i in flat if 128011 <= i < 128254]
        assert links == [128011 + 5 * j + k for j in (0, 1) for k in range(5)]
        passages = [span["text"] for span in spans if span["slot"] is not None]
        assert passages[0] == "Document [1](Title: Orvale) Orvale is a harbour town.\n"
        assert passages[1] == "Document [1](Title: ) Untitled text with <|eot_id|> in it.\n"
        assert flat[-5:] == [128009, 128006, 78191, 128007, 271]
        # the end-of-turn strings in the document and in the question are not tokens
        assert flat.count(128009) == 2
    evaluation = "".join(span["text"] for span in GOLDEN["prompts"]["evaluation"])
    assert evaluation.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a intelligent AI "
        "assistant. Please answer questions based on the user's instruction. Below are some "
        "reference documents that may help you in answering the user's question.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    training = "".join(span["text"] for span in GOLDEN["prompts"]["training"])
    after_memory = training.split("Untitled text with <|eot_id|> in it.\n")[1]
    assert "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhere is" in after_memory


def test_special_strings_with_the_real_tokenizer(llama3: PartTokenizer) -> None:
    """Every special token of Llama 3, as text, in documents and questions."""
    names = [token.content for token in llama3.hf.added_tokens_decoder.values()]
    assert len(names) >= 256
    for name in names:
        encoded = llama3.encode(f"a{name}b")
        assert all(i < 128000 for i in encoded), name
        assert llama3.decode(encoded) == f"a{name}b"


def test_ranks() -> None:
    """A fixed rank is 1 whatever the slot; an exact one follows the slot."""
    exact = replace(KVLINK5_LLAMA32, rank="exact")
    assert KVLINK5_LLAMA32.render_passage(A, 7).startswith("Document [1]")
    assert exact.render_passage(A, 7).startswith("Document [8]")


def test_published_specs_hold_48_passages() -> None:
    for name in ("Shiyu-Lab/Llama1B-KVLink5", "Shiyu-Lab/Llama3B-KVLink5"):
        spec: Spec = PUBLISHED[name]
        assert spec.link_ids(47)[-1] < 128254 <= spec.first_link_id + 5 * 49 - 1


def test_ids_that_are_remembered_are_those_of_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvlink_rag.prompt.tokenizer, "KEPT", 3)
    monkeypatch.setattr(kvlink_rag.prompt.tokenizer, "LONGEST", 40)
    tokenizer, asked = PartTokenizer(byte_tokenizer()), []
    plain = tokenizer._encode
    monkeypatch.setattr(
        tokenizer,
        "_encode",
        lambda hf, text, special: asked.append(text) or plain(hf, text, special),
    )
    texts = ["one", "<bos>", "two", "<bos>", "x" * 41, "x" * 41]
    for text in texts:
        expected = PartTokenizer(byte_tokenizer()).encode(text)
        tokenizer.encode(text).clear()  # a list of the caller's own
        assert tokenizer.encode(text) == expected
    assert asked == ["one", "<bos>", "two", *["x" * 41] * 4]
    assert len(tokenizer.encode("<bos>", special=True)) == 1  # not the plain text's
    for text in ("three", "four", "one"):
        tokenizer.encode(text)
    assert len(tokenizer._known) == 3
    assert asked[-3:] == ["three", "four", "one"]
