"""Snapshots in device memory: the same answers, a byte budget, and what happens when it is full.

On a CPU the "device" is the CPU itself: the copies are real, the streams are not.
"""

from __future__ import annotations

import importlib
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_by_hand
from conftest import ModelMaker, WordEmbedder, byte_spec, byte_tokenizer, random_model
from test_oracle import F32, NAMES, difference, prompt
from test_static import DEVICES, static_model, workspaces
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

import kvlink_rag.engine.copy_stream
import kvlink_rag.engine.rope
import kvlink_rag.model.prompt_run
from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.engine.copy_stream import CopyStream
from kvlink_rag.engine.rope import rotate_into
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.snapshots.codecs import in_codec
from kvlink_rag.snapshots.device_cache import DeviceMemory, DeviceSnapshot, Recent, default_budget
from kvlink_rag.snapshots.quantised import SCHEMES
from kvlink_rag.snapshots.snapshot import ALL, EXACT, AnySnapshot, Snapshot
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

HAS_TRITON = kvlink_rag.engine.rope._kernel() is not None
needs_triton = pytest.mark.skipif(
    not (HAS_TRITON and torch.cuda.is_available()),
    reason="the kernel needs Triton and a CUDA device, not both are here",
)


def snapshot(tokens: int = 7, layers: int = 4, dtype: torch.dtype = F32, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 2, tokens, 16)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    return Snapshot(keys, values, torch.arange(tokens))


def stored(model: KVLinkModel, directory: Path, memory: DeviceMemory, codec: str) -> Reuse:
    source = StoredSnapshots(SnapshotStore(directory), model.encoder, codec=codec, memory=memory)
    return Reuse(source, memory=memory)


# The same answers.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", [EXACT, "bf16", *SCHEMES])
def test_each_memory_gives_the_answer_of_the_store(tmp_path: Path, codec: str, device: str) -> None:
    """Encoded, read, from the device's memory, from pinned memory: one answer, and verified."""
    model = static_model("qwen3", device=device)
    parts = prompt(model, 5, seed=3)
    memory = DeviceMemory(model.backbone.side, budget=1 << 24, pinned_budget=1 << 24)
    reuse = stored(model, tmp_path, memory, codec)
    first = model.prefill(parts, reuse=reuse)
    assert first.trace.snapshots_encoded > 0
    resident = model.prefill(parts, reuse=reuse)
    assert memory.on_device.hits == resident.trace.snapshots_found > 0
    memory.on_device.clear()
    pinned = model.prefill(parts, reuse=reuse)
    assert memory.pinned.hits == pinned.trace.snapshots_found == resident.trace.snapshots_found
    memory.on_device.clear()
    memory.pinned.clear()
    read = model.prefill(parts, reuse=reuse)
    assert read.trace.snapshots_encoded == 0
    for again in (resident, pinned, read):
        assert torch.equal(again.logits, first.logits)
    memory.on_device.budget = memory.pinned.budget = 0
    found = model.verify(parts, reuse=stored(model, tmp_path, memory, codec))
    assert found.holds, found.message


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_families_equal_the_oracle(
    make_model: ModelMaker, family: str, graphs: bool, tmp_path: Path
) -> None:
    model = static_model(family) if graphs else make_model(family, F32)
    parts = prompt(model, 6, seed=5)
    memory = DeviceMemory(model.backbone.side, budget=1 << 24)
    reuse = stored(model, tmp_path, memory, EXACT)
    masked = model.prefill(parts, mode="masked").logits
    for _ in range(2):
        assert difference(model.prefill(parts, reuse=reuse).logits, masked) < TOLERANCE[F32]
    assert memory.on_device.hits > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", [EXACT, *SCHEMES])
@pytest.mark.parametrize("staging", [1, 100, 1 << 20])
def test_layers_come_when_asked_for_and_are_those_of_the_host(
    codec: str, device: str, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through staging buffers of any size, a group of layers at a time."""
    if staging == 1 and device == "cuda":
        pytest.skip("a copy for every byte")
    monkeypatch.setattr(kvlink_rag.engine.copy_stream, "STAGING", staging)
    host = in_codec(snapshot(tokens=9), codec)
    held = DeviceSnapshot(CopyStream(torch.device(device)), host)
    assert (held.codec, held.nbytes) == (codec, host.nbytes)
    for layers in (slice(0, 1), slice(0, 1), slice(1, 3), slice(3, 4), ALL):
        assert held.arriving == (layers not in (ALL,))
        same(held.part(layers), host.part(layers))
    assert not held.arriving


def same(got: AnySnapshot, expected: AnySnapshot) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert got.codec == expected.codec
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), (
            name
        )


def test_layers_before_those_asked_for_come_too() -> None:
    host = snapshot()
    held = DeviceSnapshot(CopyStream(torch.device("cpu")), host)
    same(held.part(slice(2, 3)), host.part(slice(2, 3)))
    same(held.part(slice(0, 1)), host.part(slice(0, 1)))
    same(held.part(ALL), host)


def test_a_copy_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    host = snapshot()
    held = DeviceSnapshot(CopyStream(torch.device("cpu")), host)
    plain = CopyStream.upload

    def fails(side: CopyStream, target: torch.Tensor, source: torch.Tensor) -> None:
        raise RuntimeError("the device is busy")

    monkeypatch.setattr(CopyStream, "upload", fails)
    with pytest.raises(RuntimeError, match="busy"):
        held.part(slice(0, 2))
    monkeypatch.setattr(CopyStream, "upload", plain)
    same(held.part(slice(0, 2)), host.part(slice(0, 2)))
    same(held.part(ALL), host)


def test_the_host_copy_is_dropped_once_all_is_there() -> None:
    host = snapshot()
    watch = weakref.ref(host.keys)
    held = DeviceSnapshot(CopyStream(torch.device("cpu")), host)
    del host
    held.part(slice(0, 3))
    assert watch() is not None
    held.part(slice(3, 4))
    assert watch() is None


# The budget.


class Sized:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_least_recently_used_goes_first() -> None:
    recent: Recent[Sized] = Recent(10)
    for key, size in (("a", 4), ("b", 4)):
        recent.put(key, Sized(size))
    assert recent.get("a") is not None
    recent.put("c", Sized(4))
    assert recent.get("b") is None
    assert recent.nbytes == 8
    recent.put("huge", Sized(11))
    assert recent.get("huge") is None
    recent.put("a", Sized(1))  # held already
    assert recent.nbytes == 8
    recent.put("d", Sized(10))
    assert len(recent) == 1
    assert (recent.nbytes, recent.hits, recent.misses) == (10, 1, 2)
    recent.clear()
    assert (len(recent), recent.nbytes, recent.get("d")) == (0, 0, None)


def test_threads_keep_the_count_right() -> None:
    recent: Recent[Sized] = Recent(50)

    def work(seed: int) -> None:
        for i in range(500):
            key = str((i * seed) % 17)
            if recent.get(key) is None:
                recent.put(key, Sized(1 + int(key)))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recent.nbytes == sum(item.nbytes for item in recent._held.values()) <= 50
    assert recent.hits + recent.misses == 2000


def test_a_collection_keeps_what_fits(tmp_path: Path, embedder: WordEmbedder) -> None:
    """Opened with a budget for two of four passages: right answers, and never more bytes."""
    model = KVLinkModel(random_model("llama", F32), byte_tokenizer(), byte_spec())
    size = model.backbone.token_bytes * 30
    arguments: dict[str, Any] = {"model": model, "embedder": embedder, "prefix_budget": 0}
    with KVLinkRAG.open(tmp_path, **arguments) as rag:
        rag.add([Document(f"Town {i} lies by the sea.", id=str(i)) for i in range(4)])
        assert rag.reuse.memory is None  # a CPU has none of its own
        expected = rag.ask("Town 2?", k=4, max_new_tokens=6).text
    with KVLinkRAG.open(tmp_path, device_budget=2 * size, **arguments) as rag:
        memory = rag.reuse.memory
        assert memory is not None
        for _ in range(3):
            assert rag.ask("Town 2?", k=4, max_new_tokens=6).text == expected
            assert 0 < memory.on_device.nbytes <= 2 * size
        assert rag.verify().holds
    assert default_budget(torch.device("cpu")) == 0


# A device without memory, as torch tells it.


def test_without_memory_all_that_is_kept_goes_and_the_answer_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = static_model()
    parts = prompt(model, 4, seed=1)
    memory = DeviceMemory(model.backbone.side, budget=1 << 24)
    reuse = stored(model, tmp_path, memory, EXACT)
    expected = model.prefill(parts, reuse=reuse).logits
    assert len(memory.on_device) == 4
    assert len(workspaces(model)._held) == 1
    seen: list[tuple[int, int]] = []
    plain = kvlink_rag.model.prompt_run.assemble

    def full_once(*args: Any, **kwargs: Any) -> Any:
        seen.append((len(memory.on_device), len(workspaces(model)._held)))
        if len(seen) == 1:
            memory.on_device.hits = 0
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(kvlink_rag.model.prompt_run, "assemble", full_once)
    again = model.prefill(parts, reuse=reuse)
    assert torch.equal(again.logits, expected)
    assert memory.on_device.hits == 0  # read from the store the second time
    assert seen == [(4, 1), (4, 0)]
    assert memory.on_device.budget == 1 << 23


def test_no_room_for_a_snapshot_is_no_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = static_model()
    parts = prompt(model, 3, seed=1)
    memory = DeviceMemory(model.backbone.side, budget=1 << 24)
    plain, calls = DeviceSnapshot.__init__, []

    def full_once(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        plain(self, *args)

    monkeypatch.setattr(DeviceSnapshot, "__init__", full_once)
    found = model.prefill(parts, reuse=stored(model, tmp_path, memory, EXACT))
    masked = model.prefill(parts, mode="masked").logits
    assert difference(found.logits, masked) < TOLERANCE[F32]


# Rotation.


@needs_triton
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 31, 32, 200])
def test_the_kernel_gives_what_plain_torch_gives(dtype: torch.dtype, tokens: int) -> None:
    """To the bit in 16-bit types, where products are exact in float32."""
    torch.manual_seed(tokens)
    keys = torch.randn(3, 2, tokens, 64).to(dtype)
    cos, sin = (torch.randn(tokens, 64).to(dtype) for _ in "cs")
    expected = torch.empty_like(keys)
    rotate_into(expected, keys, cos, sin)
    wide = torch.zeros(3, 2, tokens + 9, 64, dtype=dtype, device="cuda")
    kernel = kvlink_rag.engine.rope._kernel()
    assert kernel is not None
    out = wide[:, :, 4 : 4 + tokens]
    assert kernel.can_rotate(out, keys.cuda(), cos.cuda(), sin.cuda())
    kernel.rotate(out, keys.cuda(), cos.cuda(), sin.cuda())
    if dtype == F32:
        assert torch.allclose(out.cpu(), expected, atol=1e-6)
    else:
        assert torch.equal(out.cpu(), expected)
    assert float(wide[:, :, :4].abs().max()) == float(wide[:, :, 4 + tokens :].abs().max()) == 0


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 31, 33])
def test_the_kernels_own_lines_give_what_plain_torch_gives(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Triton: the kernel's function, run by hand over the middle of larger tensors."""
    for name, module in triton_by_hand.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kvlink_rag.engine.rope_triton", raising=False)
    kernel = importlib.import_module("kvlink_rag.engine.rope_triton")
    monkeypatch.delitem(sys.modules, "kvlink_rag.engine.rope_triton")
    torch.manual_seed(tokens)
    keys = torch.randn(5, 2, tokens, 16).to(dtype)[1:4]
    cos, sin = (torch.randn(tokens + 3, 16).to(dtype)[3:] for _ in "cs")
    expected = torch.empty_like(keys)
    rotate_into(expected, keys, cos, sin)
    wide = torch.zeros(3, 2, tokens + 2, 16, dtype=dtype)
    out = wide[:, :, 1:-1]
    assert kernel.can_rotate(out, keys, cos, sin)
    assert not kernel.can_rotate(out, keys, cos.double(), sin)
    assert not kernel.can_rotate(out[..., :12], keys[..., :12], cos, sin)  # no power of two
    kernel.rotate(out, keys, cos, sin)
    if dtype == F32:
        assert torch.allclose(out, expected, atol=1e-6)
    else:
        assert torch.equal(out, expected)
    assert not wide[:, :, 0].any()
    assert not wide[:, :, -1].any()


@pytest.mark.parametrize("turned", [6, 8, 16])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_part_of_each_head_is_turned(dtype: torch.dtype, turned: int) -> None:
    """As transformers' own function for Phi does it; what it leaves as it is stays to the bit."""
    torch.manual_seed(turned)
    keys = torch.randn(3, 2, 5, 16).to(dtype)
    angles = torch.randn(5, turned // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch.full_like(keys, torch.nan)
    rotate_into(out, keys, cos, sin)
    expected = apply_rotary_pos_emb(keys, keys, cos[None], sin[None])[1]
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding)
    assert torch.equal(out[..., turned:], keys[..., turned:])


def test_a_kernel_that_fails_is_told_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def can_rotate(self, *tensors: torch.Tensor) -> bool:
            return True

        def rotate(self, *tensors: torch.Tensor) -> None:
            self.calls += 1
            raise RuntimeError("no compiler")

    broken = Broken()
    monkeypatch.setattr(kvlink_rag.engine.rope, "_kernel", lambda: broken)
    monkeypatch.setattr(kvlink_rag.engine.rope, "_refused", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as that of a CPU tensor
    tensors = [torch.ones(1)] * 4
    assert not kvlink_rag.engine.rope._rotated_by_kernel(*tensors)
    assert not kvlink_rag.engine.rope._rotated_by_kernel(*tensors)
    assert broken.calls == 1
    assert len(caplog.messages) == 1


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_TRITON:
        pytest.skip("Triton is installed here")
    assert kvlink_rag.engine.rope._kernel() is None
