"""Nodes that come again, change and go: the collection holds what the application holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.llms.kvlink import KVLink, KVLinkRegister, KVLinkVectorStore
from llama_index.retrievers.kvlink import KVLinkRetriever
from tiny import TOWNS, WordEmbedder

from kvlink_rag import KVLinkModel, KVLinkRAG
from kvlink_rag.errors import KVLinkError

QUESTION = "How many boats has the harbour of Teldon?"
SPLIT = SentenceSplitter(chunk_size=25, chunk_overlap=0, include_metadata=False)


def towns(version: int = 0, count: int = 4, **given: Any) -> list[LlamaDocument]:
    """Documents with names of their own; of two nodes each."""
    return [
        LlamaDocument(
            text=f"The harbour of {town} has {version} boats and a crane of many colours. "
            f"The market of {town} opens at dawn and sells bread, salt, rope and {version} hats.",
            doc_id=f"doc-{town}",
            **given,
        )
        for town in TOWNS[:count]
    ]


def unnamed(version: int = 0, **given: Any) -> list[LlamaDocument]:
    """The same documents with random ids, as readers give them anew at each run."""
    return [
        LlamaDocument(text=d.text, metadata={"title": t}, **given)
        for t, d in zip(TOWNS, towns(version), strict=False)
    ]


def texts(rag: KVLinkRAG) -> list[str]:
    return sorted(document.text for document in rag.documents())


def of_pipeline(rag: KVLinkRAG, **more: Any) -> tuple[IngestionPipeline, SimpleVectorStore]:
    store = SimpleVectorStore()
    pipeline = IngestionPipeline(
        transformations=[SPLIT, KVLinkRegister(rag=rag), MockEmbedding(embed_dim=2)],
        docstore=SimpleDocumentStore(),
        vector_store=store,
        **more,
    )
    return pipeline, store


def test_upserts_leave_no_ghosts(rag: KVLinkRAG) -> None:
    """After each round the collection holds what the application's store holds."""
    pipeline, store = of_pipeline(rag, docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE)
    register = pipeline.transformations[1]
    assert isinstance(register, KVLinkRegister)
    for version, count in [(1, 4), (2, 4), (2, 4), (3, 4), (4, 2), (4, 0), (5, 3)]:
        nodes = pipeline.run(documents=towns(version, count))
        register.sync(pipeline.docstore)
        assert len(rag) == len(store.data.embedding_dict) == rag.stats().snapshots
        assert {n.text for n in nodes} <= set(texts(rag))  # type: ignore[attr-defined]
    assert all("5" in t for t in texts(rag))


def test_an_earlier_version_that_comes_back_is_registered(rag: KVLinkRAG) -> None:
    """A pipeline's cache does not pass nodes by that the collection no longer holds."""
    pipeline, _ = of_pipeline(rag, docstore_strategy=DocstoreStrategy.UPSERTS)
    held = []
    for version in (1, 2, 1, 1):
        pipeline.run(documents=towns(version, 1))
        held.append(texts(rag))
    assert held[0] == held[2] == held[3] != held[1]
    rag.delete([str(document.id) for document in rag.documents()])
    pipeline = IngestionPipeline(
        transformations=pipeline.transformations, cache=pipeline.cache, docstore=None
    )
    pipeline.run(documents=towns(1, 1))
    assert texts(rag) == held[0]


def test_the_cache_is_used_while_nothing_changes(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = rag.register
    monkeypatch.setattr(rag, "register", lambda d, **n: calls.append(d) or real(d, **n))
    pipeline = IngestionPipeline(transformations=[SPLIT, KVLinkRegister(rag=rag)])
    for _ in range(4):
        pipeline.run(documents=towns())
    assert 1 <= len(calls) <= 2


def test_a_document_in_parts_stays_whole(rag: KVLinkRAG) -> None:
    """Nodes of one version may come in several calls; the next version replaces all of them."""
    register = KVLinkRegister(rag=rag)
    nodes = SPLIT(towns(1, 1))
    assert len(nodes) > 1
    for node in nodes:
        register([node])
    assert len(rag) == len(nodes)
    register(SPLIT(towns(2, 1))[:1])
    assert len(rag) == 1


def add_by_retriever(rag: KVLinkRAG, nodes: Any) -> None:
    KVLinkRetriever(rag=rag).add(nodes)


def add_by_register(rag: KVLinkRAG, nodes: Any) -> None:
    KVLinkRegister(rag=rag, embed=True)(nodes)


def add_by_store(rag: KVLinkRAG, nodes: Any) -> None:
    KVLinkVectorStore(rag=rag).add(nodes)


@pytest.mark.parametrize("add", [add_by_retriever, add_by_register, add_by_store])
@pytest.mark.parametrize("make", [unnamed, towns])
def test_a_program_that_runs_again_adds_nothing(
    rag: KVLinkRAG, add: Callable[..., None], make: Callable[..., list[LlamaDocument]]
) -> None:
    """Ids are new each time; hits stay, and have the ids of the last run."""
    found = []
    for run in range(3):
        dates = {"last_modified_date": f"2026-01-0{run + 1}"} if make is towns else {}
        documents = make(metadata=dates) if dates else make()
        nodes = SPLIT(documents)
        add(rag, nodes)
        hits = KVLinkRetriever(k=5, rag=rag).retrieve(QUESTION)
        found.append([hit.node.get_content() for hit in hits])
        assert len(rag) == len(nodes) == rag.stats().embedded
        assert rag.stats().snapshots == len({(n.metadata.get("title"), n.text) for n in nodes})
        assert {hit.node_id for hit in hits} <= {node.node_id for node in nodes}
        assert {hit.node.ref_doc_id for hit in hits} <= {d.doc_id for d in documents}
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5


def test_registering_what_search_finds_leaves_it_found(rag: KVLinkRAG) -> None:
    add_by_retriever(rag, SPLIT(unnamed()))
    embedded = rag.stats().embedded
    KVLinkRegister(rag=rag)(SPLIT(unnamed()))
    assert rag.stats().embedded == embedded == len(rag)


def test_equal_texts_of_two_named_documents_are_two(rag: KVLinkRAG) -> None:
    same = [LlamaDocument(text="The ferry sails at noon.", doc_id=id) for id in ("one", "two")]
    register = KVLinkRegister(rag=rag)
    register(SPLIT(same))
    assert (len(rag), rag.stats().snapshots) == (2, 1)
    assert register.delete_ref_doc("one") == 1
    assert register.delete_ref_doc("one") == 0
    assert [d.text for d in rag.documents()] == ["The ferry sails at noon."]


def test_a_random_id_that_the_application_keeps_is_its_nodes_own(rag: KVLinkRAG) -> None:
    id = str(uuid4())
    retriever = KVLinkRetriever(rag=rag)
    for text in ("The old text of a node.", "The new text of a node."):
        retriever.add([TextNode(id_=id, text=text), TextNode(id_="named", text=f"{text} Named.")])
        assert {n.node_id: n.text for n in retriever.retrieve("text")} == {
            id: text,
            "named": f"{text} Named.",
        }
    assert retriever.delete_nodes([id, "no such node"]) == 1
    assert retriever.delete_nodes("named") == 1
    assert len(rag) == 0


def test_other_writers_are_noticed(rag: KVLinkRAG, tmp_path: Path) -> None:
    """What is known of sources follows the collection, whoever changes it."""
    KVLinkRegister(rag=rag)(SPLIT(towns(1, 2)))
    with KVLinkRAG.open(rag.directory, model=rag.model, embedder=rag.embedder) as other:
        KVLinkRegister(rag=other)(SPLIT(towns(1, 3)))
        assert KVLinkRegister(rag=rag).delete_ref_doc("doc-Teldon") == 2
        assert KVLinkRegister(rag=other).delete_ref_doc("doc-Teldon") == 0
        assert KVLinkRegister(rag=other).delete_ref_doc("doc-Orvale") == 2
        assert KVLinkRegister(rag=rag).delete_ref_doc("doc-Orvale") == 0


def test_one_more_document_reads_no_others(rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    register = KVLinkRegister(rag=rag)
    register(SPLIT(towns(1, 1)))
    read: list[int] = []
    real = rag.documents
    monkeypatch.setattr(rag, "documents", lambda: read.append(1) or real())
    for document in towns(1, 4)[1:]:
        register(SPLIT([document]))
    assert read == []


@pytest.mark.parametrize("embed", [True, False])
def test_windows_round_sentences_are_reused(
    rag: KVLinkRAG, llm: KVLink, embedder: WordEmbedder, embed: bool
) -> None:
    """The prompt holds the window, so that is what has to be known."""
    nodes = SentenceWindowNodeParser(window_size=1)(towns(1, 2))
    register = KVLinkRegister(rag=rag, embed=embed)
    register(nodes)
    retriever = KVLinkRetriever(k=1, rag=rag)
    if not embed:
        retriever.add(nodes)
    [hit] = MetadataReplacementPostProcessor(target_metadata_key="window").postprocess_nodes(
        retriever.retrieve(QUESTION)
    )
    assert len(hit.text) > len(str(hit.metadata["original_text"]))
    raw = llm.complete(f"{hit.text}\n\nQuestion: {QUESTION}").raw
    assert raw["trace"]["passages"] == 1
    assert raw["trace"]["snapshots_encoded"] == 0
    assert rag.stats().embedded == len(nodes)  # search finds sentences
    assert register.delete_ref_doc("doc-Orvale") == register.delete_ref_doc("doc-Marnik")
    assert len(rag) == 0


# The collection in the place of a vector store


@pytest.fixture
def index(rag: KVLinkRAG) -> VectorStoreIndex:
    store = KVLinkVectorStore(rag=rag)
    return VectorStoreIndex.from_documents(
        towns(1, 4),
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MockEmbedding(embed_dim=1),
        transformations=[SPLIT],
    )


def test_an_index_over_a_collection(index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink) -> None:
    found = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    assert found == KVLinkRetriever(k=3, rag=rag).retrieve(QUESTION)
    assert "Teldon" in found[0].text
    response = index.as_query_engine(llm=llm, similarity_top_k=2).query(QUESTION)
    assert [n.node_id for n in response.source_nodes] == [n.node_id for n in found[:2]]
    index.delete_ref_doc("doc-Teldon")
    index.update_ref_doc(towns(9, 1)[0])
    index.insert(towns(1, 5)[4])
    held = texts(rag)
    assert not any("Teldon" in text for text in held)
    assert "9 boats" in next(text for text in held if "of Orvale has" in text)
    assert len(held) == 4 * 2


def test_queries_of_the_store(index: VectorStoreIndex, rag: KVLinkRAG) -> None:
    store = KVLinkVectorStore(rag=rag)
    everything = store.get_nodes()
    assert len(everything) == 8
    one = everything[3].node_id

    def ids(**query: Any) -> list[str]:
        result = store.query(VectorStoreQuery(query_str=QUESTION, **query))
        assert result.similarities == sorted(result.similarities or [], reverse=True)
        return list(result.ids or [])

    assert len(ids(similarity_top_k=100)) == 8
    assert ids(similarity_top_k=3, node_ids=[one]) == [one]
    assert len(ids(similarity_top_k=9, doc_ids=["doc-Brisk"])) == 2
    vector = rag.embedder.embed_queries([QUESTION])[0].tolist()
    by_vector = store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=4))
    assert list(by_vector.ids or []) == ids(similarity_top_k=4)
    with pytest.raises(NotImplementedError, match="'mmr', expected 'default'") as error:
        ids(mode=VectorStoreQueryMode.MMR)
    assert isinstance(error.value, KVLinkError)


def test_the_store_alone(rag: KVLinkRAG) -> None:
    store = KVLinkVectorStore(rag=rag)
    nodes = [TextNode(id_=f"n{i}", text=f"Text {i}.", metadata={"i": i}) for i in range(5)]
    assert store.add(nodes) == ["n0", "n1", "n2", "n3", "n4"]
    first = MetadataFilters(filters=[MetadataFilter(key="i", value=0)])
    assert [n.node_id for n in store.get_nodes(filters=first)] == ["n0"]
    assert [n.node_id for n in store.get_nodes(["n3", "n1"])] == ["n1", "n3"]
    store.delete_nodes(filters=first)
    store.delete_nodes(["n1"])
    assert len(rag) == 3
    assert KVLinkVectorStore.from_dict(store.to_dict()).directory == str(rag.directory)

    async def rest() -> list[int]:
        counts = []
        await store.async_add(nodes)
        counts.append(len(await store.aget_nodes()))
        await store.adelete_nodes(["n4"])
        counts.append(len(rag))
        found = await store.aquery(VectorStoreQuery(query_str="Text 2.", similarity_top_k=1))
        counts.append(len(found.nodes or []))
        await store.adelete("no source")
        await store.aclear()
        return [*counts, len(rag)]

    assert asyncio.run(rest()) == [5, 4, 1, 0]


def test_a_pipeline_into_a_collection(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    """The pipeline itself deletes from it what its docstore says is gone."""
    store = KVLinkVectorStore(directory=tmp_path, model=model, embedder=embedder)
    pipeline = IngestionPipeline(
        transformations=[SPLIT, MockEmbedding(embed_dim=1)],
        docstore=SimpleDocumentStore(),
        vector_store=store,
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    for version, count in [(1, 4), (2, 4), (3, 2)]:
        pipeline.run(documents=towns(version, count))
        assert len(store.rag) == store.rag.stats().snapshots == 2 * count


def test_progress_is_shown_where_it_is_asked_for(
    rag: KVLinkRAG, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = SPLIT(towns())
    for shown in (False, True):
        for add in (
            lambda: KVLinkRegister(rag=rag, show_progress=shown)(nodes),  # noqa: B023
            lambda: KVLinkRegister(rag=rag, show_progress=shown, embed=True)(nodes),  # noqa: B023
            lambda: KVLinkRetriever(rag=rag).add(nodes, show_progress=shown),  # noqa: B023
        ):
            add()
            assert ("passage" in capfd.readouterr().err) is shown
