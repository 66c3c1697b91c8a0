"""Passages found by their content: what is recognised, what never is, and what it costs."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import sqlite3
import subprocess
import sys
import textwrap
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import ModelMaker, WordEmbedder, byte_spec, byte_tokenizer, random_model
from hypothesis import given
from hypothesis import strategies as st

import kvlink_rag.prompt.recognition.beginnings
from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Part, Passage, Text, Trace
from kvlink_rag.collection.catalog import Catalog, Record
from kvlink_rag.errors import PromptError, PromptTooLong, TooManyPassages
from kvlink_rag.prompt.recognition import Recogniser
from kvlink_rag.prompt.recognition.beginnings import NECK
from kvlink_rag.prompt.recognition.escapes import unescaped
from kvlink_rag.prompt.recognition.rules import find_question
from kvlink_rag.prompt.tokenizer import PartTokenizer

TOWNS = ["Orvale", "Marnik", "Teldon", "Brisk"]
FOUNDED = {town: 1900 + 7 * n for n, town in enumerate(TOWNS)}


def told(town: str) -> str:
    return f"{town} lies on the coast. Its harbour was built in {FOUNDED[town]}, of grey stone."


DOCS = [Document(told(town), title=town, id=town.lower()) for town in TOWNS]
TEXTS = [document.text for document in DOCS]
WORDS = PartTokenizer(byte_tokenizer())


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(tmp_path / "catalog.sqlite", create=True) as catalog:
        yield catalog


def put(catalog: Catalog, *documents: Document | str) -> list[Document]:
    made = [d if isinstance(d, Document) else Document(d) for d in documents]
    made = [d.identified() for d in made]
    catalog.upsert([Record(d) for d in made])
    return made


def recogniser(catalog: Catalog, **arguments: int) -> Recogniser:
    return Recogniser(catalog, WORDS, **arguments)


def ids(parts: Sequence[Part]) -> list[str | None]:
    return [part.document.id for part in parts if isinstance(part, Passage)]


def put_back(parts: Sequence[Part]) -> str:
    """The prompt again: each passage as its stripped text."""
    texts = [p.text if isinstance(p, Text) else p.document.text.strip() for p in parts]
    return "".join(texts)


# What is recognised


def test_passages_in_a_prompt(catalog: Catalog) -> None:
    put(catalog, *DOCS)
    prompt = f"Read this.\n\n{TEXTS[0]}\n\n{TEXTS[2]}\n\nWhen was it built?"
    expected = [
        Text("Read this.\n\n"),
        Passage(DOCS[0]),
        Text("\n\n"),
        Passage(DOCS[2]),
        Text("\n\nWhen was it built?"),
    ]
    assert recogniser(catalog).recognise(prompt) == expected


SEPARATORS = ["\n\n", "\n", " ", "\t", "\n---\n", "\r\n\r\n", " | ", ", ", "", "---", "\n\n###\n\n"]
SEPARATORS += ["</doc><doc>", "\n</doc>\n<doc>\n", "; ", "\u2028", "\u3000", "。", "\n[SEP]\n", "•"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_any_separator(catalog: Catalog, separator: str) -> None:
    put(catalog, *DOCS)
    prompt = f"Context:\n{separator.join(TEXTS)}\n\nQuestion: what?"
    parts = recogniser(catalog).recognise(prompt)
    assert ids(parts) == [d.id for d in DOCS]
    assert put_back(parts) == prompt


def test_a_metadata_header_and_stripped_ends(catalog: Catalog) -> None:
    """As LlamaIndex writes a node, whose text was stored with white space around it."""
    put(catalog, *(Document(f"\n  {d.text} \n\n", title=d.title, id=d.id) for d in DOCS))
    nodes = "\n\n".join(f"file_name: a.txt\ntitle: {d.title}\n\n{d.text}" for d in DOCS)
    prompt = f"Context is below.\n-----\n{nodes}\n-----\nQuery: what?\nAnswer: "
    parts = recogniser(catalog).recognise(prompt)
    assert ids(parts) == [d.id for d in DOCS]
    assert put_back(parts) == prompt


def test_the_same_passage_twice_and_at_both_ends(catalog: Catalog) -> None:
    put(catalog, *DOCS)
    parts = recogniser(catalog).recognise(f"{TEXTS[1]} {TEXTS[1]}", question="")
    assert parts == [Passage(DOCS[1]), Text(" "), Passage(DOCS[1])]
    assert recogniser(catalog).recognise(TEXTS[1], question="") == [Passage(DOCS[1])]


def test_a_cut_passage_is_computed(catalog: Catalog) -> None:
    put(catalog, *DOCS)
    for cut in (TEXTS[0][:-1], TEXTS[0][1:], TEXTS[0].replace("grey", "gray"), TEXTS[0].upper()):
        prompt = f"{cut}\n\n{TEXTS[1]}\n\nwhat?"
        parts = recogniser(catalog).recognise(prompt)
        assert ids(parts) == ["marnik"]
        assert put_back(parts) == prompt


def test_the_longest_wins(catalog: Catalog) -> None:
    inner, outer = TEXTS[0], f"{TEXTS[0]} {TEXTS[1]}"
    middle = f"{TEXTS[3]}\n{outer}\n{TEXTS[2]}"
    put(catalog, *(Document(t, id=i) for t, i in ((inner, "in"), (outer, "out"), (middle, "all"))))
    found = recogniser(catalog).recognise
    assert ids(found(f"{middle}\n\nwhat?")) == ["all"]
    assert ids(found(f"{outer}\n\n{inner}\n\nwhat?")) == ["out", "in"]
    assert ids(found(f"{middle[:-1]}\n\nwhat?")) == ["out"]
    overlap = Document(f"{TEXTS[1]} And {'so ' * 30}on.", id="over")
    put(catalog, overlap)
    parts = found(f"{TEXTS[0]} {overlap.text}\n\nwhat?")
    assert ids(parts) == ["in", "over"]  # not the shorter "out", which begins before "over"


def test_two_passages_within_one_word_are_text(catalog: Catalog) -> None:
    """Each stands beside another passage, and still begins or ends inside a word."""
    put(catalog, *(text.rstrip(".") for text in TEXTS))
    first, second, third, fourth = (text.rstrip(".") for text in TEXTS)
    prompt = f"{first}{second}\n\n{third}.{fourth}\n\nwhat?"
    parts = recogniser(catalog).recognise(prompt)
    assert [p.document.text for p in parts if isinstance(p, Passage)] == [third, fourth]
    assert put_back(parts) == prompt


def test_inside_words_and_sentences_it_is_text(catalog: Catalog) -> None:
    put(catalog, *DOCS)
    text = TEXTS[0]
    for prompt in (f"x{text}", f"{text}x", f"{text}, they say", f"www.{text}", f"{text}/x"):
        assert ids(recogniser(catalog).recognise(f"{prompt}\n\nwhat?")) == []
    far = "!" * 100
    assert ids(recogniser(catalog).recognise(f"{text}{far}{TEXTS[1]}\n\nwhat?")) == []


def listed(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"page_content": t, "metadata": {"source": "a.txt", "n": n}} for n, t in enumerate(texts)
    ]


ODD = [
    'She said: "the harbour\'s walls\nare grey"\tand so\\they are.',
    "Ganz grau 🚢 ist der Hafen,\n\n  das weiß jeder in Orvale.",
    "The harbour of Marnik is dry since\xa01911, of grey stone.",
]
FORMATS: dict[str, Callable[[Sequence[str]], str]] = {
    "tags": lambda texts: "\n".join(f"<doc id='{n}'>{t}</doc>" for n, t in enumerate(texts)),
    "glued tags": lambda texts: "".join(
        f"<document><source>a</source><document_content>{t}</document_content></document>"
        for t in texts
    ),
    "fences": lambda texts: "\n".join(f"```{t}```" for t in texts),
    "fenced lines": lambda texts: "\n".join(f"```text\n{t}\n```" for t in texts),
    "triple quotes": lambda texts: "\n".join(f'"""{t}"""' for t in texts),
    "quotes": lambda texts: ", ".join(f"\u201c{t}\u201d" for t in texts),
    "brackets": lambda texts: "\n".join(f"[{n}]({t})" for n, t in enumerate(texts)),
    "labels": lambda texts: "\n".join(f"Content:{t}" for t in texts),
    "table": lambda texts: "\n".join(f"|{n}|{t}|" for n, t in enumerate(texts)),
    "json": lambda texts: json.dumps(listed(texts)),
    "json, indented": lambda texts: json.dumps(listed(texts), indent=2, ensure_ascii=False),
    "repr": lambda texts: repr(listed(texts)),
    "repr of a list": lambda texts: str(list(texts)),
    "glued edge": lambda texts: "See." + "\n".join(texts) + ".",
}


@pytest.mark.parametrize("question", ["after", "before", "before, no label"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_popular_formats_write_is_recognised(
    catalog: Catalog, name: str, question: str
) -> None:
    texts = [*TEXTS[:2], *ODD]
    if name in ("fences", "table", "glued edge"):
        texts = TEXTS[:3]  # what holds the format's own signs is not this format
    made = put(catalog, *texts)
    context = FORMATS[name](texts)
    asked = "Which of the harbours is the oldest one, and since when?"
    prompt = {
        "after": f"Use this:\n{context}\n\nQuestion: {asked}\nAnswer:",
        "before": f"Question: {asked}\n\nContext:\n{context}",
        "before, no label": f"{asked}\n\n{context}",
    }[question]
    parts = recogniser(catalog).recognise(prompt)
    assert ids(parts) == [document.id for document in made]
    assert asked in "".join(p.text for p in parts if isinstance(p, Text))


INDENTED = (
    "def harbour():\n    crane = 'grey'\n    return crane, 'of the year 1911'\n\nprint(harbour())"
)
ACCENTED = "Près du phare élevé, la criée ouvre à l'aube et ferme à la tombée de la nuit."
LOOSE = [  # a text, and what another program made of it
    (INDENTED, textwrap.indent(INDENTED, "    ")),
    (INDENTED, INDENTED.replace("    ", "\t")),
    (ACCENTED, unicodedata.normalize("NFD", ACCENTED)),
    (unicodedata.normalize("NFD", f"Élevé, {ACCENTED}"), f"Élevé, {ACCENTED}"[:-1]),
    (
        "부산항의 등대는 천구백십일년에 회색 돌로 지어졌으며 지금도 서 있다고 한다.",
        unicodedata.normalize(
            "NFD", "부산항의 등대는 천구백십일년에 회색 돌로 지어졌으며 지금도 서 있다고 한다."
        ),
    ),
]


def test_what_is_not_word_for_word_is_counted(catalog: Catalog) -> None:
    put(catalog, *DOCS)
    cut = TEXTS[0][:-8]
    for prompt in (f"{cut} …\n\nwhat?", f"{TEXTS[1]}\n\n{cut}\n\nwhat?"):
        trace = Trace()
        messages = [{"role": "user", "content": prompt}]
        recogniser(catalog).recognise_contents(messages, trace=trace)
        assert len(cut) <= trace.unrecognised_tokens <= len(TEXTS[0]) + 2  # … is three bytes
    for text, sent in LOOSE:
        put(catalog, text)
        trace = Trace()
        messages = [{"role": "user", "content": f"{sent}\n\nwhat?"}]
        recogniser(catalog).recognise_contents(messages, trace=trace)
        assert trace.unrecognised_tokens >= len(text) * 0.9
    trace = Trace()
    messages = [{"role": "user", "content": f"{TEXTS[0]}\n\nAnother text.\n\nwhat?"}]
    recogniser(catalog).recognise_contents(messages, trace=trace)
    assert trace.unrecognised_tokens == 0


@given(st.text(max_size=60))
def test_escapes_of_json_and_python_are_read_back(text: str) -> None:
    """Against the standard library's own readers; places lead back to what was written."""
    plain = json.dumps(text, ensure_ascii=False)
    for written in (json.dumps(text)[1:-1], plain[1:-1], repr(text)[1:-1]):
        found = unescaped(written)
        assert found.text == text
        assert len(found.places) == len(text) + 1
        assert found.places == sorted(found.places)
        for i, character in enumerate(text):
            piece = written[found.places[i] : found.places[i + 1]]
            assert unescaped(piece).text == character


UNICODE = [
    "漢字のテキスト。港は千九百年に建てられ、灰色の石でできています。",
    "Стены гавани построены из серого камня в тысяча девятисотом году, говорят там.",
    "👩‍👩‍👧‍👦 emoji 🇫🇷 and combining e\u0301\u0323 marks, \U0001d54f astral, \u200bzero width",
    "مرحبا بالعالم هذا نص عربي طويل بما يكفي ليكون فقرة كاملة",
    "line one\r\nline two\u2028line three\x85line four\x0bline five, long enough by far",
]


def test_unicode(catalog: Catalog) -> None:
    made = put(catalog, *UNICODE)
    prompt = "Lies:\n\n" + "\n\n".join(UNICODE) + "\n\nwas?"
    parts = recogniser(catalog).recognise(prompt)
    assert ids(parts) == [d.id for d in made]
    assert put_back(parts) == prompt
    assert ids(recogniser(catalog).recognise(f"e{UNICODE[2]}\ud800 lone\n\n{UNICODE[0]}\n\n?")) == [
        made[0].id
    ]


def test_short_texts_stay_text(catalog: Catalog) -> None:
    put(catalog, "Yes, it is.", "0123456789abcdef", "0123456789abcde", "港港港港港港")
    prompt = "Yes, it is.\n\n0123456789abcdef\n\n0123456789abcde\n\n港港港港港港\n\nwhat?"
    found = [
        p.document.text for p in recogniser(catalog).recognise(prompt) if hasattr(p, "document")
    ]
    assert found == ["0123456789abcdef", "港港港港港港"]  # 16 tokens, and 18
    assert len(ids(recogniser(catalog, min_tokens=11).recognise(prompt))) == 4
    assert len(ids(recogniser(catalog, min_tokens=17).recognise(prompt))) == 1


def test_of_one_text_the_title_before_it_decides(catalog: Catalog) -> None:
    text = "The harbour was built in 1911 and rebuilt after the flood."
    titles = {"c": "Orvale", "b": "", "a": "York", "d": "New York", "e": "Orvale", "f": "A (B) C."}
    put(catalog, *(Document(text, title=title, id=id) for id, title in titles.items()))

    def found(before: str) -> str | None:
        return ids(recogniser(catalog).recognise(f"{before}{text}\n\nwhat?"))[0]

    for before in ("Orvale: ", "Orvale\n\n", "(Title: Orvale) ", "# Orvale\n", "**Orvale** - "):
        assert found(before) == "c", before
    assert found("title: Orvale\nsource: York.txt\nn: 3\n\n") == "c"
    assert found("of York\n") == "a"
    assert found("New York.\n") == "d"
    assert found("A (B) C.\n") == "f"
    assert found("") == found("Nothing: ") == found("Newest Yorkshire\n") == "a"  # the lowest id
    assert found("Orvale\n\nAnother paragraph.\n\n") == "a"
    prompt = f"Orvale: {text}\nYork: {text}\n{text}\n\nwhat?"
    assert ids(recogniser(catalog).recognise(prompt)) == ["c", "a", "a"]


# What never is


QUESTION = TEXTS[0]
ENDINGS = [
    "{context}\n\n{question}",
    "{context}\n\nQuestion: {question}",
    "{context}\n\nQuestion:\n{question}\n\nAnswer:",
    "{context}\n\nQuestion: {question}\nHelpful Answer:",
    "Context information is below.\n-----\n{context}\n-----\nGiven it, answer the query.\n"
    "Query: {question}\nAnswer: ",
    "You are an assistant for question-answering tasks.\nQuestion: {question} \n"
    "Context: {context} \nAnswer:",
    "### Context\n{context}\n### Question: {question}\n### Answer:",
    "{context}\n\n**Question:** {question}\n\n**Answer:**",
    "{context}\nHuman: {question}\nAI:",
    "The original question is as follows: {question}\nWe have provided an existing answer: Yes.\n"
    "We have the opportunity to refine it with some more context below.\n------------\n{context}\n"
    "------------\nGiven the new context, refine the original answer.\nRefined Answer: ",
    "Answer the question based only on the following context:\n{context}\n\nQuestion: {question}\n",
    "Answer the question by the context:\n{context}\n\n{question}",
    "{context}\n\nIs it true that {question} or not?",
    "{context}\n\nQuestion: Is it true that {question} or not?\nAnswer in a word:",
]


@pytest.mark.parametrize("template", ENDINGS)
def test_a_document_equal_to_the_question(catalog: Catalog, template: str) -> None:
    put(catalog, *DOCS)
    prompt = template.format(context=f"{TEXTS[1]}\n\n{TEXTS[2]}", question=QUESTION)
    found = recogniser(catalog).recognise(prompt)
    assert ids(found) == ["marnik", "teldon"]
    assert put_back(found) == prompt
    assert recogniser(catalog).recognise(prompt, question=QUESTION) == found


def test_a_question_of_several_lines_stays_whole(catalog: Catalog) -> None:
    """Neither it nor a passage that is its first line becomes one."""
    question = f"{TEXTS[0]}\n{TEXTS[3]}"
    put(catalog, *DOCS, question)
    parts = recogniser(catalog).recognise(f"{TEXTS[1]}\n\n{question}")
    assert parts == [Passage(DOCS[1]), Text(f"\n\n{question}")]


def test_a_label_inside_a_passage_asks_nothing(catalog: Catalog) -> None:
    faq = "Question: When was it built?\nAnswer: In 1911, of grey stone, by the town."
    put(catalog, Document(faq, id="faq"), *DOCS)
    prompt = f"{TEXTS[0]}\n\n{faq}\n\nQuestion: {QUESTION}\nAnswer:"
    assert ids(recogniser(catalog).recognise(prompt)) == ["orvale", "faq"]
    assert ids(recogniser(catalog).recognise(f"{faq}\n\nWhen?")) == ["faq"]


def test_the_application_s_own_instruction(catalog: Catalog) -> None:
    own = "Use only the passages below, and say so where they do not hold the answer."
    more = Document(f"{own} Or guess, in the end.", id="more")
    put(catalog, Document(own, id="own"), more, *DOCS)
    prompt = f"{own}\n\n{TEXTS[0]}\n\nwhat?"
    known = recogniser(catalog)
    assert ids(known.recognise(prompt)) == ["own", "orvale"]
    assert ids(known.recognise(prompt, system=[own])) == ["orvale"]
    assert ids(known.recognise(prompt, system=[f"{own}\n\n{{context}}"])) == ["orvale"]
    assert ids(known.recognise(prompt, system=["the town", "e", "", "{context}"])) == [
        "own",
        "orvale",
    ]
    # a longer passage that holds the instruction is not the instruction
    assert ids(known.recognise(f"{more.text}\n\nwhat?", system=[own])) == ["more"]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("some context\n\nwhat is it?", "what is it?"),
        ("context\nQuery: what?\nAnswer: ", "Query: what?"),
        ("Question: one?\nAnswer: 1\n\nQuestion: two?\nAnswer:", "Question: two?"),
        ("what?\n\nHelpful Answer:\n", "what?\n\nHelpful Answer:\n"),
        ("Answer:", "Answer:"),
        ("", ""),
    ],
)
def test_where_the_question_is_found(prompt: str, question: str) -> None:
    found = find_question(prompt, [])
    assert prompt[found.start : found.stop] == question


# In step with the catalog


def test_changes_are_seen(catalog: Catalog) -> None:
    known = recogniser(catalog)
    prompt = "\n\n".join([*TEXTS, "what?"])
    assert ids(known.recognise(prompt)) == []
    put(catalog, *DOCS)
    assert len(ids(known.recognise(prompt))) == 4
    catalog.delete(["brisk", "orvale"])
    assert ids(known.recognise(prompt)) == ["marnik", "teldon"]
    put(catalog, Document("Another text altogether, of the same document.", id="teldon"))
    assert ids(known.recognise(prompt)) == ["marnik"]
    put(catalog, Document(TEXTS[0], title="again", id="x"))
    assert ids(known.recognise(prompt)) == ["x", "marnik"]


def add_elsewhere(path: Path) -> None:
    with Catalog.open(path) as catalog:
        put(catalog, *DOCS)
        catalog.delete(["orvale"])


def test_changes_of_another_process_are_seen(catalog: Catalog) -> None:
    known = recogniser(catalog)
    prompt = "\n\n".join([*TEXTS, "what?"])
    assert ids(known.recognise(prompt)) == []
    process = multiprocessing.get_context("spawn").Process(
        target=add_elsewhere, args=(catalog.path,)
    )
    process.start()
    process.join()
    assert ids(known.recognise(prompt)) == ["marnik", "teldon", "brisk"]


def test_a_damaged_document_is_computed(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    put(catalog, *DOCS)
    known = recogniser(catalog)
    prompt = "\n\n".join([*TEXTS, "what?"])
    known.recognise(prompt)
    with sqlite3.connect(catalog.path) as sql:
        sql.execute("UPDATE documents SET title = 'forged' WHERE id = 'marnik'")
    sql.close()
    assert ids(known.recognise(prompt)) == ["orvale", "teldon", "brisk"]
    assert "damaged" in caplog.text


# Properties


PIECES = st.sampled_from(
    ["a", "b", "ab", "a b", " ", "\n", "é", "漢", "🙂", ".", "x" * 20, "Question:"]
)
PASSAGE = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(str.strip)


@given(data=st.data())
def test_outside_passages_nothing_changes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against the plainest search there is: borders, overlaps, and the characters put back."""
    texts = data.draw(st.lists(PASSAGE, min_size=1, max_size=6, unique=True))
    pieces = data.draw(st.lists(st.sampled_from([*texts, " ", "\n\n", "-", "z", "a"]), max_size=12))
    prompt = "".join(pieces)
    path = tmp_path_factory.mktemp("c") / "catalog.sqlite"
    with Catalog.open(path, create=True) as catalog:
        put(catalog, *texts)
        parts = recogniser(catalog, min_tokens=2).recognise(prompt, question="")
        assert put_back(parts) == prompt
        found = [p.document.text.strip() for p in parts if isinstance(p, Passage)]
        assert all(len(text.encode()) >= 2 for text in found)
        if longest := longest_free(prompt, texts):
            assert max(map(len, found)) >= longest
        without = recogniser(catalog, min_tokens=2).recognise(prompt)
        assert put_back(without) == prompt


def longest_free(prompt: str, texts: Sequence[str]) -> int:
    """Length of the longest text that stands in `prompt` with white space on both sides."""
    padded, best = f" {prompt} ", 0
    for text in (text.strip() for text in texts):
        at = padded.find(text)
        while at > 0 and len(text.encode()) >= 2:
            if padded[at - 1].isspace() and padded[at + len(text)].isspace():
                best = max(best, len(text))
            at = padded.find(text, at + 1)
    return best


# Hostile texts


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that were hashed to be compared, of each anew: the work that is done."""
    done: list[int] = []
    plain = xxhash.xxh3_64_intdigest
    monkeypatch.setattr(
        xxhash, "xxh3_64_intdigest", lambda text, seed: done.append(len(text)) or plain(text, seed)
    )
    return done


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> int:
    """Less than usual, so that its end is come to sooner."""
    monkeypatch.setattr(kvlink_rag.prompt.recognition.beginnings, "PATIENCE", 1 << 21)
    return 1 << 21


def test_one_character_ten_million_times(
    catalog: Catalog, hashed: list[int], patience: int
) -> None:
    put(
        catalog,
        *("a" * n for n in range(16, 4000, 3)),
        *("a " * n + "b" for n in range(8, 2000, 3)),
    )
    known = recogniser(catalog)
    known.refresh()
    for prompt in ("a" * 10_000_000, "a " * 500_000, "a-" * 500_000):
        hashed.clear()
        parts = known.recognise(prompt)
        assert put_back(parts) == prompt
        assert sum(hashed) < patience + 8 * len(prompt) + 256 * NECK


HOSTILE = ["the ", "the\n", "question ", "-", "_", "A:\n", "Question:\n", "- ", "a-", "漢", "\n"]
HOSTILE += [" ", f"{TEXTS[0]}-", f"{TEXTS[0]} ", f"Query: {TEXTS[0]}\n"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_many_characters_of_anything(
    catalog: Catalog, hashed: list[int], patience: int, piece: str
) -> None:
    """Work grows with the length, whatever stands there; a quadratic pattern would never end."""
    put(catalog, *DOCS, *(piece.strip() * n or "x" for n in range(20, 120, 7)))
    known = recogniser(catalog)
    for end in ("", "Question", " " * 30_000, "\nAnswer:"):
        prompt = f"Question{piece * (300_000 // len(piece))}{end}"
        known.refresh()
        hashed.clear()
        parts = known.recognise(prompt, system=[TEXTS[0]] if end else [])
        assert sum(hashed) < patience + 8 * len(prompt) + 256 * NECK
        assert put_back(parts) == prompt


def test_many_passages_with_one_head_and_one_text(catalog: Catalog, hashed: list[int]) -> None:
    head = "Internal report of the harbour company, confidential, not for circulation. "
    put(catalog, *(Document(f"{head}{n} {'word ' * (n % 300)}", id=str(n)) for n in range(5000)))
    put(catalog, *(Document(head + "The same.", title=f"T{n}", id=f"s{n:04}") for n in range(3000)))
    known = recogniser(catalog)
    wanted = [17, 4711, 23]
    texts = [f"{head}{n} {'word ' * (n % 300)}" for n in wanted]
    prompt = "\n\n".join([*texts, f"T2999: {head}The same.", f"{head}The same.", "what?"])
    assert ids(known.recognise(prompt)) == ["17", "4711", "23", "s2999", "s0000"]
    hashed.clear()
    known.recognise(prompt)
    assert len(hashed) < 200  # at 5 places of 36 lengths below `NECK` (without necks: 300)


def test_a_prompt_that_asks_for_too_much_work_is_computed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(catalog, *DOCS)
    monkeypatch.setattr(kvlink_rag.prompt.recognition.beginnings, "PATIENCE", -10_000)
    prompt = "\n\n".join([*TEXTS, "what?"])
    assert put_back(recogniser(catalog).recognise(prompt)) == prompt
    assert "the rest is computed" in caplog.text


def test_memory_is_as_stated(catalog: Catalog) -> None:
    for batch in range(4):
        put(catalog, *(f"passage {batch} {n} with some words to it" for n in range(2500)))
    known = recogniser(catalog)
    tracemalloc.start()
    table = known.refresh()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(table.heads) == 10_000
    assert table.nbytes == 36 * 10_000
    assert held < table.nbytes + 50_000


def test_the_benchmark_runs_and_ends_in_one_json_object() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "recognition.py"
    sizes = ["--passages", "600", "--characters", "9000", "--rounds", "2"]
    done = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["kind"] for row in rows] == ["chain", "text", "changed", "one_head"]
    assert [row["recognised"] > 5 for row in rows] == [True, False, True, True]
    assert all(row["table_bytes"] == 36 * row["passages"] for row in rows)


# Through a collection


@pytest.fixture
def model(make_model: ModelMaker) -> KVLinkModel:
    return make_model("llama", torch.float32)


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.register(DOCS)
        yield rag
        assert rag.check() == []


CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatty() -> KVLinkModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return KVLinkModel(random_model("llama", torch.float32), tokenizer, byte_spec())


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_the_answer_equals_the_masked_prefill(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder, family: str
) -> None:
    """Text before, between and after passages, one of them twice."""
    with KVLinkRAG.open(
        tmp_path, model=make_model(family, torch.float32), embedder=embedder
    ) as rag:
        rag.register(DOCS)
        for question in ("When was Orvale built?", "And Marnik?"):
            prompt = f"Read.\n\n{TEXTS[0]}\n---\n{TEXTS[1]}\n\n{TEXTS[0]}\n\nQuestion: {question}"
            stream = rag.complete(prompt, max_new_tokens=12)
            text = "".join(stream)
            parts = rag.recognise_chat([{"role": "user", "content": prompt}])
            assert sum(isinstance(part, Passage) for part in parts) == 3
            assert text == rag.model.generate(parts, mode="masked", max_new_tokens=12)
            assert rag.model.verify(parts, reuse=rag.reuse).holds
            assert stream.trace.snapshots_found == 2
            assert stream.trace.reused_tokens == rag.model.layout(parts).reused_tokens > 200
        assert stream.trace.computed_tokens == len("And Marnik?\n")  # only what differs


def test_nothing_is_recognised_before_the_first_piece(rag: KVLinkRAG) -> None:
    stream = rag.complete(f"{TEXTS[0]}\n\nwhat?", max_new_tokens=2)
    assert stream.trace.passages == 0
    list(stream)
    assert stream.trace.passages == 1
    assert 0 < stream.trace.retrieval_ms < stream.trace.first_token_ms


def test_passages_beyond_the_slots_are_told(
    tmp_path: Path, embedder: WordEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    """They are computed as text; those of a caller take slots first, and too many are an error."""
    model = KVLinkModel(random_model("llama", torch.float32), byte_tokenizer(), byte_spec(slots=3))
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.register(DOCS)
        asked = "\n\n".join([*TEXTS, "Question: when?"])
        stream = rag.complete(asked, max_new_tokens=8)
        said = "".join(stream)
        assert (stream.trace.passages, stream.trace.passages_as_text) == (3, 1)
        assert "1 of the 4 passages in the prompt are computed as text" in caplog.text
        assert "link tokens for 3; retrieve fewer for a prompt (a smaller k)" in caplog.text
        parts = rag.recognise_chat([{"role": "user", "content": asked}])
        assert said == rag.model.generate(parts, mode="masked", max_new_tokens=8)
        given = [*(Passage(document) for document in DOCS[:2]), Text(asked)]
        stream = rag.complete([{"role": "user", "content": given}], max_new_tokens=2)
        list(stream)
        assert (stream.trace.passages, stream.trace.passages_as_text) == (3, 3)
        handed = [*(Passage(document) for document in DOCS), Text("when?")]
        with pytest.raises(TooManyPassages, match="found 4 passages"):
            next(rag.complete([{"role": "user", "content": handed}]))
        caplog.clear()
        list(rag.complete("\n\n".join([*TEXTS[:3], "Question: when?"]), max_new_tokens=2))
        assert caplog.text == ""


EMPTY = [
    "",
    " \n",
    [],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": [Text(" ")]}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}],
]


@pytest.mark.parametrize("prompt", EMPTY)
def test_an_empty_question(rag: KVLinkRAG, prompt: Any) -> None:
    with pytest.raises(PromptError, match="empty"):
        rag.complete(prompt)
    with pytest.raises(PromptError, match="the question is '"):
        rag.ask("" if prompt == [] else " ")


FILLER = "An instruction that goes on and on, as those of applications do. " * 8


def said(rag: KVLinkRAG, prompt: str, caplog: pytest.LogCaptureFixture) -> str:
    """The warnings of one call."""
    caplog.clear()
    "".join(rag.complete(prompt, max_new_tokens=1))
    return caplog.text


def test_prompts_without_documents_are_told_once(
    rag: KVLinkRAG, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(rag, "Nothing of it.\n\nwhat?", caplog) == ""  # it could hold none
    for _ in range(2):
        assert said(rag, f"{FILLER}\n\nwhat?", caplog) == ""
    assert "recognised none of the 4 documents of" in said(rag, f"{FILLER}\n\nwhat?", caplog)
    assert said(rag, f"{FILLER}\n\nwhat?", caplog) == ""


def test_a_right_chain_is_never_warned_of(rag: KVLinkRAG, caplog: pytest.LogCaptureFixture) -> None:
    """Ten turns: a call over documents, and one that condenses the history and holds none."""
    history = ""
    for turn in range(10):
        if turn:
            condense = f"{FILLER}\n\nChat history:\n{history}\n\nRephrase: and then?"
            assert said(rag, condense, caplog) == ""
        assert said(rag, f"{FILLER}\n\n{TEXTS[turn % 4]}\n\nQuestion: what?", caplog) == ""
        history += "Human: what?\nAssistant: that.\n"


def test_an_empty_collection_is_told_once(
    rag: KVLinkRAG, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with KVLinkRAG.open(tmp_path / "empty", model=rag.model) as empty:
        assert said(empty, "what?", caplog) == ""
        assert "holds no documents" in said(empty, f"{FILLER}\n\nwhat?", caplog)
        assert said(empty, f"{FILLER}\n\nwhat?", caplog) == ""


def test_a_changed_document_is_told_once(rag: KVLinkRAG, caplog: pytest.LogCaptureFixture) -> None:
    prompt = f"{TEXTS[0]}\n\n{TEXTS[1][:-9]} …\n\nwhat?"
    assert "look like documents of" in said(rag, prompt, caplog)
    assert said(rag, prompt, caplog) == ""


def test_passages_beyond_the_slots_stay_text(
    tmp_path: Path, chatty: KVLinkModel, embedder: WordEmbedder
) -> None:
    model = KVLinkModel(chatty.backbone.model, chatty.tokenizer.hf, byte_spec(slots=3))
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.register(DOCS)
        prompt = "\n\n".join([*TEXTS, "what?"])
        assert ids(rag.recognise(prompt)) == ["orvale", "marnik", "teldon"]
        one = {"role": "user", "content": [Passage(DOCS[3]), Text(prompt)]}
        other = {"role": "system", "content": TEXTS[3]}
        assert ids(rag.recognise_chat([other, one])) == ["brisk", "brisk", "orvale"]
        stream = rag.complete([other, one], max_new_tokens=2)
        text = "".join(stream)
        assert stream.trace.passages == 3
        parts = rag.recognise_chat([other, one])
        assert text == model.generate(parts, mode="masked", max_new_tokens=2)


def test_chat(tmp_path: Path, chatty: KVLinkModel, embedder: WordEmbedder) -> None:
    """Contents are recognised before the template trims them; a later turn changes no earlier."""
    with KVLinkRAG.open(tmp_path, model=chatty, embedder=embedder) as rag:
        rag.register([*DOCS, Document("You are a helpful clerk of the harbour office.", id="sys")])
        rag.register_system_prompt("You are a helpful clerk of the harbour office.\n\n{context}")
        system = f"You are a helpful clerk of the harbour office.\n\n{TEXTS[0]}\n\n{TEXTS[1]}"
        messages = [
            {"role": "system", "content": f"\n{system}\n"},
            {"role": "user", "content": TEXTS[2]},
        ]
        parts = rag.recognise_chat(messages)
        assert ids(parts) == ["orvale", "marnik"]
        assert parts[1] == Text("You are a helpful clerk of the harbour office.\n\n")  # trimmed
        first = "".join(rag.complete(messages, max_new_tokens=4))
        messages += [
            {"role": "assistant", "content": f"{TEXTS[0]}"},
            {"role": "user", "content": f"{TEXTS[3]}\n\n{TEXTS[2]}"},
        ]
        later = rag.recognise_chat(messages)
        assert ids(later) == ["orvale", "marnik", "brisk"]
        before = chatty.layout(parts).token_ids
        assert chatty.layout(later).token_ids[: len(before)].tolist() == before.tolist()
        stream = rag.complete(messages, max_new_tokens=4)
        assert "".join(stream) == chatty.generate(later, mode="masked", max_new_tokens=4)
        assert stream.trace.prefix_tokens >= len(before) - chatty.layout(parts).reused_tokens
        assert first == chatty.generate(parts, mode="masked", max_new_tokens=4)


def test_context_in_a_message_of_its_own(
    tmp_path: Path, chatty: KVLinkModel, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path, model=chatty, embedder=embedder) as rag:
        rag.register(DOCS)
        alone = [{"role": "user", "content": TEXTS[0]}, {"role": "user", "content": TEXTS[1]}]
        assert ids(rag.recognise_chat(alone)) == ["orvale"]
        tool = [
            {"role": "user", "content": TEXTS[1]},
            {"role": "assistant", "content": "looking"},
            {"role": "tool", "content": TEXTS[0]},
        ]
        assert ids(rag.recognise_chat(tool)) == ["orvale"]


def test_bad_prompts(rag: KVLinkRAG) -> None:
    for prompt in ("", " \n", []):
        with pytest.raises(PromptError, match="empty"):
            rag.complete(prompt)
    with pytest.raises(PromptTooLong, match="window"):
        next(rag.complete("long " * 3000))
    for messages in ([{"content": "x"}], ["x"]):
        with pytest.raises(PromptError, match="role or content"):
            rag.recognise_chat(messages)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="content is int"):
        rag.recognise_chat([{"role": "user", "content": 3}])


def test_registering_needs_no_embedder(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    """None is loaded or remembered, by any call that embeds nothing; one may come later."""
    caplog.set_level(logging.WARNING)
    nowhere = "no/such-embedder"
    with KVLinkRAG.open(tmp_path, model=model, embedder=nowhere) as rag:
        assert rag.register(DOCS).encoded == 4
        assert rag.register(DOCS).unchanged == 4
        assert rag.search("anything") == []
        assert rag.delete(["brisk"]) == 1
        assert rag.check(fix=True) == []
        "".join(rag.complete(f"{TEXTS[0]}\n\nwhat?", max_new_tokens=1))
        assert "embedder" not in rag.catalog.settings()
    with (
        KVLinkRAG.open(tmp_path, model=model) as registered,
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag,
    ):
        assert registered.check() == []
        rag.add(DOCS[:2])
        assert [hit.document.id for hit in rag.search("Marnik", 1)] == ["marnik"]
        registered.register(DOCS[3:])
        assert registered.check() == []
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        assert [hit.document.id for hit in rag.search("Marnik", 1)] == ["marnik"]
        assert rag.check() == []
    assert caplog.text == ""
