"""Adapters: as peft itself merges them, on their own base only, in the identity, in the trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, random_model
from safetensors.torch import load_file, save_file

from kvlink_rag import Document, KVLinkModel
from kvlink_rag.disk.digests import tokenizer_digest, weights_digest
from kvlink_rag.errors import ConfigError, SpecError
from kvlink_rag.model.loading import find_model
from kvlink_rag.prompt.spec import SPEC_FILE, Base, PromptPreset, Spec
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.sources import EncodeNow, Reuse

pytest.importorskip("peft", reason="peft makes the adapters of these tests")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
)

SIZE = 260  # of the base's vocabulary: bytes, <bos>, <eos> and two that are nothing here
LINKS, SLOTS = 2, 3
NEW = LINKS * SLOTS + 2
DOCUMENTS = [Document("One is 1.", title="A"), Document("Two is 2."), Document("Three.", title="C")]


def spec(base: Path) -> Spec:
    return Spec(
        links_per_passage=LINKS,
        first_link_id=SIZE + 2,
        mem_start=SIZE,
        mem_end=SIZE + 1,
        max_passages=SLOTS,
        presets={"test": PromptPreset(before="<bos>", after="\n")},
        preset="test",
        base=Base(str(base), weights_digest(base), tokenizer_digest(byte_tokenizer(0))),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_base(tmp_path_factory.mktemp("base"), seed=0)


def written_base(root: Path, *, seed: int, tied: bool = True) -> Path:
    tokenizer = byte_tokenizer(0)
    tokenizer.save_pretrained(root)
    shape = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    random_model("llama", torch.float32, seed=seed, **shape).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_adapter(base, tmp_path_factory.mktemp("adapter"))[0]


def written_adapter(base: Path, root: Path, **settings: Any) -> tuple[Path, Any]:
    """An adapter of random numbers, written by peft, and the model that peft makes of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(SIZE + NEW, mean_resizing=False)
    facts = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    rows = {"embed_tokens": list(range(SIZE, SIZE + NEW))}
    tuned = get_peft_model(
        model, LoraConfig(trainable_token_indices=rows, task_type="CAUSAL_LM", **facts)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    tuned.save_pretrained(root, save_embedding_layers=False)
    (root / SPEC_FILE).write_text(spec(base).to_json(), "utf-8")
    return root, tuned.merge_and_unload()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_the_merged_model_is_the_one_that_peft_makes(
    tmp_path: Path, tied: bool, rslora: bool
) -> None:
    base = written_base(tmp_path / "base", seed=3, tied=tied)
    directory, wanted = written_adapter(base, tmp_path / "adapter", use_rslora=rslora)
    model = KVLinkModel.from_pretrained(base, adapter=directory, device="cpu")
    plain = KVLinkModel.from_pretrained(base, device="cpu")
    ids = torch.tensor([[256, 70, SIZE, 80, SIZE + 2, SIZE + 7, SIZE + 1, 90]])
    with torch.no_grad():
        found, expected, before = (
            each(input_ids=ids if each is not plain.backbone.model else ids.clamp(max=257)).logits
            for each in (model.backbone.model, wanted, plain.backbone.model)
        )
    torch.testing.assert_close(found[..., :SIZE], expected[..., :SIZE], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, :2, :SIZE], before[:, :2], atol=1e-2)
    assert model.verify(model.prompt(DOCUMENTS, "Which?")).holds


def test_an_adapter_alone_opens_with_the_base_it_names(base: Path, adapter: Path) -> None:
    model = KVLinkModel.from_pretrained(adapter, device="cpu")
    other = KVLinkModel.from_pretrained(base, adapter=adapter, device="cpu")
    assert model.spec == other.spec == spec(base)
    assert model.fingerprint == other.fingerprint
    narrow = KVLinkModel.from_pretrained(adapter, device="cpu", dtype="bfloat16")
    assert narrow.fingerprint == model.fingerprint  # files are named, not what is computed in
    parts = model.prompt(DOCUMENTS, "Which?")
    assert torch.equal(model.prefill(parts).logits, other.prefill(parts).logits)
    seen = find_model(adapter).format
    assert (seen.spec, seen.window) == (model.spec, model.window)
    assert model.stream(parts, max_new_tokens=1).trace.notice == ""


def test_identity_covers_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    found = {KVLinkModel.from_pretrained(adapter, device="cpu").fingerprint}
    found.add(KVLinkModel.from_pretrained(base, device="cpu").fingerprint)
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    weights = load_file(changed / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_A" in name)][0, 0] += 1
    save_file(weights, changed / "adapter_model.safetensors")
    found.add(KVLinkModel.from_pretrained(changed, device="cpu").fingerprint)
    shutil.copytree(adapter, tmp_path / "scaled")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    path = tmp_path / "scaled" / "adapter_config.json"
    path.write_text(json.dumps({**settings, "lora_alpha": 12}))
    found.add(KVLinkModel.from_pretrained(tmp_path / "scaled", device="cpu").fingerprint)
    assert len(found) == 4


def test_link_tokens_leave_snapshots_valid_and_headers_do_not(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Rows that only computed tokens have name the runs that are kept, and no snapshot."""
    behind, shared = replace(spec(base), header=(SIZE + 3,)), PrefixCache()
    found = {}
    for name, row in (("as it is", None), ("another link", 5), ("another header", 3)):
        copied = tmp_path / name
        shutil.copytree(adapter, copied)
        (copied / SPEC_FILE).write_text(behind.to_json())
        weights = load_file(copied / "adapter_model.safetensors")
        rows = next(name for name in weights if name.endswith("trainable_tokens_delta"))
        if row is not None:
            weights[rows][row] += 1
        save_file(weights, copied / "adapter_model.safetensors")
        model = KVLinkModel.from_pretrained(copied, device="cpu")
        found[name] = (model.fingerprint, model.backbone.links)
        # kept runs of one are no other's, even where the snapshots under them are
        parts = model.prompt(DOCUMENTS, "Which?")
        runs = Reuse(EncodeNow(model.encoder), shared)
        assert model.prefill(parts, reuse=runs).trace.prefix_tokens == 0, name
        assert model.prefill(parts, reuse=runs).trace.prefix_tokens > 0, name
    as_it_is, link, header = found.values()
    assert [a == b for a, b in zip(link, as_it_is, strict=True)] == [True, False]
    assert [a == b for a, b in zip(header, as_it_is, strict=True)] == [False, True]


def test_another_base_is_refused_unless_the_user_insists(adapter: Path, tmp_path: Path) -> None:
    other = written_base(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match=r"another weights; .*adapter_base='any'"):
        KVLinkModel.from_pretrained(other, adapter=adapter, device="cpu")
    model = KVLinkModel.from_pretrained(other, adapter=adapter, adapter_base="any", device="cpu")
    parts = model.prompt(DOCUMENTS, "Which?")
    assert "another weights: answers may be wrong" in model.prefill(parts).trace.notice
    stream = model.stream(parts, max_new_tokens=2)
    list(stream)
    assert "was trained on" in stream.trace.to_dict()["notice"]


def test_another_tokenizer_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = byte_tokenizer(0)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="another tokenizer;"):
        KVLinkModel.from_pretrained(other, adapter=adapter, device="cpu")


def test_a_base_of_another_shape_cannot_be_insisted_on(adapter: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(0)
    tokenizer.save_pretrained(tmp_path)
    shape = {"vocab_size": len(tokenizer), "intermediate_size": 80}
    random_model("llama", torch.float32, **shape).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"mlp.* does not fit the base"):
        KVLinkModel.from_pretrained(tmp_path, adapter=adapter, adapter_base="any", device="cpu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": None}, "no settings of peft"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    adapter: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=told):
        KVLinkModel.from_pretrained(tmp_path / "a", device="cpu")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", SPEC_FILE])
def test_a_damaged_adapter_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises((ConfigError, SpecError), match=name):
        KVLinkModel.from_pretrained(tmp_path / "a", device="cpu")
    path.unlink()
    with pytest.raises(ConfigError, match=name):
        KVLinkModel.from_pretrained(tmp_path / "a", device="cpu")


def test_added_tokens_are_never_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    """At a temperature where every token is as likely as any other."""
    model = KVLinkModel.from_pretrained(adapter, device="cpu")
    said: set[int] = set()
    decode = model.tokenizer.decode
    model.tokenizer.decode = lambda ids: (said.update(ids), decode(ids))[1]  # type: ignore[method-assign]
    parts = model.prompt(DOCUMENTS, "Which?")
    for seed in range(12):
        model.generate(parts, max_new_tokens=60, temperature=1e6, seed=seed)
    assert len(said) > 150
    assert max(said) < SIZE
