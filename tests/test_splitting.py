"""Splitting: nothing is lost, nothing is too long, borders are where a reader would put them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError
from kvlink_rag.ingest.splitter import headings, split_document, split_text


class Bytes:
    """One token a byte, as the smallest byte-level tokenizer."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))


class Characters:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)


class Words:
    """One token a word: white space costs nothing."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


class Uneven:
    """Words of six characters are one token, others one a character.

    So a slice can have more tokens than a longer one, as with real merges.
    """

    def encode(self, text: str) -> list[int]:
        return [0] * sum(1 if len(word) == 6 else len(word) for word in text.split())


ENCODERS = [Bytes(), Words(), Uneven()]
PIECES = st.sampled_from(
    [
        *("word", "x", "sixsix", "Dr. Smith", "e.g. this", "3.14", "Stop.", "Why?", '"Quoted."'),
        *(" ", "  ", "\n", "\n\n", "\n \t\n", "\r\n", "\f", "\u2029", "\u00a0", "\u200b"),
        *("# Heading", "## Sub ##", "---", "===", "```", "- item", "| a | b |", "    code"),
        *(
            "你好。",
            "これは「文」です。",
            "क्षेत्र।",
            "한글",
            "각",
            "e\u0301",
            "👨‍👩‍👧",
            "🇫🇷🇩🇪",
            "👍🏽",
        ),
        *("\ud800", "\0", "\u0301" * 30, "a" * 300),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=60).map("".join)
LIMITS = st.integers(1, 60)


def squeezed(text: str) -> str:
    """The text's content: all that is not white space."""
    return "".join(text.split())


@given(TEXTS, LIMITS, st.sampled_from(ENCODERS))
@settings(max_examples=400, deadline=None)
def test_passages_are_slices_in_order_with_only_white_space_between(text, most, encoder):
    at = 0
    for passage in split_text(text, encoder=encoder, max_tokens=most):
        found = text.index(passage.text, at)
        assert not text[at:found].strip()
        assert passage.text == passage.text.strip() != ""
        at = found + len(passage.text)
    assert not text[at:].strip()


@given(TEXTS, LIMITS, st.sampled_from(ENCODERS))
@settings(max_examples=400, deadline=None)
def test_only_a_single_character_exceeds_the_limit(text, most, encoder):
    for passage in split_text(text, encoder=encoder, max_tokens=most):
        assert len(encoder.encode(passage.text)) <= most or len(passage.text) == 1


@given(TEXTS, LIMITS)
@settings(max_examples=400, deadline=None)
def test_markdown_headings_move_to_titles_and_the_rest_stays(text, most):
    found = list(headings(text))
    passages = split_text(text, title="Root", encoder=Bytes(), max_tokens=most, markdown=True)
    kept = iter(squeezed("".join(p.text for p in passages)))
    starts = [h.start for h in found] + [len(text)]
    bodies = [text[: starts[0]]] + [
        text[h.stop : end] for h, end in zip(found, starts[1:], strict=True)
    ]
    for character in squeezed("".join(bodies)):  # a subsequence: lone headings are text as well
        assert character in kept
    titles = squeezed("".join(p.title for p in passages))
    texts = squeezed("".join(p.text for p in passages))
    for heading in found:
        assert squeezed(heading.text) in titles or squeezed(heading.text) in texts


@given(TEXTS, st.integers(8, 60))
@example("word\x80¡\u1acf", 10)  # a mark younger than Python's own tables
@example("あ。\u0301い、\u0301う" * 9, 12)  # ends of sentences and clauses that carry a mark
@example("x\u0e01\u0e33" * 9, 8)  # Thai SARA AM, which goes on a grapheme without being a mark
@example("\u0600\u0661" * 9, 8)  # a sign that joins the number after it
@example("🇫🇷🇩🇪" * 9, 20)
@settings(max_examples=300, deadline=None)
def test_graphemes_stay_whole_where_they_fit(text, most):
    clusters = [m.span() for m in regex.finditer(r"\X", text)]
    for encoder in (Words(), Bytes()):
        at = 0
        for passage in split_text(text, encoder=encoder, max_tokens=most):
            at = text.index(passage.text, at)
            for start, stop in clusters:
                inside = start < at < stop or start < at + len(passage.text) < stop
                space_inside = any(c.isspace() for c in text[start:stop])
                fits = len(text[start:stop].encode("utf-8", "replace")) * 2 <= most
                assert not (inside and fits and not space_inside), (passage.text, text[start:stop])
            at += len(passage.text)


def test_pairs_that_are_one_grapheme_are_not_cut():
    """Every character of Unicode that a letter before it, or after it, joins."""
    marks = [c for c in map(chr, range(0x300, 0x30000)) if regex.fullmatch(r"\X", "x" + c)]
    assert len(marks) > 2000
    for mark in marks:
        text = f"x{mark}" * 4
        for passage in split_text(text, encoder=Characters(), max_tokens=5):
            assert passage.text == f"x{mark}" * 2, ascii(mark)


PROSE = "The harbour of Orvale was built in 1911. It was enlarged twice, in 1930 and 1958! Why? "


def test_passages_are_well_filled():
    text = (PROSE * 5 + "\n\n") * 40
    passages = split_text(text, encoder=Words(), max_tokens=200)
    sizes = [len(p.text.split()) for p in passages[:-1]]
    assert min(sizes) > 150
    assert len(passages) <= 1.25 * len(text.split()) / 200


def test_a_text_that_fits_is_one_passage():
    assert [p.text for p in split_text("  a b\n\nc d.\n", encoder=Words(), max_tokens=4)] == [
        "a b\n\nc d."
    ]


def test_borders_are_paragraphs_then_sentences_then_lines_then_words():
    def texts(text: str, most: int) -> list[str]:
        return [p.text for p in split_text(text, encoder=Words(), max_tokens=most)]

    assert texts("a b c.\n\nd e f. g", 6) == ["a b c.", "d e f. g"]
    assert texts("aa bb. Cc\nd e f g", 5) == ["aa bb.", "Cc\nd e f g"]
    assert texts("a b c\nd e f", 5) == ["a b c", "d e f"]
    assert texts("a b c d e", 3) == ["a b c", "d e"]
    # a border that would leave less than a quarter is passed over for a finer one
    assert texts("a\n\nbb cc dd ee. Ff gg hh ii", 8) == ["a\n\nbb cc dd ee.", "Ff gg hh ii"]


@pytest.mark.parametrize(
    "sentence",
    ["Dr. Bell met J. Smith.", "See Fig. 3, e.g. the left part, i.e. this.", "It is 3.14 wide."],
)
def test_abbreviations_and_numbers_end_no_sentence(sentence):
    text = f"One two three. {sentence} {'Word ' * 30}"
    first = split_text(text, encoder=Words(), max_tokens=len(sentence.split()) + 5)[0]
    assert first.text == f"One two three. {sentence}"


def test_sentences_end_without_spaces_in_chinese_and_japanese():
    passages = split_text(
        "第一句话。第二句话！「第三句话。」第四句话？", encoder=Bytes(), max_tokens=33
    )
    assert [p.text for p in passages] == ["第一句话。第二句话！", "「第三句话。」", "第四句话？"]


def test_a_character_is_the_last_resort():
    family = "👨‍👩‍👧"
    passages = split_text(family * 4, encoder=Bytes(), max_tokens=40)
    assert [p.text for p in passages] == [family * 2] * 2
    assert "".join(p.text for p in split_text(family, encoder=Bytes(), max_tokens=7)) == family
    assert [p.text for p in split_text("é", encoder=Bytes(), max_tokens=1)] == ["é"]


MARKDOWN = """Before any heading.

# Guide #

Welcome.

## Installing

### Linux

Use the package.

```sh
# not a heading
make
```

### Windows

## Using
Run it.

Notes
-----
Of one line.

Last
====

- item
---
"""


def test_titles_are_paths_of_headings():
    passages = split_text(MARKDOWN, title="guide", encoder=Words(), markdown=True)
    assert [(p.title, p.text.split("\n")[0]) for p in passages] == [
        ("guide", "Before any heading."),
        ("guide > Guide", "Welcome."),
        ("guide > Guide > Installing > Linux", "Use the package."),
        ("guide > Guide > Installing", "Windows"),
        ("guide > Guide > Using", "Run it."),
        ("guide > Guide > Notes", "Of one line."),
        ("guide > Last", "- item"),
    ]
    assert "# not a heading" in passages[2].text


def test_the_documents_own_title_stands_once():
    passages = split_text("# A\n\nx\n\n## B\n\ny", title="A", encoder=Words(), markdown=True)
    assert [p.title for p in passages] == ["A", "A > B"]


def test_headings_are_those_of_a_markdown_parser():
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt().parse(MARKDOWN)
    expected = [
        (int(token.tag[1]), tokens[i + 1].content)
        for i, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    assert [(h.level, h.text) for h in headings(MARKDOWN)] == expected


def test_plain_text_has_no_headings():
    assert [p.text for p in split_text("# a\nb", encoder=Words())] == ["# a\nb"]


def test_a_very_long_heading_is_text():
    line = "# " + "x" * 1000
    (passage,) = split_text(line, encoder=Words(), markdown=True)
    assert (passage.title, passage.text) == ("", line)


def test_split_document_keeps_metadata_and_numbers_given_ids():
    document = Document("a b c d", "T", id="doc", metadata={"source": "f", "page": 3})
    parts = split_document(document, Words(), 2)
    assert [p.id for p in parts] == ["doc#1", "doc#2"]
    assert all(p.metadata == document.metadata and p.title == "T" for p in parts)
    assert split_document(document, Words())[0].id == "doc"
    assert split_document(Document("a b c"), Words(), 2)[0].id is None


@pytest.mark.parametrize("text", ["", " \n\t\r\n \u00a0\u3000"])
def test_no_text_gives_no_passages(text):
    assert split_text(text, encoder=Words()) == []


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_below_one_is_refused(most):
    with pytest.raises(ConfigError, match="max_tokens"):
        split_text("a", encoder=Words(), max_tokens=most)


UNITS = [
    "a",
    " ",
    "\n",
    "#",
    "=",
    "`",
    "-",
    ".",
    "。",
    "\u0301",
    "\u200d",
    "🇫",
    "a\n\n",
    ". ",
    "a. ",
]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_hostile_text_takes_linear_work(unit):
    """Four times the text takes at most about four times the work; quadratic would be 16.

    Work: function calls, and characters that the encoder is given.
    """

    def work(size: int) -> int:
        encoder = Counting()
        calls = calls_of(
            lambda: split_text(unit * (size // len(unit)), encoder=encoder, markdown=True)
        )
        return calls + encoder.characters

    assert work(80_000) < 5 * work(20_000) + 10_000


class Counting(Bytes):
    """Counts what it is given."""

    characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return super().encode(text)


def calls_of(action: Callable[[], object]) -> int:
    """How many functions, Python's and C's, `action` calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_of_one_thing(unit):
    """What is quadratic inside one call (of a pattern, say) would not come back today."""
    text = unit * (1_000_000 // len(unit))
    passages = split_text(text, encoder=Bytes(), max_tokens=200)
    assert sum(len(squeezed(p.text)) for p in passages) == len(squeezed(text))


def test_adjacent_passages_would_not_fit_together_without_better_borders():
    words = " ".join(f"w{i}" for i in range(5000))
    passages = split_text(words, encoder=Words(), max_tokens=50)
    assert all(len((a.text + " " + b.text).split()) > 50 for a, b in pairwise(passages))
    assert len(passages) <= 5000 / 50 * 16 / 15 + 1
