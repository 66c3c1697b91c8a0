"""Contriever (Izacard et al., arXiv 2112.09118): mean pooling over the attention mask.

Compared by inner product, queries and passages encoded alike. The kind of encoder for directories
without a recipe of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.errors import ConfigError
from kvlink_rag.pretrained.model_files import find_device, find_dtype

from .embedder import Vectors
from .recipe import MODULES, Recipe, read_recipe
from .text_encoder import TextEncoder, find_encoder, load_encoder


class ContrieverEmbedder(TextEncoder):
    """A BERT-shaped encoder with mean pooling. Arguments as in `TextEncoder`."""

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
        the model cannot be found or loaded, or its own files ask for another way to pool.
        """
        directory = find_encoder(path_or_id, local_files_only)
        recipe = read_recipe(directory) or Recipe()
        if recipe != Recipe(max_length=recipe.max_length, folder=recipe.folder):
            raise ConfigError(
                f"{directory} asks for more than mean pooling ({MODULES}); open it with "
                "load_embedder"
            )
        weights = directory / recipe.folder
        model, tokenizer = load_encoder(
            weights, torch.float32 if dtype == "auto" else find_dtype(dtype)
        )
        model = model.to(find_device(device))
        return cls(model, tokenizer, batch_size=batch_size, max_length=max_length, source=weights)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions: Contriever encodes them as it does passages."""
        return self.embed(texts)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return mean_pooling(states, mask)

    def _recipe_facts(self) -> list[Any]:
        return ["mean"]


def mean_pooling(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of real tokens, as on Contriever's model card.

    states: [texts, tokens, dimension]; mask: [texts, tokens], 1 for real tokens. Returns
    [texts, dimension].
    """
    summed = states.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1)
    return summed / mask.sum(dim=1)[..., None]
