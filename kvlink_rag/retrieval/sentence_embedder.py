"""Encoders that say by their own files how a text becomes a vector (`recipe`).

Equal to sentence-transformers on the same directory, of length 1 where its files compare by the
cosine. An implementation of our own, since that package brings scikit-learn and scipy for what are
a few lines here, and would import the classes that a `modules.json` names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor

from kvlink_rag.errors import ConfigError
from kvlink_rag.pretrained.model_files import find_device, find_dtype

from .contriever import mean_pooling
from .embedder import Vectors
from .recipe import MODULES, Recipe, read_recipe
from .text_encoder import TextEncoder, find_encoder, load_encoder

_LONGEST = 512  # tokens a text, where neither files nor caller say


class SentenceEmbedder(TextEncoder):
    """An encoder with the recipe of its files. Arguments as in `TextEncoder`, and the recipe."""

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe, **options: Any) -> None:
        tokenizer = _as_asked(tokenizer, recipe)
        super().__init__(model, tokenizer, **options)
        self.recipe = recipe

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 32,
        max_length: int | None = None,
        local_files_only: bool = False,
    ) -> SentenceEmbedder:
        """Load the encoder from a directory or the hub, as `ContrieverEmbedder` does.

        max_length: None is what the files say. Raises `ConfigError`, and `ModelNotSupported` where
        the files ask for what cannot be done.
        """
        directory = find_encoder(path_or_id, local_files_only)
        recipe = read_recipe(directory)
        if recipe is None:
            raise ConfigError(f"{directory} holds no {MODULES}, which would say how to pool")
        weights = directory / recipe.folder
        model, tokenizer = load_encoder(
            weights, torch.float32 if dtype == "auto" else find_dtype(dtype)
        )
        return cls(
            model.to(find_device(device)),
            tokenizer,
            recipe,
            batch_size=batch_size,
            max_length=max_length or recipe.max_length or _LONGEST,
            source=weights,
        )

    @property
    def dimension(self) -> int:
        """Length of a vector: that of a state for each pooling."""
        return super().dimension * len(self.recipe.poolings)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of passages: float32 [texts, dimension], in order, after the files' prompt."""
        return super().embed([self.recipe.passage + text for text in texts])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as a passage, uncut, prompt and special tokens included."""
        return super().count_tokens([self.recipe.passage + text for text in texts])

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions: float32 [texts, dimension], in order, after the files' prompt."""
        return super().embed([self.recipe.query + text for text in texts])

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        pooled = torch.cat([_POOL[name](states, mask) for name in self.recipe.poolings], dim=1)
        return torch.nn.functional.normalize(pooled, dim=1) if self.recipe.normalise else pooled

    def _recipe_facts(self) -> list[Any]:
        recipe = self.recipe
        asked = [recipe.normalise, recipe.query, recipe.passage, recipe.lower]
        return ["+".join(recipe.poolings), *(asked if any(asked) else [])]


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    rows = torch.arange(len(states), device=states.device)
    return states[rows, mask.sum(dim=1) - 1]


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None].bool(), -torch.inf).amax(dim=1)


def _sum_over_root(states: Tensor, mask: Tensor) -> Tensor:
    return mean_pooling(states, mask) * mask.sum(dim=1)[..., None].sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Token k of n counts k times (Muennighoff, arXiv 2202.08904)."""
    places = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    weighted = states.masked_fill(~mask[..., None].bool(), 0.0) * places[..., None]
    return weighted.sum(dim=1) / places.sum(dim=1)[..., None]


_POOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": mean_pooling,
    "mean_sqrt_len_tokens": _sum_over_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def _as_asked(tokenizer: Any, recipe: Recipe) -> Any:
    """A copy of `tokenizer` with the length of the recipe, and in lower case where it says so."""
    found = copy.deepcopy(tokenizer)
    if recipe.max_length is not None:
        found.model_max_length = recipe.max_length
    if recipe.lower:
        backend = found.backend_tokenizer
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
    return found
