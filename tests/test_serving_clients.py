"""LangChain's and LlamaIndex's own OpenAI classes against the server, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from conftest import WordEmbedder  # noqa: E402
from server import EMBEDDER, READER, Running, make_towns, running  # noqa: E402

from kvlink_rag.serving.embeddings import _encoding  # noqa: E402

QUESTION = "Orvale harbour?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("clients")
    make_towns(root)
    with running(root) as server:
        yield server


@pytest.fixture
def where(server: Running) -> dict[str, Any]:
    return {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}


def expected(server: Running, tokens: int = 8) -> str:
    with server.towns() as rag:
        return rag.ask(QUESTION, k=3, max_new_tokens=tokens).text


def test_langchain_chat(server: Running, where: dict[str, Any]) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    llm = chat(model="kvlink/towns", max_tokens=8, stream_usage=True, **where)
    answer = llm.invoke(QUESTION)
    assert answer.content == expected(server)
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
    pieces = list(llm.stream(QUESTION))
    assert "".join(piece.text for piece in pieces) == answer.content
    assert len(pieces) > 3
    many = llm.batch([QUESTION] * 4)
    assert [each.content for each in many] == [answer.content] * 4
    assert llm.invoke([("system", "Be brief."), ("human", QUESTION)]).content


def test_langchain_responses(server: Running, where: dict[str, Any]) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    llm = chat(model="kvlink/towns", max_tokens=8, use_responses_api=True, **where)
    answer = llm.invoke([("system", "Be brief."), ("human", QUESTION)])
    again = chat(model="kvlink/towns", max_tokens=8, **where).invoke(
        [("system", "Be brief."), ("human", QUESTION)]
    )
    assert answer.text == again.text
    assert answer.usage_metadata["output_tokens"] == 8
    pieces = list(llm.stream(QUESTION))
    assert "".join(piece.text for piece in pieces) == llm.invoke(QUESTION).text
    further = llm.invoke([("human", QUESTION), answer, ("human", "And the mill?")])
    assert further.usage_metadata["output_tokens"] == 8


def test_langchain_completions(server: Running, where: dict[str, Any]) -> None:
    llm = pytest.importorskip("langchain_openai").OpenAI
    llm = llm(model=READER, max_tokens=8, temperature=0, **where)
    with server.towns() as rag:
        said = "".join(rag.complete(QUESTION, max_new_tokens=8))
    assert llm.invoke(QUESTION) == said
    assert "".join(llm.stream(QUESTION)) == said


def test_langchain_embeddings(
    server: Running, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends ids of tiktoken's encoding, whose file LlamaIndex brings along."""
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    texts = ["Orvale harbour", "salt and stone"]
    vectors = WordEmbedder().embed(texts)
    plain = embeddings(model=EMBEDDER, check_embedding_ctx_length=False, **where)
    assert np.allclose(plain.embed_documents(texts), vectors, atol=1e-6)
    core = Path(pytest.importorskip("llama_index.core").__file__).parent
    if not (cache := core / "_static" / "tiktoken_cache").is_dir():
        pytest.skip("this LlamaIndex brings no encoding along")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    _encoding.cache_clear()
    ids = embeddings(model=EMBEDDER, **where)
    assert np.allclose(ids.embed_documents(texts), vectors, atol=1e-6)
    assert np.allclose(ids.embed_query(texts[1]), vectors[1], atol=1e-6)
    _encoding.cache_clear()
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(openai.BadRequestError, match="send text"):
        ids.embed_query(texts[1])
    _encoding.cache_clear()


def test_llama_index(server: Running, where: dict[str, Any]) -> None:
    llms = pytest.importorskip("llama_index.core.llms")
    like = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
    named: dict[str, Any] = {"api_base": where["base_url"], "api_key": "none", "max_retries": 0}
    named["temperature"] = 0  # its own is 0.1
    llm = like(model="kvlink/towns", is_chat_model=True, max_tokens=8, **named)
    asked = [llms.ChatMessage(role="user", content=QUESTION)]
    answer = llm.chat(asked).message.content
    assert answer == expected(server)
    assert "".join(each.delta or "" for each in llm.stream_chat(asked)) == answer
    plain = like(model=READER, max_tokens=8, **named)
    with server.towns() as rag:
        said = "".join(rag.complete(QUESTION, max_new_tokens=8))
    assert plain.complete(QUESTION).text == said
    assert [each.text for each in plain.stream_complete(QUESTION)][-1] == said
