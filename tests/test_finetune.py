"""Fine-tuning whole, on tiny models: the oracle, resuming, adapters, the result as it is opened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_spec, byte_tokenizer, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvlink_rag import Document, KVLinkModel, Passage, Text
from kvlink_rag.cli.main import main
from kvlink_rag.errors import ConfigError, MissingExtra
from kvlink_rag.model.loading import load_config
from kvlink_rag.prompt.spec import SPEC_FILE, Spec
from kvlink_rag.training import trainer as module
from kvlink_rag.training.attention import NAME
from kvlink_rag.training.batches import Collator
from kvlink_rag.training.chat import Chat
from kvlink_rag.training.config import FinetuneConfig, Links, Lora, Part
from kvlink_rag.training.dry_run import estimate
from kvlink_rag.training.losses import full_attention
from kvlink_rag.training.prepare import begin_tokens, prepare
from kvlink_rag.training.samples import Sample, encode
from kvlink_rag.training.trainer import KVLinkTrainer, arguments, finetune
from kvlink_rag.training.transforms import Format

TEMPLATE = (
    "<bos>{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


PEFT = (  # what peft says of transformers and of embeddings that have grown
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct checkpoint without link tokens: tiny, random, with a chat template."""
    root = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer(0)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root)
    shape = {"num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    random_model("llama", torch.float32, **shape).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Part, ...]:
    root = tmp_path_factory.mktemp("data")
    questions = [
        {
            "question": f"What is {i}?",
            "answers": [str(i % 3)],
            "ctxs": [{"title": f"T{j}", "text": f"{j} is {j % 3}."} for j in (i, i + 1)],
        }
        for i in range(12)
    ]
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    ]
    for name, rows in (("qa", questions), ("chat", chats)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        Part("qa", str(root / "qa.jsonl"), weight=2.0),
        Part("qa_full", str(root / "qa.jsonl")),
        Part("chat", str(root / "chat.jsonl")),
    )


@pytest.fixture
def config(base: Path, data: tuple[Part, ...], tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(base),
        out=str(tmp_path / "run"),
        data=data,
        links=Links(per_passage=2, passages=4),
        chat="template",
        instruction="Answer.",
        steps=6,
        warmup=1,
        batch=4,
        device_batch=4,
        learning_rate=5e-3,
        max_length=400,
        bf16=False,
        stored="float32",
        gradient_checkpointing=False,
        save_every=3,
        log_every=1,
    )


def losses(config: FinetuneConfig) -> list[float]:
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


# The oracle


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "qwen2-window", "qwen3", "phi3-window", "phi4-mini"]
)
@pytest.mark.parametrize("links", [0, 5])
@pytest.mark.parametrize("header", [(), (3, 250)])
def test_the_trainers_logits_are_the_masked_prefills(
    config: FinetuneConfig, family: str, links: int, header: tuple[int, ...]
) -> None:
    """Many questions over one memory, and several memories in one row, as the Trainer feeds them:
    at each answer token, what the masked prefill of that question alone says there.
    """
    spec, tokenizer = dataclasses.replace(byte_spec(links), header=header), byte_tokenizer()
    oracle = KVLinkModel(random_model(family, torch.float32), tokenizer, spec)
    form = Format(spec, Chat("", "", "", "", "<eos>"), "")
    sets = [[Document(f"{j} is {j}.", title=f"T{j}") for j in range(n)] for n in (1, 3, 2, 0)]
    asked = [[(f"What is {i}?" + "?" * i, f"{i}!") for i in range(n)] for n in (3, 1, 16, 2)]
    samples = [
        encode(Sample(*form.ask(d, a)), oracle.tokenizer, spec, 9999)
        for d, a in zip(sets, asked, strict=True)
    ]
    model = random_model(family, torch.float32)
    model.set_attn_implementation(NAME)
    made = KVLinkTrainer(model=model, args=arguments(config, cpu=True))
    batch = Collator()(samples)
    with torch.no_grad():
        logits = iter(made.forward(model, made._prepare_inputs(batch)))
    for documents, questions in zip(sets, asked, strict=True):
        for question, answer in questions:
            parts = spec.prompt(documents, question)
            for said in range(len(answer) + 1):
                prompt = [*parts, Text(answer[:said])] if said else parts
                found = next(logits)
                wanted = oracle.prefill(prompt, mode="masked").logits
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
                full = oracle.prefill(prompt, mode="full").logits
                assert torch.allclose(found, full, atol=1e-3) == (not documents)
    assert next(logits, None) is None


@pytest.mark.parametrize("links", [0, 5])
@pytest.mark.parametrize("header", [(), (3, 250)])
def test_the_teacher_is_full_attention_over_the_plain_prompt(
    config: FinetuneConfig, links: int, header: tuple[int, ...]
) -> None:
    spec, tokenizer = dataclasses.replace(byte_spec(links), header=header), byte_tokenizer()
    plain = dataclasses.replace(spec, links_per_passage=0, mem_start=None, mem_end=None)
    oracle = KVLinkModel(random_model("llama", torch.float32), tokenizer, plain)
    form = Format(spec, Chat("", "", "", "", "<eos>"), "")
    documents = [Document(f"{j} is {j}.", title=f"T{j}") for j in range(3)]
    asked = [("What?", "a"), ("Who is it?", "b")]
    texts = [Sample((Passage(documents[0]),), (((Text("on and on"), True),),))] * 2
    samples = [Sample(*form.ask(documents, asked)), *texts]
    encoded = [encode(sample, oracle.tokenizer, spec, 9999) for sample in samples]
    model = random_model("llama", torch.float32)
    model.set_attn_implementation(NAME)
    made = KVLinkTrainer(model=model, args=arguments(config, cpu=True))
    batch = full_attention(Collator()(encoded), spec.special_ids())
    with torch.no_grad():
        logits = made.forward(model, batch)
    assert len(logits) == sum(each.learned for each in encoded)
    for number, (question, answer) in enumerate(asked):
        for said in (0, 1):
            prompt = [*spec.prompt(documents, question), Text(answer[:said])]
            wanted = oracle.prefill([p for p in prompt if p != Text("")], mode="full").logits
            found = logits[2 * number + said]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    begun = oracle.prefill([Text(plain.render_passage(documents[0]))], mode="full").logits
    torch.testing.assert_close(logits[4], begun, rtol=1e-4, atol=1e-4)


# Runs


def test_a_run_ends_in_a_model_that_opens_by_itself(config: FinetuneConfig, base: Path) -> None:
    directory = finetune(config, device="cpu")
    found = losses(config)
    assert found[-1] < found[0] - 0.5
    model = KVLinkModel.from_pretrained(directory, device="cpu")
    assert model.spec.links_per_passage == 2
    assert len(model.spec.special_ids()) == 2 * 4 + 2
    assert model.tokenizer.encode("<|link_3_1|>", special=True) == [model.spec.link_ids(3)[1]]
    parts = model.prompt([Document("1 is 1.", title="T1"), Document("2 is 2.")], "What is 1?")
    assert model.verify(parts).holds
    assert model.generate(parts, max_new_tokens=4)
    assert model.prompt([], "")[0] == Text("<bos>[system]Answer.[user]", special=True)
    before = AutoModelForCausalLM.from_pretrained(base)
    after = model.backbone.model
    assert not torch.equal(before.model.norm.weight, after.model.norm.weight)
    assert list((Path(config.out) / "tensorboard").iterdir())


@pytest.mark.filterwarnings(*PEFT)
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_a_run_goes_on_with_the_losses_it_would_have_had(
    config: FinetuneConfig, lora: Lora | None
) -> None:
    """From the last checkpoint, and from one that is named; the whole run is the reference."""
    config = dataclasses.replace(config, lora=lora)
    directory = finetune(config, device="cpu")
    whole = losses(config)
    assert len(whole) == 6
    out = Path(config.out)
    (weights,) = directory.glob("*.safetensors")
    wanted = weights.read_bytes()
    shutil.rmtree(directory)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    assert finetune(config, device="cpu") == directory
    assert losses(config) == whole
    assert weights.read_bytes() == wanted
    checkpoint = str(out / "checkpoints" / "checkpoint-3")
    finetune(config, device="cpu", resume=checkpoint)
    assert losses(config) == whole
    assert weights.read_bytes() == wanted
    with pytest.raises(ConfigError, match="no checkpoint"):
        finetune(config, device="cpu", resume=str(out))
    with pytest.raises(ConfigError, match=r"other settings \(steps\)"):
        finetune(dataclasses.replace(config, steps=5), device="cpu")
    finetune(dataclasses.replace(config, steps=7), device="cpu")
    assert losses(config)[:6] == whole
    assert len(losses(config)) == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"device_batch": 2},
        {"device_batch": 1},
        {"gradient_checkpointing": True},
    ],
)
def test_what_must_not_change_the_losses(
    config: FinetuneConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Accumulation and checkpointing are about memory, not about what is learned."""
    short = dataclasses.replace(config, steps=2)
    finetune(short, device="cpu")
    other = dataclasses.replace(short, out=str(tmp_path / "other"), **changes)
    finetune(other, device="cpu")
    assert losses(other) == pytest.approx(losses(short), rel=1e-3)


def test_bfloat16_is_near(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    short = dataclasses.replace(config, steps=2)
    finetune(short, device="cpu")
    other = dataclasses.replace(short, out=str(tmp_path / "other"), bf16=True, stored="bfloat16")
    directory = finetune(other, device="cpu")
    assert losses(other) != losses(short)
    assert losses(other) == pytest.approx(losses(short), rel=0.05)
    model = KVLinkModel.from_pretrained(directory, device="cpu", dtype=load_config(directory).dtype)
    assert model.backbone.dtype == torch.bfloat16


@pytest.mark.filterwarnings(*PEFT)
def test_adapters_train_themselves_and_the_new_tokens_only(
    config: FinetuneConfig, base: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    lora = dataclasses.replace(config, lora=Lora(rank=4, alpha=8), gradient_checkpointing=True)
    directory = finetune(lora, device="cpu", merge=True)
    assert losses(lora)[-1] < losses(lora)[0]
    model = KVLinkModel.from_pretrained(directory, device="cpu")
    after, before = model.backbone.model, AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(before.model.norm.weight, after.model.norm.weight)
    rows = before.model.embed_tokens.weight.shape[0]
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight[:rows])
    first, second = (before, after)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.get_parameter(name), second.get_parameter(name))
    links = after.model.embed_tokens.weight[model.spec.link_ids(0)]
    others = after.model.embed_tokens.weight[model.spec.link_ids(3)]
    assert not torch.equal(links, others)  # began alike; only slots that were seen have moved
    parts = model.prompt([Document("1 is 1.", title="T1")], "What is 1?")
    assert model.verify(parts).holds
    adapter = KVLinkModel.from_pretrained(Path(lora.out) / "adapter", device="cpu")
    assert adapter.spec == dataclasses.replace(model.spec, base=adapter.spec.base)
    found, wanted = (each.prefill(parts).logits[:rows] for each in (adapter, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    size = (Path(lora.out) / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (directory / "model.safetensors").stat().st_size / 3


@pytest.mark.filterwarnings(*PEFT)
def test_an_adapter_is_tuned_further(config: FinetuneConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    lora = dataclasses.replace(config, lora=Lora(rank=4, alpha=8))
    adapter = finetune(lora, device="cpu")
    learned = load_file(adapter / "adapter_model.safetensors")
    again = dataclasses.replace(
        lora, out=str(tmp_path / "again"), adapter=str(adapter), learning_rate=0.0, steps=1
    )
    found = load_file(finetune(again, device="cpu") / "adapter_model.safetensors")
    assert found.keys() == learned.keys()
    assert all(torch.equal(found[name], learned[name]) for name in learned)
    for other_lora in (Lora(rank=2, alpha=8), Lora(rank=4, alpha=4)):
        out = str(tmp_path / f"{other_lora.rank}")
        other = dataclasses.replace(again, out=out, lora=other_lora)
        with pytest.raises(ConfigError, match="its rank is 4, its alpha 8"):
            finetune(other, device="cpu")
    spec = json.loads((adapter / "kvlink.json").read_text())
    spec["base"]["weights"] = "0" * 64
    (adapter / "kvlink.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="has other weights or another tokenizer"):
        finetune(dataclasses.replace(again, out=str(tmp_path / "base")), device="cpu")


@pytest.mark.filterwarnings(*PEFT)
@pytest.mark.parametrize("distill", [0.5, 1.0])
def test_the_models_own_full_attention_is_learned(
    config: FinetuneConfig, tmp_path: Path, distill: float
) -> None:
    """Alone, what is learned is how the untuned model answers over the same documents as text."""
    lora = dataclasses.replace(
        config,
        lora=Lora(rank=8),
        distill=distill,
        steps=30,
        learning_rate=1e-2,
        data=config.data[:1],
    )
    directory = finetune(lora, device="cpu")
    found = losses(lora)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    if distill < 1:
        return
    tuned = KVLinkModel.from_pretrained(directory, device="cpu")
    before = KVLinkModel.from_pretrained(lora.model, device="cpu")
    plain = dataclasses.replace(
        tuned.spec, links_per_passage=0, mem_start=None, mem_end=None, max_passages=None
    )
    documents = [Document(f"{j} is {j % 3}.", title=f"T{j}") for j in (1, 2)]
    teacher = KVLinkModel(before.backbone.model, before.tokenizer.hf, plain)
    wanted = teacher.prefill(teacher.prompt(documents, "What is 1?"), mode="full").logits
    wanted = wanted.log_softmax(-1)
    far = [
        float((wanted.exp() * (wanted - logits[: len(wanted)].log_softmax(-1))).sum())
        for logits in (
            tuned.prefill(tuned.prompt(documents, "What is 1?")).logits,
            teacher.prefill(teacher.prompt(documents, "What is 1?")).logits,
        )
    ]
    assert far[0] < far[1]


def test_a_tuned_model_is_tuned_further_with_its_own_spec(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    directory = finetune(dataclasses.replace(config, steps=1), device="cpu")
    again = dataclasses.replace(
        config, model=str(directory), out=str(tmp_path / "again"), links=None, steps=1
    )
    prepared = prepare(again)
    assert prepared.new_ids == ()
    first = KVLinkModel.from_pretrained(directory, device="cpu")
    assert prepared.spec == first.spec
    second = KVLinkModel.from_pretrained(finetune(again, device="cpu"), device="cpu")
    assert second.spec == first.spec
    with pytest.raises(ConfigError, match="links: null"):
        prepare(dataclasses.replace(again, links=Links()))
    with pytest.raises(ConfigError, match="brings no kvlink"):
        prepare(dataclasses.replace(config, links=None))


def test_new_tokens_begin_alike_in_every_slot() -> None:
    model, spec = random_model("llama", torch.float32, tie_word_embeddings=False), byte_spec(5)
    before = model.model.embed_tokens.weight.detach().clone()
    begin_tokens(model, spec, 0, {})
    after, out = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    ids = spec.special_ids()
    others = [i for i in range(len(before)) if i not in set(ids)]
    assert torch.equal(after[others], before[others])
    assert torch.equal(after[spec.link_ids(0)], after[spec.link_ids(7)])
    assert len({tuple(row.tolist()) for row in after[ids]}) == 5 + 2
    mean, spread = before[others].mean(0), before[others].std(0)
    assert (((after[ids] - mean) / spread).abs() < 0.5).all()
    torch.testing.assert_close(out[ids], out[others].mean(0).expand(len(ids), -1))


# The command


def test_the_command_tells_and_trains(
    config: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    path.write_text(yaml.safe_dump({**fields, "steps": 1}))
    assert main(["train", str(path), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 step, 4 examples" in told
    assert not Path(config.out).exists()
    assert main(["train", str(path), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [kind["kind"] for kind in found["kinds"]] == ["qa", "qa_full", "chat"]
    assert main(["train", str(path), "--device", "cpu"]) == 0
    assert str(Path(config.out) / "model") in capsys.readouterr().out
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "one of llama-3" in capsys.readouterr().err


def test_a_header_that_a_model_brings_stays(
    config: FinetuneConfig, base: Path, tmp_path: Path
) -> None:
    brought = shutil.copytree(base, tmp_path / "brought")
    spec = Spec(header=(7, 9), links_per_passage=1, first_link_id=3, links_shared=True)
    (brought / SPEC_FILE).write_text(spec.to_json())
    for chat in ("template", "plain"):
        again = dataclasses.replace(config, model=str(brought), links=None, chat=chat)
        assert prepare(again).spec.header == (7, 9)


def test_the_estimate_counts_what_is_there(config: FinetuneConfig, base: Path) -> None:
    found = estimate(config, tflops=1e-6, drawn=40)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert found.parameters == found.trained == sum(p.numel() for p in model.parameters())
    assert found.examples == 6 * 4
    assert sum(kind.drawn for kind in found.kinds) == 40
    assert found.weight_bytes == 16 * found.parameters  # weights, gradients, two moments
    mean = sum(kind.drawn * kind.tokens for kind in found.kinds) / 40
    assert found.tokens == int(24 * mean)
    assert found.seconds == pytest.approx(6 * found.parameters * 24 * mean / found.fill / 1e6)
    assert 0 < found.fill <= 1
    adapted = estimate(dataclasses.replace(config, lora=Lora(rank=2)), tflops=1, drawn=4)
    # rank · (in + out) of q 64·64, k and v 64·32, o 64·64, gate and up 64·96, down 96·64, twice
    matrices = 2 * 2 * (128 + 96 + 96 + 128 + 160 + 160 + 160)
    assert adapted.trained == matrices + 64 * (2 * 4 + 2)  # and the rows of new tokens


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_a_missing_package_is_named(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        call = lambda: module._tensorboard(Path(config.out))  # noqa: E731
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        call = lambda: finetune(config, device="cpu")  # noqa: E731
    with pytest.raises(MissingExtra, match=r"pip install 'kvlink-rag\[train\]'"):
        call()


def test_rows_beyond_what_the_model_computes_alike_are_refused(config: FinetuneConfig) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 9000, and .* has 8192 positions"):
        prepare(dataclasses.replace(config, max_length=9000))


def test_processes_that_do_not_fit_are_refused(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="2 GPUs and one process"):
        arguments(config, cpu=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"times processes \(3\)"):
        arguments(config, cpu=True)


def test_two_processes_with_sharded_weights_learn_what_one_learns(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    """FSDP over gloo; the losses and the result of one process are the reference."""
    short = dataclasses.replace(config, steps=2)
    one = finetune(short, device="cpu")
    two = dataclasses.replace(
        short, out=str(tmp_path / "two"), device_batch=1, fsdp="full_shard auto_wrap"
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(two)))))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "kvlink_rag", "train", str(path), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(two) == pytest.approx(losses(short), rel=1e-4)
    found, wanted = (load_file(d / "model.safetensors") for d in (Path(two.out) / "model", one))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3)
