"""Codecs: their bytes, their errors, their sizes, and the oracle of reuse from quantised snapshots.

`decode` is a reader written from `docs/formats.md` with numpy and struct alone; everything here is
held against it. The oracle: plain transformers, one forward under the mask of `test_oracle`, in
which hooks give the passages' tokens the keys (before RoPE) and values that `decode` finds in the
files. So it shares neither de-quantising nor rotation nor cache with what it checks.
"""

from __future__ import annotations

import hashlib
import json
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ModelMaker, WordEmbedder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_oracle import as_given, by_token, difference, documents, givers, rule_logits

import kvlink_rag.collection.reencoding
import kvlink_rag.snapshots.quantised
from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Trace, arguments
from kvlink_rag.errors import ConfigError, SettingsMismatch, SnapshotCorrupt
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots import codecs
from kvlink_rag.snapshots.codecs import Storage, in_codec
from kvlink_rag.snapshots.file_format import (
    planned_size,
    read_snapshot,
    snapshot_key,
    snapshot_size,
    write_snapshot,
)
from kvlink_rag.snapshots.quantised import SCHEMES, Quantised, quantise
from kvlink_rag.snapshots.snapshot import Snapshot
from kvlink_rag.snapshots.sources import EncodeNow, Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

F32 = torch.float32
KEY = "cd" * 32
NAMES = sorted(SCHEMES)
LLAMA_1B = (16, 8, 200, 64)  # layers, kv_heads, tokens, head_dim
IDS = "07 00 00 00 00 00 00 00 ff f4 01 00 00 00 00 00"
# The data of keys [[0, 1, -2, 0.5], [0.001, 300, 4, -1]] and values of the other sign, in order,
# and the SHA-256 of the file. Two of them by hand: the key channel (1, 300) has low 1 and scale
# 299 / 255 rounded up to a bfloat16, 1.1796875 (0x3f97), and 299 / 1.1796875 rounds to 253 (0xfd).
GOLDEN = {
    "int8": (
        IDS + " 84 36 97 3f c1 3c c1 3b  00 00 80 3f 00 c0 80 bf  41 3c 98 3f  80 bf 96 c3"
        " 00 00 00 ff fe fd ff 00  55 00 ff 2a fd 00 f9 fd",
        "7b6fcc4e4793893f451fb1bc67a77046845c3f206c2f5e5c9a34bb9cd20deaeb",
    ),
    "int4": (
        IDS + " 8c 38 a0 41 cd 3e cd 3d  00 00 80 3f 00 c0 80 bf  4d 3e a1 41  80 bf 96 c3"
        " 00 f0 ff 0f  f5 20 ff f0",
        "e88c0f01a7304acc5263fa512ab88a61df8e2af5a5b17608d053a45b5f4b2ee5",
    ),
    "fp8": (
        IDS + " 16 36 2c 3f 13 3c 13 3b  93 3b 2c 3f"
        " 00 3c f6 76 7e 7e 7e fe  80 f6 7e ee 81 fe cc 3c",
        "6782febce656f373f8109c072c919517ee847bc4190a8d7286f3ff67b9ad795b",
    ),
}
CODES = {"int8": ("U8", 4), "int4": ("U8", 2), "fp8": ("F8_E4M3", 4)}


def states(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = F32) -> Snapshot:
    """Keys with channels of very different size and mean, as models have them; values without."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *shape, generator=generator)
    wide = torch.rand(shape[0], shape[1], 1, shape[3], generator=generator) * 8
    mean = torch.randn(shape[0], shape[1], 1, shape[3], generator=generator) * 4
    return Snapshot((keys * wide + mean).to(dtype), values.to(dtype), torch.arange(shape[2]))


def write(path: Path, snapshot: Any, key: str = KEY) -> Path:
    with FileIO(path, "w") as file:
        assert write_snapshot(file, snapshot, key) == file.tell() == snapshot_size(snapshot, key)
    return path


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys before RoPE and values of a file: float32 [layers, kv_heads, tokens, dim].

    Of one that is quantised, or an exact one in bfloat16.
    """
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    codec = header["__metadata__"]["codec"]

    def tensor(name: str) -> np.ndarray:
        entry = header[name]
        start, stop = entry["data_offsets"]
        kind = {"U8": "u1", "F8_E4M3": "u1", "BF16": "<u2", "I64": "<i8"}[entry["dtype"]]
        found = np.frombuffer(data[start:stop], kind).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            found = (found.astype("<u4") << 16).view("<f4")
        return found

    def codes(name: str) -> np.ndarray:
        found = tensor(name)
        if codec == "int4":
            return np.concatenate([found & 15, found >> 4], axis=-1).astype(np.float32)
        if codec == "int8":
            return found.astype(np.float32)
        sign, exponent, fraction = found >> 7, (found >> 3) & 15, (found & 7) / np.float32(8)
        normal = np.ldexp(1 + fraction, exponent.astype(int) - 7)
        return np.where(sign, -1, 1) * np.where(exponent, normal, np.ldexp(fraction, -6))

    def low(name: str, like: np.ndarray) -> np.ndarray:
        return tensor(name) if name in header else np.zeros_like(like)

    if codec == "exact":
        return tensor("keys"), tensor("values")
    keys, values = codes("keys").astype(np.float32), codes("values").astype(np.float32)
    scales = tensor("key_scales")
    lows, tokens = low("key_lows", scales), keys.shape[2]
    group = np.arange(tokens) // -(-tokens // scales.shape[2])
    keys = keys * scales[:, :, group] + lows[:, :, group]
    scales = tensor("value_scales")
    wide = [np.repeat(s, values.shape[3] // scales.shape[3], axis=-1)
            for s in (scales, low("value_lows", scales))]  # fmt: skip
    return keys, values * wide[0] + wide[1]


# Bytes.


@pytest.mark.parametrize("codec", NAMES)
def test_golden_bytes(tmp_path: Path, codec: str) -> None:
    keys = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-3, 300.0, 4.0, -1.0]).view(1, 1, 2, 4)
    path = write(tmp_path / "s", quantise(codec, keys, -keys, torch.tensor([7, 128255])))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    data, digest = GOLDEN[codec]
    assert raw[8 + length :] == bytes.fromhex(data)
    assert hashlib.sha256(raw).hexdigest() == digest
    found = json.loads(raw[8 : 8 + length])
    assert found.pop("__metadata__").items() >= {"codec": codec, "version": "1"}.items()
    dtype, width = CODES[codec]
    lows = codec != "fp8"
    assert [(name, entry["dtype"], entry["shape"]) for name, entry in found.items()] == [
        ("token_ids", "I64", [2]),
        ("key_scales", "BF16", [1, 1, 1, 4]),
        *([("key_lows", "BF16", [1, 1, 1, 4])] if lows else []),
        ("value_scales", "BF16", [1, 1, 2, 1]),
        *([("value_lows", "BF16", [1, 1, 2, 1])] if lows else []),
        ("keys", dtype, [1, 1, 2, width]),
        ("values", dtype, [1, 1, 2, width]),
    ]
    assert (8 + length + 2 * 8) % 64 == 0


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("shape", [LLAMA_1B, (2, 2, 1, 16), (1, 1, 150, 128), (1, 2, 65, 80)])
def test_files_read_back_as_documented(tmp_path: Path, codec: str, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "s", in_codec(states(shape), codec))
    read = read_snapshot(path, key=KEY, token_ids=range(shape[2]))
    assert isinstance(read, Quantised)
    assert (read.codec, read.shape) == (codec, shape)
    expected = decode(path)
    for got, wanted in zip(read.exact(F32), expected, strict=True):
        assert np.array_equal(got.numpy(), wanted)
    assert set(load_file(path)) == set(read.tensors)  # any safetensors reader opens it


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", NAMES)
def test_filling_rotates_what_the_file_says(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    """Into places of a larger buffer, the rest of which is left alone."""
    shape = (2, 2, 150, 16)
    path = write(tmp_path / "s", in_codec(states(shape), codec))
    angles = torch.rand(150, 8).repeat(1, 2) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = torch.full((2, 2, 2, 170, 16), 7.0, dtype=dtype)
    read = read_snapshot(path)
    read.fill(keys[:, :, 10:160], values[:, :, 10:160], cos, sin)
    plain, expected = (torch.from_numpy(x).to(dtype) for x in decode(path))
    assert torch.equal(values[:, :, 10:160], expected)
    turned = torch.cat([-plain[..., 8:], plain[..., :8]], dim=-1)
    wanted = plain.double() * cos.double() + turned.double() * sin.double()
    step = {F32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    size = (plain.abs() + turned.abs()).double()  # two roundings of what is added
    assert bool(((keys[:, :, 10:160].double() - wanted).abs() <= 2 * step * size + 1e-12).all())
    for buffer in (keys, values):
        assert bool((buffer[:, :, :10] == 7).all())
        assert bool((buffer[:, :, 160:] == 7).all())


# Sizes and errors.


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.29)])
def test_sizes_of_real_files(tmp_path: Path, codec: str, most: float) -> None:
    """200 tokens of Llama-3.2-1B's shape, all overhead included, against the exact file."""
    snapshot = states(LLAMA_1B, dtype=torch.bfloat16)
    exact = write(tmp_path / "exact", snapshot).stat().st_size
    small = write(tmp_path / "small", in_codec(snapshot, codec)).stat().st_size
    assert small <= most * exact
    assert small > 0.9 * most * exact  # the limits are not so wide that they say nothing


@pytest.mark.parametrize("codec", ["exact", "bf16", *NAMES])
@pytest.mark.parametrize("shape", [(2, 2, 1, 16), (1, 1, 150, 128), (1, 2, 65, 80)])
def test_sizes_are_known_before(tmp_path: Path, codec: str, shape: Any) -> None:
    for dtype in (F32, torch.bfloat16):
        path = write(tmp_path / "s", in_codec(states(shape, dtype=dtype), codec))
        assert planned_size(shape, Storage.of(codec, dtype)) == path.stat().st_size


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 140), st.sampled_from([2, 16, 64, 128])
)


@settings(max_examples=40)
@given(shapes, st.integers(0, 1000), st.sampled_from([F32, torch.bfloat16, torch.float16]),
       st.floats(1e-6, 1e4))  # fmt: skip
def test_errors_are_within_half_a_step(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, size: float
) -> None:
    """Of the range of what shares a scale; scales and lows are rounded outwards to bfloat16."""
    made = states(shape, seed)
    made = Snapshot(
        (made.keys * size).clamp(-6e4, 6e4).to(dtype),
        (made.values * size).clamp(-6e4, 6e4).to(dtype),
        made.token_ids,
    )
    for codec in NAMES:
        keys, values = quantise(codec, made.keys, made.values, made.token_ids).exact(F32)
        for got, wanted, dim in ((keys, made.keys.float(), 2), (values, made.values.float(), 3)):
            largest = wanted.abs().amax(dim, keepdim=True)
            if codec == "fp8":
                # half the distance of two codes: 2**-4 of the number, or of the smallest normal
                bound = torch.maximum(wanted.abs(), largest / 448 * 2**-6 * 1.01) * 2**-4
            else:
                spread = wanted.amax(dim, keepdim=True) - wanted.amin(dim, keepdim=True)
                levels = 255 if codec == "int8" else 15
                bound = (spread + largest * 2**-7) / levels / 2 * (1 + 2**-7)
            slack = largest * 2**-20 + 1e-40  # float32 of the sum itself
            assert bool(((got - wanted).abs() <= bound * 1.02 + slack).all()), codec


@pytest.mark.parametrize("codec", NAMES)
def test_constant_channels_are_kept(codec: str) -> None:
    for number in (0.0, 1.0, -3.0, 1e-20):
        keys = torch.full((1, 1, 3, 4), number)
        for got in quantise(codec, keys, keys, torch.arange(3)).exact(F32):
            assert torch.allclose(got, keys, rtol=2**-7, atol=0)


def test_what_cannot_be_quantised_is_refused() -> None:
    good = torch.ones(1, 1, 3, 4)
    for bad in (torch.inf, -torch.inf, torch.nan):
        keys = good.clone()
        keys[0, 0, 1, 2] = bad
        for codec in NAMES:
            with pytest.raises(ConfigError, match="not finite"):
                quantise(codec, keys, good, torch.arange(3))
            with pytest.raises(ConfigError, match="not finite"):
                quantise(codec, good, keys, torch.arange(3))
    with pytest.raises(ConfigError, match="head_dim of 3, expected an even one"):
        quantise("int4", good[..., :3], good[..., :3], torch.arange(3))
    for unknown in ("int3", "bfloat16", ""):
        with pytest.raises(ConfigError, match="expected one of exact, bf16, int8, int4, fp8"):
            in_codec(Snapshot(good, good, torch.arange(3)), unknown)


@pytest.mark.parametrize("codec", NAMES)
def test_other_tensors_are_refused(tmp_path: Path, codec: str) -> None:
    """Each one left out, of another shape, in another order; the checksum fits."""
    snapshot = quantise(codec, *states((1, 2, 70, 16)).exact(F32), torch.arange(70))
    good = snapshot.tensors
    read_snapshot(write(tmp_path / "good", snapshot))
    wrong = [{**good, "more": good["keys"]}, dict(reversed(good.items()))]
    for name, tensor in good.items():
        wrong += [
            {n: t for n, t in good.items() if n != name},
            {**good, name: tensor[:0]},
            {**good, name: tensor[None]},
            {**good, name: tensor.view(torch.uint8)[..., :2]},
        ]
    for tensors in wrong:
        forged = object.__new__(Quantised)
        object.__setattr__(forged, "codec", codec)
        object.__setattr__(forged, "tensors", tensors)
        with pytest.raises(SnapshotCorrupt, match="not a snapshot of codec"):
            read_snapshot(write(tmp_path / "bad", forged))


# The oracle.


def given_logits(model: KVLinkModel, laid: Layout, files: list[Path]) -> torch.Tensor:
    """Logits of the masked prefill in which the passages' tokens have what `files` hold."""
    backbone = model.backbone
    found = [[torch.from_numpy(x).to(backbone.dtype) for x in decode(path)] for path in files]
    keys, values = (torch.cat(each, dim=2) for each in zip(*found, strict=True))
    at = laid.segments != 0
    handles = []
    for number, layer in enumerate(backbone.model.model.layers):
        giving = givers(layer.self_attn)
        for given_states, name in ((keys, "keys"), (values, "values")):
            module, columns = giving[name]
            states_here = given_states[number].transpose(0, 1)

            def put(
                _: Any, __: Any, output: torch.Tensor, here: Any = states_here, part: Any = columns
            ) -> torch.Tensor:
                changed = by_token(output, part, laid, backbone.kv_heads).clone()
                changed[at] = here
                return as_given(changed, output, part)

            handles.append(module.register_forward_hook(put))
    try:
        return rule_logits(model, laid)
    finally:
        for handle in handles:
            handle.remove()


def stored(
    model: KVLinkModel, path: Path, codec: str, parts: list[Any]
) -> tuple[Reuse, list[Path]]:
    """The snapshots of a prompt in a store, and their files in the prompt's order."""
    store = SnapshotStore(path)
    source = StoredSnapshots(store, model.encoder, codec=codec)
    laid = model.layout(parts)
    passages = [laid.passage_ids(span) for span in laid.passages]
    source.fetch(passages, Trace())
    files = [next(path.glob(f"??/{source.key(ids)}-*")) for ids in passages]
    return Reuse(source), files


@pytest.mark.parametrize("codec", ["bf16", *NAMES])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_reuse_equals_masked_over_what_the_files_hold(
    make_model: ModelMaker, tmp_path: Path, family: str, codec: str
) -> None:
    model = make_model(family, F32)
    parts = model.prompt(documents(5, seed=8, longest=14), "what is it?")
    reuse, files = stored(model, tmp_path / "s", codec, parts)
    got = model.prefill(parts, reuse=reuse)
    assert (got.trace.snapshots_found, got.trace.snapshots_encoded) == (5, 0)
    expected = given_logits(model, model.layout(parts), files)
    assert difference(got.logits, expected) < TOLERANCE[F32]
    assert difference(got.logits, model.prefill(parts, "masked").logits) > 3 * TOLERANCE[F32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", NAMES)
def test_the_oracle_in_16_bits(
    make_model: ModelMaker, tmp_path: Path, codec: str, dtype: torch.dtype
) -> None:
    model = make_model("qwen3", dtype)
    parts = model.prompt(documents(5, seed=8), "what is it?")
    reuse, files = stored(model, tmp_path / "s", codec, parts)
    expected = given_logits(model, model.layout(parts), files)
    assert difference(model.prefill(parts, reuse=reuse).logits, expected) < TOLERANCE[dtype]


def test_a_snapshot_encoded_now_is_the_one_that_is_kept(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    """So that an answer does not depend on whether the store had it."""
    model = make_model("llama", F32)
    parts = model.prompt(documents(3, seed=1), "what is it?")
    for codec in ("bf16", *NAMES):
        reuse, _ = stored(model, tmp_path / codec, codec, parts)
        found = model.prefill(parts, reuse=reuse)
        made = model.prefill(parts, reuse=Reuse(EncodeNow(model.encoder, codec)))
        assert (found.trace.snapshots_found, made.trace.snapshots_encoded) == (3, 3)
        assert torch.equal(found.logits, made.logits)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])  # heads behind tokens, and first
@pytest.mark.parametrize("codec", ["bf16", *NAMES])
def test_verify_states_the_codecs_price(make_model: ModelMaker, codec: str, family: str) -> None:
    model = make_model(family, F32)
    parts = model.prompt(documents(4, seed=2), "what is it?")
    reuse = Reuse(EncodeNow(model.encoder, codec))
    found = model.verify(parts, reuse=reuse)
    logits, masked = (
        model.prefill(parts, mode, reuse=reuse).logits for mode in ("reuse", "masked")
    )
    assert found.holds
    assert found.difference < TOLERANCE[F32]
    price = found.price
    assert price is not None
    assert (price.codec, price.same_top_token) == (codec, bool(logits.argmax() == masked.argmax()))
    assert price.difference == pytest.approx(difference(logits, masked), rel=1e-3)
    exact = torch.distributions.Categorical(logits=masked.double())
    other = torch.distributions.Categorical(logits=logits.double())
    expected = float(torch.distributions.kl_divergence(exact, other))
    rounding = 2 * torch.finfo(F32).eps * float(exact.logits.abs().max())  # of its logarithms
    assert price.divergence == pytest.approx(expected, rel=1e-2, abs=rounding)
    assert f"the same {codec} keys and values" in found.message
    assert f"{codec} moves the logits by {price.difference:.2e}" in found.message
    assert model.verify(parts).price is None


def test_verify_finds_a_quantised_key_in_the_wrong_place(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", F32)
    parts = model.prompt(documents(4, seed=2), "what is it?")
    plain = kvlink_rag.snapshots.quantised.rotate_into

    def shifted(out: Any, keys: Any, cos: Any, sin: Any) -> None:
        plain(out, keys, cos.roll(1, 0), sin.roll(1, 0))

    monkeypatch.setattr(kvlink_rag.snapshots.quantised, "rotate_into", shifted)
    found = model.verify(parts, reuse=Reuse(EncodeNow(model.encoder, "int8")))
    assert not found.holds
    assert "NOT" in found.message


# Collections.


def towns(count: int = 6) -> list[Document]:
    return [Document(f"The town number {n} has a harbour.", id=str(n)) for n in range(count)]


def codecs_in(directory: Path) -> set[str]:
    files = (directory / "snapshots").glob("??/*.safetensors")
    return {read_snapshot(path).codec for path in files}


def test_a_collection_remembers_its_codec(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    pair = {"model": make_model("llama", F32), "embedder": embedder}
    with KVLinkRAG.open(tmp_path, codec="int8", **pair) as rag:
        rag.add(towns())
        before = rag.stats()
        text = rag.ask("Which town?", k=3, max_new_tokens=8).text
        assert before.codec == rag.snapshots.codec == "int8"
    assert codecs_in(tmp_path) == {"int8"}
    with KVLinkRAG.open(tmp_path, **pair) as rag:
        answer = rag.ask("Which town?", k=3, max_new_tokens=8)
        assert (answer.text, answer.trace.snapshots_found) == (text, 3)
        assert rag.add(towns()).encoded == 0
        found = rag.verify()
        assert found.holds
        assert found.price is not None
        assert rag.check() == []
    with pytest.raises(SettingsMismatch, match="as 'int8', found codec 'exact'"):
        KVLinkRAG.open(tmp_path, codec="exact", **pair)
    with pytest.raises(ConfigError, match="found codec 'int7', expected one of exact, bf16, int8"):
        KVLinkRAG.open(tmp_path, codec="int7", **pair)


def test_another_codec_encodes_again(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    pair = {"model": make_model("llama", F32), "embedder": embedder}
    with KVLinkRAG.open(tmp_path, **pair) as rag:
        rag.add(towns())
    exact_bytes = sum(p.stat().st_size for p in (tmp_path / "snapshots").glob("??/*"))
    for codec in ("int4", "fp8", "exact"):
        with KVLinkRAG.open(tmp_path, codec=codec, reencode=True, **pair) as rag:
            assert rag.stats().snapshots == 6
            assert rag.ask("Which town?", k=6, max_new_tokens=2).trace.snapshots_found == 6
            assert rag.check() == []
        assert codecs_in(tmp_path) == {codec}
    assert sum(p.stat().st_size for p in (tmp_path / "snapshots").glob("??/*")) == exact_bytes


def test_an_interrupted_change_of_codec_is_finished_when_told_to(
    make_model: ModelMaker,
    embedder: WordEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = {"model": make_model("llama", F32), "embedder": embedder}
    with KVLinkRAG.open(tmp_path, **pair) as rag:
        rag.add(towns())

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kvlink_rag.collection.reencoding, "encode_missing", stopped)
        with pytest.raises(KeyboardInterrupt):
            KVLinkRAG.open(tmp_path, codec="int8", reencode=True, **pair)
    with pytest.raises(SettingsMismatch, match="interrupted; open it with reencode=True"):
        KVLinkRAG.open(tmp_path, **pair)
    with KVLinkRAG.open(tmp_path, embedder=embedder, model=pair["model"], reencode=True) as rag:
        assert rag.stats().codec == "int8"
        assert rag.check() == []
    assert codecs_in(tmp_path) == {"int8"}


def test_keys_of_codecs_differ() -> None:
    keys = {snapshot_key("m", [1], dtype=F32, codec=codec) for codec in ("exact", *SCHEMES)}
    assert len(keys) == 4
    text = b'["kvlink-snapshot",1,"m","torch.float32","int8"]\n' + struct.pack("<q", 1)
    assert hashlib.sha256(text).hexdigest() in keys


def test_every_codec_by_name_is_registered_and_reads_what_it_writes() -> None:
    assert {*codecs.CODECS} == {*arguments.CODECS} - {"bf16"}  # whose files are exact ones
    keys, values = (torch.randn(2, 2, 9, 8) for _ in "kv")
    exact = Snapshot(keys, values, torch.arange(9))
    for name, codec in codecs.CODECS.items():
        made = codec.encode(exact)
        again = codec.read(dict(made.tensors))
        assert (again.codec, list(again.tensors)) == (name, list(made.tensors))
        layout = {n: (t.dtype, list(t.shape)) for n, t in made.tensors.items()}
        assert layout == codec.layout((2, 2, 9, 8), torch.float32)
        pairs = zip(again.exact(F32), made.exact(F32), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_quantising_a_models_own_states_keeps_most_of_them(make_model: ModelMaker) -> None:
    """Relative error of a real passage: the order of the codecs, and no surprise."""
    model = make_model("llama", F32)
    exact = model.encoder.one(model.passage_tokens(towns(1)[0]))
    errors = {}
    for codec in NAMES:
        keys, _ = in_codec(exact, codec).exact(F32)
        errors[codec] = float((keys - exact.keys).norm() / exact.keys.norm())
    assert errors["int8"] < errors["fp8"] < errors["int4"] < 0.15
    assert errors["int8"] < 0.01
