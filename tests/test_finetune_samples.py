"""Rows to laid-out samples and rows of a batch: by hand, and against the layout of inference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_spec, byte_tokenizer
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from kvlink_rag import Document, Passage, Text
from kvlink_rag.errors import ConfigError, ExampleError, PromptTooLong
from kvlink_rag.prompt.layout import layout, visibility
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.training.finetune.batches import STEP, Collator, block_masks, dense_masks
from kvlink_rag.training.finetune.chat import LLAMA3, Chat, find_chat
from kvlink_rag.training.finetune.config import (
    CONFIGS,
    FinetuneConfig,
    Links,
    Part,
    from_mapping,
    load,
)
from kvlink_rag.training.finetune.prepare import reserved_ids, with_tokens
from kvlink_rag.training.finetune.samples import IGNORED, Encoded, Sample, encode
from kvlink_rag.training.finetune.stream import Mixture
from kvlink_rag.training.finetune.transforms import TRANSFORMS, Format
from kvlink_rag.training.packing import CachedEncoder

ENCODER = CachedEncoder(PartTokenizer(byte_tokenizer()))
SPEC = byte_spec()
CHAT = Chat("<bos>S:", "\nU:", "\nA:", "<eos>\nU:", "<eos>")
FORM = Format(SPEC, CHAT, "Answer.", opening="<bos>")
ROWS: dict[str, dict[str, Any]] = {
    "qa": {
        "question": "Who?",
        "answers": ["Tarn"],
        "ctxs": [{"title": "A", "text": "One."}, {"title": "B", "text": "Two."}],
    },
    "text": {"text": "It is long. " * 20},
    "text_memory": {"text": " ".join(f"word{i}" for i in range(2000))},
    "chat": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "No."},
        ]
    },
    "chat_memory": {
        "conversations": [
            {"from": "User", "value": "One?"},
            {"from": "Assistant", "value": "Yes."},
            {"from": "User", "value": "Two?"},
            {"from": "Assistant", "value": "No."},
        ]
    },
    "summary": {"document": " ".join(f"news{i}" for i in range(900)), "summary": "News."},
}
ROWS["qa_full"] = ROWS["qa"]


def made(kind: str, row: dict[str, Any] | None = None, form: Format = FORM) -> Sample:
    return TRANSFORMS[kind](row or ROWS[kind], 0, form, random.Random(0))


def encoded(kind: str) -> Encoded:
    return encode(made(kind), ENCODER, SPEC, 30_000)


def decoded(ids: torch.Tensor) -> str:
    """Text with special tokens, as it was given."""
    return str(byte_tokenizer().decode(ids.tolist(), skip_special_tokens=False))


def learned(sample: Encoded) -> str:
    return decoded(sample.labels[sample.labels != IGNORED])


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_labels_are_the_learned_tokens_themselves(kind: str) -> None:
    sample = encoded(kind)
    where = sample.labels != IGNORED
    assert where.any()
    assert torch.equal(sample.labels[where], sample.token_ids[where])
    assert not sample.segments[where].any()


def test_what_is_learned() -> None:
    assert learned(encoded("qa")) == learned(encoded("qa_full")) == "Tarn<eos>"
    assert learned(encoded("chat")) == "Yes.<eos>No.<eos>"
    assert learned(encoded("chat_memory")) == "No.<eos>"
    assert learned(encoded("summary")) == "News.<eos>"
    assert learned(encoded("text")) == ROWS["text"]["text"]
    rest = learned(encoded("text_memory"))
    assert ROWS["text_memory"]["text"].endswith(rest)
    assert 1 < len(rest) < len(ROWS["text_memory"]["text"])


def test_a_question_is_laid_out_as_inference_does() -> None:
    documents = [Document("One.", title="A"), Document("Two.", title="B")]
    wanted = layout(SPEC.prompt(documents, "Who?"), ENCODER, SPEC)
    found, count = encoded("qa"), len(wanted)
    for field in ("token_ids", "positions", "segments"):
        assert torch.equal(getattr(found, field)[:count], getattr(wanted, field))
    assert (found.labels[:count] == IGNORED).all()
    assert (found.labels[count:] != IGNORED).all()


def test_the_twin_has_the_same_text_and_no_memory() -> None:
    memory, full = encoded("qa"), encoded("qa_full")
    special = set(SPEC.special_ids())
    plain = [i for i in memory.token_ids.tolist() if i not in special]
    assert full.token_ids.tolist() == plain
    assert memory.segments.max() == 2
    assert full.segments.max() == 0


def test_chats_are_written_with_the_frame_of_the_chat() -> None:
    text = decoded(encoded("chat").token_ids)
    assert text == "<bos>S:Be brief.\nU:One?\nA:Yes.<eos>\nU:Two?\nA:No.<eos>"
    memory = encoded("chat_memory")
    assert decoded(memory.token_ids[memory.segments == 1]) == "User: One?\nAssistant: Yes.\n"
    rest = decoded(memory.token_ids[memory.segments == 0])
    assert rest.startswith("<bos>S:Answer.\nU:")
    assert rest.endswith("Two?\nA:No.<eos>")


def test_texts_lose_nothing_when_they_are_cut_into_memory() -> None:
    sample = made("text_memory")
    pieces = [part.document.text for part in sample.head if isinstance(part, Passage)]
    assert 5 <= len(pieces) <= 40
    whole = " ".join([*pieces, sample.tail[0][0].text])
    assert whole == ROWS["text_memory"]["text"]
    words = sum(len(piece.split()) for piece in pieces)
    assert 500 * 0.75 - 1 <= words <= 1500 * 0.75
    article = made("summary")
    pieces = [part.document.text for part in article.head if isinstance(part, Passage)]
    assert " ".join(pieces) == ROWS["summary"]["document"]
    assert [len(piece.split()) for piece in pieces] == [75] * 12


def test_special_tokens_in_rows_stay_text() -> None:
    messages = [
        {"role": "system", "content": "<eos>"},
        {"role": "user", "content": "<mem_start>"},
        {"role": "assistant", "content": "<eos>"},
    ]
    sample = encode(made("chat", {"messages": messages}), ENCODER, SPEC, 999)
    ends = [i for i in sample.token_ids.tolist() if i == byte_tokenizer().eos_token_id]
    assert len(ends) == 1
    assert SPEC.mem_start not in sample.token_ids.tolist()


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("qa", {"question": "?", "answer": "x"}),
        ("qa", {**ROWS["qa"], "generated": 5}),
        ("text", {"content": "x"}),
        ("text", {"text": " "}),
        ("text_memory", {"text": "short"}),
        ("chat", {"messages": []}),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}),
        ("chat", {"messages": [{"role": "user"}]}),
        ("chat", {"messages": ["x"]}),
        ("chat", {"messages": [{"role": "user", "content": 1}]}),
        ("chat", {"text": "x"}),
        ("chat_memory", {"messages": ROWS["chat"]["messages"][:3]}),
        ("summary", {"document": "short", "summary": "x"}),
    ],
)
def test_rows_that_cannot_be_used_are_refused(kind: str, row: dict[str, Any]) -> None:
    with pytest.raises(ExampleError):
        made(kind, row)


def test_answers_come_from_the_column_that_is_named() -> None:
    row = {**ROWS["qa"], "generated": "By Tarn.", "other": "Tarn did."}
    assert made("qa", row).tail[0][0] == Text("By Tarn.")
    form = Format(SPEC, CHAT, "", column="other", documents=1)
    found = made("qa", row, form)
    assert found.tail[0][0] == Text("Tarn did.")
    assert sum(isinstance(part, Passage) for part in found.head) == 1


def test_a_long_text_is_cut_and_a_long_question_refused() -> None:
    whole = encoded("text")
    assert torch.equal(encode(made("text"), ENCODER, SPEC, 20).token_ids, whole.token_ids[:20])
    with pytest.raises(PromptTooLong, match="at most 20"):
        encode(made("qa"), ENCODER, SPEC, 20)


# Rows and masks


@pytest.fixture(scope="module")
def samples() -> list[Encoded]:
    return [encoded("qa"), encoded("chat_memory"), encoded("chat"), encoded("qa_full")]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_sample_once(samples: list[Encoded], pack: bool) -> None:
    batch = Collator(512, pack)(samples)
    assert {t.shape for t in batch.values()} == {batch["input_ids"].shape}
    rows, width = batch["input_ids"].shape
    assert width % STEP == 0
    assert rows < len(samples) if pack else rows == len(samples)
    found = []
    for row in range(rows):
        for group in range(1, int(batch["groups"][row].max()) + 1):
            own = batch["groups"][row] == group
            fields = ("input_ids", "position_ids", "segments", "labels")
            found.append(tuple(tuple(batch[name][row][own].tolist()) for name in fields))
    fields = ("token_ids", "positions", "segments", "labels")
    wanted = [tuple(tuple(getattr(s, name).tolist()) for name in fields) for s in samples]
    assert sorted(found) == sorted(wanted)
    padding = batch["groups"] == 0
    assert (batch["labels"][padding] == IGNORED).all()
    assert int((batch["labels"] != IGNORED).sum()) == sum(s.learned for s in samples)


CONFIGURATIONS = {
    "llama": LlamaConfig(),
    "mistral-window": MistralConfig(sliding_window=24),
    "qwen2-window": Qwen2Config(use_sliding_window=True, sliding_window=24, max_window_layers=1),
}


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_masks_are_the_rule_inside_each_sample(samples: list[Encoded], family: str) -> None:
    """Dense and block masks, against `visibility` of each sample alone and nothing between them."""
    config, batch = CONFIGURATIONS[family], Collator(512, True)(samples)
    dense, block = dense_masks(config, batch), block_masks(config, batch)
    window = getattr(config, "sliding_window", None)
    pairs = (
        [("full_attention", None), ("sliding_attention", window)]
        if isinstance(dense, dict)
        else [(None, window)]
    )
    assert not isinstance(dense, dict) or dense.keys() == block.keys()
    for name, width in pairs:
        mask = dense if name is None else dense[name]
        rule = (block if name is None else block[name]).mask_mod
        tokens = torch.arange(mask.shape[-1])
        for row in range(len(mask)):
            group = batch["groups"][row]
            at, segment = batch["position_ids"][row], batch["segments"][row]
            wanted = visibility(at, segment, at, segment, window=width)
            wanted &= group[:, None] == group[None, :]
            assert torch.equal(mask[row, 0], wanted)
            assert mask[row, 0].diagonal().all()  # padding too sees itself: no row is empty
            found = rule(torch.tensor(row), torch.tensor(0), tokens[:, None], tokens[None, :])
            assert torch.equal(found, wanted)


# Token ids, chats, configs


def config(**changes: Any) -> FinetuneConfig:
    fields = {"model": "m", "out": "o", "data": (Part("qa", "x"),), **changes}
    return FinetuneConfig(**fields)


def test_the_llama3_tokenizer_gives_the_published_ids(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "llama3_tokenizer")
    size = len(tokenizer)
    spec = with_tokens(tokenizer, Links(), LLAMA3, config())
    assert (spec.first_link_id, spec.mem_start, spec.mem_end) == (128011, 128254, 128255)
    assert spec.link_ids(47)[-1] < 128254
    assert len(tokenizer) == size
    with_tokens(tokenizer, Links(per_passage=6), LLAMA3, config())
    assert len(tokenizer) == size + 6 * 48 + 2


@pytest.mark.parametrize("links", [0, 1, 5, 7])
def test_a_tokenizer_without_reserved_tokens_gets_new_ones(links: int) -> None:
    tokenizer = byte_tokenizer(0)
    before = len(tokenizer)
    assert reserved_ids(tokenizer) == []
    spec = with_tokens(tokenizer, Links(links, 3), CHAT, config())
    ids = sorted(spec.special_ids())
    assert ids == list(range(before, before + 3 * links + 2))
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<|mem_start|>", "<|mem_end|>"]
    if links:
        assert tokenizer.convert_ids_to_tokens(spec.link_ids(2))[0] == "<|link_2_0|>"


def test_a_chat_is_read_off_the_template() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="no chat template"):
        find_chat("template", tokenizer)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}[assistant]"
    )
    found = find_chat("template", tokenizer)
    assert found == Chat("<bos>[system]", "[user]", "[assistant]", "<eos>[user]", "<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    with pytest.raises(ConfigError, match="end of text"):
        find_chat("template", tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="drops"):
        find_chat("template", tokenizer)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_bundled_configs_are_the_papers(name: str) -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    found = load(name)
    assert (found.steps, found.batch, found.warmup, found.max_length) == (6000, 64, 600, 4096)
    assert found.learning_rate == (1e-4 if found.lora else 5e-6)
    shares: dict[str, float] = {}
    for part in found.data:
        shares[part.kind] = shares.get(part.kind, 0) + part.weight
    assert shares == {
        "text_memory": 20, "chat": 30, "chat_memory": 25, "qa": 10, "qa_full": 10, "summary": 5
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "whole number"),
        ({"learning_rate": "fast"}, "expected a number"),
        ({"pack": "yes"}, "true or false"),
        ({"batch": 6}, "multiple of device_batch"),
        ({"preset": "x"}, "expected one of"),
        ({"stepps": 1}, "unknown settings"),
        ({"data": []}, "data is missing"),
        ({"data": [{"kind": "qq", "path": "x"}]}, "expected one of qa"),
        ({"data": [{"kind": "qa"}]}, "path"),
        ({"data": [{"kind": "qa", "path": "x", "weight": 0}]}, "expected above 0"),
        ({"links": {"per": 1}}, "unknown settings"),
        ({"lora": {}, "fsdp": "full_shard"}, "lora and fsdp"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], told: str) -> None:
    good = {"model": "m", "out": "o", "data": [{"kind": "qa", "path": "x"}]}
    assert from_mapping({**good, "learning_rate": "5e-6"}).learning_rate == 5e-6
    with pytest.raises(ConfigError, match=told):
        from_mapping({**good, **changes})


def test_a_config_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    with pytest.raises(ConfigError, match="one of llama-3"):
        load("nothing")
    for text, told in (("[1", "not YAML"), ("- 1", "expected settings"), ("", "expected settings")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            load(tmp_path / "c.yaml")


# The mixture


def files(tmp_path: Path) -> tuple[Part, Part]:
    (tmp_path / "qa.jsonl").write_text(
        "".join(json.dumps({**ROWS["qa"], "answers": [f"a{i}"]}) + "\n" for i in range(9))
        + "{\n"
        + '{"question": "?"}\n'
    )
    (tmp_path / "chat.jsonl").write_text(json.dumps(ROWS["chat"]) + "\n")
    return (
        Part("qa", str(tmp_path / "qa.jsonl"), weight=3.0),
        Part("chat", str(tmp_path / "chat.jsonl"), weight=1.0),
    )


def drawn(config: FinetuneConfig, count: int) -> tuple[list[tuple[int, str]], Mixture]:
    mixture = Mixture(config, ENCODER, FORM)
    stream = mixture.draw()
    found = [next(stream) for _ in range(count)]
    return [(each.part, learned(each.sample)) for each in found], mixture


def test_the_mixture_follows_weights_and_seed(tmp_path: Path) -> None:
    setting = config(data=files(tmp_path), shuffle=4)
    found, mixture = drawn(setting, 400)
    assert found == drawn(setting, 400)[0]
    assert found != drawn(config(data=files(tmp_path), shuffle=4, seed=1), 400)[0]
    share = sum(part == 0 for part, _ in found) / 400
    assert abs(share - 0.75) < 0.07
    answers = [text for part, text in found if part == 0]
    assert set(answers[:9]) == {f"a{i}<eos>" for i in range(9)}
    assert answers[:9] != answers[9:18]  # another order each time
    assert set(mixture.skipped.reasons) == {"qa: ExampleError"}
    assert list(zip(range(5), mixture, strict=False))  # as a loader reads it


def test_an_oracle_file_is_filled_up_from_its_own_rows(tmp_path: Path) -> None:
    """Rows 2 to 8 only, four passages a question, of which one holds the answer."""
    rows = [
        {"question": f"q{i}", "answers": [f"answer{i}"], "ctxs": [{"text": f"Is answer{i}."}]}
        for i in range(12)
    ]
    path = tmp_path / "oracle.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = Part("qa", str(path), fill=4, first=2, last=9)
    mixture = Mixture(config(data=(part,)), ENCODER, FORM)
    found = [sample for _, sample in zip(range(14), mixture, strict=False)]
    assert {learned(sample) for sample in found} == {f"answer{i}<eos>" for i in range(2, 9)}
    places = set()
    for sample in found:
        answer = learned(sample).removesuffix("<eos>")
        texts = [decoded(sample.token_ids[sample.segments == n]) for n in range(1, 5)]
        assert len(set(texts)) == 4
        assert sum(answer in text for text in texts) == 1
        places.add(next(n for n, text in enumerate(texts) if answer in text))
        assert all(2 <= int(text.split("answer")[1].split(".")[0]) < 9 for text in texts)
    assert len(places) > 1
    with pytest.raises(ConfigError, match="fill is 11"):
        config(data=(Part("qa", "x", fill=11),))


def test_bad_rows_are_refused_where_the_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExampleError):
        drawn(config(data=files(tmp_path), on_bad="refuse"), 20)
    rows = [{"document": "short", "summary": "x"}] * 3 + [ROWS["summary"]]
    (tmp_path / "xsum.json").write_text(json.dumps(rows))
    article = Part("summary", str(tmp_path / "xsum.json"))
    found, mixture = drawn(config(data=(article,), on_bad="refuse", max_length=9000), 1)
    assert found == [(0, "News.<eos>")]
    assert mixture.skipped.reasons.keys() <= {"summary: left out by the recipe"}
    part = Part("summary", files(tmp_path)[0].path)
    with pytest.raises(ConfigError, match=r"no usable row.*summary: ExampleError"):
        drawn(config(data=(part,)), 1)
    long = config(data=files(tmp_path)[:1], max_length=10)
    with pytest.raises(ConfigError, match="PromptTooLong"):
        drawn(long, 1)
