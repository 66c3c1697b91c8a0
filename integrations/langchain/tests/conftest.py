"""A tiny random model with a byte tokenizer, words as vectors, and towns to ask about.

What these tests compare is counts, texts and the engine's own oracle, so weights need not be
trained. The pair `small` is for the few that no other model would do for.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Awaitable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_kvlink import ChatKVLink
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvlink_rag import KVLinkModel, KVLinkRAG, Spec
from kvlink_rag.pretrained import fetch
from kvlink_rag.pretrained.known import ADAPTERS, PAIRS, SMALL
from kvlink_rag.prompt.spec import PromptPreset

torch.set_num_threads(1)

SLOTS, LINKS = 12, 2
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


@cache
def _model() -> KVLinkModel:
    config = LlamaConfig(
        vocab_size=263 + SLOTS * LINKS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim > 1:
                wide = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0, wide / parameter.shape[1] ** 0.5)
    return KVLinkModel(lm.eval(), _tokenizer(), _spec(), name="tiny")


@pytest.fixture(scope="session")
def model() -> KVLinkModel:
    return _model()


@pytest.fixture(scope="session")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of the model and of a tiny random encoder."""
    model = _model()
    root = tmp_path_factory.mktemp("pair")
    model.backbone.model.save_pretrained(root / "lm")
    (root / "lm" / "kvlink.json").write_text(model.spec.to_json())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    tokenizer = _tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
    BertModel(config).save_pretrained(root / "encoder")
    for part in ("lm", "encoder"):
        tokenizer.save_pretrained(root / part)
    return root / "lm", root / "encoder"


class WordEmbeddings(Embeddings):
    """Words hashed into a vector: deterministic, and equal words do bring texts together."""

    model = "words"

    def embed_documents(self, texts: Sequence[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(64)
        for word in re.findall(r"\w+", text.lower()):
            digest = hashlib.sha256(word.encode()).digest()
            vector[digest[0] % 64] += 1
            vector[digest[1] % 64] -= 0.5
        return list(map(float, vector))


@pytest.fixture
def embeddings() -> WordEmbeddings:
    return WordEmbeddings()


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel, embeddings: WordEmbeddings) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "collection", model=model, embedder=embeddings) as rag:
        yield rag


@pytest.fixture
def llm(rag: KVLinkRAG) -> ChatKVLink:
    return ChatKVLink(rag=rag, max_tokens=8)


@pytest.fixture
def towns() -> list[Document]:
    return [
        Document(
            f"The town of {town} has a harbour, a market and {n} lighthouses.",
            metadata={"title": town, "n": n, "kind": "odd" if n % 2 else "even"},
            id=town.lower(),
        )
        for n, town in enumerate(TOWNS)
    ]


@pytest.fixture(autouse=True)
def _own_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no test names is in its own folder, not in the user's cache."""
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))


_PLACES = {model: fetch.place_of(model) for model in PAIRS[SMALL]}  # the user's


@pytest.fixture
def small(_own_default_directory: None) -> str:
    """The name of the default pair, in the test's own cache; skips where it is not here."""
    if not all(place.is_dir() for place in _PLACES.values()):
        pytest.skip("the pair small is not here; fetch it with: kvlink-rag models get small")
    if not (ADAPTERS[SMALL] / "adapter_model.safetensors").is_file():
        pytest.skip(f"the adapter of the pair small is not in {ADAPTERS[SMALL]}")
    for model, place in _PLACES.items():
        target = fetch.place_of(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(place, target_is_directory=True)
    return SMALL


class Responsive:
    """Whether the event loop turns while something runs in another thread, which waits for that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._turns = 0

    def meet(self, target: Any, name: str) -> None:
        """Let each call of a function wait in its thread until the loop has turned."""
        real = getattr(target, name)

        def wait(*arguments: Any, **named: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            turned = threading.Event()
            self._loop.call_soon_threadsafe(turned.set)
            assert turned.wait(600), "the event loop stands still"
            self._turns += 1
            return real(*arguments, **named)

        self._monkeypatch.setattr(target, name, wait)

    async def turns(self, work: Awaitable[Any]) -> int:
        """How many calls met the turning loop during `work`."""
        self._loop, before = asyncio.get_running_loop(), self._turns
        await work
        return self._turns - before


@pytest.fixture
def responsive(monkeypatch: pytest.MonkeyPatch) -> Responsive:
    return Responsive(monkeypatch)
