"""Text to vectors: the only file that knows the encoder model.

Contriever (Izacard et al., arXiv 2112.09118): mean pooling over the attention mask, compared by
inner product, queries and passages encoded alike. Knows texts and vectors; knows neither the
index nor the catalog.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvlink_rag.disk.digests import module_digest, tokenizer_digest, weights_digest
from kvlink_rag.disk.model_files import find_device, find_dtype, quiet, resolve
from kvlink_rag.errors import ConfigError

Vectors = npt.NDArray[np.float32]

_FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]
# What of a configuration shapes the vectors and does not show in the weights.
_SHAPING = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps")


class Embedder(Protocol):
    """What a collection asks of an encoder. Any object with these four will do."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Which encoder this is: equal for equal vectors, in every process."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of passages: float32 [texts, dimension], in order, finite."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions, compared with those of passages by inner product."""
        ...


class ContrieverEmbedder:
    """A BERT-shaped encoder with mean pooling. Safe to share between threads.

    model, tokenizer: as transformers loads them (`BertModel`, `PreTrainedTokenizerBase`).
    batch_size: texts a forward pass. max_length: tokens a text, special tokens included; what is
    longer is cut at the end, and no window is longer than the encoder's own positions (512 for
    Contriever). source: the directory the weights came from, if any.
    """

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
        self._tokenizer_lock = threading.Lock()
        self.batch_size = batch_size
        self.max_length = min(
            max_length, model.config.max_position_embeddings, tokenizer.model_max_length
        )
        self._source = source
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = "facebook/contriever",
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 32,
        max_length: int = 512,
        local_files_only: bool = False,
    ) -> ContrieverEmbedder:
        """Load the encoder from a directory or the hub.

        dtype: "auto" is float32 on every device, so that vectors made on one agree with those
        made on another. Weights are read from safetensors files, or from a `pytorch_model.bin`
        with `weights_only`; code from the repository is never run. Raises `ConfigError` where
        the model cannot be found or loaded.
        """
        directory = _directory(path_or_id, local_files_only)
        model, tokenizer = _load(directory, torch.float32 if dtype == "auto" else find_dtype(dtype))
        model = model.to(find_device(device))
        return cls(model, tokenizer, batch_size=batch_size, max_length=max_length, source=directory)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer, pooling and `max_length`.

        A loaded directory and the same model handed over have different ones. Device, dtype and
        batch size do not enter.
        """
        weights = weights_digest(self._source) if self._source else module_digest(self.model)
        config = [str(getattr(self.model.config, name, None)) for name in _SHAPING]
        facts = ["mean", self.max_length, weights, self._tokenizer_digest, *config]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

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

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions: Contriever encodes them as it does passages."""
        return self.embed(texts)

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the encoder's special tokens, cut to the window."""
        if not texts:
            return []
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        with self._tokenizer_lock:
            found = self._tokenizer(
                clean,
                truncation=True,
                max_length=self.max_length,
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
        return np.asarray(mean_pooling(states.float(), mask).cpu().numpy())


def mean_pooling(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of real tokens, as on Contriever's model card.

    states: [texts, tokens, dimension]; mask: [texts, tokens], 1 for real tokens. Returns
    [texts, dimension].
    """
    summed = states.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1)
    return summed / mask.sum(dim=1)[..., None]


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


def _directory(path_or_id: str | Path, local_files_only: bool) -> Path:
    if not local_files_only or Path(path_or_id).expanduser().is_dir():
        return resolve(path_or_id, bundled="encoder", files=_FILES)
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


def _load(directory: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kind = MODEL_MAPPING[type(config)]
        pooler = "add_pooling_layer" in signature(kind).parameters  # it would be random, and unused
        with quiet(directory):
            model = AutoModel.from_pretrained(
                directory,
                dtype=dtype,
                trust_remote_code=False,
                **({"add_pooling_layer": False} if pooler else {}),
            )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # three libraries raise whatever they meet in the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{directory} holds no encoder that can be loaded: {reason}") from error
    return model, tokenizer
