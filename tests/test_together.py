"""Answers of several threads decoded together: the same as alone, whatever their company does."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    ModelMaker,
    WordEmbedder,
    byte_spec,
    byte_tokenizer,
    random_model,
)

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Part, Trace
from kvlink_rag.collection.conversation import Conversation
from kvlink_rag.engine.attention import NAME as GROUPED
from kvlink_rag.engine.backbone import Backbone, Token
from kvlink_rag.engine.turns import Turns
from kvlink_rag.model.prompt_run import PromptRun

Maker = Callable[..., KVLinkModel]
F32 = torch.float32
TEXTS = ["the harbour of Orvale", "a crane, grey since 1911", "nine bells of bronze hang here"]


@pytest.fixture(scope="module")
def make() -> Maker:
    """As `make_model`, with the attention that loaded models have."""

    @functools.cache
    def made(family: str = "llama") -> KVLinkModel:
        model = random_model(family, F32)
        model.set_attn_implementation(GROUPED)
        return KVLinkModel(model, byte_tokenizer(), byte_spec(), name=family)

    return made


@pytest.fixture(autouse=True)
def nothing_fails_together(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    yield
    if "breaks" not in request.fixturenames:
        assert "together failed" not in caplog.text


def prompts(model: KVLinkModel, count: int) -> list[list[Part]]:
    """Of different lengths and numbers of passages."""
    documents = [Document(f"{text} {'and on ' * i}", title="") for i, text in enumerate(TEXTS * 3)]
    return [model.prompt(documents[: 1 + i % 5], f"question {'x' * i}?") for i in range(count)]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward over several had."""
    found: list[int] = []
    forward = Backbone.forward_rows

    def counted(self: Backbone, ids: Sequence[int], *arguments: Any) -> torch.Tensor:
        found.append(len(ids))
        return forward(self, ids, *arguments)

    monkeypatch.setattr(Backbone, "forward_rows", counted)
    monkeypatch.setattr("kvlink_rag.engine.turns.PATIENCE", 1e6)  # all that may come are waited for
    return found


def side_by_side(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """All tasks at once, each in its thread."""
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as threads:
        return list(threads.map(run, tasks))


def answers(model: KVLinkModel, asked: Sequence[list[Part]], **how: Any) -> list[str]:
    return side_by_side(
        [lambda p=p: model.generate(p, max_new_tokens=12, **how) for p in asked]  # type: ignore[misc]
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_together_are_those_alone(make: Maker, family: str, sizes: list[int]) -> None:
    model = make(family)
    asked = prompts(model, 6)
    alone = [model.generate(p, max_new_tokens=12) for p in asked]
    assert sizes == []
    assert answers(model, asked) == alone
    assert max(sizes) > 1


def test_logits_of_rows_are_those_alone(make: Maker) -> None:
    model = make("mistral-window")
    backbone, asked = model.backbone, prompts(model, 4)
    runs = []
    for parts in asked:
        stream = model.stream(parts, max_new_tokens=4)
        next(stream)
        runs.append(stream)
    caches = [_cache_of(stream) for stream in runs]
    at = [len(cache.positions) for cache in caches]
    rows = backbone.forward_rows([5, 6, 7, 8], at, caches)
    for parts, token, row in zip(asked, (5, 6, 7, 8), rows, strict=True):
        other = model.stream(parts, max_new_tokens=4)
        next(other)
        cache = _cache_of(other)
        alone = backbone.forward(
            torch.tensor([token]),
            torch.tensor([len(cache.positions)]),
            torch.zeros(1).long(),
            cache,
        )[-1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def _cache_of(stream: Any) -> Any:
    return stream._pieces.gi_frame.f_locals["run"].cache


def test_a_seed_says_the_same_in_any_company(make: Maker, sizes: list[int]) -> None:
    model = make("llama")
    asked = prompts(model, 4)
    how = [
        {"temperature": 1.3, "seed": 1, "top_k": 50},
        {"temperature": 0.8, "seed": 2, "repetition_penalty": 1.5},
        {"temperature": 2.0, "seed": 3, "min_p": 0.05},
        {},
    ]
    tasks = [
        lambda p=p, h=h: model.generate(p, max_new_tokens=12, **h)
        for p, h in zip(asked, how, strict=True)
    ]
    alone = [task() for task in tasks]
    assert side_by_side(tasks) == alone
    assert max(sizes) > 1


def test_who_leaves_in_the_middle_stops_nobody(make: Maker, sizes: list[int]) -> None:
    model = make("llama")
    asked = prompts(model, 5)
    alone = [model.generate(p, max_new_tokens=12) for p in asked]

    def leaves(parts: list[Part]) -> str:
        stream = model.stream(parts, max_new_tokens=12)
        first = next(stream)
        stream.close()
        return first

    tasks = [lambda p=p: model.generate(p, max_new_tokens=12) for p in asked[:3]]
    tasks += [lambda p=p: leaves(p) for p in asked[3:]]
    *whole, fourth, fifth = side_by_side(tasks)
    assert whole == alone[:3]
    assert alone[3].startswith(fourth)
    assert alone[4].startswith(fifth)
    assert model.backbone.turns.waiting == 0


@pytest.fixture
def breaks(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards over several rows fail in their second layer."""
    model = make("llama")
    forward, layer = Backbone.forward_rows, model.backbone.model.model.layers[1]

    def broken(self: Backbone, *arguments: Any) -> torch.Tensor:
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            return forward(self, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(Backbone, "forward_rows", broken)
    monkeypatch.setattr("kvlink_rag.engine.turns.PATIENCE", 1e6)


def test_what_fails_together_is_asked_alone(
    make: Maker, breaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The caches are as they were before, so nothing of the answers changes."""
    model = make("llama")
    asked = prompts(model, 4)
    alone = [model.generate(p, max_new_tokens=12) for p in asked]
    assert answers(model, asked) == alone
    assert "together failed" in caplog.text


def test_an_error_of_one_step_is_only_its_own() -> None:
    def run(steps: Sequence[int]) -> list[int | Exception]:
        return [ValueError(f"{step}") if step % 2 else 10 * step for step in steps]

    turns: Turns[int, int] = Turns(run)

    def ask(step: int) -> object:
        try:
            return turns.step(step, step)
        except ValueError as error:
            return str(error)

    asked = [lambda i=i: ask(i) for i in range(8)]
    assert side_by_side(asked) == [10 * i if i % 2 == 0 else f"{i}" for i in range(8)]


def test_a_thread_that_is_ended_leaves_no_one_waiting() -> None:
    def run(steps: Sequence[int]) -> list[int | Exception]:
        raise KeyboardInterrupt

    turns: Turns[int, int] = Turns(run)
    with pytest.raises(KeyboardInterrupt):
        turns.step("a", 1)
    with turns.alone():
        assert turns.waiting == 0


def test_ctrl_c_in_the_thread_that_runs_all_leaves_the_others_their_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvlink_rag.engine.turns.PATIENCE", 1e9)
    ran: list[list[str]] = []

    def run(steps: Sequence[str]) -> list[str]:
        ran.append(list(steps))
        if "gone" in steps:
            raise KeyboardInterrupt
        return [step.upper() for step in steps]

    turns: Turns[str, str] = Turns(run)
    together(turns)
    turns._state.coming = set("bc")
    found: list[str] = []
    others = [
        threading.Thread(target=lambda row=row: found.append(turns.step(row, row))) for row in "bc"
    ]

    def lead() -> None:
        with pytest.raises(KeyboardInterrupt):
            turns.step("a", "gone")  # leads, and waits for b and c

    leader = threading.Thread(target=lead)
    leader.start()
    while not turns._state.busy:
        pass
    for thread in others:
        thread.start()
    for thread in (leader, *others):
        thread.join(60)
    assert sorted(found) == ["B", "C"]
    assert [sorted(steps) for steps in ran[1:]] == [["b", "c", "gone"], ["b", "c"]]
    assert turns.waiting == 0


def test_ctrl_c_in_a_forward_leaves_every_cache_as_it_was(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float32)
    runs = []
    for seed in range(3):
        laid = model.layout(model.prompt([Document(f"number {seed}")], "what?"))
        runs.append(PromptRun(model.backbone, laid, Trace(mode="reuse"), model.reuse))
        runs[-1].start(4)
    caches = [run.cache for run in runs]
    before = [len(cache.positions) for cache in caches]
    plain, calls = model.backbone._alone, iter(range(2))

    def alone(token: Token) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(token)

    monkeypatch.setattr(model.backbone, "_alone", alone)
    monkeypatch.setattr(model.backbone, "forward_rows", lambda *each: 1 / 0)
    tokens = [Token(9, n, cache) for n, cache in zip(before, caches, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        model.backbone._next_logits(tokens)
    assert [len(cache.positions) for cache in caches] == before
    assert all(layer.length == n for c, n in zip(caches, before, strict=True) for layer in c.layers)


def test_prefills_and_steps_take_turns() -> None:
    """While both wait, neither goes twice; prefills go in the order of asking."""
    order: list[str] = []
    turns: Turns[str, str] = Turns(
        lambda steps: [order.append("+".join(steps)) or s for s in steps]
    )  # type: ignore[func-returns-value]

    def prefill(name: str) -> None:
        with turns.alone():
            order.append(name)

    threads = []

    def begin(task: Callable[..., Any], *arguments: Any) -> None:
        count = turns.waiting
        threads.append(threading.Thread(target=task, args=arguments))
        threads[-1].start()
        while turns.waiting == count:
            pass

    with turns.alone():
        for name in ("p1", "p2", "p3"):
            begin(prefill, name)
        begin(turns.step, "a", "s1")
    for thread in threads:
        thread.join()
    assert order == ["s1", "p1", "p2", "p3"]


class Interruptible(threading.Condition):
    """A condition in which Ctrl-C comes to this thread's first wait for which `due` holds."""

    def __init__(self, due: Callable[[], bool]) -> None:
        super().__init__()
        self._due, self._thread = due, threading.current_thread()
        self.came, self.waits_on = False, threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread() is self._thread:
            if self.came:
                self.waits_on.set()
            elif self._due():
                self.came = True
                raise KeyboardInterrupt
        return super().wait(timeout)


def test_ctrl_c_while_a_step_waits_takes_it_back() -> None:
    """Or it would be run later, on a live cache that another prompt has by then."""
    ran: list[list[str]] = []
    turns: Turns[str, str] = Turns(lambda steps: [ran.append(list(steps)) or s for s in steps])  # type: ignore[func-returns-value]
    with turns.alone():
        turns._state.changed = Interruptible(lambda: True)
        with pytest.raises(KeyboardInterrupt):
            turns.step("a", "gone")
    assert turns.waiting == 0
    assert turns.step("b", "here") == "here"
    assert ran == [["here"]]


def together(turns: Turns[str, str]) -> None:
    """A step of the rows a and b in one run, so that each is waited for by the other."""
    with turns.alone():
        both = [threading.Thread(target=turns.step, args=(row, row)) for row in "ab"]
        for thread in both:
            thread.start()
        while turns.waiting < 2:
            pass
    for thread in both:
        thread.join()


def test_ctrl_c_while_others_are_waited_for_frees_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvlink_rag.engine.turns.PATIENCE", 1e9)
    turns: Turns[str, str] = Turns(list)
    together(turns)
    turns._state.changed = Interruptible(lambda: True)
    with pytest.raises(KeyboardInterrupt):
        turns.step("a", "gone")  # leads, and waits for b
    assert turns.waiting == 0
    assert not turns._state.busy
    assert turns.step("b", "here") == "here"


def test_ctrl_c_in_a_step_that_another_runs_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until then the forward writes to the live cache."""
    monkeypatch.setattr("kvlink_rag.engine.turns.PATIENCE", 1e9)
    begun, ended = threading.Event(), threading.Event()
    changed = Interruptible(begun.is_set)

    def run(steps: Sequence[str]) -> list[str]:
        if "gone" in steps:
            with changed:  # free once the other step waits
                begun.set()
                changed.notify_all()
            assert changed.waits_on.wait(60)
            ended.set()
        return list(steps)

    turns: Turns[str, str] = Turns(run)
    together(turns)
    turns._state.changed = changed
    leader = threading.Thread(target=turns.step, args=("b", "here"))
    leader.start()  # leads, and waits for a
    while not turns._state.busy:
        pass
    with pytest.raises(KeyboardInterrupt):
        turns.step("a", "gone")
    over = ended.is_set()
    changed.waits_on.set()
    leader.join()
    assert over


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_in_anothers_turn_goes_on(make: Maker) -> None:
    model = make("llama")
    (parts,) = prompts(model, 1)
    text = model.generate(parts, max_new_tokens=4)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with model.backbone.turns.alone():
            inside.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_says, args=(model, parts, text))
    child.start()
    child.join(120)
    leave.set()
    holder.join()
    assert child.exitcode == 0


def _says(model: KVLinkModel, parts: list[Part], text: str) -> None:
    assert model.generate(parts, max_new_tokens=4) == text


def test_many_questions_are_answered_in_their_order(
    make: Maker, tmp_path: Any, sizes: list[int]
) -> None:
    model = make("llama")
    with KVLinkRAG.open(tmp_path, model=model, embedder=WordEmbedder()) as rag:
        rag.add([Document(f"{text}, number {i}") for i, text in enumerate(TEXTS * 4)])
        asked = [f"which {text}, {i}?" for i, text in enumerate(TEXTS * 2)]
        alone = [rag.ask(question, k=3, max_new_tokens=8) for question in asked]
        found = rag.ask_many(asked, at_once=4, k=3, max_new_tokens=8)
        assert [each.text for each in found] == [each.text for each in alone]
        assert [each.hits for each in found] == [each.hits for each in alone]
        assert max(sizes) > 1
        assert rag.ask_many([]) == []


def test_repaired_prompts_and_conversations_keep_company(
    make: Maker, tmp_path: Any, sizes: list[int]
) -> None:
    model = make("llama")
    with KVLinkRAG.open(tmp_path, model=model, embedder=WordEmbedder(), prefix_budget=0) as rag:
        rag.add([Document(f"{text}, number {i}") for i, text in enumerate(TEXTS * 4)])

        def repaired() -> str:
            return rag.ask("which harbour?", k=3, repair="first:4", max_new_tokens=8).text

        def talked() -> list[str]:
            conversation = Conversation(rag, 2)
            return ["".join(conversation.ask(q, max_new_tokens=8)) for q in ("where?", "and when?")]

        tasks: list[Callable[[], Any]] = [repaired, talked, repaired, talked]
        alone = [task() for task in tasks]
        sizes.clear()
        assert side_by_side(tasks) == alone
        assert max(sizes) > 1


def test_a_stream_that_nobody_keeps_stops_nobody(make: Maker, sizes: list[int]) -> None:
    model = make("llama")
    asked = prompts(model, 2)
    wanted = model.generate(asked[1], max_new_tokens=12)

    def forgets() -> None:
        next(model.stream(asked[0], max_new_tokens=12))
        gc.collect()

    _, found = side_by_side([forgets, lambda: model.generate(asked[1], max_new_tokens=12)])
    assert found == wanted
    assert model.backbone.turns.waiting == 0
