"""Whether reuse equals the masked full prefill of one prompt, and what a codec costs.

The masked prefill is the oracle of the whole project: every token computed, with the visibility of
reuse. Knows prompts and one model's backbone; knows no collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlink_rag.arguments import UNREPAIRED, Mode
from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.snapshot import EXACT, Source
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

from .prompt_run import PromptRun

# The largest relative difference of logits that rounding explains; see docs/architecture.md.
TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether reuse equals the masked full prefill on this model and prompt.

    difference: largest difference of logits over the largest logit of the masked run. margin: how
    far apart the two best logits of the masked run lie, on the same scale. Where the snapshots are
    in a codec, the masked run has their keys and values, and `price` is what the codec costs.
    compared, wrong: of a collection, how many stored snapshots were encoded again, and the ids of
    documents whose snapshot is not what this model encodes.
    """

    holds: bool
    difference: float
    tolerance: float
    same_top_token: bool
    margin: float
    message: str
    price: CodecPrice | None = None
    compared: int = 0
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CodecPrice:
    """How far reuse of snapshots in a codec is from the masked prefill without it.

    difference: largest difference of logits over the largest logit. divergence: Kullback-Leibler,
    in nats, from the exact distribution of the next token. same_top_token: whether the best token
    is the same.
    """

    codec: str
    difference: float
    divergence: float
    same_top_token: bool


def first_logits(
    backbone: Backbone,
    prompt: Layout,
    mode: Mode,
    reuse: Reuse,
    trace: Trace | None = None,
) -> Tensor:
    """float32 logits [vocab] of the token after `prompt`, on the CPU; see `KVLinkModel.prefill`."""
    run = PromptRun(backbone, prompt, trace or Trace(mode=mode), reuse)
    logits = run.start(room=0)
    run.keep()
    return logits.cpu()


def verify(backbone: Backbone, prompt: Layout, reuse: Reuse) -> Verification:
    """Compare reuse with the masked full prefill of `prompt`.

    Snapshots in a codec are compared with the masked prefill over their own keys and values,
    which must be equal, and with the exact one, which says what the codec costs.
    """
    fresh = replace(reuse, prefix=None, repair=UNREPAIRED)  # the snapshots as they are
    logits = first_logits(backbone, prompt, "reuse", fresh)
    masked = first_logits(backbone, prompt, "masked", fresh)
    tolerance = TOLERANCE.get(backbone.dtype, 6e-2)
    passages = [prompt.passage_ids(span) for span in prompt.passages]
    snapshots = fresh.snapshots.fetch(passages, Trace()) if passages else []
    seen = (snapshot.codec_for(backbone.dtype) for snapshot in snapshots)
    codec = next((name for name in seen if name != EXACT), None)
    if codec is None:
        return compare(logits, masked, tolerance)
    given = _masked_over(backbone, prompt, snapshots, fresh)
    return _with_price(compare(logits, given, tolerance), codec_price(codec, logits, masked))


def _masked_over(
    backbone: Backbone, prompt: Layout, snapshots: Sequence[Source], reuse: Reuse
) -> Tensor:
    """Logits of the masked prefill whose passages have the keys and values of `snapshots`."""
    states = [snapshot.exact(backbone.dtype) for snapshot in snapshots]
    keys, values = (torch.cat(each, dim=2) for each in zip(*states, strict=True))
    places = (prompt.with_headers().segments > 0).nonzero()[:, 0]
    with backbone.giving(places, keys, values):
        return first_logits(backbone, prompt, "masked", reuse)


def compare(logits: Tensor, expected: Tensor, tolerance: float) -> Verification:
    """Say whether float32 `logits` [vocab] equal `expected` within `tolerance` (relative)."""
    scale = float(expected.abs().max()) or 1.0
    difference = float((logits - expected).abs().max()) / scale
    best = expected.topk(2).values
    margin = float(best[0] - best[1]) / scale
    same = bool(logits.argmax() == expected.argmax())
    holds = difference <= tolerance and (same or margin <= 2 * tolerance)
    verdict = (
        "reuse equals the masked full prefill: answers from snapshots are the model's own"
        if holds
        else "reuse does NOT equal the masked full prefill: do not use this model with snapshots"
    )
    message = f"{verdict} (largest difference {difference:.2e}, tolerance {tolerance:.0e})"
    return Verification(holds, difference, tolerance, same, margin, message)


def codec_price(codec: str, logits: Tensor, exact: Tensor) -> CodecPrice:
    """What float32 `logits` [vocab] from snapshots of `codec` lose against the `exact` ones."""
    found = compare(logits, exact, 0.0)
    exact_log, log = exact.log_softmax(-1), logits.log_softmax(-1)
    divergence = float((exact_log.exp() * (exact_log - log)).sum())
    return CodecPrice(codec, found.difference, max(0.0, divergence), found.same_top_token)


def _with_price(found: Verification, price: CodecPrice) -> Verification:
    """`found` over the keys and values of a codec, with what it costs."""
    over = f"masked full prefill over the same {price.codec} keys and values"
    message = found.message.replace("masked full prefill", over)
    same = "the same" if price.same_top_token else "ANOTHER"
    message += (
        f"; against exact ones {price.codec} moves the logits by {price.difference:.2e} of the "
        f"largest, the distribution by {price.divergence:.2e} nats, and gives {same} first token"
    )
    if found.holds:
        message = message.replace(
            "answers from snapshots are the model's own", "what differs from them is the codec's"
        )
    return replace(found, message=message, price=price)
