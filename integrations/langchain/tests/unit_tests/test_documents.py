"""Documents, passages, messages and filters, one as the other."""

from __future__ import annotations

import datetime
import math
from typing import Any
from uuid import NAMESPACE_URL, uuid1, uuid4, uuid5

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_kvlink import document_block
from langchain_kvlink.documents import from_passage, is_fresh, to_passage, to_passages
from langchain_kvlink.filters import as_where
from langchain_kvlink.messages import to_conversation

from kvlink_rag.documents import Document as Passage
from kvlink_rag.documents import Passage as PassagePart
from kvlink_rag.documents import Text
from kvlink_rag.errors import ConfigError, DocumentError, PromptError


@pytest.mark.parametrize(
    "metadata",
    [{}, {"title": "Orvale"}, {"n": 3, "x": 0.5, "tags": ["a", None], "deep": {"on": True}}],
)
def test_a_document_comes_back_as_it_was(metadata: dict[str, Any]) -> None:
    document = Document("The harbour.", metadata=metadata, id="one")
    passage = to_passage(document)
    assert passage.title == metadata.get("title", "")
    assert from_passage(passage) == document


def test_a_title_the_metadata_lacks_stands_there() -> None:
    assert from_passage(Passage("t", title="Orvale", id="x")).metadata == {"title": "Orvale"}


@pytest.mark.parametrize("title", [None, 7, "", "  "])
def test_what_is_no_title(title: Any) -> None:
    assert to_passage(Document("t", metadata={"title": title})).title == ""


@pytest.mark.parametrize("value", [datetime.date(1911, 5, 1), math.nan, object(), {1, 2}])
def test_metadata_that_is_not_json(value: Any) -> None:
    document = Document("t", metadata={"when": value})
    with pytest.raises(DocumentError, match="metadata"):
        to_passage(document)
    kept = to_passage(document, strict=False).metadata["when"]
    assert kept == str(value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["dict", "list", "deep"])
def test_metadata_without_end(kind: str, strict: bool) -> None:
    endless: Any = {} if kind == "dict" else []
    if kind == "dict":
        endless["self"] = endless
    elif kind == "list":
        endless.append(endless)
    for _ in range(100_000 if kind == "deep" else 0):
        endless = [endless]
    document = Document("t", id="endless")
    document.metadata["loop"] = endless
    with pytest.raises(DocumentError, match=r"metadata of (the )?document .*endless"):
        to_passage(document, strict=strict)


@pytest.mark.parametrize(
    ("id", "fresh"),
    [
        (str(uuid4()), True),
        (uuid4().hex, True),
        (str(uuid1()), True),
        (str(uuid5(NAMESPACE_URL, "x")), False),
        ("orvale", False),
        ("", False),
        (None, False),
        ("0" * 32, False),
    ],
)
def test_ids_that_are_new_each_time(id: str | None, fresh: bool) -> None:
    assert is_fresh(id) is fresh


def test_ids(towns: list[Document]) -> None:
    """Given ids go first, then the documents' own, then one from the content."""
    assert [p.id for p in to_passages(towns[:2])] == ["orvale", "marnik"]
    assert [p.id for p in to_passages(towns[:2], ["x", None])] == ["x", "marnik"]
    bare = [Document(d.page_content, metadata=d.metadata) for d in towns[:2]]
    derived = [p.id for p in to_passages(bare)]
    assert derived == [p.id for p in to_passages(bare)]
    assert len(set(derived)) == 2
    with pytest.raises(ValueError, match="found 1 ids for 2"):
        to_passages(towns[:2], ["x"])
    with pytest.raises(DocumentError, match="found a str"):
        to_passages(["text"])  # type: ignore[list-item]


def test_roles_and_contents() -> None:
    messages = [
        SystemMessage("s"),
        HumanMessage([document_block(Document("d", metadata={"title": "T"})), "and", " so"]),
        AIMessage(
            [
                {"type": "reasoning", "reasoning": "hm"},
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "a"},
            ]
        ),
        ChatMessage("c", role="user"),
    ]
    assert to_conversation(messages) == [
        {"role": "system", "content": [Text("s")]},
        {
            "role": "user",
            "content": [PassagePart(Passage("d", title="T")), Text("and"), Text(" so")],
        },
        {"role": "assistant", "content": [Text("a")]},
        {"role": "user", "content": [Text("c")]},
    ]


def test_a_block_as_langchain_wrote_it_before_version_1() -> None:
    old = {"type": "file", "source_type": "text", "text": "d", "mime_type": "text/plain"}
    content = to_conversation([HumanMessage([old])])[0]["content"]
    assert content == [PassagePart(Passage("d"))]


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (HumanMessage(""), "empty"),
        (HumanMessage("  \n"), "empty"),
        (HumanMessage([]), "empty"),
        (
            HumanMessage([{"type": "text-plain", "text": " "}]),
            r"block 1 of 1, of .*'text-plain'",
        ),
        (HumanMessage([{"type": "image", "url": "x"}]), "'image'"),
        (ToolMessage("t", tool_call_id="1"), "calls no tools"),
        (AIMessage("t", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), "calls no tools"),
    ],
)
def test_what_cannot_be_asked(message: Any, match: str) -> None:
    with pytest.raises(PromptError, match=match):
        to_conversation([message])


def test_filters(towns: list[Document]) -> None:
    passages = to_passages(towns)
    odd = [p.id for p in passages if p.metadata["n"] % 2]

    def found(filter: Any) -> list[str | None]:
        where = as_where(filter)
        return [p.id for p in passages if where is None or where(p)]

    assert len(found(None)) == len(towns)
    assert found({"kind": "odd"}) == odd
    assert found({"kind": "odd", "n": 3}) == ["brisk"]
    assert found({"kind": None, "no": 1}) == []
    assert found({"n": [1, 4, 99]}) == ["marnik", "quill"]
    assert found({"n": [1, 4], "kind": ["odd"]}) == ["marnik"]
    assert found({"n": []}) == found({"kind": [None]}) == []
    assert found({}) == [p.id for p in passages]
    assert found(lambda document: document.metadata["title"] == "Hux") == ["hux"]
    with pytest.raises(ConfigError, match="filter is a list"):
        as_where([("kind", "odd")])  # type: ignore[arg-type]
    assert found({"deep": {"on": True}}) == []
    tagged = Passage("t", metadata={"tags": ["a", "b"]})
    assert as_where({"tags": ["a", "b"]})(tagged)  # that very list
    assert not as_where({"tags": ["a"]})(tagged)


@pytest.mark.parametrize(
    ("filter", "match"),
    [
        ({"n": {"$gt": 3}}, r"operator '\$gt'"),
        ({"$or": [{"n": 1}, {"n": 2}]}, r"operator '\$or'"),
        ({1: 2}, "key 1, expected a string"),
        ({"n": (1, 2)}, "'n' for a tuple"),
        ({"n": {1, 2}}, "'n' for a set"),
    ],
)
def test_filters_that_could_find_nothing(filter: Any, match: str) -> None:
    with pytest.raises(
        ConfigError, match=match + ".*; supported are equality with a value, .*one of several"
    ):
        as_where(filter)
