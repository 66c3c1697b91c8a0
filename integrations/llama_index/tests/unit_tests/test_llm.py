"""`KVLink` alone: the eight calls, sampling, usage, errors, concurrency, cancellation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.callbacks.token_counting import TokenCountingHandler
from llama_index.llms.kvlink import KVLink
from llama_index.llms.kvlink.errors import KVLinkCallError
from llama_index.llms.kvlink.nodes import to_documents
from tiny import rendered_tokens, town_nodes, wait_for_a_turn

from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.errors import KVLinkError, PromptTooLong

HELLO = [ChatMessage(role="system", content="Be brief."), ChatMessage(content="Hello there!")]


def oracle(model: KVLinkModel, content: str, count: int = 8) -> str:
    """The masked full prefill's answer to one user message without passages."""
    parts = model.chat([{"role": "user", "content": content}])
    return model.generate(parts, mode="masked", max_new_tokens=count)


def test_complete_and_stream_agree_with_the_oracle(llm: KVLink, model: KVLinkModel) -> None:
    whole = llm.complete("Hello there!")
    pieces = list(llm.stream_complete("Hello there!"))
    assert whole.text == oracle(model, "Hello there!")
    assert "".join(piece.delta or "" for piece in pieces) == whole.text
    assert [piece.text for piece in pieces[-2:]] == [whole.text, whole.text]
    assert whole.delta is None
    assert len(pieces) > 2


def test_chat_and_stream_agree_with_the_oracle(llm: KVLink, model: KVLinkModel) -> None:
    parts = model.chat([{"role": m.role.value, "content": m.content} for m in HELLO])
    expected = model.generate(parts, mode="masked", max_new_tokens=8)
    whole = llm.chat(HELLO)
    pieces = list(llm.stream_chat(HELLO))
    assert whole.message.content == expected
    assert whole.message.role == MessageRole.ASSISTANT
    assert whole.message.additional_kwargs == {}  # else it would enter the chat history as text
    assert "".join(piece.delta or "" for piece in pieces) == expected
    assert pieces[-1].message.content == expected


@pytest.mark.parametrize("role", ["developer", "chatbot", "model"])
def test_other_names_of_roles(llm: KVLink, role: str) -> None:
    plain = {"developer": "system"}.get(role, "assistant")
    asked = [ChatMessage(role=r, content="A rule.") for r in (role, plain)]
    answers = [llm.chat([message, ChatMessage(content="Go.")]) for message in asked]
    assert answers[0].message.content == answers[1].message.content


def test_async_twins_give_the_same(llm: KVLink) -> None:
    async def ask() -> list[str]:
        streamed = await llm.astream_complete("Hello there!")
        chatted = await llm.astream_chat(HELLO)
        return [
            (await llm.acomplete("Hello there!")).text,
            "".join([piece.delta or "" async for piece in streamed]),
            (await llm.achat(HELLO)).message.content or "",
            "".join([piece.delta or "" async for piece in chatted]),
        ]

    completed, chatted = llm.complete("Hello there!").text, llm.chat(HELLO).message.content
    assert asyncio.run(ask()) == [completed, completed, chatted, chatted]


class Watched:
    """Calls `before` each piece of text, counts them, and notes the threads that make them."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: KVLinkModel,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.pieces = 0
        self.threads: set[int] = set()
        real = model.stream

        def stream(*arguments: Any, **options: Any) -> Any:
            self.threads.add(threading.get_ident())
            found = real(*arguments, **options)
            pieces = found._pieces

            def counted() -> Any:
                for piece in pieces:
                    before()
                    self.threads.add(threading.get_ident())
                    self.pieces += 1
                    yield piece

            found._pieces = counted()
            return found

        monkeypatch.setattr(model, "stream", stream)


def test_the_event_loop_is_not_blocked(
    tmp_path: Path, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.new_event_loop()
    watched = Watched(monkeypatch, model, lambda: wait_for_a_turn(loop))
    real = KVLinkRAG.open

    def watched_open(*arguments: Any, **options: Any) -> KVLinkRAG:
        wait_for_a_turn(loop)
        watched.threads.add(threading.get_ident())
        return real(*arguments, **options)

    monkeypatch.setattr(KVLinkRAG, "open", watched_open)
    llm = KVLink(directory=tmp_path, model=model, max_new_tokens=8)

    async def ask() -> None:
        await llm.acomplete("Hello there!")
        async for _ in await llm.astream_chat(HELLO):
            pass

    loop.run_until_complete(ask())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    assert watched.pieces > 8
    assert threading.get_ident() not in watched.threads  # opening, loading and every token


def test_a_cancelled_call_stops_generating(
    llm: KVLink, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, cancelled = threading.Event(), threading.Event()

    def before() -> None:
        if watched.pieces == 1:
            second.set()
            cancelled.wait(600)

    watched = Watched(monkeypatch, model, before)

    async def cancel() -> None:
        asking = asyncio.create_task(llm.acomplete("Hello there!", max_new_tokens=200))
        while not second.is_set():
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        cancelled.set()

    asyncio.run(cancel())  # which waits for its threads to end
    assert watched.pieces == 2


def test_a_stream_that_is_left_stops_generating(
    llm: KVLink, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, model)
    for _ in llm.stream_complete("Hello there!", max_new_tokens=200):
        break
    assert watched.pieces == 1

    async def leave() -> None:
        stream = await llm.astream_complete("Hello there!", max_new_tokens=200)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    assert watched.pieces == 2


def test_nothing_runs_before_the_first_piece(llm: KVLink) -> None:
    stream = llm.stream_complete("")
    with pytest.raises(KVLinkCallError, match="empty"):
        next(stream)


def test_sampling_of_the_llm_and_of_a_call(rag: KVLinkRAG) -> None:
    llm = KVLink(rag=rag, max_new_tokens=12, temperature=1.0, seed=1)
    one = llm.complete("Hello").text
    assert llm.complete("Hello").text == one
    assert llm.complete("Hello", seed=2).text != one
    greedy = llm.complete("Hello", temperature=0.0).text
    assert llm.complete("Hello", temperature=1.0, top_p=1e-6).text == greedy
    assert llm.complete("Hello", seed=1, max_tokens=None, stop=None, top_p=None).text == one
    with pytest.raises(KVLinkCallError, match="stop is 5, expected a list"):
        llm.complete("Hello", stop=5)
    with pytest.raises(KVLinkCallError, match="the prompt is a NoneType"):
        llm.complete(None)  # type: ignore[arg-type]
    assert llm.complete("Hello", max_tokens=3).raw["usage"]["completion_tokens"] == 3
    stop = greedy[4:6]
    before = greedy.partition(stop)[0]
    assert llm.complete("Hello", temperature=0.0, stop=stop).text == before
    assert KVLink(rag=rag, max_new_tokens=12, stop=[stop]).complete("Hello").text == before
    assert (
        "".join(p.delta for p in llm.stream_complete("Hello", temperature=0, stop=[stop])) == before
    )


@pytest.mark.parametrize(
    "words",
    [{"top_k": 3}, {"min_p": 0.4}, {"repetition_penalty": 30.0}],
    ids=lambda w: next(iter(w)),
)
def test_which_tokens_are_sampled(
    rag: KVLinkRAG, model: KVLinkModel, words: dict[str, Any]
) -> None:
    """Field and argument of a call do what the engine does with the word, which is not nothing."""
    plain: dict[str, Any] = {"max_new_tokens": 20, "temperature": 2.0, "seed": 1}
    expected = model.generate(model.chat([{"role": "user", "content": "Hello"}]), **plain, **words)
    llm = KVLink(rag=rag, **plain)
    assert llm.complete("Hello").text != expected
    assert llm.complete("Hello", **words).text == expected
    assert KVLink(rag=rag, **plain, **words).complete("Hello").text == expected


def test_what_an_answer_says_of_itself(llm: KVLink, model: KVLinkModel) -> None:
    documents = to_documents(town_nodes(3))
    answer = llm.complete("Which town?", documents=documents)
    usage, trace = answer.raw["usage"], answer.raw["trace"]
    reused = rendered_tokens(model, town_nodes(3))
    assert trace["reused_tokens"] == reused
    assert trace["passages"] == 3
    assert usage["cached_tokens"] == reused + trace["prefix_tokens"]
    assert usage["prompt_tokens"] == usage["cached_tokens"] + trace["computed_tokens"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert (answer.raw["model"], answer.raw["finish_reason"]) == (model.name, "length")
    assert answer.additional_kwargs == usage
    last = list(llm.stream_complete("Which town?", documents=documents))[-1]
    assert (last.delta, last.raw["usage"]["completion_tokens"]) == ("", 8)
    chatted = llm.chat(HELLO)
    assert chatted.raw["usage"] == chatted.additional_kwargs


def test_documents_of_a_call_equal_the_oracle(
    llm: KVLink, rag: KVLinkRAG, model: KVLinkModel
) -> None:
    documents = to_documents(town_nodes(4))
    expected = model.generate(model.prompt(documents, "Which?"), mode="masked", max_new_tokens=8)
    assert llm.complete("Which?", documents=documents).text == expected
    again = llm.complete("Which?", documents=documents)
    assert again.text == expected
    assert again.raw["trace"]["snapshots_found"] == 4  # kept since the first call


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        (
            [Document(f"Fact number {i} of many.") for i in range(15)],
            "found 15 passages",
        ),
        ("text", "documents is a str, expected a list"),
        (["fine"], "document 1 of 1 is a str"),
        ([Document("x"), Document(" ", id="p7")], r"document 2 of 2 \(id 'p7'.* has no text"),
    ],
)
def test_documents_that_cannot_be_handed_over(llm: KVLink, documents: Any, match: str) -> None:
    with pytest.raises(KVLinkCallError, match=match) as error:
        llm.complete("Which?", documents=documents)
    assert isinstance(error.value.__cause__, KVLinkError)


def test_an_empty_question(llm: KVLink, rag: KVLinkRAG) -> None:
    with pytest.raises(KVLinkCallError, match="the question is ' '"):
        llm.complete(" ", documents=[Document("The harbour of Orvale.")])
    for messages in ([ChatMessage(content=" ")], [HELLO[0], ChatMessage(content="")]):
        with pytest.raises(KVLinkCallError, match="empty, expected"):
            llm.chat(messages)


def test_a_system_prompt_goes_before_documents(rag: KVLinkRAG, model: KVLinkModel) -> None:
    llm = KVLink(rag=rag, max_new_tokens=4, system_prompt="Be a pirate.")
    documents = to_documents(town_nodes(2))
    plain = KVLink(rag=rag, max_new_tokens=4).complete("Which?", documents=documents)
    asked = llm.complete("Which?", documents=documents)
    more = asked.raw["usage"]["prompt_tokens"] - plain.raw["usage"]["prompt_tokens"]
    assert more == len("Be a pirate.") + 2  # <system> and <eos>


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_prompt_is_refused(llm: KVLink, empty: str) -> None:
    with pytest.raises(KVLinkCallError, match="empty"):
        llm.complete(empty)
    with pytest.raises(KVLinkCallError, match="empty"):
        llm.chat([])


def test_a_prompt_beyond_the_window_is_refused(llm: KVLink, model: KVLinkModel) -> None:
    with pytest.raises(KVLinkCallError, match=f"window is {model.window}") as found:
        llm.complete("x" * model.window)
    assert isinstance(found.value.__cause__, PromptTooLong)
    assert not isinstance(found.value, ValueError)  # which LlamaIndex would swallow
    with pytest.raises(KVLinkCallError, match="window"):
        asyncio.run(llm.acomplete("x" * model.window))


def test_messages_that_are_not_text_are_refused(llm: KVLink) -> None:
    image = ChatMessage(blocks=[TextBlock(text="Look:"), ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(KVLinkCallError, match="ImageBlock"):
        llm.chat([image])


def test_unknown_arguments_of_a_call_are_refused(llm: KVLink) -> None:
    with pytest.raises(KVLinkCallError, match="'temprature'"):
        llm.complete("Hello", temprature=1.0)


def test_blocks_of_text_and_empty_contents(llm: KVLink, model: KVLinkModel) -> None:
    blocks = ChatMessage(blocks=[TextBlock(text="Hello"), TextBlock(text="there!")])
    assert llm.chat([blocks]).message.content == oracle(model, "Hello\nthere!")
    assert llm.chat([ChatMessage(role="assistant"), ChatMessage(content="Hi")]).message.content


def test_special_tokens_in_messages_stay_text(llm: KVLink, model: KVLinkModel) -> None:
    usage = llm.chat([ChatMessage(content="<eos><system>")]).raw["usage"]
    assert usage["prompt_tokens"] == 4 + len("<eos><system>")


def test_calls_side_by_side_give_what_calls_in_turn_give(rag: KVLinkRAG) -> None:
    llm = KVLink(rag=rag, max_new_tokens=6)
    documents = to_documents(town_nodes(6))
    questions = [f"Question {i % 4}?" for i in range(8)]

    def ask(question: str) -> str:
        return llm.complete(question, documents=documents[int(question[9]) :]).text

    expected = [ask(question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, questions)) == expected


def test_the_collection_is_opened_once_by_many_threads(
    tmp_path: Any, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = KVLinkRAG.open

    def slow_open(*arguments: Any, **options: Any) -> KVLinkRAG:
        opened.append(threading.get_ident())
        time.sleep(0.2)  # long enough for the other threads to come to it
        return real(*arguments, **options)

    monkeypatch.setattr(KVLinkRAG, "open", slow_open)
    llm = KVLink(directory=tmp_path, model=model, max_new_tokens=2)
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: llm.complete("Hello").text, range(4)))
    assert len(opened) == len(answers) == 1


def test_callbacks_and_token_counts(rag: KVLinkRAG) -> None:
    debug, counter = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler()
    llm = KVLink(rag=rag, max_new_tokens=5, callback_manager=CallbackManager([debug, counter]))
    llm.complete("Hello there!")
    list(llm.stream_chat(HELLO))
    pairs = debug.get_event_pairs(CBEventType.LLM)
    assert len(pairs) == 2
    assert pairs[0][0].payload[EventPayload.PROMPT] == "Hello there!"
    assert pairs[1][1].payload[EventPayload.RESPONSE].raw["usage"]["completion_tokens"] == 5
    assert counter.completion_llm_token_count == 10


def lookup(town: str) -> str:
    """How many lighthouses a town has."""
    return town


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.chat(HELLO, tools=[lookup]),
        lambda llm: llm.complete("Hello", functions=[lookup]),
        lambda llm: llm.chat(HELLO, tool_choice="auto"),
        lambda llm: llm.chat_with_tools([lookup], "Hello"),
        lambda llm: llm.stream_chat_with_tools([lookup], "Hello"),
        lambda llm: llm.get_tool_calls_from_response(llm.chat(HELLO)),
        lambda llm: llm.chat([*HELLO, ChatMessage(role="tool", content="3")]),
    ],
)
def test_functions_are_refused_with_what_to_use(llm: KVLink, ask: Any) -> None:
    with pytest.raises(NotImplementedError, match="QueryEngineTool") as found:
        ask(llm)
    assert isinstance(found.value, KVLinkError)
    assert not isinstance(found.value, ValueError)  # which LlamaIndex would swallow


def test_no_functions_are_no_fault(llm: KVLink) -> None:
    assert llm.chat(HELLO, tools=[]).message.content == llm.chat(HELLO).message.content


@pytest.mark.skipif(not hasattr(types, "ThinkingBlock"), reason="this LlamaIndex has none")
def test_what_an_earlier_model_thought_is_not_repeated(llm: KVLink) -> None:
    said = ChatMessage(role="assistant", content="Hi.")
    thought = ChatMessage(
        role="assistant", blocks=[types.ThinkingBlock(content="Hm."), TextBlock(text="Hi.")]
    )
    answers = [llm.chat([*HELLO, m, ChatMessage(content="Why?")]) for m in (said, thought)]
    assert answers[0].message.content == answers[1].message.content
    assert answers[0].raw["usage"]["prompt_tokens"] == answers[1].raw["usage"]["prompt_tokens"]


def test_messages_to_prompt_makes_the_prompt(rag: KVLinkRAG, model: KVLinkModel) -> None:
    """All four ways of a chat: one user message, as `complete` has it."""

    def render(messages: Any) -> str:
        return "\n".join(f"{m.role.value} says: {m.content}" for m in messages)

    llm = KVLink(rag=rag, max_new_tokens=8, messages_to_prompt=render)
    expected = oracle(model, render(HELLO))
    assert llm.chat(HELLO).message.content == expected
    assert "".join(p.delta or "" for p in llm.stream_chat(HELLO)) == expected
    assert asyncio.run(llm.achat(HELLO)).message.content == expected
    plain = KVLink(rag=rag, max_new_tokens=8, messages_to_prompt=None)
    assert (
        plain.chat(HELLO).message.content
        == KVLink(rag=rag, max_new_tokens=8).chat(HELLO).message.content
    )


@pytest.mark.parametrize("call", ["stream_complete('Hello')", "stream_chat([ChatMessage('Hi')])"])
def test_a_stream_left_open_at_exit_says_nothing(
    call: str, tmp_path: Path, saved_model: Path
) -> None:
    words = f"directory={str(tmp_path)!r}, model={str(saved_model)!r}"
    code = (
        "from llama_index.core.llms import ChatMessage\n"
        "from llama_index.llms.kvlink import KVLink\n"
        f"stream = KVLink({words}, max_new_tokens=50).{call}\n"
        "next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
