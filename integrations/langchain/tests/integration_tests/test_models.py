"""`ChatKVLink` and `KVLinkLLM`: every way to call them, and what they say about an answer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.agents import create_tool_calling_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_kvlink import ChatKVLink, KVLinkLLM, document_block, register_documents
from langchain_kvlink.messages import to_conversation
from pydantic import BaseModel

from kvlink_rag import KVLinkModel, KVLinkRAG
from kvlink_rag.errors import (
    ConfigError,
    KVLinkError,
    PromptError,
    PromptTooLong,
    TooManyPassages,
)


class Tokens(BaseCallbackHandler):
    """Notes what a callback sees."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ends: list[Any] = []
        self.errors: list[BaseException] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


def masked(rag: KVLinkRAG, messages: list[Any], **arguments: Any) -> str:
    """The answer of a masked full prefill of the same prompt: the engine's oracle."""
    parts = rag.recognise_chat(to_conversation(messages))
    return rag.model.generate(parts, mode="masked", **arguments)


def tokens_of(model: KVLinkModel, documents: list[Document]) -> int:
    """Tokens of the documents as passages: what a prompt that holds them all reuses."""
    texts = [f"{d.metadata['title']}: {d.page_content}\n" for d in documents]
    return sum(len(model.tokenizer.encode(text)) for text in texts)


def test_the_answer_is_the_models_own(
    llm: ChatKVLink, rag: KVLinkRAG, towns: list[Document]
) -> None:
    """Passages in blocks, recognised passages and a plain question: the oracle's answers."""
    register_documents(llm, towns)
    asked = [
        [HumanMessage("Where is the harbour?")],
        [SystemMessage("Be brief."), HumanMessage("Hello"), AIMessage("Hi"), HumanMessage("Why?")],
        [HumanMessage([document_block(towns[0]), {"type": "text", "text": "How many?"}])],
        [HumanMessage(f"From {towns[1].page_content}\n\n{towns[2].page_content}\n\nHow many?")],
    ]
    for messages in asked:
        assert llm.invoke(messages).text == masked(rag, messages, max_new_tokens=8)


def test_usage_and_metadata(llm: ChatKVLink, rag: KVLinkRAG, towns: list[Document]) -> None:
    register_documents(llm, towns)
    blocks = [document_block(town) for town in towns[:3]]
    messages = [HumanMessage([*blocks, {"type": "text", "text": "Which one?"}])]
    answer = llm.invoke(messages)
    reused = tokens_of(rag.model, towns[:3])
    prompt = len(rag.model.layout(rag.recognise_chat(to_conversation(messages))))
    assert answer.usage_metadata == {
        "input_tokens": prompt,
        "output_tokens": 8,
        "total_tokens": prompt + 8,
        "input_token_details": {"cache_read": reused},
    }
    assert llm.get_num_tokens_from_messages(messages) == prompt
    about = answer.response_metadata
    assert about["model_name"] == "tiny"
    assert about["finish_reason"] == "length"
    trace = about["trace"]
    assert (trace["passages"], trace["snapshots_found"], trace["snapshots_encoded"]) == (3, 3, 0)
    assert trace["first_token_ms"] > 0
    again = llm.invoke(messages)
    assert again.text == answer.text
    kept = again.response_metadata["trace"]["prefix_tokens"]
    assert kept > 0
    assert again.usage_metadata["input_token_details"]["cache_read"] == reused + kept
    assert again.usage_metadata["input_tokens"] == prompt


def test_streaming_comes_in_pieces(llm: ChatKVLink) -> None:
    chunks = list(llm.stream("Hello"))
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    whole: AIMessageChunk | None = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    answer = llm.invoke("Hello")
    assert whole.text == answer.text
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"] == 8
    assert whole.response_metadata["model_name"] == "tiny"
    assert whole.response_metadata["trace"]["generated_tokens"] == 8


def test_the_first_piece_comes_before_the_last_is_made(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is left after its first piece has not run to its end."""
    steps = []
    real = type(rag.model.backbone).forward
    monkeypatch.setattr(
        type(rag.model.backbone), "forward", lambda *a, **n: steps.append(1) or real(*a, **n)
    )
    stream = ChatKVLink(rag=rag, max_tokens=40).stream("Hello")
    next(stream)
    stream.close()
    assert 0 < len(steps) < 20


async def test_async_is_the_same(llm: ChatKVLink, towns: list[Document]) -> None:
    register_documents(llm, towns)
    messages = [HumanMessage([document_block(towns[0]), {"type": "text", "text": "Which?"}])]
    text = llm.invoke(messages).text
    assert (await llm.ainvoke(messages)).text == text
    pieces = [chunk.text async for chunk in llm.astream(messages)]
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert [m.text for m in await llm.abatch([messages, messages])] == [text, text]
    assert [m.text for m in llm.batch([messages, messages])] == [text, text]


async def test_the_event_loop_turns_meanwhile(
    llm: ChatKVLink, rag: KVLinkRAG, responsive: Any
) -> None:
    """Opening, prefill and every token are made in other threads."""
    responsive.meet(type(rag.model.backbone), "forward")
    text = KVLinkLLM(rag=rag, max_tokens=4)
    few = ChatKVLink(rag=rag, max_tokens=4)

    async def stream(model: Any) -> None:
        async for _ in model.astream("Hello"):
            pass

    for work in (few.ainvoke("Hello"), text.ainvoke("Hello"), stream(few), stream(text)):
        assert await responsive.turns(work) == 4  # the prefill and every token after it


async def test_a_cancelled_call_stops_generating(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, third, cancelled = [], asyncio.Event(), threading.Event()
    loop, real = asyncio.get_running_loop(), type(rag.model.backbone).forward

    def forward(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            loop.call_soon_threadsafe(third.set)
            cancelled.wait(600)
        return real(*arguments, **named)

    monkeypatch.setattr(type(rag.model.backbone), "forward", forward)
    task = asyncio.create_task(ChatKVLink(rag=rag, max_tokens=100).ainvoke("Hello"))
    await third.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cancelled.set()
    await loop.shutdown_default_executor()  # what still runs there has ended
    assert len(steps) < 10  # the piece it was at, of at most four bytes


def test_concurrent_calls_are_as_single_ones(llm: ChatKVLink, towns: list[Document]) -> None:
    register_documents(llm, towns)
    asked = [
        [HumanMessage([document_block(town), {"type": "text", "text": f"Question {n}?"}])]
        for n, town in enumerate(towns)
    ]
    single = [llm.invoke(messages).text for messages in asked]
    assert len(set(single)) > 1
    with ThreadPoolExecutor(4) as pool:
        assert [m.text for m in pool.map(llm.invoke, asked * 2)] == single * 2


@pytest.mark.parametrize("kind", [ChatKVLink, KVLinkLLM])
def test_stop(kind: Any, rag: KVLinkRAG) -> None:
    def text(answer: Any) -> str:
        return str(getattr(answer, "text", answer))

    whole = text(kind(rag=rag, max_tokens=12).invoke("Hello"))
    end = whole[4:6]
    before = whole[: whole.index(end)]
    assert text(kind(rag=rag, max_tokens=12, stop=[end]).invoke("Hello")) == before
    assert text(kind(rag=rag, max_tokens=12).invoke("Hello", stop=[end])) == before
    assert text(kind(rag=rag, max_tokens=12).bind(stop=[end]).invoke("Hello")) == before
    assert text(kind(rag=rag, max_tokens=12, stop=[end]).invoke("Hello", stop=["\0\0"])) == whole
    assert text(kind(rag=rag, max_tokens=12).invoke("Hello", stop=end)) == before
    with pytest.raises(ConfigError, match="stop is 5, expected a list"):
        kind(rag=rag).invoke("Hello", stop=5)
    streamed = [text(c) for c in kind(rag=rag, max_tokens=12, stop=[end]).stream("Hello")]
    assert "".join(streamed) == before


def test_sampling(rag: KVLinkRAG) -> None:
    warm = ChatKVLink(rag=rag, max_tokens=20, temperature=2.0, seed=1)
    text = warm.invoke("Hello").text
    assert warm.invoke("Hello").text == text
    assert warm.bind(seed=2).invoke("Hello").text != text
    assert warm.invoke("Hello", top_p=1e-6).text == warm.invoke("Hello", temperature=0).text
    nothing = {"max_tokens": None, "top_p": None, "seed": None, "temperature": None}
    assert warm.invoke("Hello", **nothing).text == text
    assert warm.invoke("Hello", max_tokens=3).usage_metadata["output_tokens"] == 3
    with pytest.raises(ConfigError, match="'temprature'"):
        warm.invoke("Hello", temprature=1)
    with pytest.raises(ConfigError, match="another object for another model"):
        warm.invoke("Hello", model="gpt")
    assert warm.invoke("Hello", model="tiny").text == text


@pytest.mark.parametrize(
    "words",
    [{"top_k": 3}, {"min_p": 0.4}, {"repetition_penalty": 30.0}],
    ids=lambda w: next(iter(w)),
)
def test_which_tokens_are_sampled(rag: KVLinkRAG, words: dict[str, Any]) -> None:
    """Field and argument of a call do what the engine does with the word, which is not nothing."""
    plain: dict[str, Any] = {"max_tokens": 20, "temperature": 2.0, "seed": 1}
    parts = rag.recognise_chat([{"role": "user", "content": "Hello"}])
    expected = rag.model.generate(parts, max_new_tokens=20, temperature=2.0, seed=1, **words)
    llm = ChatKVLink(rag=rag, **plain)
    assert llm.invoke("Hello").text != expected
    assert llm.invoke("Hello", **words).text == expected
    assert ChatKVLink(rag=rag, **plain, **words).invoke("Hello").text == expected
    assert KVLinkLLM(rag=rag, **plain, **words).invoke("Hello") == expected


def test_an_object_made_for_every_call(rag: KVLinkRAG) -> None:
    """`configurable_fields` constructs a model a call; it is the same collection."""
    llm = ChatKVLink(rag=rag).configurable_fields(max_tokens=ConfigurableField(id="most"))
    answer = llm.with_config(configurable={"most": 3}).invoke("Hello")
    assert answer.usage_metadata["output_tokens"] == 3


@pytest.mark.parametrize("kind", [ChatKVLink, KVLinkLLM])
@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
async def test_callbacks(kind: Any, way: str, rag: KVLinkRAG) -> None:
    """Every piece once, in order, and the whole at the end."""
    seen = Tokens()
    llm = kind(rag=rag, max_tokens=24)
    config = {"callbacks": [seen]}
    if way == "invoke":
        llm.invoke("Hello", config)
    elif way == "stream":
        list(llm.stream("Hello", config))
    elif way == "ainvoke":
        await llm.ainvoke("Hello", config)
    else:
        [_ async for _ in llm.astream("Hello", config)]
    (end,) = seen.ends
    assert "".join(seen.tokens) == end.generations[0][0].text
    assert len([token for token in seen.tokens if token]) > 1
    assert not seen.errors


def test_an_error_reaches_the_callbacks(llm: ChatKVLink) -> None:
    seen = Tokens()
    with pytest.raises(PromptError):
        llm.invoke("", {"callbacks": [seen]})
    assert [type(error) for error in seen.errors] == [PromptError]


def test_what_an_llm_says_about_its_answer(rag: KVLinkRAG, towns: list[Document]) -> None:
    llm = KVLinkLLM(rag=rag, max_tokens=5)
    register_documents(llm, towns)
    prompt = f"{towns[0].page_content}\n\nHow many lighthouses?"
    (answers,) = llm.generate([prompt]).generations
    info = answers[0].generation_info
    assert answers[0].text == llm.invoke(prompt)
    assert answers[0].text == ChatKVLink(rag=rag, max_tokens=5).invoke(prompt).text
    assert info["model_name"] == "tiny"
    assert info["usage_metadata"]["output_tokens"] == 5
    reused = tokens_of(rag.model, towns[:1])
    assert info["usage_metadata"]["input_token_details"]["cache_read"] == reused
    assert llm.batch([prompt, "Hello"]) == [answers[0].text, llm.invoke("Hello")]
    assert llm.get_num_tokens("abc") == 3


def test_bad_input(llm: ChatKVLink, rag: KVLinkRAG, towns: list[Document]) -> None:
    for empty in ("", "  \n", [], [HumanMessage([])]):
        with pytest.raises(PromptError, match="empty"):
            llm.invoke(empty)
        with pytest.raises(PromptError, match="empty"):
            list(llm.stream(empty))
    with pytest.raises(PromptError, match="empty"):
        KVLinkLLM(rag=rag).invoke(" ")
    with pytest.raises(PromptTooLong, match="window is 4096"):
        llm.invoke("long " * 1000)
    many = [document_block(Document(f"Number {n} of many passages.")) for n in range(13)]
    with pytest.raises(TooManyPassages):
        llm.invoke([HumanMessage([*many, {"type": "text", "text": "Which?"}])])


def test_more_recognised_passages_than_slots_stay_text(llm: ChatKVLink) -> None:
    many = [Document(f"House number {n} has a red door.", id=str(n)) for n in range(15)]
    register_documents(llm, many)
    prompt = "\n\n".join(d.page_content for d in many) + "\n\nWhich house?"
    answer = llm.invoke(prompt)
    assert answer.response_metadata["trace"]["passages"] == 12


def lookup(town: str) -> str:
    """How many lighthouses a town has."""
    return town


class Town(BaseModel):
    """A town."""

    name: str


def agent(llm: ChatKVLink) -> Any:
    prompt = ChatPromptTemplate([("human", "{input}"), ("placeholder", "{agent_scratchpad}")])
    return create_tool_calling_agent(llm, [tool(lookup)], prompt)


@pytest.mark.parametrize(
    ("ask", "instead"),
    [
        (lambda llm: llm.bind_tools([lookup]), "KVLinkDocumentsChain"),
        (agent, "KVLinkDocumentsChain"),
        (lambda llm: llm.invoke("Hello", tools=[lookup]), "KVLinkDocumentsChain"),
        (lambda llm: llm.bind(functions=[{"name": "x"}]).invoke("Hello"), "KVLinkDocumentsChain"),
        (lambda llm: llm.get_num_tokens_from_messages([], tools=[lookup]), "KVLinkDocumentsChain"),
        (lambda llm: llm.with_structured_output(Town), "PydanticOutputParser"),
        (lambda llm: llm.invoke("Hello", response_format=Town), "PydanticOutputParser"),
        (lambda llm: KVLinkLLM(rag=llm.rag).with_structured_output(Town), "PydanticOutputParser"),
        (lambda llm: KVLinkLLM(rag=llm.rag).invoke("Hello", tools=[lookup]), "DocumentsChain"),
    ],
)
def test_tools_and_schemas_are_refused_with_what_to_use(
    llm: ChatKVLink, ask: Any, instead: str
) -> None:
    with pytest.raises(NotImplementedError, match=instead) as found:
        ask(llm)
    assert isinstance(found.value, KVLinkError)


def test_langchain_sees_that_models_of_this_class_call_no_tools() -> None:
    """As its standard suite and `with_structured_output` ask."""
    assert ChatKVLink.bind_tools is BaseChatModel.bind_tools
    assert ChatKVLink.with_structured_output is BaseChatModel.with_structured_output


def test_no_tools_are_no_fault(llm: ChatKVLink) -> None:
    assert llm.invoke("Hello", tools=[]).text == llm.invoke("Hello").text


def test_what_streaming_changes(rag: KVLinkRAG) -> None:
    """Nothing of the answer, nor of what callbacks see."""
    seen = {}
    for given in ({}, {"streaming": True}, {"streaming": False}):
        llm, tokens = ChatKVLink(rag=rag, max_tokens=8, **given), Tokens()
        answer = llm.invoke("Hello", {"callbacks": [tokens]})
        seen[str(given)] = answer.text, [token for token in tokens.tokens if token]
        assert "".join(chunk.text for chunk in llm.stream("Hello")) == answer.text
    assert len({str(found) for found in seen.values()}) == 1


@pytest.mark.parametrize("kind", ["ChatKVLink", "KVLinkLLM"])
def test_a_stream_left_open_at_exit_says_nothing(
    kind: str, tmp_path: Path, saved_pair: tuple[Path, Path]
) -> None:
    words = f"directory={str(tmp_path)!r}, model={str(saved_pair[0])!r}"
    code = (
        f"from langchain_kvlink import {kind}\n"
        f"stream = {kind}({words}, max_tokens=50).stream('Hello')\n"
        "next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "langchain_kvlink" not in done.stderr  # old LangChain's own generator round it
