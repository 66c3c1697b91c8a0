"""Greedy decoding of many started prompts at once, one forward a token for all of them.

Each prompt was prefilled alone, so that its time to first token is its own; then the caches are
laid in one batch, padded at the end, and padding is never visible. The rules of an answer (where it
ends, that it says something visible) are those of `TextStream`. Knows tensors and text pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvlink_rag.engine.families import masks_by_layer
from kvlink_rag.engine.live_cache import LiveLayer, as_argument, cache_of
from kvlink_rag.engine.text_pieces import TextPieces
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.prompt.layout import visibility

from .modes import Started


@dataclass(slots=True)
class Decoded:
    """An answer.

    margins: for each step how far apart the two best logits lay, over the largest (see `compare`).
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    ended: bool = False


@torch.inference_mode()
def decode(model: KVLinkModel, started: Sequence[Started], most: int) -> list[Decoded]:
    """Up to `most` tokens for each prompt, greedily; fewer where the model's window is full."""
    answers = [Decoded() for _ in started]
    pieces = [TextPieces(model.tokenizer.decode) for _ in started]
    batch = _Batch(model, started, most)
    logits = torch.stack([each.logits for each in started])
    for step in range(most):
        chosen = [
            _choose(model, row, answer, text)
            for row, answer, text in zip(logits.float().cpu(), answers, pieces, strict=True)
        ]
        full = [each.position + step + 1 >= model.window for each in started]
        for answer, stop in zip(answers, full, strict=True):
            answer.ended = answer.ended or stop
        if all(answer.ended for answer in answers) or step + 1 == most:
            break
        logits = batch.step(torch.tensor(chosen))
    for answer, text in zip(answers, pieces, strict=True):
        answer.text += text.finish()
    return answers


@torch.inference_mode()
def likelihood(model: KVLinkModel, started: Started, text: str) -> float:
    """Nats a token that the answer `text` costs after the prompt; appends it to the prompt's cache.

    Over the vocabulary that can be said, with the end of a text as its last token.
    """
    ids = model.tokenizer.encode(text)
    if (end := model.tokenizer.hf.eos_token_id) is not None:
        ids = [*ids, end]
    logits = started.logits[None].float().cpu()
    if len(ids) > 1:  # the first token's are there
        tokens, first = torch.tensor(ids[:-1], dtype=torch.int64), started.position
        positions = torch.arange(first, first + len(tokens))
        rest = model.backbone.forward(
            tokens, positions, torch.zeros_like(tokens), started.cache, keep=len(tokens)
        )
        logits = torch.cat([logits, rest.float().cpu()])
    if model.never_ids:
        logits = logits.index_fill(-1, torch.tensor(model.never_ids), -torch.inf)
    return float(cross_entropy(logits, torch.tensor(ids)))


def _choose(model: KVLinkModel, logits: Tensor, answer: Decoded, text: TextPieces) -> int:
    """Take the best token into the answer; 0 once it has ended."""
    if answer.ended:
        return 0
    ruled_out = [*model.never_ids, *(() if text.visible else model.end_ids)]
    if ruled_out:
        logits = logits.index_fill(0, torch.tensor(ruled_out), -torch.inf)
    best, second = logits.topk(2).values.tolist()
    token = int(logits.argmax())
    answer.margins.append((best - second) / max(abs(best), 1e-9))
    answer.tokens.append(token)
    if token in model.end_ids:
        answer.ended = True
    else:
        answer.text += text.push(token)
    return token


class _Batch:
    """The live caches of several prompts in one: [batch, kv_heads, longest + room, head_dim]."""

    def __init__(self, model: KVLinkModel, started: Sequence[Started], room: int) -> None:
        self._backbone = model.backbone
        device = model.backbone.device
        longest = max(len(each.cache.positions) for each in started)
        self._keys_at = torch.full((len(started), longest + room), -1, device=device)
        for row, each in zip(self._keys_at, started, strict=True):
            row[: len(each.cache.positions)] = each.cache.positions
        layers = [
            _batched([each.cache.layers[i] for each in started], longest, longest + room)
            for i in range(model.backbone.layers)
        ]
        self._cache = cache_of(layers)
        self._next = torch.tensor([each.position for each in started], device=device)
        self._used = longest

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each prompt: logits [batch, vocab] of the next."""
        self._keys_at[:, self._used] = self._next
        self._used += 1
        output = self._backbone.model(
            input_ids=tokens.to(self._next.device)[:, None],
            position_ids=self._next[:, None],
            attention_mask=self._masks(),
            use_cache=True,
            **as_argument(self._cache, self._backbone.model),
        )
        self._next = self._next + 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _masks(self) -> Any:
        """bool [batch, 1, 1, entries], by the engine's rule; generated tokens are of segment 0."""
        keys_at = self._keys_at[:, : self._used]
        none = torch.zeros_like(keys_at[0])

        def mask(window: int | None) -> Tensor:
            seen = [
                visibility(at[None], none[:1], keys, none, window=window) & (keys >= 0)
                for at, keys in zip(self._next, keys_at, strict=True)
            ]
            return torch.stack(seen)[:, None]

        return masks_by_layer(self._backbone.config, mask)


def _batched(layers: Sequence[LiveLayer], used: int, capacity: int) -> LiveLayer:
    """One layer of several caches, each padded at its end to `capacity` entries."""
    shape = (len(layers), layers[0].keys.shape[1], capacity, layers[0].keys.shape[3])
    keys, values = (layers[0].keys.new_zeros(shape) for _ in "kv")
    for row, layer in enumerate(layers):
        keys[row, :, : layer.length] = layer.keys[0, :, : layer.length]
        values[row, :, : layer.length] = layer.values[0, :, : layer.length]
    return LiveLayer(keys, values, used)
