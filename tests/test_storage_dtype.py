"""What a model computes in, what its snapshots are kept in, and that the two are independent.

The processor is the one thing that is replaced: tests say whether it multiplies bfloat16. The
checkpoints are directories, as people have them, since a model handed over is known by its numbers.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WordEmbedder, byte_spec, byte_tokenizer, random_model
from safetensors.torch import load_file

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.engine import processor
from kvlink_rag.engine.processor import computing_dtype
from kvlink_rag.errors import ConfigError, SettingsMismatch
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.snapshots.codecs import CODECS as FILE_CODECS
from kvlink_rag.snapshots.codecs import Storage, default_codec, in_codec
from kvlink_rag.snapshots.snapshot import Snapshot

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = "It stands by the river and was built of the stone that the mill could spare. " * 3
DOCUMENTS = [Document(f"Tower {n} has {n * 7} bells. {LONG}", id=str(n)) for n in range(5)]
QUESTION = "Which tower has bells?"

Processor = Callable[[bool], None]


@pytest.fixture
def multiplying(monkeypatch: pytest.MonkeyPatch) -> Processor:
    """`multiplying(True)`: from now on the processor multiplies bfloat16."""

    def make(multiplies: bool) -> None:
        monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: multiplies)

    make(False)
    return make


def checkpoint(directory: Path, dtype: torch.dtype = BF16, family: str = "llama") -> Path:
    """A directory of a tiny model whose weights are kept in `dtype`."""
    if not directory.exists():
        random_model(family, dtype).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        (directory / "kvlink.json").write_text(byte_spec().to_json())
    return directory


def opened(tmp_path: Path, name: str = "c", own: torch.dtype = BF16, **arguments: Any) -> KVLinkRAG:
    """The collection `name`, on the CPU, of a checkpoint in `own`."""
    model = arguments.pop("model", None) or checkpoint(tmp_path / f"m-{own}", own)
    arguments = {"embedder": WordEmbedder(), "device": "cpu", **arguments}
    return KVLinkRAG.open(tmp_path / name, model=model, **arguments)


def files(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Every snapshot file, as any safetensors reader has it."""
    return [load_file(path) for path in sorted((directory / "snapshots").glob("??/*"))]


def dtypes(directory: Path) -> set[torch.dtype]:
    return {tensors[name].dtype for tensors in files(directory) for name in ("keys", "values")}


def settings(directory: Path) -> dict[str, Any]:
    """What the catalog remembers."""
    with sqlite3.connect(directory / "catalog.sqlite") as database:
        rows = database.execute("SELECT key, value FROM settings").fetchall()
    database.close()
    return {key: json.loads(value) for key, value in rows}


def forget(directory: Path, key: str) -> None:
    database = sqlite3.connect(directory / "catalog.sqlite")
    with database:
        database.execute("DELETE FROM settings WHERE key = ?", (key,))
    database.close()


# What is computed in.


@pytest.mark.parametrize(
    ("own", "device", "multiplies", "expected"),
    [
        (BF16, CPU, False, F32),
        (BF16, CPU, True, BF16),
        (F16, CPU, False, F32),
        (F16, CPU, True, F32),
        (F32, CPU, True, F32),
        (torch.float64, CPU, False, torch.float64),
        (BF16, GPU, False, BF16),
        (F16, GPU, False, F16),
    ],
    ids=str,
)
def test_the_dtype_that_suits_weights_and_device(
    multiplying: Processor,
    own: torch.dtype,
    device: torch.device,
    multiplies: bool,
    expected: torch.dtype,
) -> None:
    multiplying(multiplies)
    assert computing_dtype(own, device) == expected


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("own", "multiplies", "expected"),
    [(BF16, False, F32), (BF16, True, BF16), (F16, True, F32), (F32, True, F32)],
    ids=str,
)
def test_a_checkpoint_is_loaded_in_it(
    tmp_path: Path,
    multiplying: Processor,
    own: torch.dtype,
    multiplies: bool,
    expected: torch.dtype,
    told: bool,
) -> None:
    """Also where its configuration does not tell its dtype. A name overrides, whatever it is."""
    directory = checkpoint(tmp_path / "m", own)
    if not told:
        config = json.loads((directory / "config.json").read_text())
        config.pop("dtype")
        (directory / "config.json").write_text(json.dumps(config))
    multiplying(multiplies)
    model = KVLinkModel.from_pretrained(directory, device="cpu")
    assert {p.dtype for p in model.backbone.model.parameters()} == {expected}
    numbers = random_model("llama", own).state_dict()
    for name, found in model.backbone.model.state_dict().items():
        assert torch.equal(found, numbers[name].to(expected)), name
    for named in (F32, BF16):
        forced = KVLinkModel.from_pretrained(directory, device="cpu", dtype=named)
        assert forced.backbone.dtype == named
        assert forced.fingerprint == model.fingerprint  # the files are the same


@pytest.mark.parametrize("multiplies", [False, True])
def test_stats_and_trace_say_what_was_taken(
    tmp_path: Path, multiplying: Processor, multiplies: bool
) -> None:
    multiplying(multiplies)
    taken = "bfloat16" if multiplies else "float32"
    with opened(tmp_path) as rag:
        assert (rag.stats().dtype, rag.stats().storage_dtype) == ("", "")  # nothing is loaded
        rag.add(DOCUMENTS)
        answer = rag.ask(QUESTION, max_new_tokens=2)
        assert answer.trace.to_dict()["dtype"] == taken
        stats = rag.stats()
        assert (stats.dtype, stats.storage_dtype, stats.codec) == (taken, "bfloat16", "bf16")
        assert rag.model.prefill(rag.model.prompt(DOCUMENTS[:1], "x")).trace.dtype == taken
    with opened(tmp_path) as rag:
        assert (rag.stats().dtype, rag.stats().storage_dtype) == ("", "bfloat16")


# What is kept.


@pytest.mark.parametrize("own", [BF16, F16, F32], ids=str)
def test_what_a_cpu_chooses_is_kept_in_half_the_bytes(
    tmp_path: Path, multiplying: Processor, own: torch.dtype
) -> None:
    with opened(tmp_path, own=own) as rag:
        rag.add(DOCUMENTS)
        assert rag.codec == rag.snapshots.codec == "bf16"
        small = rag.stats().snapshot_bytes
    with opened(tmp_path, "exact", own, codec="exact") as rag:
        rag.add(DOCUMENTS)
        assert rag.codec == rag.snapshots.codec == "exact"
        whole = rag.stats().snapshot_bytes
    assert dtypes(tmp_path / "c") == {BF16}
    assert dtypes(tmp_path / "exact") == {F32}
    assert 0.5 < small / whole < 0.53


def test_who_names_the_dtype_keeps_it(
    tmp_path: Path, multiplying: Processor, make_model: Callable[..., KVLinkModel]
) -> None:
    """So does who hands a model over."""
    with opened(tmp_path, "named", dtype="float32") as rag:
        assert rag.codec == "exact"
        rag.add(DOCUMENTS)
        found = rag.verify(sample=None)
        assert (found.holds, found.price, found.tolerance) == (True, None, 1e-4)
    with opened(tmp_path, "object", model=make_model("llama", F32)) as rag:
        rag.add(DOCUMENTS)
        assert rag.verify().price is None
    assert dtypes(tmp_path / "named") == dtypes(tmp_path / "object") == {F32}


def test_a_model_that_was_loaded_before_says_how_it_is_kept(
    tmp_path: Path, multiplying: Processor
) -> None:
    directory = checkpoint(tmp_path / "m")
    for dtype, codec in (("auto", "bf16"), ("float32", "exact")):
        model = KVLinkModel.from_pretrained(directory, device="cpu", dtype=dtype)
        with opened(tmp_path, dtype, model=model.with_spec(byte_spec())) as rag:
            assert rag.codec == codec


def test_a_gpu_keeps_what_it_computes() -> None:
    assert default_codec("auto", GPU) == default_codec(F32, CPU) == "exact"
    assert default_codec("auto", CPU) == "bf16"


def test_files_hold_what_the_model_computed_rounded_once(
    tmp_path: Path, multiplying: Processor
) -> None:
    with opened(tmp_path, "half") as half, opened(tmp_path, "whole", dtype="float32") as whole:
        half.add(DOCUMENTS)
        whole.add(DOCUMENTS)
    by_ids = {tuple(made["token_ids"].tolist()): made for made in files(tmp_path / "whole")}
    assert len(by_ids) == len(DOCUMENTS)
    for kept in files(tmp_path / "half"):
        made = by_ids[tuple(kept["token_ids"].tolist())]
        for name in ("keys", "values"):
            assert torch.equal(kept[name], made[name].to(BF16))


def test_verify_holds_to_float32s_tolerance_and_says_the_price(
    tmp_path: Path, multiplying: Processor
) -> None:
    with opened(tmp_path) as rag:
        rag.add(DOCUMENTS)
        found = rag.verify(QUESTION, sample=None)
    assert found.price is not None
    assert (found.holds, found.tolerance, found.price.codec) == (True, TOLERANCE[F32], "bf16")
    assert found.difference < 1e-5 < 1e-4 < found.price.difference < TOLERANCE[BF16]
    assert "the same bf16 keys and values" in found.message


@pytest.mark.parametrize("kept", [BF16, F16], ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_numbers_of_another_dtype_are_brought_to_the_caches_slab_by_slab(
    kept: torch.dtype, tokens: int
) -> None:
    """Against RoPE as it is written down, over the same numbers."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, 2, tokens, 16)
    held = [torch.randn(shape, generator=generator).to(kept) for _ in "kv"]
    angles = torch.rand(tokens, 8, generator=generator).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    keys, values = torch.full((2, *shape), 7.0)
    Snapshot(*held, torch.arange(tokens)).fill(keys, values, cos, sin)
    plain = held[0].float()
    turned = torch.cat([-plain[..., 8:], plain[..., :8]], dim=-1)
    assert torch.allclose(keys, plain * cos + turned * sin, rtol=0, atol=1e-6)
    assert torch.equal(values, held[1].float())


def test_snapshots_lie_in_device_memory_as_they_are_kept(
    tmp_path: Path, multiplying: Processor
) -> None:
    with opened(tmp_path) as rag:
        rag.add(DOCUMENTS)
        plain = rag.ask(QUESTION, k=3, max_new_tokens=8).text
    with opened(tmp_path, device_budget="64MB") as rag:
        assert rag.ask(QUESTION, k=3, max_new_tokens=8).text == plain
        memory = rag.reuse.memory
        assert memory is not None
        assert len(memory.on_device) == 3
        held = rag.ask(QUESTION, k=3, max_new_tokens=8)
        assert held.text == plain
        tokens = held.trace.reused_tokens
        backbone = rag.model.backbone
        assert memory.on_device.nbytes == tokens * (backbone.token_bytes // 2 + 8)
        assert rag.verify(QUESTION, sample=0).holds


def test_every_name_means_one_storage() -> None:
    assert {*CODECS} == {*FILE_CODECS, "bf16"}
    assert Storage.of("bf16", F32) == Storage.of("bf16", BF16) == Storage.of("exact", BF16)
    assert Storage.of("exact", F32) != Storage.of("bf16", F32)
    names = [Storage.of("exact", BF16).codec_for(d) for d in (BF16, F32, F16)]
    assert names == ["exact", "bf16", "bf16"]
    assert Storage.of("exact", F16).codec_for(F32) == "float16"
    assert Storage.of("int8", F16).codec_for(F32) == "int8"


def test_a_dtype_takes_what_has_its_digits() -> None:
    pairs = [(kept, computed) for kept in (F32, BF16, F16) for computed in (F32, BF16, F16)]
    assert {(k, c) for k, c in pairs if Storage("exact", k).takes(c)} == {
        (F32, F32),
        (BF16, F32),
        (BF16, F16),
        (BF16, BF16),
        (F16, F32),
        (F16, F16),
    }
    assert Storage("int8", F32).takes(BF16)


def test_numbers_beyond_a_dtype_are_refused() -> None:
    numbers = torch.full((1, 1, 2, 4), 7e4)
    snapshot = Snapshot(torch.ones(1, 1, 2, 4), numbers, torch.arange(2))
    assert in_codec(snapshot, "bf16").tensors["values"].isfinite().all()
    with pytest.raises(ConfigError, match="not finite in float16, in which these"):
        Storage("exact", F16).keep(snapshot)


# One collection, two kinds of processor.


@pytest.mark.parametrize("first", [False, True], ids=["emulates first", "multiplies first"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
def test_a_collection_opens_on_the_other_kind_of_processor(
    tmp_path: Path, multiplying: Processor, family: str, first: bool
) -> None:
    """Nothing is encoded again, reuse holds, and what is added there serves here."""
    model = checkpoint(tmp_path / "m", family=family)
    multiplying(first)
    with opened(tmp_path, model=model) as rag:
        rag.add(DOCUMENTS[:3])
        assert rag.model.backbone.dtype == (BF16 if first else F32)
        keys = {key for key, _ in rag.catalog.snapshots()}
    multiplying(not first)
    with opened(tmp_path, model=model) as rag:
        assert rag.model.backbone.dtype == (F32 if first else BF16)
        trace = rag.ask(QUESTION, k=3, max_new_tokens=4).trace
        assert (trace.snapshots_found, trace.snapshots_encoded) == (3, 0)
        report = rag.add(DOCUMENTS)
        assert (report.unchanged, report.encoded) == (3, 2)
        found = rag.verify(QUESTION, k=5, sample=None)
        assert (found.holds, found.compared, found.wrong) == (True, 5, ())
        assert found.tolerance == TOLERANCE[rag.model.backbone.dtype]
        assert (found.price is not None) == first  # float32 over bfloat16
        assert keys < {key for key, _ in rag.catalog.snapshots()}
        assert rag.check(sample=None) == []
    multiplying(first)
    with opened(tmp_path, model=model) as rag:
        assert rag.verify(QUESTION, k=5, sample=None).holds
        assert rag.stats().encoded == 0
    assert dtypes(tmp_path / "c") == {BF16}


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
def test_quantised_ones_too(tmp_path: Path, multiplying: Processor, codec: str) -> None:
    with opened(tmp_path, codec=codec) as rag:
        rag.add(DOCUMENTS)
    assert settings(tmp_path / "c")["dtype"] == "float32"
    multiplying(True)
    with opened(tmp_path, codec=codec) as rag:
        assert rag.ask(QUESTION, k=5, max_new_tokens=4).trace.snapshots_encoded == 0
        assert rag.add(DOCUMENTS).encoded == 0
        found = rag.verify(QUESTION, sample=None)
        assert (found.holds, found.wrong) == (True, ())
        assert rag.stats().storage_dtype == ""


def test_other_weights_are_found_whatever_they_are_computed_in(
    tmp_path: Path, multiplying: Processor
) -> None:
    """The tolerance of what is kept is wide; another model's numbers are wider still."""
    other = random_model("llama", BF16, seed=3)
    with opened(tmp_path) as rag:
        rag.add(DOCUMENTS)
        entry = rag.catalog.get(["1"])[0]
        made = KVLinkModel(other.float(), byte_tokenizer(), byte_spec())
        (forged,) = made.reuse.snapshots.fetch([made.passage_tokens(entry.document)], Trace())
        rag.store.put(str(entry.snapshot_key), in_codec(forged, "bf16"))
        assert rag.verify(k=1, sample=None).wrong == ("1",)
        rag.check(fix=True, sample=None)
        assert rag.verify(k=1, sample=None).wrong == ()


def test_float16_made_elsewhere_stays_float16(tmp_path: Path, multiplying: Processor) -> None:
    """As a GPU makes it, which computes in the checkpoint's own."""
    with opened(tmp_path, own=F16, dtype="float16") as rag:
        rag.add(DOCUMENTS[:3])
        assert (rag.codec, rag.storage_dtype) == ("exact", "float16")
    with opened(tmp_path, own=F16) as rag:
        assert rag.model.backbone.dtype == F32
        assert rag.add(DOCUMENTS).encoded == 2
        found = rag.verify(QUESTION, k=5, sample=None)
        assert found.price is not None
        assert (found.holds, found.wrong, found.price.codec) == (True, (), "float16")
    assert dtypes(tmp_path / "c") == {F16}


# What was asked for by name.


def test_exact_of_a_named_dtype_is_that_dtype(tmp_path: Path, multiplying: Processor) -> None:
    multiplying(True)
    with opened(tmp_path, codec="exact") as rag:
        rag.add(DOCUMENTS)
    multiplying(False)
    with opened(tmp_path, codec="exact") as rag:  # the app's own line, on another machine
        assert rag.add(DOCUMENTS).encoded == 0
        assert rag.verify(sample=None).holds
    with pytest.raises(SettingsMismatch, match=r"are bfloat16, found .* in float32; open it"):
        opened(tmp_path, dtype="float32", codec="exact")
    with opened(tmp_path, dtype="float32") as rag:
        assert rag.add(DOCUMENTS).encoded == 0
    with opened(tmp_path, dtype="float32", codec="exact", reencode=True) as rag:
        assert rag.verify(sample=None).price is None
        assert rag.check() == []
    assert dtypes(tmp_path / "c") == {F32}


def test_fewer_digits_than_are_kept_are_refused(tmp_path: Path, multiplying: Processor) -> None:
    """bfloat16 could read float32 snapshots, and would write others beside them."""
    with opened(tmp_path, dtype="float32") as rag:
        rag.add(DOCUMENTS)
    multiplying(True)
    for arguments in ({}, {"dtype": "bfloat16"}, {"dtype": "float16"}):
        with pytest.raises(SettingsMismatch, match=r"are float32, .* open it with dtype='float32'"):
            opened(tmp_path, **arguments)
    with opened(tmp_path, dtype="float32") as rag:
        assert rag.verify(sample=None).price is None
    with opened(tmp_path, reencode=True) as rag:
        assert rag.verify(sample=None).holds
    assert dtypes(tmp_path / "c") == {BF16}


def test_another_name_of_the_same_storage_is_no_other_codec(
    tmp_path: Path, multiplying: Processor
) -> None:
    multiplying(True)
    with opened(tmp_path, codec="exact") as rag:
        rag.add(DOCUMENTS)
    with opened(tmp_path, codec="bf16") as rag:
        assert rag.add(DOCUMENTS).encoded == 0
    with opened(tmp_path, "default") as rag:
        rag.add(DOCUMENTS)
        assert settings(tmp_path / "default")["codec"] == "bf16"
        assert rag.uses(codec="exact")
    with opened(tmp_path, "default", codec="exact") as rag:
        assert rag.add(DOCUMENTS).encoded == 0
    multiplying(False)
    with pytest.raises(SettingsMismatch, match="as 'bf16', found codec 'exact'"):
        opened(tmp_path, "default", codec="exact")
    with pytest.raises(SettingsMismatch, match="as 'bf16', found codec 'int8'"):
        opened(tmp_path, "default", codec="int8")


def test_nothing_is_encoded_again_for_what_a_machine_computes_in(
    tmp_path: Path, multiplying: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as rag:
        rag.add(DOCUMENTS)
    for multiplies in (True, False):
        multiplying(multiplies)
        with opened(tmp_path, reencode=True):
            assert "again, for another model" not in caplog.text


def test_a_model_handed_over_in_another_dtype_is_another(
    tmp_path: Path, make_model: Callable[..., KVLinkModel]
) -> None:
    """Its name is that of its numbers in memory, and those are others."""
    with opened(tmp_path, model=make_model("llama", BF16)) as rag:
        rag.add(DOCUMENTS)
    with pytest.raises(SettingsMismatch, match=r"are bfloat16, found .* in float32"):
        opened(tmp_path, model=make_model("llama", F32))


def test_kept_runs_go_by_the_storage(tmp_path: Path, multiplying: Processor) -> None:
    scopes = set()
    for arguments in ({}, {"codec": "exact"}, {"codec": "int8"}):
        with opened(tmp_path, reencode=True, **arguments) as rag:
            rag.add(DOCUMENTS)
            scopes.add(rag.reuse.scope)
    assert len(scopes) == 3


# Collections made before.


def old_identity(rag: KVLinkRAG, dtype: str) -> str:
    """As 0.1.0 wrote it."""
    spec = rag.model.spec
    rendering = [spec.passage_template, spec.untitled_template, spec.rank]
    facts = [rag.model.fingerprint, f"torch.{dtype}", rendering]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def old_key(rag: KVLinkRAG, document: Document, dtype: str) -> str:
    head = f'["kvlink-snapshot",1,"{rag.model.fingerprint}","torch.{dtype}","exact"]\n'
    ids = rag.model.passage_tokens(document)
    packed = b"".join(number.to_bytes(8, "little") for number in ids)
    return hashlib.sha256(head.encode() + packed).hexdigest()


@pytest.mark.parametrize("remembered", [True, False], ids=["with its dtype", "as in 0.1.0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_collection_made_before_opens(
    tmp_path: Path, multiplying: Processor, dtype: str, remembered: bool
) -> None:
    """Exact snapshots in the dtype of the model, whose name entered identity and keys."""
    with opened(tmp_path, dtype=dtype, codec="exact") as rag:
        rag.add(DOCUMENTS)
        wanted = {old_key(rag, document, dtype) for document in DOCUMENTS}
        assert {key for key, _ in rag.catalog.snapshots()} == wanted
        known = settings(tmp_path / "c")
        assert known["model_identity"] == old_identity(rag, dtype)
        assert (known["codec"], known["dtype"]) == ("exact", dtype)
    if not remembered:
        forget(tmp_path / "c", "dtype")
        forget(tmp_path / "c", "codec")
    with opened(tmp_path) as rag:  # a processor that computes in float32
        assert rag.model.backbone.dtype == F32
        trace = rag.ask(QUESTION, k=5, max_new_tokens=4).trace
        assert (trace.snapshots_found, trace.snapshots_encoded) == (5, 0)
        assert rag.add([*DOCUMENTS, Document("A mill.", id="mill")]).encoded == 1
        found = rag.verify(QUESTION, sample=None)
        assert (found.holds, found.wrong) == (True, ())
        assert (found.price is None) == (dtype == "float32")
    multiplying(True)
    if dtype == "bfloat16":
        with opened(tmp_path) as rag:
            assert rag.verify(QUESTION, sample=None).holds
            assert rag.stats().encoded == 0
    else:
        with pytest.raises(SettingsMismatch, match=r"are float32, .* open it with dtype='float32'"):
            opened(tmp_path)
