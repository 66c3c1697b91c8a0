"""GGUF files: the model and the tokenizer that come out are those that went in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, fields_of, small_model, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from kvlink_rag import KVLinkModel
from kvlink_rag.documents import Document
from kvlink_rag.engine.backbone import check_supported
from kvlink_rag.errors import ConfigError, ModelNotSupported
from kvlink_rag.pretrained.gguf import model_directory
from kvlink_rag.pretrained.gguf.metadata import GGUFFile
from kvlink_rag.pretrained.gguf.tokenizer import build_tokenizer

HARD = [
    "",
    " ",
    "   leading and trailing   ",
    "1 12 123 1234 12345 1,234.56 ½ ٣٤٥ ⅷ x2y3",
    "don't DON'T I'll we'Ve it's 'tis y'all'd've",
    "line\r\nline\n\n\n  indented\t\ttabs \u00a0nbsp\u2003em",
    "naïve Café déjà vu, e\u0301 decomposed, ﬁ ligature, Ångström",
    "👩🏽‍🚀👨‍👩‍👧‍👦 🇫🇷 ☃️ 🤷",
    "日本語のテキスト、漢字とカナ。한국어 中文字符",
    "العربية हिन्दी Ελλάδα Россия ไทย",
    "a==b && c!=d; <|im_end|> [INST] $100+20% ^~|`{}#@!?...---",
    "snake_case camelCase __init__ http://example.org/?a=b&c=1",
    "\0\x07\ufeff\u200b\ud7ff\ue000",
]
CORPUS = [
    *HARD,
    "the quick brown fox jumps over the lazy dog. " * 3,
    "Don't, we'll, it's 1999! " * 3,
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The rules as the published `tokenizer.json` of SmolLM2, GPT-2, Llama 3 and Qwen2 have them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(False),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_LLAMA3.replace("{1,3}", "")),
}


def _split(rule: str) -> Any:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), bytes_])


def trained(rule: str) -> Tokenizer:
    """A small tokenizer of a published kind, its special tokens behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PUBLISHED[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.model.ignore_merges = rule == "llama-bpe"
    return tokenizer


@pytest.fixture(scope="module")
def bytes_only() -> dict[str, Any]:
    """Fields of a tokenizer of Qwen's kind."""
    tokenizer = trained("qwen2")
    ends = {"bos_token_id": 500, "eos_token_id": 502, "padding_token_id": 500}
    return fields_of(tokenizer, "qwen2", **ends) | {"tokenizer.chat_template": TEMPLATE}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_directory(path), dtype=torch.float32).eval()


def size_of(fields: dict[str, Any]) -> int:
    return len(fields["tokenizer.ggml.tokens"])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % 400
    return model(ids).logits


# Models.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_float32_gives_the_model_that_was_written(
    tmp_path: Path, bytes_only: dict[str, Any], kind: str, tied: bool
) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    window = {"mistral": {"llama.attention.sliding_window": 16}}.get(kind, {})
    if kind == "mistral":
        changes["sliding_window"] = 16
    if kind == "qwen3":
        changes["head_dim"] = 32
    model = small_model(kind, size_of(bytes_only), **changes)
    path = write_model(tmp_path / "a.gguf", kind, model, bytes_only, fields=window)
    found = loaded(path)
    assert type(found) is type(model)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)
    assert found.config.dtype == torch.float32 or found.dtype == torch.float32
    check_supported(found.config)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_weights_are_what_was_written_as_far_as_the_type_holds(
    tmp_path: Path, bytes_only: dict[str, Any], quantisation: str
) -> None:
    """A step of a block is at most its span over the number of steps (both signs for *_0)."""
    model = small_model("llama", size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", "llama", model, bytes_only, quantisation)
    found = loaded(path).state_dict()
    steps = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 7.5, "Q5_0": 16}
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(found[name], weight)
        elif quantisation in ("F16", "BF16"):
            kept = torch.float16 if quantisation == "F16" else torch.bfloat16
            assert torch.equal(found[name], weight.to(kept).float())
        else:
            blocks = weight.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / steps[quantisation]
            assert ((found[name].reshape(-1, 32) - blocks).abs() <= step * 1.01).all()
            assert not torch.equal(found[name], weight)


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_weights_are_those_transformers_reads(
    tmp_path: Path, bytes_only: dict[str, Any], kind: str, quantisation: str
) -> None:
    """transformers' own GGUF loading, rounded to the float16 in which quantised ones are kept."""
    model = small_model(kind, size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", kind, model, bytes_only, quantisation)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    ).state_dict()
    found = loaded(path).state_dict()
    assert found.keys() == theirs.keys()
    for name, weight in theirs.items():
        whole = weight.dim() == 1 or quantisation == "F32"
        assert torch.equal(found[name], weight if whole else weight.half().float()), name


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_1", "bfloat16")],
)
def test_the_dtype_to_compute_in(
    tmp_path: Path, bytes_only: dict[str, Any], quantisation: str, dtype: str
) -> None:
    model = small_model("qwen3", size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", "qwen3", model, bytes_only, quantisation)
    assert AutoConfig.from_pretrained(model_directory(path)).dtype == getattr(torch, dtype)


ROPES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 4.0, "original_context_length": 64},
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {},
    ),
}


@pytest.mark.parametrize("rule", ROPES)
def test_rope_is_scaled_as_it_was(tmp_path: Path, bytes_only: dict[str, Any], rule: str) -> None:
    """Llama 3's factors are made here from transformers' own frequencies, as llama.cpp stores
    them: what each frequency is divided by."""
    parameters, scaling = ROPES[rule]
    theta = {"rope_theta": 500000.0}
    model = small_model("llama", size_of(bytes_only), rope_parameters={**parameters, **theta})
    plain = small_model(
        "llama", size_of(bytes_only), rope_parameters={"rope_type": "default", **theta}
    )
    fields = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    divided = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    tensors = {"rope_freqs.weight": divided.numpy()} if rule == "llama3" else {}
    path = write_model(
        tmp_path / "a.gguf", "llama", model, bytes_only, fields=fields, tensors=tensors
    )
    found = loaded(path)
    rotary, expected = found.model.rotary_emb, model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, expected.inv_freq)
    assert rotary.attention_scaling == expected.attention_scaling
    torch.testing.assert_close(logits(found), logits(model))
    with pytest.raises(AssertionError):  # the rule does something
        torch.testing.assert_close(logits(found), logits(plain))


def test_a_gguf_file_is_a_model_to_answer_with(tmp_path: Path, bytes_only: dict[str, Any]) -> None:
    model = small_model("qwen3", size_of(bytes_only))
    path = write_model(tmp_path / "model.gguf", "qwen3", model, bytes_only)
    opened = KVLinkModel.from_pretrained(path, device="cpu")
    assert opened.end_ids == {502}
    parts = opened.prompt([Document("The harbour was built in 1911."), Document("Two.")], "When?")
    assert opened.verify(parts).holds
    assert "<|im_start|>user\n" in opened.spec.prompt_preset.before


# Tokenizers.


def converted(path: Path, fields: dict[str, Any]) -> Any:
    """transformers' tokenizer of a GGUF file with the fields of a tokenizer."""
    model = small_model("llama", size_of(fields), intermediate_size=32, num_hidden_layers=1)
    write_model(path, "llama", model, fields)
    return AutoTokenizer.from_pretrained(model_directory(path))


@pytest.mark.parametrize("rule", PUBLISHED)
def test_texts_have_the_tokens_of_the_published_rule(tmp_path: Path, rule: str) -> None:
    original = trained(rule)
    found = converted(tmp_path / "a.gguf", fields_of(original, rule))
    assert found.get_vocab() == original.get_vocab(with_added_tokens=True)
    for text in [*HARD, *_mixed(200)]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert found(text, add_special_tokens=False).input_ids == ids, text
        assert found.decode(ids) == original.decode(ids, skip_special_tokens=False)


def _mixed(count: int) -> list[str]:
    """Texts of random pieces of the hard ones."""
    chance = random.Random(5)
    pieces = [text[i : i + 3] for text in CORPUS for i in range(0, len(text), 3)]
    return ["".join(chance.choices(pieces, k=12)) for _ in range(count)]


def test_rules_differ(tmp_path: Path) -> None:
    """One vocabulary, other rules: other tokens. A rule that is not asked for would not show."""
    fields = fields_of(trained("gpt-2"), "gpt-2")
    seen = set()
    for rule in ("gpt-2", "smollm", "llama-bpe", "qwen2", "default"):
        changed = fields | {"tokenizer.ggml.pre": rule}
        found = converted(tmp_path / f"{rule}.gguf", changed)
        seen.add(tuple(tuple(found(text).input_ids) for text in HARD))
    assert len(seen) == 5


def test_the_default_rule_is_that_of_llama_cpp(tmp_path: Path) -> None:
    """Four expressions, each over the pieces of the one before; merged by hand."""
    fields = fields_of(trained("gpt-2"), "gpt-2") | {"tokenizer.ggml.pre": None}
    found = converted(tmp_path / "a.gguf", fields)
    rules = [
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ]
    ranks = {merge: i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    for text in HARD:
        if any(word in text for word in SPECIAL):
            continue
        pieces = [text]
        for rule in rules:
            pieces = [part for piece in pieces for part in _cut(piece, rule)]
        words = [word for piece in pieces for word in _merged(_bytes(piece), ranks)]
        assert found.convert_ids_to_tokens(found(text).input_ids) == words, text


def _cut(text: str, rule: str) -> list[str]:
    """Matches and what lies between them, as `unicode_regex_split` of llama.cpp."""
    parts, end = [], 0
    for match in regex.finditer(rule, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


def _bytes(text: str) -> list[str]:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list("".join(piece for piece, _ in level.pre_tokenize_str(text)))


def _merged(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Byte-pair merges, the lowest rank first, one at a time."""
    while True:
        pairs = [(ranks.get(f"{a} {b}", 1 << 30), i) for i, (a, b) in enumerate(pairwise(symbols))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return symbols
        i = min(pairs)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def test_llama_3s_own_tokenizer_survives(tmp_path: Path, shared_data: Path) -> None:
    original = Tokenizer.from_file(str(shared_data / "llama3_tokenizer" / "tokenizer.json"))
    fields = fields_of(original, "llama-bpe", bos_token_id=128000, add_bos_token=False)
    found = build_tokenizer(GGUFFile(tmp_path, fields, {}))
    assert found.get_vocab() == original.get_vocab()
    for text in [*HARD, *_mixed(200), "<|begin_of_text|>a<|eot_id|>"]:
        ids = original.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == original.decode(ids)


def test_special_tokens_keep_their_part(tmp_path: Path) -> None:
    fields = fields_of(
        trained("qwen2"),
        "qwen2",
        bos_token_id=501,
        eos_token_id=502,
        eot_token_id=500,
        padding_token_id=500,
        add_bos_token=True,
    )
    for key, more in (("tokens", ["[PAD504]", "[PAD505]"]), ("token_type", [UNUSED, UNUSED])):
        fields[f"tokenizer.ggml.{key}"] = [*fields[f"tokenizer.ggml.{key}"], *more]
    found = converted(tmp_path / "a.gguf", fields | {"tokenizer.chat_template": TEMPLATE})
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (501, 502, 500)
    assert len(found) == 504  # the padding of the vocabulary is no word
    assert found("a<|im_end|>").input_ids == [
        501,
        *found("a", add_special_tokens=False).input_ids,
        502,
    ]
    plain = found("a<|im_end|>", split_special_tokens=True, add_special_tokens=False).input_ids
    assert 502 not in plain
    assert "<tool_call>" not in found.all_special_tokens
    assert found("<tool_call>", add_special_tokens=False).input_ids == [503]
    chat = [{"role": "user", "content": "Hi"}]
    text = found.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    config = AutoConfig.from_pretrained(model_directory(tmp_path / "a.gguf"))
    assert config.eos_token_id == [502, 500]
    assert config.vocab_size == 506


def sentence_fields(prefixed: bool = True) -> dict[str, Any]:
    """A vocabulary of SentencePiece's kind: bytes, letters, words with falling scores."""
    words = ["▁t", "he", "▁the", "in", "▁in", "er", "▁a", "an", "ing", "▁quick", "qu", "ick", "▁▁"]
    words += ["br", "own", "brown", "ow", "▁d", "on", "▁don", "'t", "日本", "s>", "</", "<0"]
    letters = sorted(
        {c for text in CORPUS[1:3] + CORPUS[-2:] for c in text if c.isalnum()} | set("▁<>/'日本")
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece_joins_the_best_score_first(tmp_path: Path, prefixed: bool) -> None:
    """Against SentencePiece's own algorithm, by hand; what has no word becomes its bytes."""
    fields = sentence_fields(prefixed)
    found = converted(tmp_path / "a.gguf", fields)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = {
        token: score
        for token, kind, score in zip(tokens, kinds, fields["tokenizer.ggml.scores"], strict=True)
        if kind == NORMAL
    }
    for text in [text for text in [*HARD, *_mixed(100)] if text]:
        symbols = list(("▁" if prefixed else "") + text.replace(" ", "▁"))
        ids = [1]
        for symbol in _joined(symbols, scores):
            spelled = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            ids += [tokens.index(t) for t in ([symbol] if symbol in scores else spelled)]
        assert found(text).input_ids == ids, text
        assert found.decode(ids[1:]) == text
    assert 2 not in found("a</s>", split_special_tokens=True).input_ids
    assert found("a</s>").input_ids[-1] == 2


def _joined(symbols: list[str], scores: dict[str, float]) -> list[str]:
    while True:
        joined = [
            (-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores
        ]
        if not joined:
            return symbols
        i = min(joined)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "'deepseek-llm'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.head_count": [4, 2]}, "head_count"),
        ({"llama.rope.dimension_count": 32}, "rotates 32"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.block_count": 3}, "blk.2."),
        ({"llama.block_count": 1}, "blk.1."),
        ({"llama.block_count": 4_000_000_000}, "layers"),
        ({"llama.context_length": None}, "no field llama.context_length"),
        ({"tokenizer.ggml.eos_token_id": 99_999}, "99999"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "no tokens"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, bytes_only: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    model = small_model("llama", size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", "llama", model, bytes_only, fields=fields)
    with pytest.raises(ConfigError, match=message) as caught:
        model_directory(path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_transformers_would_replace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its newer versions give every model of type qwen2 the splitting rule of Qwen2."""
    model = small_model("qwen2", 504)
    path = write_model(tmp_path / "a.gguf", "qwen2", model, fields_of(trained("gpt-2"), "gpt-2"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Qwen2Tokenizer.from_pretrained)
    with pytest.raises(ModelNotSupported, match="Qwen2Tokenizer"):
        model_directory(path)


def test_other_tensors_and_other_rope_factors_are_refused(
    tmp_path: Path, bytes_only: dict[str, Any]
) -> None:
    model = small_model("llama", size_of(bytes_only))
    ones = np.linspace(1, 3, 32, dtype=np.float32)
    for name, message in (("blk.0.attn_q.bias", "attn_q.bias"), ("rope_freqs.weight", "Llama 3")):
        path = tmp_path / f"{name}.gguf"
        write_model(path, "llama", model, bytes_only, tensors={name: ones})
        with pytest.raises(ModelNotSupported, match=message):
            model_directory(path)


def test_damaged_files_are_refused(tmp_path: Path, bytes_only: dict[str, Any], cache: Path) -> None:
    model = small_model("llama", size_of(bytes_only), num_hidden_layers=1)
    whole = write_model(tmp_path / "a.gguf", "llama", model, bytes_only).read_bytes()
    chance = random.Random(1)
    damaged = [whole[: chance.randrange(len(whole))] for _ in range(20)]
    for _ in range(60):  # a flipped byte among the fields
        at = chance.randrange(12000)
        damaged.append(
            whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :]
        )
    refused = 0
    for content in [b"", b"GGUF", *damaged]:
        (tmp_path / "b.gguf").write_bytes(content)
        try:
            model_directory(tmp_path / "b.gguf")
        except ConfigError:
            refused += 1
    assert refused >= 22
    assert not list((cache / "gguf").glob("*.partial"))


# The directory.


def test_one_file_is_converted_once(
    tmp_path: Path, bytes_only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("llama", size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", "llama", model, bytes_only)
    found = model_directory(path)
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    monkeypatch.setattr(gguf, "GGUFReader", None)  # nothing is read a second time
    assert model_directory(tmp_path / "b.gguf") == found


def test_threads_that_come_at_once_get_one_directory(
    tmp_path: Path, bytes_only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("llama", size_of(bytes_only))
    path = write_model(tmp_path / "a.gguf", "llama", model, bytes_only)
    opened, found = [], []
    original = gguf.GGUFReader

    def counted(*arguments: Any) -> Any:
        opened.append(1)
        return original(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    threads = [
        threading.Thread(target=lambda: found.append(model_directory(path))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert len(opened) == 1


_KILLED = """
import os, signal, sys
from pathlib import Path
from kvlink_rag.pretrained.gguf import convert, model_directory
def stop(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_name == sys.argv[2] and "gguf" in code.co_filename:
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(stop)
model_directory(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", ["_split_halves", "_sync"])
def test_kill_in_the_middle_leaves_nothing_half(
    tmp_path: Path, bytes_only: dict[str, Any], cache: Path, step: str
) -> None:
    """Killed among the weights, or when all is written but not yet in its place."""
    model = small_model("llama", size_of(bytes_only), num_hidden_layers=1)
    path = write_model(tmp_path / "a.gguf", "llama", model, bytes_only)
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(path), step], env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    kept = [each.name for each in (cache / "gguf").iterdir() if each.is_dir()]
    assert len(kept) == 1
    assert kept[0].endswith(".partial")
    found = loaded(path)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)
    names = {each.name for each in model_directory(path).iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not list((cache / "gguf").glob("*.partial"))
