"""Token ids to snapshots: each passage is encoded once, alone, in padded batches.

Knows tensors; knows no store and no prompt. KVLink, arXiv 2502.16002, section 3.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from kvlink_rag.errors import DeviceMemoryError

from .snapshot import Snapshot

if TYPE_CHECKING:
    from kvlink_rag.engine.backbone import Backbone

TOKENS_A_BATCH = 4096

logger = logging.getLogger(__name__)


def encode_one(backbone: Backbone, token_ids: Sequence[int]) -> Snapshot:
    """The snapshot of one passage."""
    return encode_batch(backbone, [token_ids])[0]


def encode_many(
    backbone: Backbone,
    passages: Sequence[Sequence[int]],
    *,
    tokens_a_batch: int = TOKENS_A_BATCH,
) -> Iterator[tuple[int, Snapshot]]:
    """Snapshots of all passages, as (index, snapshot), in batches of similar length.

    A CUDA device that runs out of memory gets smaller batches, down to one passage.
    """
    for batch in batches([len(ids) for ids in passages], tokens_a_batch):
        yield from zip(batch, _encode(backbone, [passages[i] for i in batch]), strict=True)


def _encode(backbone: Backbone, passages: Sequence[Sequence[int]]) -> list[Snapshot]:
    try:
        return encode_batch(backbone, passages)
    except torch.cuda.OutOfMemoryError as error:
        if len(passages) == 1:
            raise DeviceMemoryError(
                f"the device ran out of memory encoding a passage of {len(passages[0])} tokens "
                f"({error}); split it smaller, or use a smaller dtype or another device"
            ) from error
    logger.warning("the device ran out of memory encoding %d passages: halved", len(passages))
    torch.cuda.empty_cache()
    half = len(passages) // 2
    return _encode(backbone, passages[:half]) + _encode(backbone, passages[half:])


def batches(lengths: Sequence[int], tokens_a_batch: int) -> Iterator[list[int]]:
    """Indices grouped by similar length so that a batch, padded, holds `tokens_a_batch`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_a_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def encode_batch(backbone: Backbone, passages: Sequence[Sequence[int]]) -> list[Snapshot]:
    """Snapshots of passages that fit one batch, on the CPU, in the model's dtype."""
    from kvlink_rag.engine.backbone import pad_batch  # what has a backbone has transformers loaded

    keys, values = backbone.capture(pad_batch(passages))
    return [
        Snapshot(
            keys=_rows(keys, row, len(ids)),
            values=_rows(values, row, len(ids)),
            token_ids=torch.tensor(ids, dtype=torch.int64),
        )
        for row, ids in enumerate(passages)
    ]


def _rows(layers: Sequence[torch.Tensor], row: int, tokens: int) -> torch.Tensor:
    """One passage of a batch: [layers, kv_heads, tokens, head_dim], contiguous, on the CPU."""
    out = torch.empty(
        (len(layers), layers[0].shape[2], tokens, layers[0].shape[3]), dtype=layers[0].dtype
    )
    for layer, states in enumerate(layers):
        out[layer].copy_(states[row, :tokens].transpose(0, 1))
    return out
