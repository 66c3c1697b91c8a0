"""A tiny random model with a byte tokenizer and rows added for link tokens, and prompts over it.

Its weights need not be trained: what the tests compare is numbers, against kvlink_rag's masked full
prefill.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlink_rag import Document, KVLinkModel, Layout, Spec
from kvlink_rag.prompt.layout import Span
from kvlink_rag.prompt.spec import PromptPreset

SLOTS, LINKS, VOCABULARY = 8, 2, 261  # the rows from 261 on are added
WINDOW = 1024
TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOWNS = ("Orvale", "Marnik", "Teldon", "Brisk")


def documents() -> list[Document]:
    return [
        Document(f"The harbour of {town} was built in {1911 + 7 * i}, with {i} lamps.", town, town)
        for i, town in enumerate(TOWNS)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then five special ones; none for link tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>"]})
    fast.chat_template = TEMPLATE
    return fast


def spec() -> Spec:
    return Spec(
        links_per_passage=LINKS,
        first_link_id=VOCABULARY + 2,
        max_passages=SLOTS,
        mem_start=VOCABULARY,
        mem_end=VOCABULARY + 1,
        header=(256,),
        presets={"test": PromptPreset(before="<bos><user>", after="<eos><assistant>")},
        preset="test",
    )


SHAPE = {
    "vocab_size": VOCABULARY + 2 + SLOTS * LINKS,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 64}),
}


def module(seed: int = 0, family: str = "llama") -> Any:
    """Attention sharp enough for a wrong mask to show."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    made = model_class(config_class(**{**SHAPE, **extra}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                wide = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0, wide / parameter.shape[1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.5)
    return made.eval()


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> KVLinkModel:
    return KVLinkModel(module(seed).to(dtype), tokenizer(), spec(), name="tiny")


def saved(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """The model as kvlink_rag opens it by name."""
    module(family=family).to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    (directory / "kvlink.json").write_text(spec().to_json())
    return directory


def greedy(
    model: KVLinkModel, layout: Layout, steps: int, vocabulary: int = VOCABULARY
) -> tuple[list[int], torch.Tensor]:
    """The oracle: token ids said one after the other, each by a masked prefill of all before it.

    Also the log-probabilities [vocabulary] of the first.
    """
    first = None
    said: list[int] = []
    for _ in range(steps):
        logits = model.states(_with(layout, said), "masked").logits[:vocabulary]
        first = logits.log_softmax(-1) if first is None else first
        said.append(int(logits.argmax()))
    assert first is not None
    return said, first


def _with(layout: Layout, said: list[int]) -> Layout:
    """The prompt with an answer behind it, which is of segment 0 as all computed text is."""
    ids = torch.cat([layout.token_ids, torch.tensor(said, dtype=torch.int64)])
    none = torch.zeros(len(said), dtype=torch.int64)
    last = layout.spans[-1]
    return dataclasses.replace(
        layout,
        token_ids=ids,
        positions=torch.arange(len(ids)),
        segments=torch.cat([layout.segments, none]),
        spans=(*layout.spans[:-1], Span(last.start, last.stop + len(said))),
    )
