"""A tiny random model with a byte tokenizer, a word embedder, and nodes to ask about.

What the tests compare is token ids, counts and text against the engine's own oracle, so weights
need not be trained.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.schema import TextNode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvlink_rag import KVLinkModel, KVLinkRAG, Part, Passage, Spec, Text
from kvlink_rag.prompt.spec import PromptPreset

SLOTS, LINKS, WINDOW = 12, 2, 4096
TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOWNS = ["Orvale", "Marnik", "Teldon", "Brisk", "Quill", "Sarno", "Velt", "Hux"]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<mem_start>", "<mem_end>", "<system>", "<user>", "<assistant>"]
    names += [f"<link_{slot}_{k}>" for slot in range(SLOTS) for k in range(LINKS)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.add_special_tokens({"additional_special_tokens": names})
    fast.chat_template = TEMPLATE
    return fast


def _spec() -> Spec:
    return Spec(
        links_per_passage=LINKS,
        first_link_id=263,
        max_passages=SLOTS,
        mem_start=258,
        mem_end=259,
        presets={"test": PromptPreset(before="<bos><user>", after="<eos><assistant>")},
        preset="test",
    )


def tiny_model(window: int) -> KVLinkModel:
    config = LlamaConfig(
        vocab_size=263 + SLOTS * LINKS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=window,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                wide = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0, wide / parameter.shape[1] ** 0.5)
    return KVLinkModel(model.eval(), _tokenizer(), _spec(), name=f"tiny-{window}")


def saved_encoder(directory: Path) -> Path:
    """A tiny random encoder, in `directory`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    tokenizer = _tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class WordEmbedder:
    """Words hashed into a vector: deterministic, and equal words do bring texts together."""

    dimension = 64
    name = "word-embedder"
    fingerprint = "word-embedder"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._vector(text) for text in texts])

    embed_queries = embed

    def _vector(self, text: str) -> np.ndarray:
        vector = np.full(self.dimension, 0.01, dtype=np.float32)  # never a vector of length 0
        for word in re.findall(r"\w+", text.lower()):
            digest = hashlib.sha256(word.encode()).digest()
            vector[digest[0] % self.dimension] += 1
            vector[digest[1] % self.dimension] -= 0.5
        return vector / max(1e-6, float(np.linalg.norm(vector)))


def town_nodes(count: int = len(TOWNS)) -> list[TextNode]:
    return [
        TextNode(
            id_=town.lower(),
            text=f"The town of {town} has a harbour, a market and a lighthouse.",
            metadata={"title": town, "population": 100 * i},
        )
        for i, town in enumerate(TOWNS[:count])
    ]


def rendered_tokens(model: KVLinkModel, nodes: Sequence[TextNode]) -> int:
    """Tokens of the nodes as passages: what a prompt that holds them all reuses."""
    return sum(
        len(model.tokenizer.encode(f"{node.metadata['title']}: {node.text}\n")) for node in nodes
    )


def wait_for_a_turn(loop: asyncio.AbstractEventLoop) -> None:
    """In another thread than the loop's: wait until the loop has turned."""
    turned = threading.Event()
    loop.call_soon_threadsafe(turned.set)
    assert threading.current_thread() is not threading.main_thread()
    assert turned.wait(600), "the event loop stands still"


class Calls:
    """What LLMs were asked and what they answered, in order, by LlamaIndex's own events."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def messages(self) -> list[list[dict[str, str]]]:
        """Of each call: its messages; a completion's prompt is one user message."""
        found = []
        for end in self.ends:
            if isinstance(end, LLMCompletionEndEvent):
                found.append([{"role": "user", "content": end.prompt}])
            else:
                found.append([{"role": m.role.value, "content": m.content} for m in end.messages])
        return found

    def prompts(self) -> list[str]:
        """Of each call: all its texts."""
        return ["\n".join(m["content"] for m in messages) for messages in self.messages()]

    def answers(self) -> list[str]:
        return [
            end.response.text
            if isinstance(end, LLMCompletionEndEvent)
            else end.response.message.content
            for end in self.ends
        ]

    def traces(self) -> list[dict[str, Any]]:
        return [end.response.raw["trace"] for end in self.ends]

    def equal_oracle(self, rag: KVLinkRAG, count: int) -> bool:
        """Whether each answer is that of a masked full prefill of what was recognised.

        Passages beyond those that the trace counts were too long together, and stayed text.
        """
        return self.answers() == [
            rag.model.generate(
                _first_passages(rag.recognise_chat(messages), trace["passages"]),
                mode="masked",
                max_new_tokens=count,
            )
            for messages, trace in zip(self.messages(), self.traces(), strict=True)
        ]


def _first_passages(parts: Sequence[Part], count: int) -> list[Part]:
    kept = [part for part in parts if isinstance(part, Passage)][:count]
    return [p if isinstance(p, Text) or p in kept else Text(p.document.text) for p in parts]


@contextmanager
def recorded_calls() -> Iterator[Calls]:
    """Listen to every LLM while the block runs."""
    calls = Calls()

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent):
                calls.ends.append(event)

    root = get_dispatcher()
    handler = Handler()
    root.add_event_handler(handler)
    try:
        yield calls
    finally:
        root.event_handlers.remove(handler)
