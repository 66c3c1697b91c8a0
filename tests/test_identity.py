"""What a snapshot and a kept run are of: each part of their identity changed alone.

A snapshot must never serve other weights (same shape), RoPE, dtype, codec, format version or token
ids; a kept run neither these nor other link tokens, markers, order or collection. Each case is
checked twice: it is not found, and put in its place by force it is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trust
from conftest import LLAMA3_ROPE, byte_spec, byte_tokenizer, random_model
from trust import SMALL, open_tiny

from kvlink_rag import Document, KVLinkModel, Passage, Spec, Text, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.disk.checked_file import Kind
from kvlink_rag.errors import ConfigError, SnapshotCorrupt
from kvlink_rag.snapshots import file_format
from kvlink_rag.snapshots.file_format import read_snapshot, snapshot_key
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.sources import EncodeNow, Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

F32 = torch.float32
DOCUMENT = Document("The harbour has a long mole.", title="Orvale")


def variant(
    seed: int = 0, dtype: torch.dtype = F32, spec: Spec | None = None, **config: Any
) -> Any:
    """The tiny model with one thing changed."""
    made = random_model("llama", dtype, seed=seed, **SMALL, **config)
    return KVLinkModel(made, byte_tokenizer(), spec or byte_spec(), name="variant")


OTHER_MODELS: dict[str, Callable[[], KVLinkModel]] = {
    "weights": lambda: variant(seed=1),
    "RoPE theta": lambda: variant(rope_parameters={**LLAMA3_ROPE, "rope_theta": 10_000.0}),
    "RoPE factor": lambda: variant(rope_parameters={**LLAMA3_ROPE, "factor": 16.0}),
    "RoPE type": lambda: variant(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "dtype": lambda: variant(dtype=torch.bfloat16),
    "norm": lambda: variant(rms_norm_eps=1e-3),
}


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """Holds the document's snapshot, encoded by the tiny model."""
    with SnapshotStore(tmp_path / "s") as store:
        fetch(store, variant())
        yield store


def fetch(store: SnapshotStore, model: KVLinkModel, document: Document = DOCUMENT) -> Trace:
    """Ask the store for the document's snapshot; what comes must be what the model encodes."""
    ids, trace = model.passage_tokens(document), Trace()
    (found,) = StoredSnapshots(store, model.encoder).fetch([ids], trace)
    (expected,) = EncodeNow(model.encoder).fetch([ids], Trace())
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)
    return trace


def test_the_same_model_finds_it(store: SnapshotStore) -> None:
    assert fetch(store, variant()).snapshots_found == 1


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_does_not(store: SnapshotStore, what: str) -> None:
    other = OTHER_MODELS[what]()
    assert fetch(store, other).snapshots_encoded == 1
    assert len(store) == 2
    mine, others = (file_of(store, model) for model in (variant(), other))
    shutil.copy(mine, others)  # by force
    assert fetch(store, other).snapshots_encoded == 1
    assert store.stats().corrupt == 1


def file_of(store: SnapshotStore, model: KVLinkModel, document: Document = DOCUMENT) -> Path:
    key = StoredSnapshots(store, model.encoder).key(model.passage_tokens(document))
    (path,) = store.directory.glob(f"{key[:2]}/{key}-*.safetensors")
    return path


@pytest.mark.parametrize("what", ["dtype", "RoPE", "weights"])
def test_one_directory_of_weights_loaded_otherwise_does_not(tmp_path: Path, what: str) -> None:
    """Files are told by their digests, so dtype and configuration must enter by themselves."""
    directory = tmp_path / "model"
    variant().backbone.model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "kvlink.json").write_text(byte_spec().to_json())
    with SnapshotStore(tmp_path / "s") as store:
        first = KVLinkModel.from_pretrained(directory, device="cpu")
        assert fetch(store, first).snapshots_encoded == 1
        assert fetch(store, KVLinkModel.from_pretrained(directory)).snapshots_found == 1
        if what == "RoPE":
            config = json.loads((directory / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = 10_000.0
            (directory / "config.json").write_text(json.dumps(config))
        elif what == "weights":
            variant(seed=1).backbone.model.save_pretrained(tmp_path / "other")
            weights = "model.safetensors"  # not written over: the first model may map it
            (tmp_path / "other" / weights).replace(directory / weights)
        dtype = "bfloat16" if what == "dtype" else "auto"
        other = KVLinkModel.from_pretrained(directory, device="cpu", dtype=dtype)
        assert fetch(store, other).snapshots_encoded == 1
        shutil.copy(file_of(store, first), file_of(store, other))
        assert fetch(store, other).snapshots_encoded == 1


OTHER_TEXTS: dict[str, tuple[Document, Spec | None]] = {
    "text": (replace(DOCUMENT, text="The harbour has a long mole!"), None),
    "title": (replace(DOCUMENT, title="Marnik"), None),
    "template": (DOCUMENT, replace(byte_spec(), passage_template="{title} - {text}\n")),
}


@pytest.mark.parametrize("what", OTHER_TEXTS)
def test_other_token_ids_do_not(store: SnapshotStore, what: str) -> None:
    document, spec = OTHER_TEXTS[what]
    other = variant(spec=spec)
    assert fetch(store, other, document).snapshots_encoded == 1
    shutil.copy(file_of(store, variant()), file_of(store, other, document))
    assert fetch(store, other, document).snapshots_encoded == 1


def test_a_file_of_this_key_with_other_token_ids_is_refused(store: SnapshotStore) -> None:
    """Were SHA-256 to collide: the ids themselves are compared."""
    path, model = file_of(store, variant()), variant()
    ids = model.passage_tokens(DOCUMENT)
    with pytest.raises(SnapshotCorrupt, match="other token ids"):
        read_snapshot(path, token_ids=[*ids[:-1], ids[-1] + 1])


def test_another_tokenizer_does_not(store: SnapshotStore) -> None:
    """It gives other ids for the same text, and they are all that counts."""
    model = variant()
    plain = model.tokenizer.encode
    model.tokenizer.encode = lambda text, special=False: [i ^ 1 for i in plain(text, special)]
    assert fetch(store, model).snapshots_encoded == 1


def test_another_codec_does_not(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint, ids = variant().fingerprint, variant().passage_tokens(DOCUMENT)
    keys = {snapshot_key(fingerprint, ids, dtype=F32, codec=name) for name in (*CODECS, "next")}
    assert len(keys) == len(CODECS) + 1
    path = file_of(store, variant())
    others = {name: codec for name, codec in file_format.CODECS.items() if name != "exact"}
    monkeypatch.setattr(file_format, "CODECS", others)
    with pytest.raises(SnapshotCorrupt, match="found codec 'exact', expected one of"):
        read_snapshot(path)


def test_another_format_version_is_told_and_encoded_again(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = variant(), file_of(store, variant())
    old_key = StoredSnapshots(store, model.encoder).key(model.passage_tokens(DOCUMENT))
    version = file_format.FORMAT_VERSION + 1
    monkeypatch.setattr(file_format, "FORMAT_VERSION", version)
    monkeypatch.setattr(file_format, "KIND", Kind("kvlink-snapshot", version, SnapshotCorrupt))
    assert fetch(store, model).snapshots_encoded == 1  # its key differs
    shutil.copy(path, file_of(store, model))  # by force
    with caplog.at_level(logging.WARNING):
        assert fetch(store, model).snapshots_encoded == 1
    assert f"found format version '{version - 1}', expected '{version}'" in caplog.text
    assert old_key in store
    assert any("format version" in line for line in store.check(fix=True))
    assert old_key not in store
    assert fetch(store, model).snapshots_found == 1


def test_a_change_of_links_and_markers_leaves_snapshots_valid(store: SnapshotStore) -> None:
    specs = [
        byte_spec(0),
        byte_spec(3),
        replace(byte_spec(), first_link_id=300, max_passages=20),
        replace(byte_spec(), mem_start=None, mem_end=None),
        replace(byte_spec(), mem_start=259, mem_end=258),
    ]
    for spec in specs:
        assert fetch(store, variant(spec=spec)).snapshots_found == 1


def test_weights_changed_under_an_open_model(store: SnapshotStore) -> None:
    """Training or loading goes on in the object that was handed over."""
    model = variant()
    assert fetch(store, model).snapshots_found == 1
    with torch.no_grad():
        model.backbone.model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    assert fetch(store, model).snapshots_encoded == 1
    model.backbone.model.load_state_dict(variant().backbone.model.state_dict())
    assert fetch(store, model).snapshots_found == 1
    assert model.fingerprint == variant().fingerprint


def adapters(model: KVLinkModel) -> Any:
    """The model inside, with two LoRA adapters, the first one active."""
    peft = pytest.importorskip("peft", reason="pip install 'kvlink-rag[train]'")
    inner = model.backbone.model
    for remark in ("Already found a `peft_config`", "Adapter x was active"):  # on purpose
        warnings.filterwarnings("ignore", remark)
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        targets = ["k_proj", "v_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        try:
            inner.add_adapter(config, adapter_name=name)
        except ValueError as error:  # transformers 5.24 asks for one newer than 0.21
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    inner.set_adapter("x")
    return inner


def rescale(inner: Any) -> None:
    for module in inner.modules():
        if hasattr(module, "adapter_layer_names"):
            module.set_scale("x", 4.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.set_adapter("y"),
        lambda inner: inner.disable_adapters(),
        lambda inner: inner.set_adapter(["x", "y"]),
        rescale,
        lambda inner: inner.delete_adapter("x"),
    ],
    ids=["switched", "disabled", "both", "rescaled", "deleted"],
)
def test_adapters_are_part_of_the_identity(
    store: SnapshotStore, change: Callable[[Any], None]
) -> None:
    model = variant()
    before = model.fingerprint
    inner = adapters(model)
    tuned = model.fingerprint
    assert tuned != before
    assert fetch(store, model).snapshots_encoded == 1
    assert fetch(store, model).snapshots_found == 1
    change(inner)
    assert model.fingerprint != tuned
    fetch(store, model)
    reuse = Reuse(StoredSnapshots(store, model.encoder))
    assert model.verify([Passage(DOCUMENT), Text("Who?")], reuse=reuse).holds


def assign(inner: Any, other: Any) -> None:
    inner.load_state_dict(other.state_dict(), assign=True)


def replace_parameter(inner: Any, other: Any) -> None:
    layer, theirs = inner.model.layers[0].self_attn, other.model.layers[0].self_attn
    layer.v_proj.weight = torch.nn.Parameter(theirs.v_proj.weight.detach().clone())


def replace_layer(inner: Any, other: Any) -> None:
    inner.model.layers[0].self_attn.k_proj.weight.data = other.model.layers[
        0
    ].self_attn.k_proj.weight.data.clone()


def past_the_counter(inner: Any, other: Any) -> None:
    for mine, theirs in zip(inner.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def fused(inner: Any, other: Any) -> None:
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.1, fused=True)
    for parameter in inner.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    "change", [assign, replace_parameter, replace_layer, past_the_counter, fused]
)
def test_weights_that_change_in_memory_are_noticed(
    store: SnapshotStore, change: Callable[[Any, Any], None]
) -> None:
    model, other = variant(), variant(seed=5).backbone.model
    assert fetch(store, model).snapshots_found == 1
    change(model.backbone.model, other)
    assert fetch(store, model).snapshots_encoded == 1
    reuse = Reuse(StoredSnapshots(store, model.encoder))
    assert model.verify([Passage(DOCUMENT), Text("Who?")], reuse=reuse).holds


def test_a_model_made_in_inference_mode_is_watched_too(store: SnapshotStore) -> None:
    with torch.inference_mode():
        model = variant()
        before = model.fingerprint
        model.backbone.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert model.fingerprint != before


def test_what_is_encoded_while_weights_change_is_not_stored(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = variant(seed=7)
    snapshots = StoredSnapshots(store, model.encoder)
    real = model.backbone.capture

    def training(token_ids: torch.Tensor) -> Any:
        with torch.no_grad():
            model.backbone.model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        return real(token_ids)

    monkeypatch.setattr(model.backbone, "capture", training)
    held = len(store)
    snapshots.fetch([model.passage_tokens(DOCUMENT)], Trace())
    assert len(store) == held
    ids = model.passage_tokens(Document("A mill by the river."))
    key = snapshots.key(ids)
    with pytest.raises(ConfigError, match="weights changed while it encoded"):
        snapshots.put(key, model.encoder.one(ids))


@pytest.mark.parametrize("how", ["replaced", "written over", "restored"])
def test_a_weights_file_that_changes_after_loading_gives_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between `from_pretrained` and the first use, whose digest is taken later."""
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        random_model("llama", F32, seed=seed).save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
    first, second = (folder / "model.safetensors" for folder in folders)
    names = [KVLinkModel.from_pretrained(f, device="cpu").fingerprint for f in folders]
    assert len(set(names)) == 2
    loaded = KVLinkModel.from_pretrained(folders[0], device="cpu")
    kept, state = first.read_bytes(), first.stat()
    if how == "replaced":
        second.replace(first)
    else:
        first.write_bytes(second.read_bytes())
    if how == "restored":
        first.write_bytes(kept)
        os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))
    in_memory = KVLinkModel(loaded.backbone.model, byte_tokenizer()).fingerprint
    assert loaded.fingerprint == in_memory
    assert loaded.fingerprint not in (names if how != "restored" else names[1:])


# A model of files: its weights are known by the files alone, so the rest must be told apart too.


def from_files(directory: Path, dtype: str = "float32", **config: Any) -> KVLinkModel:
    """The tiny model, loaded from files that hold the same weights whatever `config` is."""
    if not directory.exists():
        made = variant()
        made.backbone.model.save_pretrained(directory)
        made.tokenizer.hf.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return KVLinkModel.from_pretrained(directory, device="cpu", dtype=dtype, spec=byte_spec())


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 10_000.0}},
        {"rope_parameters": {**LLAMA3_ROPE, "factor": 16.0}},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_equal_files_of_weights_under_another_configuration_do_not(
    store: SnapshotStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    first = from_files(tmp_path / "m")
    assert fetch(store, first).snapshots_encoded == 1
    assert fetch(store, from_files(tmp_path / "m")).snapshots_found == 1
    other = from_files(tmp_path / "m", **change)
    assert other.fingerprint != first.fingerprint
    assert fetch(store, other).snapshots_encoded == 1


# Kept runs.


PARTS = [
    Text("<bos>", special=True), Text("Read this."), Passage(DOCUMENT),
    Passage(Document("A mill.", title="Brisk")), Text("Who?"),
]  # fmt: skip
FIRST = len("x") + len("Read this.")  # tokens that depend on nothing that is changed below


def kept(model: KVLinkModel, cache: PrefixCache, parts: list[Any] = PARTS, scope: str = "a") -> int:
    """How many tokens come from kept runs; the logits are the oracle's all the same."""
    reuse = Reuse(EncodeNow(model.encoder), cache, scope=scope)
    found = model.prefill(parts, reuse=reuse)
    expected = model.prefill(parts, mode="masked").logits
    tolerance = 1e-4 if model.backbone.dtype == F32 else 6e-2
    assert (found.logits - expected).abs().max() <= tolerance * expected.abs().max()
    return found.trace.prefix_tokens


@pytest.fixture
def cache() -> PrefixCache:
    """Holds the runs of `PARTS`."""
    cache = PrefixCache()
    assert kept(variant(), cache) == 0
    whole = kept(variant(), cache)
    assert whole == len(variant().layout(PARTS)) - 1 - variant().layout(PARTS).reused_tokens
    return cache


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_runs_of_another_model_are_not_used(cache: PrefixCache, what: str) -> None:
    assert kept(OTHER_MODELS[what](), cache) == 0


def test_runs_of_another_collection_are_not_used(cache: PrefixCache) -> None:
    assert kept(variant(), cache, scope="b") == 0
    assert kept(variant(), cache, scope="") == 0


OTHER_SPECS = {
    "link ids": replace(byte_spec(), first_link_id=265, max_passages=30),
    "links a passage": byte_spec(4),
    "no links": byte_spec(0),
    "markers": replace(byte_spec(), mem_start=259, mem_end=258),
    "no markers": replace(byte_spec(), mem_start=None, mem_end=None),
}


@pytest.mark.parametrize("what", OTHER_SPECS)
def test_runs_under_another_spec_are_used_up_to_the_first_difference(
    cache: PrefixCache, what: str
) -> None:
    assert kept(variant(spec=OTHER_SPECS[what]), cache) == expected_until_change(what)


def expected_until_change(what: str) -> int:
    marker = 0 if what in ("markers", "no markers", "no links") else 1
    alike = 4 if what == "links a passage" else 0  # the fifth link is the first difference
    return FIRST + marker + alike


OTHER_PARTS: dict[str, tuple[list[Any], int]] = {
    "order": ([*PARTS[:2], PARTS[3], PARTS[2], PARTS[4]], FIRST + 1),
    "a passage": ([*PARTS[:3], Passage(Document("A mull.", title="Brisk")), PARTS[4]], FIRST + 6),
    "a passage as text": ([*PARTS[:2], Text("Orvale: The harbour has a long mole.\n"), *PARTS[3:]],
                          FIRST),
    "the beginning": ([Text("<eos>", special=True), *PARTS[1:]], 0),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_PARTS)
def test_runs_after_anything_else_are_not_used(cache: PrefixCache, what: str) -> None:
    parts, same = OTHER_PARTS[what]
    assert kept(variant(), cache, parts) == same


# Collections that share a model.


def test_two_collections_share_nothing_but_the_model(tmp_path: Path) -> None:
    """One holds a secret; nothing of the other's answers, hits, traces or timings depends on it."""
    secret = Document("The password of the tower is halibut and nothing else.", title="Secret")
    with open_tiny(tmp_path / "one") as one, open_tiny(tmp_path / "two") as two:
        assert one.model is two.model
        one.add([secret])
        two.add([Document("A mill.", title="Brisk")])
        one.ask("What is the password?", max_new_tokens=2)
        answer = two.ask("What is the password?", max_new_tokens=2)
        assert [hit.document.title for hit in answer.hits] == ["Brisk"]
        assert answer.trace.prefix_tokens == 0
        assert not any(isinstance(part, Passage) for part in two.recognise(secret.text + "\n\nQ?"))
        assert any(isinstance(part, Passage) for part in one.recognise(secret.text + "\n\nQ?"))
        trace = two.model.prefill([Passage(secret), Text("?")], reuse=two.reuse).trace
        assert (trace.snapshots_found, trace.prefix_tokens) == (0, 0)


def test_copies_of_a_collection_share_no_runs(tmp_path: Path) -> None:
    """They have one identity, and still each open one keeps its own."""
    with open_tiny(tmp_path / "one") as one:
        one.add([DOCUMENT])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with open_tiny(tmp_path / "one") as one, open_tiny(tmp_path / "two") as two:
        one.ask("Who?", max_new_tokens=2)
        assert two.ask("Who?", max_new_tokens=2).trace.prefix_tokens == 0
        assert one.ask("Who?", max_new_tokens=2).trace.prefix_tokens > 0


def test_a_collection_that_keeps_no_runs(tmp_path: Path) -> None:
    with open_tiny(tmp_path, prefix_budget=0) as rag:
        rag.add([DOCUMENT])
        for _ in range(2):
            assert rag.ask("Who?", max_new_tokens=2).trace.prefix_tokens == 0
        assert (rag.stats().prefix_bytes, rag.stats().prefix_hits) == (0, 0)


def test_the_trusted_pair_is_the_one_of_trust() -> None:
    """`variant` and the stress tests' model are one and the same."""
    assert variant().fingerprint == trust.tiny_model().fingerprint
