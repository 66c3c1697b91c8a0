"""Forwards of fixed shape equal the oracle; on CUDA their recording does too.

The oracle is the mask written from the paper's rule, run by transformers' own forward. Tolerances
as in `test_oracle`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelMaker, byte_spec, byte_tokenizer, random_model
from test_oracle import F32, NAMES, difference, documents, fresh, prompt, rule_logits

import kvlink_rag.engine.workspace
import kvlink_rag.engine.workspaces
from kvlink_rag import KVLinkModel, Trace
from kvlink_rag.engine.attention import NAME as GROUPED
from kvlink_rag.engine.layer_groups import layer_groups
from kvlink_rag.engine.workspace import TOKENS, bucket
from kvlink_rag.engine.workspaces import Workspaces, capacity_of
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.snapshots.device_cache import DeviceMemory
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.quantised import SCHEMES
from kvlink_rag.snapshots.sources import Reuse

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
EXPERTS = {"mixtral", "qwen3_moe"}  # chosen by what is read, which no graph can hold
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def static_model(
    family: str = "llama", dtype: torch.dtype = F32, device: str = "cpu"
) -> KVLinkModel:
    """A model of its own, with our attention, whose forwards have fixed shapes."""
    model = random_model(family, dtype).to(device)
    model.set_attn_implementation(GROUPED)
    return KVLinkModel(model, byte_tokenizer(), byte_spec(), name=family, graphs=True)


def workspaces(model: KVLinkModel) -> Workspaces:
    found = model.backbone.workspaces
    assert found is not None
    return found


def plainly(model: KVLinkModel, call: Callable[[], Any]) -> Any:
    """`call` with the plain forward."""
    kept, model.backbone.workspaces = model.backbone.workspaces, None
    try:
        return call()
    finally:
        model.backbone.workspaces = kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", NAMES)
def test_padded_prefill_and_decode_equal_the_oracle(family: str, device: str) -> None:
    """Twice: on CUDA the second question replays graphs, of a family that can be recorded."""
    model = static_model(family, device=device)
    refused = device == "cuda" and family in EXPERTS
    for question in ("what is it?", "and who was that, pray?"):
        parts = model.prompt(documents(5, seed=3), question)
        oracle = PromptRun(model.backbone, model.layout(parts), Trace(mode="masked"), fresh(model))
        run = PromptRun(model.backbone, model.layout(parts), Trace(), fresh(model))
        logits, expected = run.start(room=20), oracle.start(room=20)
        assert run.cache is not None
        assert refused or run.cache.workspace is not None
        assert run.trace.computed_tokens not in TOKENS  # so there is padding
        for _ in range(6):
            assert difference(logits, expected) < TOLERANCE[F32]
            token = int(expected.argmax())
            logits, expected = run.step(token), oracle.step(token)
        assert len(run.cache.positions) == len(run.prompt) + 6
        del run
    assert (workspaces(model).graphs.refused is not None) == refused
    assert (workspaces(model).graphs.replays > 0) == (device == "cuda" and not refused)


@pytest.mark.parametrize("family", NAMES)
def test_it_equals_the_rule(make_model: ModelMaker, family: str) -> None:
    model, plain = static_model(family), make_model(family, F32)
    for count, seed in ((1, 1), (7, 2), (12, 3)):
        parts = prompt(model, count, seed=seed)
        logits = model.prefill(parts, reuse=fresh(model)).logits
        assert difference(logits, rule_logits(plain, plain.layout(parts))) < TOLERANCE[F32]
    assert workspaces(model).taken == 3


@pytest.mark.parametrize("codec", ["bf16", *SCHEMES])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_codecs_verify(codec: str, dtype: torch.dtype) -> None:
    from kvlink_rag.snapshots.sources import EncodeNow

    model = static_model("llama", dtype)
    found = model.verify(prompt(model, 4), reuse=Reuse(EncodeNow(model.encoder, codec)))
    assert found.holds, found.message
    assert workspaces(model).taken == 1


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_kept_runs_and_answers_equal_the_plain_ones(family: str) -> None:
    model = static_model(family)
    docs = documents(4, seed=9)
    mine, theirs = (Reuse(fresh(model).snapshots, PrefixCache()) for _ in "ab")
    for question in ("what is it?", "what is that?", "who?"):
        parts = model.prompt(docs, question)
        stream = model.stream(parts, max_new_tokens=12, reuse=mine)
        text = "".join(stream)

        def plain(parts: Any = parts) -> Any:
            found = model.stream(parts, max_new_tokens=12, reuse=theirs)
            return "".join(found), found.trace

        expected, trace = plainly(model, plain)
        assert (text, stream.trace.prefix_tokens) == (expected, trace.prefix_tokens)
    assert stream.trace.prefix_tokens > 0
    assert workspaces(model).taken == 3


def test_stale_numbers_of_an_earlier_answer_are_never_seen() -> None:
    """Whatever an answer left in the buffers, infinities too."""
    model = static_model()
    parts = prompt(model, 3)
    expected = model.prefill(parts, reuse=fresh(model)).logits
    (held,) = workspaces(model)._held
    with torch.inference_mode():
        for buffer in held.static.buffers:
            buffer.fill_(torch.inf)
    assert torch.equal(model.prefill(parts, reuse=fresh(model)).logits, expected)
    assert workspaces(model)._held == [held]


@needs_cuda
def test_logits_stay_when_the_next_graph_is_replayed() -> None:
    model = static_model(device="cuda")
    run = PromptRun(model.backbone, model.layout(prompt(model, 2)), Trace(), fresh(model))
    run.start(6)
    for token in (70, 71, 65):  # the second one records
        first = run.step(token)
    assert workspaces(model).graphs.replays > 0
    kept = first.clone()
    run.step(66)
    assert torch.equal(first, kept)


def test_an_answer_that_outgrows_its_workspace_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room was asked for fewer tokens than come: the plain forward takes over, exactly."""
    monkeypatch.setattr(kvlink_rag.engine.workspaces, "SMALLEST", 16)
    model = static_model()
    parts = prompt(model, 3, seed=2)
    laid = model.layout(parts)
    run = PromptRun(model.backbone, laid, Trace(), fresh(model))
    oracle = PromptRun(model.backbone, laid, Trace(mode="masked"), fresh(model))
    logits, expected = run.start(room=0), oracle.start(room=0)
    assert run.cache is not None
    held = run.cache.workspace
    assert held is not None
    for _ in range(held.capacity - len(laid) + 4):
        token = int(expected.argmax())
        logits, expected = run.step(token), oracle.step(token)
        assert difference(logits, expected) < TOLERANCE[F32]
    assert run.cache.workspace is None
    assert held.busy  # its buffers were this answer's


def test_one_workspace_one_answer() -> None:
    """Two are kept; a third answer at the same time takes the plain path, and all are right."""
    model = static_model()
    laid = [model.layout(prompt(model, 3, seed=seed)) for seed in range(3)]
    runs = [PromptRun(model.backbone, each, Trace(), fresh(model)) for each in laid]
    masked = [PromptRun(model.backbone, each, Trace(mode="masked"), fresh(model)) for each in laid]
    logits, expected = ([run.start(8) for run in each] for each in (runs, masked))
    assert [run.cache is not None and run.cache.workspace is not None for run in runs] == [
        *(True, True, False)
    ]
    for _ in range(3):
        for i in range(3):
            assert difference(logits[i], expected[i]) < TOLERANCE[F32]
            token = int(expected[i].argmax())
            logits[i], expected[i] = runs[i].step(token), masked[i].step(token)
    del runs
    assert not any(held.busy for held in workspaces(model)._held)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_share_the_workspaces(device: str) -> None:
    model = static_model(device=device)
    docs = [documents(3, seed=seed) for seed in range(4)]
    memory = DeviceMemory(model.backbone.side, budget=1 << 24)
    expected = [model.generate(model.prompt(d, "so?"), max_new_tokens=8, mode="masked")
                for d in docs]  # fmt: skip
    wrong: list[str] = []

    def ask(number: int) -> None:
        for i in range(6):
            at = (number + i) % 4
            source = Reuse(OnDevice(model, memory), memory=memory)
            text = model.generate(model.prompt(docs[at], "so?"), max_new_tokens=8, reuse=source)
            if text != expected[at]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert workspaces(model).taken > 0


class OnDevice:
    """Snapshots encoded now, and kept on the device."""

    def __init__(self, model: KVLinkModel, memory: DeviceMemory) -> None:
        self.source, self.memory = fresh(model).snapshots, memory

    def fetch(self, passages: Any, trace: Trace) -> list[Any]:
        made = self.source.fetch(passages, trace)
        keys = [str(ids) for ids in passages]
        return [
            self.memory.get(k) or self.memory.take(k, s)  # type: ignore[arg-type]
            for k, s in zip(keys, made, strict=True)
        ]


def test_many_computed_tokens_take_the_plain_forward() -> None:
    model = static_model()
    parts = model.prompt(documents(2), "long " * 120)
    masked = model.prefill(parts, mode="masked").logits
    assert difference(model.prefill(parts, reuse=fresh(model)).logits, masked) < TOLERANCE[F32]
    assert workspaces(model).taken == 0


def test_a_failure_to_record_is_told_once_and_the_answer_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = static_model()
    parts = prompt(model, 3)
    expected = model.generate(parts, max_new_tokens=8, mode="masked")
    workspaces(model).graphs.record = True
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)

    class NoGraph:
        def __init__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    for _ in range(2):
        assert model.generate(parts, max_new_tokens=8, reuse=fresh(model)) == expected
    assert sum("the plain forward is used" in line for line in caplog.messages) == 1
    assert workspaces(model).graphs.refused is not None
    assert workspaces(model)._held == []


def test_weights_that_moved_are_noticed() -> None:
    model = static_model()
    parts = prompt(model, 3)
    model.prefill(parts, reuse=fresh(model))
    (held,) = workspaces(model)._held
    weight = model.backbone.model.lm_head.weight
    weight.data = weight.data.clone() * 2
    masked = model.prefill(parts, mode="masked").logits
    assert difference(model.prefill(parts, reuse=fresh(model)).logits, masked) < TOLERANCE[F32]
    assert workspaces(model)._held != [held]


def test_a_hidden_entry_that_is_seen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle catches a mask that shows what is not written."""
    monkeypatch.setattr(kvlink_rag.engine.workspace, "HIDDEN", 0)
    model = static_model()
    parts = prompt(model, 4)
    masked = model.prefill(parts, mode="masked").logits
    assert difference(model.prefill(parts, reuse=fresh(model)).logits, masked) > 1e-2


def test_unproved_attention_takes_the_plain_forward() -> None:
    model = random_model("llama", F32)
    model.set_attn_implementation("eager")
    assert (
        KVLinkModel(model, byte_tokenizer(), byte_spec(), graphs=True).backbone.workspaces is None
    )
    assert KVLinkModel(model, byte_tokenizer(), byte_spec()).backbone.workspaces is None


def test_shapes() -> None:
    assert [bucket(n) for n in (0, 1, 2, 68, 512, 513)] == [None, 1, 16, 96, 512, None]
    assert [capacity_of(n) for n in (1, 1024, 1025, 1537, 2049, 3073, 5324)] == [
        *(1024, 1024, 1536, 2048, 3072, 4096, 6144)
    ]
    for layers in (1, 3, 16, 32):
        for groups in (2, 8):
            numbers = [n for part in layer_groups(layers, groups) for n in range(layers)[part]]
            assert numbers == list(range(layers))
