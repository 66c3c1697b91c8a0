"""Token ids to snapshots: each passage is encoded once, alone, in padded batches.

A header, where the spec has one, is run before every passage and not kept: it gives a passage what
a beginning of a prompt gives, a place for attention that looks for nothing (attention sink). Knows
tensors; knows no store and no prompt. KVLink, arXiv 2502.16002, section 3.1; shared prefix: APE,
Yang et al., arXiv 2502.05431.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvlink_rag.errors import DeviceMemoryError

from .snapshot import Snapshot

if TYPE_CHECKING:
    from kvlink_rag.engine.backbone import Backbone

TOKENS_A_BATCH = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassageEncoder:
    """What makes snapshots: a model, and the header (token ids) that passages see before them."""

    backbone: Backbone
    header: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with anything that shapes a snapshot but its own tokens."""
        found = self.backbone.fingerprint
        if not self.header:
            return found
        return hashlib.sha256(f"{found} header {list(self.header)}".encode()).hexdigest()

    def one(self, token_ids: Sequence[int]) -> Snapshot:
        """The snapshot of one passage."""
        return encode_batch(self, [token_ids])[0]

    def many(
        self, passages: Sequence[Sequence[int]], *, tokens_a_batch: int = TOKENS_A_BATCH
    ) -> Iterator[tuple[int, Snapshot]]:
        """Snapshots of all passages, as (index, snapshot), in batches of similar length.

        A CUDA device that runs out of memory gets smaller batches, down to one passage.
        """
        lengths = [len(self.header) + len(ids) for ids in passages]
        for batch in batches(lengths, tokens_a_batch):
            yield from zip(batch, _encode(self, [passages[i] for i in batch]), strict=True)


def _encode(encoder: PassageEncoder, passages: Sequence[Sequence[int]]) -> list[Snapshot]:
    try:
        return encode_batch(encoder, passages)
    except torch.cuda.OutOfMemoryError as error:
        if len(passages) == 1:
            raise DeviceMemoryError(
                f"the device ran out of memory encoding a passage of {len(passages[0])} tokens "
                f"({error}); split it smaller, or use a smaller dtype or another device"
            ) from error
    logger.warning("the device ran out of memory encoding %d passages: halved", len(passages))
    torch.cuda.empty_cache()
    half = len(passages) // 2
    return _encode(encoder, passages[:half]) + _encode(encoder, passages[half:])


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


def encode_batch(encoder: PassageEncoder, passages: Sequence[Sequence[int]]) -> list[Snapshot]:
    """Snapshots of passages that fit one batch, on the CPU, in the model's dtype."""
    from kvlink_rag.engine.backbone import pad_batch  # what has a backbone has transformers loaded

    header = encoder.header
    keys, values = encoder.backbone.capture(pad_batch([(*header, *ids) for ids in passages]))
    return [
        Snapshot(
            keys=_own(keys, row, len(header), len(ids)),
            values=_own(values, row, len(header), len(ids)),
            token_ids=torch.tensor(ids, dtype=torch.int64),
        )
        for row, ids in enumerate(passages)
    ]


def _own(layers: Sequence[torch.Tensor], row: int, header: int, tokens: int) -> torch.Tensor:
    """One passage of a batch: [layers, kv_heads, tokens, head_dim], contiguous, on the CPU."""
    out = torch.empty(
        (len(layers), layers[0].shape[2], tokens, layers[0].shape[3]), dtype=layers[0].dtype
    )
    for layer, states in enumerate(layers):
        out[layer].copy_(states[row, header : header + tokens].transpose(0, 1))
    return out
