"""Models of published shapes with random weights, and a tokenizer of one token a word.

TTFT does not depend on what the weights are, so a shape is enough to time it honestly.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvlink_rag import KVLinkModel, PromptPreset
from kvlink_rag.engine.attention import NAME
from kvlink_rag.prompt.published import KVLINK5_LLAMA32

SYSTEM_WORDS = 43  # tokens of the published system prompt, up to and including the user header
_COMMON = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city name team minute idea body back parent face others level office door "
    "health person art war history party result change morning reason research girl moment air "
    "teacher force education"
)
Encode = Callable[[str], list[int]]

AFTER_WORDS = 5  # tokens of <|eot_id|> and the assistant header

_LLAMA32_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def random_model(shape: str, dtype: torch.dtype, device: str, seed: int = 0) -> KVLinkModel:
    """A model of `shape` with random weights, the published link ids and a stand-in tokenizer."""
    config = LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_LLAMA32_ROPE,
        bos_token_id=128000,
        eos_token_id=128009,
        **SHAPES[shape],
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(NAME)  # as `from_pretrained` loads it
    system = " ".join(f"w{i}" for i in range(SYSTEM_WORDS))
    after = " ".join(f"w{i}" for i in range(AFTER_WORDS))
    spec = replace(
        KVLINK5_LLAMA32,
        passage_template="{text}",
        untitled_template="{text}",
        rank="none",
        presets={"words": PromptPreset(before=system, after=after)},
        preset="words",
    )
    return KVLinkModel(model, word_tokenizer(), spec, name=f"{shape} (random weights)")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`w0` to `w127999` are ids 0 to 127999: one token a word."""
    vocabulary = {f"w{i}": i for i in range(128000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words(count: int, generator: torch.Generator, encode: Encode | None = None) -> str:
    """Random words of `count` tokens together, by `encode`; None: of the shapes' own tokenizer."""
    if encode is None or len(encode("w1 w2 w3")) == 3:
        ids = torch.randint(0, 120000, (count,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())
    known = _single(encode)
    chosen: list[str] = []
    while len(encode(" ".join(chosen))) < count:
        missing = count - len(encode(" ".join(chosen)))
        drawn = torch.randint(0, len(known), (max(1, missing // 2),), generator=generator)
        chosen += [known[i] for i in drawn.tolist()]
    text = " ".join(chosen)
    while len(encode(text)) > count:
        text = text[:-1]
    return text


@functools.cache
def _single(encode: Encode) -> list[str]:
    """Words that are one token each behind a space, or whatever words there are."""
    found = [w for w in _COMMON.split() if len(encode(f"a {w}")) == len(encode("a")) + 1]
    return found or _COMMON.split()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.machine()
