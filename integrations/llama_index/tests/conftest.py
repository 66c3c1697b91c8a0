"""A tiny random model with a byte tokenizer, and nodes to ask it about.

What the tests compare is token ids, counts and text against the engine's own oracle, so weights
need not be trained.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_index.core
import numpy as np
import pytest
import torch
from llama_index.core.schema import TextNode
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvlink_rag import KVLinkModel, KVLinkRAG, Spec
from kvlink_rag.spec import PromptPreset

torch.set_num_threads(1)

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


def _model(window: int) -> KVLinkModel:
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


@pytest.fixture(scope="session")
def model() -> KVLinkModel:
    return _model(WINDOW)


@pytest.fixture(scope="session")
def small_window() -> KVLinkModel:
    """A window that the default prompts fill nearly alone."""
    return _model(2048)


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


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "collection", model=model, embedder=embedder) as rag:
        yield rag
        assert rag.check() == []


@pytest.fixture
def llm(rag: KVLinkRAG) -> KVLink:
    return KVLink(rag=rag, max_new_tokens=8)


@pytest.fixture(autouse=True)
def _no_global_tokenizer() -> Iterator[None]:
    """LlamaIndex's one global that these tests touch."""
    llama_index.core.global_tokenizer = None
    yield
    llama_index.core.global_tokenizer = None


def town_nodes(count: int = len(TOWNS)) -> list[TextNode]:
    return [
        TextNode(
            id_=town.lower(),
            text=f"The town of {town} has a harbour, a market and a lighthouse.",
            metadata={"title": town, "population": 100 * i},
        )
        for i, town in enumerate(TOWNS[:count])
    ]


@pytest.fixture
def nodes(rag: KVLinkRAG) -> list[TextNode]:
    """Towns, registered in the collection and not embedded there."""
    found = town_nodes()
    KVLinkRegister(rag=rag)(found)
    return found


def rendered_tokens(model: KVLinkModel, nodes: Sequence[TextNode]) -> int:
    """Tokens of the nodes as passages: what a prompt that holds them all reuses."""
    return sum(
        len(model.tokenizer.encode(f"{node.metadata['title']}: {node.text}\n")) for node in nodes
    )
