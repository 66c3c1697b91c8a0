"""LlamaIndex's own engines with only the LLM swapped, and with our retriever and synthesizer."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from llama_index.core import PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import CompactAndRefine, ResponseMode
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.embeddings.contriever import ContrieverEmbedding
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from llama_index.llms.kvlink.errors import KVLinkCallError
from llama_index.llms.kvlink.nodes import to_documents
from llama_index.response_synthesizers.kvlink import KVLinkSynthesizer
from llama_index.retrievers.kvlink import KVLinkRetriever
from tiny import Calls, WordEmbedder, rendered_tokens, town_nodes, wait_for_a_turn

from kvlink_rag import KVLinkModel, KVLinkRAG, Passage
from kvlink_rag.errors import PromptTooLong, TooManyPassages

QUESTION = "Which town is Marnik?"


@pytest.fixture
def index(nodes: list[TextNode], embedder: WordEmbedder) -> VectorStoreIndex:
    """LlamaIndex's default store, with registered nodes in it."""
    return VectorStoreIndex(nodes, embed_model=ContrieverEmbedding(embedder))


def found(response: Any) -> list[TextNode]:
    return [source.node for source in response.source_nodes]


# Only the LLM swapped


def test_unchanged_compact_and_refine_reuses_every_node(
    index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink, calls: Calls
) -> None:
    engine = RetrieverQueryEngine(index.as_retriever(similarity_top_k=3), CompactAndRefine(llm=llm))
    response = engine.query(QUESTION)
    assert len(found(response)) == 3
    assert "population: " in calls.messages()[0][-1]["content"]  # the framework's own header
    [trace] = calls.traces()
    assert trace["passages"] == trace["snapshots_found"] == 3
    assert trace["reused_tokens"] == rendered_tokens(rag.model, found(response))
    assert calls.equal_oracle(rag, 8)
    assert response.response == calls.answers()[0]


def test_as_query_engine_with_one_line_that_registers(
    rag: KVLinkRAG, embedder: WordEmbedder, llm: KVLink, calls: Calls
) -> None:
    documents = [
        LlamaDocument(text=f"{node.text} " * 3, metadata={"file_name": f"{node.node_id}.md"})
        for node in town_nodes(4)
    ]
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[
            SentenceSplitter(chunk_size=256, chunk_overlap=0),
            KVLinkRegister(rag=rag),
        ],
        embed_model=ContrieverEmbedding(embedder),
    )
    response = index.as_query_engine(llm=llm, similarity_top_k=2).query(QUESTION)
    assert len(rag) >= 4
    assert {document.title for document in rag.documents()} == {
        f"{t}.md" for t in ("orvale", "marnik", "teldon", "brisk")
    }
    assert calls.traces()[0]["passages"] == len(found(response)) == 2
    assert calls.equal_oracle(rag, 8)


def test_the_second_question_over_the_same_nodes_computes_less(
    index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink, calls: Calls
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=8)
    engine.query(QUESTION)
    engine.query(QUESTION)
    first, second = calls.traces()
    assert second["prefix_tokens"] > first["computed_tokens"] / 2
    assert second["computed_tokens"] < first["computed_tokens"] / 2
    assert calls.equal_oracle(rag, 8)


def test_overflow_is_refined_and_a_cut_node_is_computed(
    tmp_path: Any, small_window: KVLinkModel, embedder: WordEmbedder, calls: Calls, caplog: Any
) -> None:
    nodes = town_nodes()
    with KVLinkRAG.open(tmp_path / "small", model=small_window, embedder=embedder) as rag:
        KVLinkRegister(rag=rag)(nodes)
        llm = KVLink(rag=rag, max_new_tokens=8)
        Settings.tokenizer = llm.tokenizer
        engine = VectorStoreIndex(nodes, embed_model=ContrieverEmbedding(embedder)).as_query_engine(
            llm=llm, similarity_top_k=8
        )
        with caplog.at_level(logging.WARNING):
            response = engine.query(QUESTION)
        assert "Structured response error" not in caplog.text
        asked = calls.prompts()
        assert len(asked) > 1
        whole = [[node for node in nodes if node.text in prompt] for prompt in asked]
        assert 0 < len(whole[0]) < 8
        parts = [prompt.count("The town of") + prompt.count("lighthouse.") for prompt in asked]
        assert any(n != 2 * len(held) for n, held in zip(parts, whole, strict=True))  # one is cut
        for prompt, held, trace in zip(asked, whole, calls.traces(), strict=True):
            held.sort(key=lambda node: prompt.index(node.text))
            left = small_window.window - trace["reused_tokens"] - trace["computed_tokens"]
            # all are reused, unless titles and links leave no room for one more and the answer
            assert trace["passages"] == len(held) or left < 8 + 32
            expected = rendered_tokens(small_window, held[: trace["passages"]])
            assert trace["reused_tokens"] == expected
        assert all(trace["generated_tokens"] == 8 for trace in calls.traces())
        assert calls.equal_oracle(rag, 8)
        assert response.response == calls.answers()[-1]


@pytest.mark.parametrize("mode", [ResponseMode.REFINE, ResponseMode.TREE_SUMMARIZE])
def test_other_synthesizers_of_llama_index(
    index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink, calls: Calls, mode: ResponseMode
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=2, response_mode=mode)
    response = engine.query(QUESTION)
    total = sum(trace["reused_tokens"] for trace in calls.traces())
    assert total == rendered_tokens(rag.model, found(response))


def test_a_template_of_the_application(
    index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink, calls: Calls
) -> None:
    template = PromptTemplate("Read this.\n---\n{context_str}\n---\nQuestion: {query_str}")
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, text_qa_template=template)
    response = engine.query(QUESTION)
    assert calls.traces()[0]["reused_tokens"] == rendered_tokens(rag.model, found(response))
    assert calls.equal_oracle(rag, 8)


def test_a_streaming_engine(index: VectorStoreIndex, llm: KVLink) -> None:
    whole = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    response = index.as_query_engine(llm=llm, similarity_top_k=3, streaming=True).query(QUESTION)
    assert isinstance(response, StreamingResponse)
    pieces = list(response.response_gen)
    assert "".join(pieces) == whole.response
    assert len(pieces) > 2


def test_an_async_engine(index: VectorStoreIndex, llm: KVLink) -> None:
    whole = index.as_query_engine(llm=llm, similarity_top_k=3)
    streaming = index.as_query_engine(llm=llm, similarity_top_k=3, streaming=True)

    async def ask() -> tuple[str, str]:
        answer, stream = await whole.aquery(QUESTION), await streaming.aquery(QUESTION)
        assert isinstance(stream, AsyncStreamingResponse)
        return answer.response, "".join([p async for p in stream.async_response_gen()])

    assert asyncio.run(ask()) == (whole.query(QUESTION).response,) * 2


def test_a_prompt_beyond_the_window_is_an_error_not_an_empty_answer(llm: KVLink) -> None:
    """The refine synthesizers swallow every `ValueError`; here a helper packs too much."""
    synthesizer = CompactAndRefine(llm=llm, prompt_helper=PromptHelper(context_window=50_000))
    node = NodeWithScore(node=TextNode(text="word " * 2000), score=1.0)
    with pytest.raises(KVLinkCallError, match=r"window.* Settings.tokenizer = llm.tokenizer"):
        synthesizer.synthesize(QUESTION, [node])
    with pytest.raises(KVLinkCallError, match="window"):
        asyncio.run(synthesizer.asynthesize(QUESTION, [node]))


def test_a_pipeline_registers_and_caches(rag: KVLinkRAG, embedder: WordEmbedder) -> None:
    pipeline = IngestionPipeline(
        transformations=[KVLinkRegister(rag=rag), ContrieverEmbedding(embedder)]
    )
    nodes = pipeline.run(nodes=town_nodes(3))
    assert [len(node.embedding or []) for node in nodes] == [64, 64, 64]
    assert (len(rag), rag.stats().embedded, rag.stats().snapshots) == (3, 0, 3)
    more = asyncio.run(pipeline.arun(nodes=town_nodes(5)))
    assert (len(more), len(rag)) == (5, 5)


# Our retriever


def test_the_retriever(rag: KVLinkRAG) -> None:
    retriever = KVLinkRetriever(k=3, rag=rag)
    assert retriever.retrieve(QUESTION) == []
    retriever.add(town_nodes())
    nodes = retriever.retrieve(QUESTION)
    assert [type(node) for node in nodes] == [NodeWithScore] * 3
    assert nodes[0].node_id == "marnik"
    assert nodes[0].metadata == {"title": "Marnik", "population": 100}
    assert (nodes[0].score or 0) >= (nodes[1].score or 0) >= (nodes[2].score or 0)
    assert asyncio.run(retriever.aretrieve(QueryBundle(QUESTION))) == nodes
    assert len(KVLinkRetriever(k=100, rag=rag).retrieve(QUESTION)) == 8
    assert KVLinkRetriever(2, rag=rag, rounds=2).retrieve("Hux")[0].node_id == "hux"
    hyde = QueryBundle("?", custom_embedding_strs=["The town of Quill"])
    assert retriever.retrieve(hyde)[0].node_id == "quill"


def test_the_retriever_does_not_block(rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    async def retrieve() -> list[NodeWithScore]:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(rag, "search", lambda *a, **o: wait_for_a_turn(loop) or [])
        return await KVLinkRetriever(rag=rag).aretrieve(QUESTION)

    assert asyncio.run(retrieve()) == []


def test_register_with_embed_feeds_the_retriever(rag: KVLinkRAG) -> None:
    nodes = town_nodes(3)
    assert KVLinkRegister(rag=rag, embed=True)(nodes) is nodes
    assert KVLinkRetriever(k=1, rag=rag).retrieve("Orvale")[0].node_id == "orvale"


@pytest.mark.parametrize("kind", ["llama_index", "langchain"])
def test_embedding_objects_of_frameworks(
    tmp_path: Any, model: KVLinkModel, embedder: WordEmbedder, kind: str
) -> None:
    class LangChain:
        model = "words"

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[2 * x for x in vector] for vector in embedder.embed(texts).tolist()]

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    given = LangChain() if kind == "langchain" else ContrieverEmbedding(embedder)
    retriever = KVLinkRetriever(k=2, directory=tmp_path, model=model, embedder=given)
    retriever.add(town_nodes())
    nodes = retriever.retrieve(QUESTION)
    assert nodes[0].node_id == "marnik"
    assert nodes[0].score is not None
    assert nodes[0].score <= 1 + 1e-5
    assert KVLinkRetriever(directory=tmp_path, embedder=given).rag is retriever.rag


# Our synthesizer


def oracle(rag: KVLinkRAG, nodes: list[TextNode]) -> str:
    parts = rag.model.prompt(to_documents(nodes), QUESTION)
    return rag.model.generate(parts, mode="masked", max_new_tokens=8)


@pytest.fixture
def retriever(rag: KVLinkRAG) -> KVLinkRetriever:
    found = KVLinkRetriever(k=4, rag=rag)
    found.add(town_nodes())
    return found


def test_the_synthesizer(retriever: KVLinkRetriever, rag: KVLinkRAG, llm: KVLink) -> None:
    response = RetrieverQueryEngine(retriever, KVLinkSynthesizer(llm)).query(QUESTION)
    assert response.response == oracle(rag, found(response))
    assert len(found(response)) == 4
    told = response.metadata
    assert told["marnik"] == {"title": "Marnik", "population": 100}
    assert told["kvlink"]["trace"]["snapshots_found"] == 4
    assert told["kvlink"]["trace"]["reused_tokens"] == rendered_tokens(rag.model, found(response))


def test_the_synthesizer_streams(retriever: KVLinkRetriever, rag: KVLinkRAG, llm: KVLink) -> None:
    engine = RetrieverQueryEngine(retriever, KVLinkSynthesizer(llm, streaming=True))
    response = engine.query(QUESTION)
    assert isinstance(response, StreamingResponse)
    assert response.metadata["kvlink"] == {}
    pieces = list(response.response_gen)
    assert len(pieces) > 2
    assert "" not in pieces
    assert "".join(pieces) == oracle(rag, found(response))
    assert response.metadata["kvlink"]["usage"]["completion_tokens"] == 8


def test_the_synthesizer_async(retriever: KVLinkRetriever, rag: KVLinkRAG, llm: KVLink) -> None:
    async def ask() -> tuple[Any, str, dict[str, Any]]:
        answer = await RetrieverQueryEngine(retriever, KVLinkSynthesizer(llm)).aquery(QUESTION)
        engine = RetrieverQueryEngine(retriever, KVLinkSynthesizer(llm, streaming=True))
        stream = await engine.aquery(QUESTION)
        assert isinstance(stream, AsyncStreamingResponse)
        text = "".join([piece async for piece in stream.async_response_gen()])
        return answer, text, stream.metadata["kvlink"]

    answer, text, told = asyncio.run(ask())
    assert answer.response == text == oracle(rag, found(answer))
    assert told["usage"]["completion_tokens"] == 8


def test_the_synthesizer_takes_nodes_that_nobody_registered(rag: KVLinkRAG, llm: KVLink) -> None:
    nodes = town_nodes(2)
    given = [NodeWithScore(node=node, score=1.0) for node in nodes]
    response = KVLinkSynthesizer(llm).synthesize(QUESTION, given, additional_source_nodes=given[:1])
    assert response.response == oracle(rag, nodes)
    assert len(response.source_nodes) == 3


def test_the_synthesizer_in_an_index(index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink) -> None:
    engine = index.as_query_engine(
        response_synthesizer=KVLinkSynthesizer(llm), llm=llm, similarity_top_k=2
    )
    response = engine.query(QUESTION)
    assert response.response == oracle(rag, found(response))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("query", ["", " \n"])
def test_the_synthesizer_without_a_question(llm: KVLink, query: str, streaming: bool) -> None:
    synthesizer = KVLinkSynthesizer(llm, streaming=streaming)
    with pytest.raises(KVLinkCallError, match="the question is '"):
        synthesizer.synthesize(query, town_nodes(2))
    with pytest.raises(KVLinkCallError, match="the question is"):
        asyncio.run(synthesizer.asynthesize(query, town_nodes(2)))


def test_the_synthesizer_takes_nodes_without_score(rag: KVLinkRAG, llm: KVLink) -> None:
    nodes = town_nodes(2)
    response = KVLinkSynthesizer(llm).synthesize(QUESTION, nodes, additional_source_nodes=nodes)
    assert response.response == oracle(rag, nodes)
    assert [source.node_id for source in response.source_nodes] == ["orvale", "marnik"] * 2


def test_more_nodes_than_slots(rag: KVLinkRAG, llm: KVLink, caplog: Any) -> None:
    """Handed over they are an error; recognised in a prompt they are text, and that is told."""
    nodes = [
        TextNode(id_=f"{n}", text=f"Number {n} of a good many passages.", metadata={"title": "N"})
        for n in range(13)
    ]
    with pytest.raises(KVLinkCallError, match="found 13 passages in the prompt, expected") as error:
        KVLinkSynthesizer(llm).synthesize(QUESTION, nodes)
    assert isinstance(error.value.__cause__, TooManyPassages)
    llm_with_system = KVLink(rag=rag, system_prompt="Be brief.")
    with pytest.raises(KVLinkCallError, match="found 13 passages"):
        llm_with_system.complete(QUESTION, documents=to_documents(nodes))
    assert caplog.text == ""
    KVLinkRegister(rag=rag)(nodes)
    prompt = "\n\n".join([*(node.text for node in nodes), f"Question: {QUESTION}"])
    trace = llm.complete(prompt).raw["trace"]
    assert (trace["passages"], trace["passages_as_text"]) == (12, 1)
    assert "1 of the 13 passages in the prompt are computed as text" in caplog.text


def test_the_synthesizer_without_nodes_or_text(rag: KVLinkRAG, llm: KVLink) -> None:
    assert KVLinkSynthesizer(llm).synthesize(QUESTION, []).response == "Empty Response"
    assert KVLinkSynthesizer(llm).synthesize("", []).response == "Empty Response"
    streamed = KVLinkSynthesizer(llm, streaming=True).synthesize(QUESTION, [])
    assert "".join(streamed.response_gen) == "Empty Response"


def test_the_synthesizer_of_texts(rag: KVLinkRAG, llm: KVLink) -> None:
    """As components call it that know texts only."""
    texts = [node.text for node in town_nodes(2)]
    assert KVLinkSynthesizer(llm).get_response(QUESTION, [*texts, " "]) == oracle(
        rag, [TextNode(text=text) for text in texts]
    )


def test_more_nodes_than_the_window_holds(rag: KVLinkRAG, llm: KVLink) -> None:
    given = [
        NodeWithScore(node=TextNode(text=f"{i} " + "long " * 150), score=1.0) for i in range(8)
    ]
    with pytest.raises(KVLinkCallError, match="fewer or shorter passages") as error:
        KVLinkSynthesizer(llm).synthesize(QUESTION, given)
    assert isinstance(error.value.__cause__, PromptTooLong)


def test_templates_of_the_synthesizer(llm: KVLink) -> None:
    synthesizer = KVLinkSynthesizer(llm)
    assert synthesizer.get_prompts() == {}
    with pytest.raises(ValueError, match="text_qa_template"):
        synthesizer.update_prompts({"text_qa_template": PromptTemplate("{query_str}")})


def test_recognised_parts_are_passages(rag: KVLinkRAG, nodes: list[TextNode]) -> None:
    """What the tests above rest on: recognition sees the framework's own node text."""
    content = nodes[0].get_content(metadata_mode="llm")  # type: ignore[arg-type]
    parts = rag.recognise(f"{content}\n\nQuestion: where?")
    assert [p.document.id for p in parts if isinstance(p, Passage)] == ["orvale"]
