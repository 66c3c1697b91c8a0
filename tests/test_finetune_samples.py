"""Rows to laid-out samples and rows of a batch: by hand, and against the layout of inference."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WordEmbedder, byte_spec, byte_tokenizer
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from kvlink_rag import Document, Passage, Text
from kvlink_rag.errors import ConfigError, ExampleError, PromptTooLong
from kvlink_rag.prompt.layout import layout, visibility
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.training import distractors
from kvlink_rag.training.attention import Plan
from kvlink_rag.training.batches import FLEX_BLOCK, Collator, block_masks, plans
from kvlink_rag.training.chat import LLAMA3, Chat, find_chat
from kvlink_rag.training.config import (
    CONFIGS,
    FinetuneConfig,
    Links,
    Part,
    from_mapping,
    load,
)
from kvlink_rag.training.gaps import gap, title_of
from kvlink_rag.training.prepare import reserved_ids, with_tokens
from kvlink_rag.training.questions import Asking
from kvlink_rag.training.samples import IGNORED, Encoded, Sample, encode
from kvlink_rag.training.stream import Mixture
from kvlink_rag.training.transforms import TRANSFORMS, Format

ENCODER = PartTokenizer(byte_tokenizer())
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
ROWS["gaps"] = {
    "question": "Who?",
    "answers": ["Tarn"],
    "ctxs": [{"title": "A", "text": "It was found by Mary Anning in the cliffs of the south."}],
}


def made(kind: str, row: dict[str, Any] | None = None, form: Format = FORM) -> Sample:
    return TRANSFORMS[kind](row or ROWS[kind], 0, form, random.Random(0))


def encoded(kind: str) -> Encoded:
    return encode(made(kind), ENCODER, SPEC, 30_000)


def decoded(ids: torch.Tensor) -> str:
    """Text with special tokens, as it was given."""
    return str(byte_tokenizer().decode(ids.tolist(), skip_special_tokens=False))


def learned(sample: Encoded) -> str:
    return decoded(sample.targets[sample.targets != IGNORED])


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_targets_are_the_next_tokens(kind: str) -> None:
    sample = encoded(kind)
    where = (sample.targets != IGNORED).nonzero()[:, 0]
    assert len(where)
    assert torch.equal(sample.targets[where], sample.token_ids[where + 1])
    assert not sample.segments[where + 1].any()


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
    assert (found.targets[: count - 1] == IGNORED).all()
    assert (found.targets[count - 1 : -1] != IGNORED).all()
    assert found.targets[-1] == IGNORED


def test_each_of_several_questions_is_laid_out_as_it_is_alone() -> None:
    documents = [Document("One.", title="A"), Document("Two.", title="B")]
    asked = [("Who?", "Tarn"), ("And when was it?", "In 1997"), ("?", "x")]
    head, tails = FORM.ask(documents, asked)
    found = encode(Sample(head, tails), ENCODER, SPEC, 999)
    for number, (question, answer) in enumerate(asked, start=1):
        parts = (*SPEC.prompt(documents, question), Text(answer), Text("<eos>", special=True))
        wanted = layout(parts, ENCODER, SPEC)
        own = (found.branches == 0) | (found.branches == number)
        for field in ("token_ids", "positions", "segments"):
            assert torch.equal(getattr(found, field)[own], getattr(wanted, field))
        targets = found.targets[own]
        assert decoded(targets[targets != IGNORED]) == f"{answer}<eos>"


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
    whole = " ".join([*pieces, sample.tails[0][0][0].text])
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


def learned_texts(sample: Sample) -> list[str]:
    return [text.text for text, learned in sample.tails[0] if learned]


def test_answers_come_from_the_column_that_is_named() -> None:
    row = {**ROWS["qa"], "generated": "By Tarn.", "other": "Tarn did."}
    assert learned_texts(made("qa", row)) == ["By Tarn.", "<eos>"]
    form = Format(SPEC, CHAT, "", column="other", asking=Asking(documents=1))
    found = made("qa", row, form)
    assert learned_texts(found) == ["Tarn did.", "<eos>"]
    assert sum(isinstance(part, Passage) for part in found.head) == 1


def test_a_long_text_is_cut_and_a_long_question_refused() -> None:
    whole = encoded("text")
    assert torch.equal(encode(made("text"), ENCODER, SPEC, 20).token_ids, whole.token_ids[:20])
    with pytest.raises(PromptTooLong, match="at most 20"):
        encode(made("qa"), ENCODER, SPEC, 20)


# Rows and masks


@pytest.fixture(scope="module")
def samples() -> list[Encoded]:
    documents = [Document("One.", title="A"), Document("Two.", title="B")]
    several = Sample(*FORM.ask(documents, [("Who?", "Tarn"), ("When?", "In 1997"), ("?", "x")]))
    whole = encode(several, ENCODER, SPEC, 999)
    return [encoded("qa"), whole, encoded("chat_memory"), encoded("chat"), encoded("qa_full")]


@pytest.mark.parametrize("multiple", [1, FLEX_BLOCK])
def test_a_row_holds_every_sample_once(samples: list[Encoded], multiple: int) -> None:
    batch = Collator(multiple)(samples)
    assert {t.shape for t in batch.values()} == {batch["input_ids"].shape}
    rows, width = batch["input_ids"].shape
    assert rows == 1
    assert 0 <= width - sum(map(len, samples)) < multiple
    names = {"input_ids": "token_ids", "position_ids": "positions", "labels": "targets"}
    for number, sample in enumerate(samples, start=1):
        own = batch["groups"][0] == number
        for name in ("input_ids", "position_ids", "segments", "branches", "labels"):
            assert torch.equal(batch[name][0][own], getattr(sample, names.get(name, name)))
    assert (batch["labels"][batch["groups"] == 0] == IGNORED).all()


CONFIGURATIONS = {
    "llama": LlamaConfig(),
    "mistral-window": MistralConfig(sliding_window=24),
    "qwen2-window": Qwen2Config(use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "phi3-window": Phi3Config(sliding_window=24),
}


@pytest.mark.parametrize("multiple", [1, FLEX_BLOCK])
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_masks_are_the_rule_inside_each_sample(
    samples: list[Encoded], family: str, multiple: int
) -> None:
    """Plans and block masks against `visibility` of each branch with its memory."""
    config, batch = CONFIGURATIONS[family], Collator(multiple)(samples)
    plan, block = plans(config, batch), block_masks(config, batch)
    window = getattr(config, "sliding_window", None)
    pairs = (
        [("full_attention", None), ("sliding_attention", window)]
        if isinstance(plan, dict)
        else [(None, window)]
    )
    assert not isinstance(plan, dict) or plan.keys() == block.keys()
    names = ("groups", "position_ids", "segments", "branches")
    group, at, segment, branch = (batch[name][0] for name in names)
    tokens = torch.arange(len(group))
    for name, width in pairs:
        wanted = visibility(at, segment, at, segment, window=width)
        wanted &= group[:, None] == group[None, :]
        wanted &= (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
        rule = (block if name is None else block[name]).mask_mod
        found = rule(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :])
        assert torch.equal(found, wanted)
        heads = config.num_attention_heads // config.num_key_value_heads
        assert torch.equal(dense(plan if name is None else plan[name], heads), wanted)
        assert wanted.diagonal().all()  # padding too sees itself: no row is empty


def dense(plan: Plan, groups: int) -> torch.Tensor:
    """bool [tokens, tokens]: what a plan lets see, the same for each query head of a group."""
    seen = []
    for lengths, passages, free in plan:
        assert all(torch.equal(each, free[: len(free) // groups]) for each in free.chunk(groups))
        mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
        rest = free[: len(free) // groups] == 0
        start = 0
        for length, bias in zip(lengths, passages, strict=True):
            own = slice(start, start + length)
            if bias is None:
                mask[own], rest = rest[:length], rest[length:]
            else:
                mask[own, own] = bias[:length] == 0
            start += length
        assert not len(rest)
        seen.append(mask)
    return torch.block_diag(*(each.int() for each in seen)).bool()


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
        ({"bf16": "yes"}, "true or false"),
        ({"batch": 6}, "multiple of device_batch"),
        ({"preset": "x"}, "expected one of"),
        ({"stepps": 1}, "unknown settings"),
        ({"data": []}, "data is missing"),
        ({"data": [{"kind": "qq", "path": "x"}]}, "expected one of qa"),
        ({"data": [{"kind": "qa"}]}, "path"),
        ({"data": [{"kind": "qa", "path": "x", "weight": 0}]}, "expected above 0"),
        ({"data": [{"kind": "qa", "path": "x", "fewest": 2}]}, "expected 0 to fill"),
        ({"data": [{"kind": "qa", "path": "x", "questions": 0}]}, "questions is 0"),
        ({"data": [{"kind": "qa", "path": "x", "absent": 1.0}]}, "less than 1"),
        ({"distill": 2.0}, "distill is 2.0"),
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
    part = Part("qa", str(path), fill=4, first=2, last=9, questions=1)
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


def test_loader_workers_share_the_rows(tmp_path: Path) -> None:
    """Each row is one worker's, also where there are fewer rows than workers."""
    part, _ = files(tmp_path)
    setting = config(data=(part,), shuffle=4)
    seen: list[str] = []
    for worker in range(12):
        stream = Mixture(setting, ENCODER, FORM).draw(worker, 12)
        seen += [learned(next(stream).sample) for _ in range(3)]
    assert set(seen) == {f"a{i}<eos>" for i in range(9)}
    first = [
        [learned(next(stream).sample) for _ in range(3)]
        for stream in (Mixture(setting, ENCODER, FORM).draw(worker, 3) for worker in range(3))
    ]
    assert sorted(answer for each in first for answer in each) == [f"a{i}<eos>" for i in range(9)]


def test_a_set_without_a_usable_row_is_told_to_every_worker(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "?"}\n' * 5)
    for worker in range(3):
        with pytest.raises(ConfigError, match="no usable row"):
            next(Mixture(config(data=(Part("qa", str(path)),)), ENCODER, FORM).draw(worker, 3))


# Gaps


TEXTS = [
    f"The town of Place{i} lies on the river Water{i} and was founded by Founder{i} in 18{i:02} "
    f"after the great fire. Its market is held on each Monday by the guild of bakers."
    for i in range(12)
]


def gap_rows(tmp_path: Path, *, of: int = 6) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "question": f"q{i}",
            "answers": [f"Founder{i}"],
            "ctxs": [
                {"title": f"T{n % 12}", "text": TEXTS[n % 12], "isgold": n == i}
                for n in range(i, i + of)
            ],
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gaps_are_filled_by_what_stands_in_the_passages(tmp_path: Path) -> None:
    part = Part("gaps", gap_rows(tmp_path), documents=4, fill=4, fewest=2, questions=6, absent=0.3)
    setting = config(data=(part,), absent_answer="Not said.")
    stream = Mixture(setting, ENCODER, FORM).draw()
    absent = answered = titles = 0
    for _ in range(40):
        sample = next(stream).sample
        passages = decoded(sample.token_ids[sample.segments > 0])
        for branch in range(1, int(sample.branches.max()) + 1):
            own = sample.branches == branch
            asked, *_ = decoded(sample.token_ids[own]).partition("\n")
            answer = decoded(sample.targets[own & (sample.targets != IGNORED)])
            answer = answer.removesuffix("<eos>")
            if told := re.search(r"Of what is this said: (.*)", asked):
                of = [i for i, text in enumerate(TEXTS) if told[1] in text]
                there = [i for i in of if f"T{i}: {TEXTS[i]}" in passages]
                assert answer in [f"T{i}" for i in there] or (answer == "Not said." and of)
                titles += answer != "Not said."
                continue
            found = re.search(r"Fill in the gap: (.*?) ?___ ?(.*)", asked)
            assert found is not None
            whole = f"{found[1]} {answer} {found[2]}".strip().replace(" .", ".")
            if answer == "Not said.":
                absent += 1
                left_out = [text for text in TEXTS if text not in passages]
                assert any(found[1] in text and found[2] in text for text in left_out)
            else:
                answered += 1
                assert whole in passages
                assert answer not in f"{found[1]} {found[2]}"
    assert absent > 20
    assert answered > 60
    assert titles > 20


def test_a_title_is_asked_for_by_what_its_passage_says() -> None:
    rng = random.Random(0)
    passage = Document("It lies on the river and was founded by monks after the fire.", "Old Town")
    asked = {title_of(passage, rng) for _ in range(50)}
    assert {each and each[1] for each in asked} == {"Old Town"}
    for question, _ in filter(None, asked):
        quoted = question.removeprefix("Of what is this said: ")
        assert quoted in passage.text
        assert 6 <= len(quoted.split()) <= 14
    told = "the Old Town was founded by monks"
    assert title_of(Document(told, "Old Town"), rng) is None
    for title in ("", "…", "a title of far too many words"):
        assert title_of(Document(passage.text, title), rng) is None
    assert title_of(Document("too few words", "Old Town"), rng) is None
    assert title_of(Document("", "Old Town"), rng) is None


def test_gaps_of_passages_that_are_not_there_without_a_choice_of_passages(tmp_path: Path) -> None:
    """Where all of a row's passages are taken, those of other rows are asked about."""
    part = Part("gaps", gap_rows(tmp_path), documents=10, questions=4, absent=0.5)
    stream = Mixture(config(data=(part,), absent_answer="Not said."), ENCODER, FORM).draw()
    said = "".join(learned(next(stream).sample) for _ in range(20))
    assert said.count("Not said.") > 5


def test_a_gap_is_a_name_or_a_number_in_the_midst_of_a_sentence() -> None:
    rng = random.Random(0)
    found = {gap(TEXTS[3], rng) for _ in range(200)} - {None}
    answers = {each[1] for each in found if each is not None}
    assert answers == {"Place3", "Water3", "Founder3", "1803", "Monday"}
    assert all(each is not None and "Its" not in each[1] for each in found)
    assert gap("no names here, none at all in this text", rng) is None
    assert gap("", rng) is None
    for broken in (
        "rose by 3.5% in all",
        "left at 10:30am each",
        "of 2.4GHz and",
    ):
        assert gap(f"what is told of it {broken} of the many that were there", rng) is None
    assert gap("what is called The, as it is told by all who were there", rng) is None
    found_there = gap("the people of Île-de-France are those that live near the town", rng)
    assert found_there is not None
    assert found_there[1] == "Île-de-France"
    assert gap("is Anna, was Anna, are Anna and so Anna, that Anna now", rng) is None
    assert gap("of A B C D E F of that which is far too long to be said", rng) is None


def facts(tmp_path: Path) -> Part:
    """Twelve questions, each with its passage and six others; the last two ask about one."""
    documents = [{"title": f"T{i}", "text": f"Is answer{i:02}."} for i in range(12)]
    rows = [
        {
            "question": f"q{i:02}",
            "answers": [f"answer{i:02}"],
            "ctxs": [{**documents[i], "isgold": True}]
            + [documents[(i + step) % 12] for step in range(1, 7)],
        }
        for i in range(12)
    ]
    rows.append({**rows[11], "question": "q12"})
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Part("qa", str(path), fill=8, fewest=2, questions=5, absent=0.25)


def test_long_answers_are_left_out(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"{number}?",
            "answers": [" ".join(["word"] * number), "short"],
            "ctxs": [{"title": "", "text": "word"}],
        }
        for number in range(1, 9)
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"no": "answer"}]))
    part = Part("qa", str(path), documents=1, questions=1, answer_words=3)
    mixture = Mixture(config(data=(part,)), ENCODER, FORM)
    found = [sample for _, sample in zip(range(30), mixture, strict=False)]
    answers = {" ".join(["word"] * number) for number in range(1, 4)}
    assert {learned(sample).removesuffix("<eos>") for sample in found} == answers
    assert mixture.skipped.reasons["qa: ExampleError"] >= 1  # told as ever, not hidden


def test_passages_are_asked_all_that_is_known_about_them(tmp_path: Path) -> None:
    """Whatever is asked has its passage in the memory, or the fixed answer and no passage."""
    part = facts(tmp_path)
    mixture = Mixture(config(data=(part,), absent_answer="Not there.", seed=1), ENCODER, FORM)
    counts, absent, asked, places = set(), 0, 0, set()
    for _, sample in zip(range(200), mixture, strict=False):
        passages = int(sample.segments.max())
        texts = [decoded(sample.token_ids[sample.segments == n + 1]) for n in range(passages)]
        assert len(set(texts)) == passages
        counts.add(passages)
        questions = int(sample.branches.max())
        assert 1 <= questions <= 5
        for branch in range(1, questions + 1):
            own = sample.branches == branch
            question = re.search(r"q(\d\d)", decoded(sample.token_ids[own]))
            assert question is not None
            number = min(int(question[1]), 11)
            answer = decoded(sample.targets[own & (sample.targets != IGNORED)])
            held = [n for n, text in enumerate(texts) if f"answer{number:02}" in text]
            assert answer == (f"answer{number:02}<eos>" if held else "Not there.<eos>")
            absent, asked = absent + (not held), asked + 1
            places |= set(held)
    assert counts == set(range(2, 9))
    assert places == set(range(8))
    assert asked > 600
    assert 0.2 < absent / asked < 0.35


def test_link_tokens_are_left_out_of_a_share_of_samples(tmp_path: Path) -> None:
    part = facts(tmp_path)
    for share, wanted in ((1.0, {True}), (0.0, {False}), (0.5, {True, False})):
        mixture = Mixture(config(data=(part,), links_share=share), ENCODER, FORM)
        links = set(SPEC.special_ids()) - {SPEC.mem_start, SPEC.mem_end}
        found = [set(s.token_ids.tolist()) for _, s in zip(range(20), mixture, strict=False)]
        assert {bool(ids & links) for ids in found} == wanted
        assert all(SPEC.mem_start in ids for ids in found)


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


# Distractors


def test_questions_get_the_passages_that_score_highest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are words in common; row 2 is left out, and row 4's passage is found for nobody."""
    words = ["red fox runs", "red hen sleeps", "blue fox swims", "green"]
    rows = [
        {"question": text, "answers": ["x"], "ctxs": [{"title": "", "text": text}]}
        for text in words
    ]
    rows[3]["question"] = "red fox"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(distractors, "load_embedder", lambda *a, **k: WordEmbedder())
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    given = ["--data", f"{data}:1-4", "--without", "rows.jsonl:2", "--embedder", "x"]
    given += ["--documents", "2", "--out", str(out), "--plain", str(plain)]
    assert distractors.main(given) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [[c["text"] for c in row["ctxs"]] for row in found] == [
        ["red fox runs", "blue fox swims"],
        ["blue fox swims", "red fox runs"],
        ["red fox runs", "green"],
    ]
    assert [[c["isgold"] for c in row["ctxs"]] for row in found] == [
        [True, False],
        [True, False],
        [False, True],
    ]
    alone = [json.loads(line) for line in plain.read_text().splitlines()]
    assert [[c["text"] for c in row["ctxs"]] for row in alone] == [
        ["red fox runs"], ["blue fox swims"], ["green"]
    ]  # fmt: skip
    assert distractors.main([*given, "--sentences"]) == 0
    asked = {json.loads(line)["question"] for line in out.read_text().splitlines()}
    assert asked <= {"red fox runs", "blue fox swims", "red fox"} | {
        "Red fox runs?", "Blue fox swims?", "Red fox?"
    }  # fmt: skip
    assert any(each.endswith("?") for each in asked)
    assert distractors.main(["--data", f"{data}:x", *given[2:]]) == 1
