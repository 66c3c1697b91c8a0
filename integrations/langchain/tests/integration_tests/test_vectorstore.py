"""`KVLinkVectorStore`, `KVLinkRetriever` and `ContrieverEmbeddings` beyond the standard suites."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvlink import (
    ChatKVLink,
    ContrieverEmbeddings,
    KVLinkDocumentsChain,
    KVLinkRetriever,
    KVLinkVectorStore,
    aregister_documents,
    register_documents,
)

from kvlink_rag import KVLinkModel, KVLinkRAG, load_embedder
from kvlink_rag.errors import ConfigError, DocumentError


@pytest.fixture
def store(rag: KVLinkRAG, towns: list[Document]) -> KVLinkVectorStore:
    store = KVLinkVectorStore(rag=rag)
    assert store.add_documents(towns) == [town.id for town in towns]
    return store


@pytest.fixture
def reference(towns: list[Document], embeddings: Embeddings) -> InMemoryVectorStore:
    """LangChain's own store over what the embedder reads of the documents: title and text."""
    store = InMemoryVectorStore(embeddings)
    for town in towns:
        store.add_texts([f"{town.metadata['title']} {town.page_content}"], ids=[str(town.id)])
    return store


QUESTIONS = ["the town of Teldon", "a market and 3 lighthouses", "Hux Velt"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_finds_what_langchains_own_store_finds(
    store: KVLinkVectorStore, reference: InMemoryVectorStore, question: str
) -> None:
    expected = reference.similarity_search_with_score(question, k=8)
    found = store.similarity_search_with_score(question, k=8)
    assert np.allclose([s for _, s in found], [s for _, s in expected], atol=1e-5)
    assert {d.id: round(s, 4) for d, s in found} == {d.id: round(s, 4) for d, s in expected}
    assert store.similarity_search(question, k=8) == [d for d, _ in found]
    vector = store.embeddings.embed_query(question)
    assert store.similarity_search_by_vector(vector, k=8) == [d for d, _ in found]


@pytest.mark.parametrize("lambda_mult", [0.0, 0.3, 0.9])
def test_mmr_is_langchains(
    store: KVLinkVectorStore,
    reference: InMemoryVectorStore,
    embeddings: Embeddings,
    lambda_mult: float,
) -> None:
    question = "the 3 lighthouses of Teldon"
    expected = reference.max_marginal_relevance_search(
        question, k=3, fetch_k=8, lambda_mult=lambda_mult
    )
    found = store.max_marginal_relevance_search(question, k=3, fetch_k=8, lambda_mult=lambda_mult)
    assert [d.id for d in found] == [d.id for d in expected]
    by_vector = store.max_marginal_relevance_search_by_vector(
        embeddings.embed_query(question), k=3, fetch_k=8, lambda_mult=lambda_mult
    )
    assert by_vector == found
    few = store.max_marginal_relevance_search(question, k=3, filter={"kind": "odd"})
    assert [document.metadata["kind"] for document in few] == ["odd"] * 3


def test_filters_find_k_where_there_are_k(store: KVLinkVectorStore, towns: list[Document]) -> None:
    everything = store.similarity_search("Orvale", k=8)
    odd = [document for document in everything if document.metadata["kind"] == "odd"]
    assert store.similarity_search("Orvale", k=3, filter={"kind": "odd"}) == odd[:3]
    assert store.similarity_search("Orvale", k=9, filter={"kind": "odd"}) == odd
    last = everything[-1]
    assert store.similarity_search("Orvale", k=1, filter=lambda d: d.id == last.id) == [last]
    assert store.similarity_search("Orvale", filter={"kind": "none"}) == []


def test_relevance_is_between_0_and_1(store: KVLinkVectorStore, towns: list[Document]) -> None:
    text = towns[2].page_content
    titled = f"{towns[2].metadata['title']} {text}"  # what the embedder reads
    found = store.similarity_search_with_relevance_scores(titled, k=8)
    scores = [score for _, score in found]
    assert found[0][0].id == "teldon"
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    cosines = {d.id: s for d, s in store.similarity_search_with_score(titled, k=8)}
    assert {d.id: s for d, s in found} == pytest.approx(
        {id: (1 + cosine) / 2 for id, cosine in cosines.items()}, abs=1e-5
    )
    threshold = store.as_retriever(
        search_type="similarity_score_threshold",
        search_kwargs={"score_threshold": scores[3] - 1e-6, "k": 8},
    )
    assert len(threshold.invoke(titled)) >= 4


def test_relevance_of_vectors_that_are_not_of_length_1(rag: KVLinkRAG, model: Any) -> None:
    """Contriever's are not: relevance ranks as scores do, whatever k; a cosine at the top."""
    rows = {"east": [9, 0], "north": [3, 3], "west": [-9, 0], "south": [-1, -1], "up": [0.5, 1]}

    class Long:
        dimension, fingerprint, name = 2, "long", "long"

        def embed(self, texts: list[str]) -> np.ndarray:
            return np.array([rows[text.split()[-1]] for text in texts], "float32")

        embed_queries = embed

    store = KVLinkVectorStore(Long(), model=model, directory=rag.directory / "long")  # type: ignore[arg-type]
    store.add_texts([f"to the {word}" for word in rows])
    scored = store.similarity_search_with_score("north", k=10)
    found = store.similarity_search_with_relevance_scores("north", k=10)
    assert [d.page_content.split()[-1] for d, _ in scored] == [
        "east",
        "north",
        "up",
        "south",
        "west",
    ]
    assert [d for d, _ in found] == [d for d, _ in scored]
    assert found[0][1] == pytest.approx((1 + 0.5**0.5) / 2)  # its cosine, at 45 degrees
    assert found[1][1] == pytest.approx((1 + 18 / 27 * 0.5**0.5) / 2)
    assert all(0 <= relevance <= 1 for _, relevance in found)
    for k in (1, 2, 3, 5):
        assert store.similarity_search_with_relevance_scores("north", k=k) == found[:k]
        retriever = store.as_retriever(
            search_type="similarity_score_threshold",
            search_kwargs={"score_threshold": found[2][1], "k": k},
        )
        assert retriever.invoke("north") == [d for d, _ in found[: min(k, 3)]]
    filtered = store.similarity_search_with_relevance_scores(
        "north", k=2, filter=lambda document: "east" not in document.page_content
    )
    assert filtered == found[1:3]


def test_everything_added_is_encoded(store: KVLinkVectorStore, rag: KVLinkRAG) -> None:
    assert rag.stats().snapshots == 8
    store.delete(["hux", "nowhere"])
    assert rag.stats().snapshots == 7
    assert store.delete() is True
    assert (len(rag), rag.stats().snapshots) == (0, 0)
    assert store.similarity_search("Orvale") == []
    assert store.max_marginal_relevance_search("Orvale") == []
    assert store.similarity_search_with_relevance_scores("Orvale") == []


def test_adding_texts(rag: KVLinkRAG) -> None:
    store = KVLinkVectorStore(rag=rag)
    texts = ["The mill.", "The bridge."]
    ids = store.add_texts(texts, [{"n": 1}, {"n": 2}])
    assert store.add_texts(texts, [{"n": 1}, {"n": 2}]) == ids
    assert len(rag) == 2
    assert store.add_texts((t for t in ["The gate."]), ids=["g"]) == ["g"]
    assert store.get_by_ids(["g", "none", ids[1]]) == [
        Document("The gate.", id="g"),
        Document("The bridge.", metadata={"n": 2}, id=ids[1]),
    ]
    assert store.add_texts([]) == []


@pytest.mark.parametrize("by", ["texts", "documents"])
async def test_made_from(
    by: str, tmp_path: Any, model: KVLinkModel, embeddings: Embeddings, towns: list[Document]
) -> None:
    texts, ids = [d.page_content for d in towns], [str(d.id) for d in towns]
    metadatas = [d.metadata for d in towns]
    for n, words in enumerate([(embeddings,), ()]):
        where: dict[str, Any] = {"model": model, "directory": tmp_path / f"{n}"}
        if not words:
            where["embedder"] = embeddings
        if by == "texts":
            store = (
                KVLinkVectorStore.from_texts(texts, *words, metadatas, ids=ids, **where)
                if (words)
                else KVLinkVectorStore.from_texts(texts, metadatas=metadatas, ids=ids, **where)
            )
            again = await KVLinkVectorStore.afrom_texts(texts, *words, **where)
        else:
            store = KVLinkVectorStore.from_documents(towns, *words, **where)
            again = await KVLinkVectorStore.afrom_documents(towns, *words, **where)
        assert store.get_by_ids(ids) == towns
        assert store.embeddings is embeddings
        assert again.collection is store.collection


def test_bad_input(store: KVLinkVectorStore, embeddings: Embeddings) -> None:
    for blank in ("", " \n"):
        with pytest.raises(DocumentError, match="no text"):
            store.add_texts(["fine", blank])
    with pytest.raises(DocumentError, match="metadata"):
        store.add_texts(["x"], [{"when": datetime.date(1911, 5, 1)}])
    with pytest.raises(DocumentError, match="found 1 metadatas for 2"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(DocumentError, match="found 1 ids for 2"):
        store.add_texts(["a", "b"], ids=["x"])
    for search in (
        store.similarity_search,
        store.similarity_search_with_score,
        store.similarity_search_with_relevance_scores,
        store.max_marginal_relevance_search,
    ):
        with pytest.raises(ConfigError, match="k is 0"):
            search("x", k=0)
        assert len(search("x", k=100)) == 8
        with pytest.raises(TypeError, match="filtr") as unknown:
            search("x", filtr={})
        assert isinstance(unknown.value, ConfigError)
        for k in (2.5, True, "3", None):
            with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
                search("x", k=k)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fetch_k is '9'"):
        store.max_marginal_relevance_search("x", fetch_k="9")  # type: ignore[arg-type]
    for odd, match in (({1: 2}, "key 1"), ({"tags": ("a",)}, "a tuple")):
        with pytest.raises(DocumentError, match=match):
            store.add_texts(["x"], [odd], ids=["x"])  # type: ignore[list-item]
    for texts, metadatas in (([3], None), (["x"], ["y"])):
        with pytest.raises(DocumentError, match=r"expected (strings|mappings)"):
            store.add_texts(texts, metadatas)  # type: ignore[arg-type]
    for wrong in ("x", Document("x"), ["x"]):
        with pytest.raises(DocumentError, match=r"expected a (list of )?langchain_core Document"):
            store.add_documents(wrong)  # type: ignore[arg-type]
    for call in (
        lambda: store.add_texts(None),  # type: ignore[arg-type]
        lambda: store.add_texts(["x"], 5),  # type: ignore[arg-type]
        lambda: store.add_texts(["x"], ids=5),  # type: ignore[arg-type]
        lambda: store.get_by_ids(None),  # type: ignore[arg-type]
        lambda: store.delete(5),  # type: ignore[arg-type]
    ):
        with pytest.raises(DocumentError, match="expected a list"):
            call()
    for call in (
        lambda: store.similarity_search_with_relevance_scores(5),  # type: ignore[arg-type]
        lambda: store.max_marginal_relevance_search(5),  # type: ignore[arg-type]
        lambda: store.similarity_search_by_vector("abc"),  # type: ignore[arg-type]
        lambda: ContrieverEmbeddings(embedder=store.collection.embedder).embed_documents("abc"),
        lambda: KVLinkVectorStore(rag=store.collection).embeddings.embed_query(5),
        lambda: KVLinkVectorStore(rag=5).add_texts(["x"]),
    ):
        with pytest.raises(ValueError, match=r"found|list of numbers|rag is a int"):
            call()
    with pytest.raises(ConfigError, match="expected float32"):
        store.similarity_search_by_vector([1.0, 2.0])
    assert len(store.collection) == 8


def test_langchains_indexing(rag: KVLinkRAG, towns: list[Document]) -> None:
    """LangChain's own incremental indexing: adds, skips, replaces and cleans up."""
    store = KVLinkVectorStore(rag=rag)
    records = InMemoryRecordManager("towns")
    records.create_schema()

    def run(documents: list[Document]) -> tuple[int, int, int]:
        result = index(
            *(documents, records, store),
            cleanup="full",
            source_id_key="title",
            key_encoder="sha256",
        )
        return result["num_added"], result["num_skipped"], result["num_deleted"]

    assert run(towns) == (8, 0, 0)
    assert run(towns) == (0, 8, 0)
    assert run(towns[:5]) == (0, 5, 3)
    assert len(rag) == rag.stats().snapshots == 5


async def test_async_twins(store: KVLinkVectorStore) -> None:
    question = QUESTIONS[0]
    vector = store.embeddings.embed_query(question)
    assert await store.asimilarity_search(question) == store.similarity_search(question)
    assert await store.asimilarity_search_with_score(
        question
    ) == store.similarity_search_with_score(question)
    assert await store.asimilarity_search_by_vector(vector) == store.similarity_search_by_vector(
        vector
    )
    assert await store.asimilarity_search_with_relevance_scores(
        question, k=3, score_threshold=0.1
    ) == store.similarity_search_with_relevance_scores(question, k=3, score_threshold=0.1)
    assert await store.amax_marginal_relevance_search(
        question
    ) == store.max_marginal_relevance_search(question)
    assert await store.amax_marginal_relevance_search_by_vector(
        vector
    ) == store.max_marginal_relevance_search_by_vector(vector)
    assert await store.as_retriever().ainvoke(question) == store.as_retriever().invoke(question)


async def test_the_event_loop_turns_meanwhile(
    store: KVLinkVectorStore, rag: KVLinkRAG, responsive: Any
) -> None:
    retriever = KVLinkRetriever(rag=rag)
    for name in ("add", "search", "delete", "get", "search_vector"):
        responsive.meet(rag, name)
    works = [
        store.aadd_texts(["The mill."]),
        store.aadd_documents([Document("The gate.")]),
        store.asimilarity_search("x"),
        store.asimilarity_search_with_relevance_scores("x"),
        store.amax_marginal_relevance_search("x"),
        store.aget_by_ids(["hux"]),
        store.adelete(["hux"]),
        retriever.ainvoke("x"),
    ]
    for work in works:
        assert await responsive.turns(work) == 1


async def test_it_is_opened_when_first_used(
    tmp_path: Path, model: KVLinkModel, embeddings: Embeddings, responsive: Any
) -> None:
    """Also where an event loop runs: in another thread, whichever call comes first."""
    responsive.meet(KVLinkRAG, "open")

    def store(name: str) -> KVLinkVectorStore:
        return KVLinkVectorStore(embeddings, model=model, directory=tmp_path / name)

    calls = [
        lambda s: s.aadd_texts(["The mill."]),
        lambda s: s.asimilarity_search("x"),
        lambda s: s.amax_marginal_relevance_search("x"),
        lambda s: s.aget_by_ids(["x"]),
        lambda s: s.adelete(["x"]),
        lambda s: s.as_retriever().ainvoke("x"),
        lambda s: aregister_documents(s, [Document("The gate.")]),
    ]
    for number, call in enumerate(calls):
        made = store(str(number))
        assert not (tmp_path / str(number)).exists()
        assert await responsive.turns(call(made)) == 1
    embedded = KVLinkVectorStore(model=model, directory=tmp_path / "own").as_retriever()
    assert "CollectionEmbeddings" in embedded.tags  # LangChain asks for it; nothing is opened
    assert not (tmp_path / "own").exists()


def test_ids_made_anew_for_each_run(rag: KVLinkRAG, towns: list[Document]) -> None:
    """Each id stays, as LangChain has it; no search finds one content twice."""
    store, runs = KVLinkVectorStore(rag=rag), []
    contents = [Document(t.page_content, metadata=t.metadata) for t in towns]
    question = "the town of Teldon"
    for _ in range(3):
        runs.append([str(uuid4()) for _ in contents])
        assert store.add_documents(contents, ids=runs[-1]) == runs[-1]
        assert [d.id for d in store.get_by_ids(runs[-1])] == runs[-1]
        for found in (
            store.similarity_search(question, k=8),
            [d for d, _ in store.similarity_search_with_score(question, k=8)],
            [d for d, _ in store.similarity_search_with_relevance_scores(question, k=8)],
            store.max_marginal_relevance_search(question, k=8),
            store.similarity_search_by_vector(store.embeddings.embed_query(question), k=8),
            KVLinkRetriever(rag=rag, k=8).invoke(question),
            KVLinkRetriever(rag=rag, k=8, rounds=2).invoke(question),
            store.as_retriever(search_kwargs={"k": 8}).invoke(question),
        ):
            assert sorted(d.page_content for d in found) == sorted(d.page_content for d in contents)
    assert rag.stats().snapshots == len(towns)
    odd = store.similarity_search(question, k=8, filter={"kind": ["odd", "none"]})
    assert [d.metadata["kind"] for d in odd] == ["odd"] * 4
    store.delete(runs[0] + runs[1])
    assert {d.id for d in store.similarity_search(question, k=8)} == set(runs[2])


def test_ids_of_the_applications_own_are_documents_of_their_own(rag: KVLinkRAG) -> None:
    """Names and hashes, even of one content; only what a clock or chance made is no name."""
    store, text = KVLinkVectorStore(rag=rag), "The mill stands at the river."
    ids = ["one", "2", str(uuid5(NAMESPACE_URL, "a")), str(uuid5(NAMESPACE_URL, "b"))]
    store.add_texts([text] * 4, ids=ids)
    assert {d.id for d in store.similarity_search("mill", k=9)} == set(ids)


def test_documents_with_random_ids_are_registered_once(
    rag: KVLinkRAG, towns: list[Document]
) -> None:
    for _ in range(3):
        fresh = [Document(t.page_content, metadata=t.metadata, id=str(uuid4())) for t in towns]
        ids = register_documents(rag, fresh)
        assert (len(rag), len(set(ids))) == (len(towns), len(towns))
    assert rag.delete(ids) == len(towns)
    kept = KVLinkVectorStore(rag=rag).add_documents(fresh)
    assert register_documents(rag, fresh) == kept == [d.id for d in fresh]  # it holds these
    assert len(rag) == len(towns)


def test_progress_is_shown_where_it_is_asked_for(
    rag: KVLinkRAG, towns: list[Document], capfd: pytest.CaptureFixture[str]
) -> None:
    store = KVLinkVectorStore(rag=rag)
    for shown in (False, True):
        for add in (
            lambda: register_documents(rag, towns, show_progress=shown),  # noqa: B023
            lambda: store.add_documents(towns, show_progress=shown),  # noqa: B023
            lambda: store.add_texts(["The mill."], show_progress=shown),  # noqa: B023
            lambda: type(store).from_documents(towns, rag=rag, show_progress=shown),  # noqa: B023
        ):
            add()
            assert ("passage" in capfd.readouterr().err) is shown


def test_what_documents_are_registered_with(rag: KVLinkRAG, towns: list[Document]) -> None:
    chain = KVLinkDocumentsChain(llm=ChatKVLink(rag=rag))
    for target in (rag, chain, chain.llm, KVLinkRetriever(rag=rag), KVLinkVectorStore(rag=rag)):
        assert register_documents(target, towns) == [town.id for town in towns]
    with pytest.raises(ConfigError, match="found a str to register documents with"):
        register_documents("my-collection", towns)  # type: ignore[arg-type]


async def test_the_retriever(rag: KVLinkRAG, store: KVLinkVectorStore) -> None:
    retriever = KVLinkRetriever(rag=rag, k=3)
    assert retriever.invoke("Teldon") == store.similarity_search("Teldon", k=3)
    assert len(retriever.invoke("Teldon", k=1)) == 1
    assert len(await retriever.ainvoke("Teldon", k=5)) == 5
    assert len(retriever.invoke("Teldon", k=100)) == 8
    assert len(retriever.invoke("Teldon", rounds=2)) == 3
    odd = KVLinkRetriever(rag=rag, k=8, filter={"kind": "odd"})
    assert {d.metadata["kind"] for d in odd.invoke("Teldon")} == {"odd"}
    assert {d.metadata["n"] for d in odd.invoke("Teldon", filter={"n": 2})} == {2}
    with pytest.raises(ConfigError, match="k is 0"):
        retriever.invoke("Teldon", k=0)
    for k in (2.5, True, "3"):
        with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
            retriever.invoke("Teldon", k=k)
    with pytest.raises(ConfigError, match=r"operator '\$gt'; supported are equality"):
        retriever.invoke("Teldon", filter={"n": {"$gt": 3}})
    with pytest.raises(TypeError):
        retriever.invoke("Teldon", top=3)


def test_an_encoder_is_loaded_as_its_own_files_say(
    saved_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = load_embedder(saved_pair[1], device="cpu")
    directory = shutil.copytree(saved_pair[1], tmp_path / "encoder")
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kinds = {path: f"sentence_transformers.models.{kind}" for path, kind in names.items()}
    steps = [{"path": path, "type": kind} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(steps))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    vector = plain.embed(["a mill"])[0]
    expected = pytest.approx((vector / np.linalg.norm(vector)).tolist(), abs=1e-5)
    assert np.linalg.norm(vector) != pytest.approx(1, abs=0.01)
    assert ContrieverEmbeddings(embedder=directory).embed_query("a mill") == expected


def test_contriever_embeddings_of_a_loaded_encoder(rag: KVLinkRAG) -> None:
    found = ContrieverEmbeddings(embedder=rag.embedder)
    vectors = rag.embedder.embed(["a mill", "a bridge"])
    assert found.embed_documents(["a mill", "a bridge"]) == vectors.tolist()
    assert found.embed_query("a mill") == vectors[0].tolist()
    assert found.embed_documents([]) == []
