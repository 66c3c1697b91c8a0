"""LlamaIndex's filters, against LlamaIndex's own in-memory reading of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from llama_index.llms.kvlink.filters import as_where
from llama_index.llms.kvlink.nodes import to_document
from llama_index.retrievers.kvlink import KVLinkRetriever
from tiny import town_nodes

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError

NODES = [
    TextNode(id_="a", text="a", metadata={"lang": "en", "year": 1911, "tags": ["sea", "old"]}),
    TextNode(id_="b", text="b", metadata={"lang": "de", "year": 1950, "tags": []}),
    TextNode(id_="c", text="c", metadata={"lang": "EN-GB", "year": 2001, "tags": ["new"]}),
    TextNode(id_="d", text="d", metadata={}),
]
F, Op = MetadataFilter, FilterOperator


def kept(filters: MetadataFilters) -> list[str]:
    where = as_where(filters)
    assert where is not None
    return [node.node_id for node in NODES if where(to_document(node))]


@pytest.mark.parametrize("condition", list(FilterCondition))
@pytest.mark.parametrize(
    "filters",
    [
        [],
        [F(key="lang", value="en")],
        [F(key="lang", value="en", operator=Op.NE)],
        [F(key="year", value=1950, operator=Op.GT)],
        [F(key="year", value=1950, operator=Op.GTE)],
        [F(key="year", value=1950, operator=Op.LT), F(key="lang", value="en")],
        [F(key="year", value=1950, operator=Op.LTE), F(key="lang", value="de", operator=Op.NE)],
        [F(key="lang", value=["en", "de"], operator=Op.IN)],
        [F(key="lang", value=["en", "de"], operator=Op.NIN)],
        [F(key="tags", value="sea", operator=Op.CONTAINS)],
        [F(key="tags", value=["new", "sea"], operator=Op.ANY)],
        [F(key="tags", value=["old", "sea"], operator=Op.ALL)],
        [F(key="tags", value=None, operator=Op.IS_EMPTY)],
        [F(key="lang", value="en", operator=Op.TEXT_MATCH)],
        [F(key="lang", value="en", operator=Op.TEXT_MATCH_INSENSITIVE)],
    ],
)
def test_every_operator_and_condition(
    filters: list[MetadataFilter], condition: FilterCondition
) -> None:
    utils = import_module("llama_index.core.vector_stores.utils")
    if not hasattr(utils, "build_metadata_filter_fn"):
        pytest.skip("this LlamaIndex has no public reading of filters")
    given = MetadataFilters(filters=filters, condition=condition)
    theirs = utils.build_metadata_filter_fn(
        lambda id: {n.node_id: n.metadata for n in NODES}[id], given
    )
    assert kept(given) == [node.node_id for node in NODES if theirs(node.node_id)]


def test_nested() -> None:
    english = MetadataFilters(
        filters=[F(key="lang", value="en"), F(key="lang", value="EN-GB")],
        condition=FilterCondition.OR,
    )
    old = F(key="year", value=1950, operator=Op.LT)
    assert kept(MetadataFilters(filters=[english, old])) == ["a"]
    assert kept(MetadataFilters(filters=[english], condition=FilterCondition.NOT)) == ["b", "d"]


@pytest.mark.parametrize(
    "wrong",
    [
        F(key="year", value="1950", operator=Op.GT),
        F(key="year", value="19", operator=Op.TEXT_MATCH),
        F(key="year", value=1, operator=Op.CONTAINS),
        F(key="lang", value=3, operator=Op.IN),
    ],
)
def test_what_cannot_be_compared(wrong: MetadataFilter) -> None:
    with pytest.raises(ConfigError, match=r"the filter asks whether '(year|lang)'"):
        kept(MetadataFilters(filters=[wrong]))


def test_the_retriever_finds_k_where_there_are_k(rag: KVLinkRAG) -> None:
    few = MetadataFilters(filters=[F(key="population", value=[600, 700], operator=Op.IN)])
    retriever = KVLinkRetriever(similarity_top_k=3, rag=rag, filters=few)
    retriever.add(town_nodes())
    found = {node.node_id for node in retriever.retrieve("the town of Orvale")}
    assert found == {"velt", "hux"}
    retriever.filters, retriever.similarity_top_k = None, 5
    assert (retriever.k, len(retriever.retrieve("Orvale"))) == (5, 5)
    titled = MetadataFilters(filters=[F(key="title", value="Quill")])
    assert [n.node_id for n in KVLinkRetriever(rag=rag, filters=titled).retrieve("x")] == ["quill"]


@pytest.mark.parametrize("wrong", [{"lang": "en"}, [F(key="lang", value="en")], "lang"])
def test_what_is_no_filter(wrong: Any, rag: KVLinkRAG) -> None:
    with pytest.raises(ConfigError, match="expected MetadataFilters"):
        KVLinkRetriever(rag=rag, filters=wrong)
