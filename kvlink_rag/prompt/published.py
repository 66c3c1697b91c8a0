"""The specs of published KVLink checkpoints, by hub id. Knows no weights.

Ids and prompts follow Yang et al., KVLink (arXiv 2502.16002), and their evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .spec import PromptPreset, Spec

_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "You are a intelligent AI assistant. Please answer questions based on the user's instruction. "
    "Below are some reference documents that may help you in answering the user's question."
)
_USER = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
_ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

KVLINK5_LLAMA32 = Spec(
    links_per_passage=5,
    first_link_id=128011,
    mem_start=128254,
    mem_end=128255,
    max_passages=48,
    passage_template="Document [{rank}](Title: {title}) {text}\n",
    untitled_template="Document [{rank}](Title: {title}) {text}\n",
    rank="fixed",
    presets={
        "evaluation": PromptPreset(before=_SYSTEM + _USER, after=_ASSISTANT),
        "training": PromptPreset(before=_SYSTEM, between=_USER, after=_ASSISTANT),
    },
    preset="evaluation",
    tokenizer="meta-llama/Llama-3.2-1B-Instruct",
)

PUBLISHED: Mapping[str, Spec] = {
    "Shiyu-Lab/Llama1B-KVLink5": KVLINK5_LLAMA32,
    "Shiyu-Lab/Llama3B-KVLink5": replace(
        KVLINK5_LLAMA32, tokenizer="meta-llama/Llama-3.2-3B-Instruct"
    ),
}
