"""One encoder of transformers at work: texts → token ids → batches → states → vectors.

Knows how texts become states; how states become a vector is for its kinds to say (`contriever`,
`sentence_embedder`). Knows neither the index nor the catalog.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from kvlink_rag.disk.digests import tokenizer_digest
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.disk.loaded_weights import LoadedWeights, Look
from kvlink_rag.errors import ConfigError, first_line
from kvlink_rag.pretrained.known import PAIRS
from kvlink_rag.pretrained.model_files import resolve

from .embedder import Vectors

_FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]
# What of a configuration shapes the vectors and does not show in the weights.
_SHAPING = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps")


class TextEncoder(ABC):
    """An encoder and its tokenizer. Safe to share between threads.

    model, tokenizer: as transformers loads them (`BertModel`, `PreTrainedTokenizerBase`).
    batch_size: texts a forward pass. max_length: tokens a text, special tokens included; what is
    longer is cut at the end, and no window is longer than the encoder's own positions (512 for
    Contriever). source: the directory the weights came from, if any. name: what it was loaded by.
    """

    name: str = ""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        max_length: int = 512,
        source: Path | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ConfigError(
                f"found batch_size {batch_size}, max_length {max_length}, expected 1+"
            )
        self.model = model.eval()
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # not used, and some checkpoints have none: then random
        # `split_special_tokens` is state of the backend, not of the call: a copy of our own.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer_lock = ForkSafeLock()
        self.batch_size = batch_size
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length: int = min(max_length, positions, tokenizer.model_max_length)
        self._weights, self._weights_lock = LoadedWeights(self.model, source), ForkSafeLock()
        self._known: tuple[Look, list[str]] | None = None
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    @abstractmethod
    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors [texts, dimension] of float32 states [texts, tokens, width].

        mask: [texts, tokens], 1 for real tokens, which come first.
        """

    @abstractmethod
    def _recipe_facts(self) -> list[Any]:
        """What of the way from text to vector enters the fingerprint, weights and sizes apart."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer, recipe and `max_length`.

        A loaded directory and the same model handed over have different ones. Device, dtype and
        batch size do not enter. The weights are read once, and again where they look otherwise (or
        were moved since, which makes them those of a model handed over).
        """
        config = [str(getattr(self.model.config, name, None)) for name in _SHAPING]
        recipe = [*self._recipe_facts(), self.max_length]
        weights, *adapters = self._weights_facts()
        facts = [*recipe, weights, self._tokenizer_digest, *config, *adapters]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _weights_facts(self) -> list[str]:
        """A digest of the weights as they are now, and the state of adapters where there are."""
        with self._weights_lock:
            look = self._weights.look()
            if self._known is None or self._known[0] != look:
                adapters = [look.adapters] if look.adapters else []
                self._known = look, [self._weights.digest(look), *adapters]
            return self._known[1]

    @property
    def window(self) -> int:
        """The most tokens of a text that are read, special tokens included: `max_length`."""
        return self.max_length

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as a passage, uncut, special tokens included."""
        return [len(ids) for ids in self._token_ids(texts, cut=False)]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of passages: float32 [texts, dimension], in order.

        Special-token strings in a text are plain text. A text without tokens has the vector of
        the encoder's special tokens alone. Raises `ConfigError` where a vector is not finite
        (a dtype that is too narrow) and torch's error where memory runs out for a single text.
        """
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        ids = self._token_ids(texts)
        for batch in _batches([len(i) for i in ids], self.batch_size):
            vectors[batch] = self._encode([ids[i] for i in batch])
        if not np.isfinite(vectors).all():
            raise ConfigError("found a vector that is not finite; load the encoder in float32")
        return vectors

    def _token_ids(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Token ids of each text with the encoder's special tokens, cut to the window."""
        if not texts:
            return []
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        with self._tokenizer_lock:
            found = self._tokenizer(
                clean,
                truncation=cut,
                max_length=self.max_length if cut else None,
                verbose=False,  # about texts that are longer than the window
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        return [list(ids) for ids in found["input_ids"]]

    def _encode(self, batch: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch; where the device's memory does not do, of its halves."""
        try:
            return self._forward(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return np.concatenate([self._encode(batch[:half]), self._encode(batch[half:])])

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Sequence[int]]) -> Vectors:
        ids, mask = _pad(batch, self.model.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return np.asarray(self._pool(states.float(), mask).cpu().numpy())


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of texts that have tokens, longest first, `size` at a time."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _pad(batch: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [texts, tokens]; padding is id 0, which the mask hides."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in batch], batch_first=True)
    lengths = torch.tensor([len(i) for i in batch])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def find_encoder(path_or_id: str | Path, local_files_only: bool) -> Path:
    """The directory that `path_or_id` names. Raises `ConfigError` where there is none."""
    if not local_files_only or str(path_or_id) in PAIRS or Path(path_or_id).expanduser().is_dir():
        return resolve(path_or_id, role="embedder", files=_FILES)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path_or_id), allow_patterns=_FILES, local_files_only=True)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the encoder {str(path_or_id)!r} is not on this machine; fetch it while online, or "
            "give the path of a directory"
        ) from error


def load_encoder(directory: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Model and tokenizer of a directory, as transformers loads them, without a word on stderr.

    Raises `ConfigError` where they cannot be loaded or weights are missing.
    """
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kind = MODEL_MAPPING[type(config)]
        pooler = "add_pooling_layer" in signature(kind).parameters  # it would be random, and unused
        with _silent():
            model, report = AutoModel.from_pretrained(
                directory,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **({"add_pooling_layer": False} if pooler else {}),
            )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # three libraries raise whatever they meet in the files
        raise ConfigError(
            f"{directory} holds no encoder that can be loaded: {first_line(error)}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{directory} holds no encoder that can be loaded: {missing[0]} is not among its "
            f"weights ({len(missing)} are missing)"
        )
    return model, tokenizer


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bar and no report of unused weights (a pooler) while an encoder loads."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
