"""Tiny random models with a byte tokenizer on the disk, and a collection of towns on them.

What these tests compare is ids, texts and numbers of the same model, so weights need not be
trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlink_rag import Document, KVLinkRAG, Spec
from kvlink_rag.prompt.spec import PromptPreset

torch.set_num_threads(1)

SLOTS, LINKS = 8, 2
VOCABULARY = 258  # without markers and link tokens
TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOWNS = ["Orvale", "Marnik", "Teldon", "Brisk", "Quill", "Sarno", "Velt", "Hux"]
DOCUMENTS = [
    Document(f"The town of {town} has a harbour, a market and {n} lighthouses.", town, town.lower())
    for n, town in enumerate(TOWNS)
]
QUESTION = "Which town has 3 lighthouses?"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones; markers and links are the last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<bos>", "<eos>"]
    vocabulary = {c: i for i, c in enumerate([*alphabet, *names])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    names = ["<mem_start>", "<mem_end>"]
    names += [f"<link_{slot}_{k}>" for slot in range(SLOTS) for k in range(LINKS)]
    fast.add_special_tokens({"additional_special_tokens": names})
    fast.chat_template = TEMPLATE
    return fast


SPEC = Spec(
    links_per_passage=LINKS,
    first_link_id=VOCABULARY + 2,
    max_passages=SLOTS,
    mem_start=VOCABULARY,
    mem_end=VOCABULARY + 1,
    header=(256,),
    presets={"test": PromptPreset(before="<bos><user>", after="<eos><assistant>")},
    preset="test",
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY + 2 + SLOTS * LINKS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
MADE: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}


def save_pair(root: Path, family: str) -> tuple[Path, Path]:
    """Directories of a language model and of an encoder, both random."""
    torch.manual_seed(0)
    lm = MADE[family]().eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim > 1:
                wide = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0, wide / parameter.shape[1] ** 0.5)
    lm.save_pretrained(root / "lm")
    (root / "lm" / "kvlink.json").write_text(SPEC.to_json())
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=SHAPE["vocab_size"], num_hidden_layers=1, **shape)
    BertModel(config).save_pretrained(root / "encoder")
    for part in ("lm", "encoder"):
        tokenizer().save_pretrained(root / part)
    return root / "lm", root / "encoder"


def open_towns(directory: Path, pair: tuple[Path, Path], **settings: Any) -> KVLinkRAG:
    """A collection of the towns, in float32."""
    lm, encoder = pair
    rag = KVLinkRAG.open(
        directory, model=lm, embedder=encoder, device="cpu", dtype="float32", **settings
    )
    rag.add(DOCUMENTS)
    return rag
