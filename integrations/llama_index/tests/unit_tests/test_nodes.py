"""Nodes as documents and back."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import (
    ImageNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from llama_index.llms.kvlink.nodes import to_document, to_node
from llama_index.response_synthesizers.kvlink import KVLinkSynthesizer
from llama_index.retrievers.kvlink import KVLinkRetriever

from kvlink_rag import Document, Hit, KVLinkRAG
from kvlink_rag.documents import jsonable
from kvlink_rag.errors import DocumentError


def test_a_node_becomes_its_bare_text() -> None:
    node = TextNode(
        id_="n1", text="  Bare text. ", metadata={"file_name": "a.md"}, text_template="<{content}>"
    )
    for given in (node, NodeWithScore(node=node, score=0.5)):
        document = to_document(given)
        assert (document.id, document.text, document.title) == ("n1", "  Bare text. ", "a.md")
        more = {"_node": {"text_template": "<{content}>"}}
        assert dict(document.metadata) == {"file_name": "a.md", **more}


@pytest.mark.parametrize(
    ("metadata", "title"),
    [
        ({"title": "T", "file_name": "f"}, "T"),
        ({"title": " ", "file_name": "f"}, "f"),
        ({"title": 7}, ""),
        ({}, ""),
    ],
)
def test_title(metadata: dict[str, object], title: str) -> None:
    assert to_document(TextNode(text="x", metadata=metadata)).title == title


def test_odd_metadata_becomes_json() -> None:
    odd = {
        "when": date(1911, 5, 1),
        "path": Path("a"),
        "nan": float("nan"),
        "deep": {1: (True, None, 2.5), "list": [{"x": {1}}]},
    }
    found = jsonable(odd)
    assert found == {
        "when": "1911-05-01",
        "path": "a",
        "nan": "nan",
        "deep": {"1": [True, None, 2.5], "list": [{"x": "{1}"}]},
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nodes_without_text_are_left_out_of_a_pipeline_and_told(
    rag: KVLinkRAG, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [
        TextNode(id_="p7", text="", metadata={"title": "Page 7"}),
        TextNode(text=" \n"),
        ImageNode(image_url="http://localhost/x.png"),
        TextNode(id_="y", text="yes", metadata={"when": date(1911, 5, 1), "pages": [3]}),
        LlamaDocument(id_="z", text="a whole document"),
    ]
    assert KVLinkRegister(rag=rag)(nodes) is nodes
    assert [d.id for d in rag.documents()] == ["y", "z"]
    assert "3 of 5 nodes have no text and are not registered: 'p7', " in caplog.text
    assert "kept as text in the collection, under the keys when\n" in caplog.text
    assert {record.name for record in caplog.records} == {"kvlink_rag.llama_index"}
    with pytest.raises(DocumentError, match="has the key 1"):
        KVLinkRegister(rag=rag, embed=True)([TextNode(text="x", metadata={"when": {1: 2}})])


def test_nodes_without_text_handed_over_are_errors(rag: KVLinkRAG) -> None:
    nodes = [TextNode(text="fine"), TextNode(id_="p7", text=" ", metadata={"title": "Page 7"})]
    expected = r"node 2 of 2 \(id 'p7', title 'Page 7'\) has no text; leave it out"
    with pytest.raises(DocumentError, match=expected):
        KVLinkRetriever(rag=rag).add(nodes)
    with pytest.raises(DocumentError, match=expected):
        KVLinkSynthesizer(KVLink(rag=rag)).synthesize("What?", nodes)
    assert len(rag) == 0


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"deep": {1: 2}}, r"\['deep'\] has the key 1"),
        ({"tags": ("a",)}, r"\['tags'\] is a tuple"),
        ({"when": date(1911, 5, 1)}, "date"),
    ],
)
def test_metadata_that_would_not_come_back_is_an_error(
    rag: KVLinkRAG, metadata: dict[str, object], match: str
) -> None:
    node = TextNode(id_="n", text="Some text.")
    node.metadata = metadata
    for add in (KVLinkRetriever(rag=rag).add, KVLinkRegister(rag=rag, embed=True)):
        with pytest.raises(DocumentError, match=match):
            add([node])
    assert len(rag) == 0


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("deep", [0, 100_000])
def test_metadata_without_end(rag: KVLinkRAG, embed: bool, deep: int) -> None:
    node = TextNode(id_="endless", text="Some text.")
    loop: list[object] = []
    loop.append([] if deep else loop)
    for _ in range(deep):
        loop = [loop]
    node.metadata["loop"] = loop
    with pytest.raises(DocumentError, match=r"metadata of (node|document) 'endless'"):
        KVLinkRegister(rag=rag, embed=embed)([node])
    node.metadata = {}
    node.relationships = {
        NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc", metadata={"loop": loop})
    }
    with pytest.raises(DocumentError, match="metadata of node 'endless'"):
        KVLinkRegister(rag=rag, embed=embed)([node])
    assert len(rag) == 0


@pytest.mark.parametrize("wrong", ["text", ["text"], TextNode(text="alone"), None, [3]])
def test_what_is_no_list_of_nodes(rag: KVLinkRAG, wrong: object) -> None:
    synthesizer = KVLinkSynthesizer(KVLink(rag=rag))
    for call in (
        KVLinkRetriever(rag=rag).add,
        KVLinkRegister(rag=rag),
        lambda nodes: synthesizer.synthesize("What?", nodes),
    ):
        with pytest.raises(DocumentError, match=r"expected a (list of nodes|LlamaIndex node)"):
            call(wrong)  # type: ignore[operator]


def test_a_hit_becomes_a_node_and_back() -> None:
    document = Document("Text.", title="T", id="d", metadata={"page": 3})
    node = to_node(Hit(document, 0.25))
    assert (node.node_id, node.text, node.score) == ("d", "Text.", 0.25)
    assert node.metadata == {"page": 3, "title": "T"}
    again = to_document(node)
    assert (again.id, again.text, again.title) == ("d", "Text.", "T")
    assert to_node(
        Hit(Document("x", title="f", id="e", metadata={"file_name": "f"}), 1)
    ).metadata == {"file_name": "f"}


def test_what_llama_index_knows_of_a_node_comes_back() -> None:
    node = TextNode(
        text="Some text.",
        id_="n",
        metadata={"secret": "S3CRET", "title": "T"},
        excluded_llm_metadata_keys=["secret"],
        start_char_idx=3,
        end_char_idx=13,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="source")},
    )
    back = to_node(Hit(to_document(node), 1.0)).node
    assert back.ref_doc_id == "source"
    assert (back.start_char_idx, back.end_char_idx) == (3, 13)
    assert back.metadata == node.metadata
    assert "S3CRET" not in back.get_content(metadata_mode=MetadataMode.LLM)
    assert back.hash == node.hash
