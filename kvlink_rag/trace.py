"""What one question cost: milliseconds of each stage, and token counts.

Plain data. Each stage's time is wall-clock and excludes the others; `first_token_ms` is the time
from the first `next()` of the stream to the first token, so it includes all stages before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Trace:
    """Filled in while a question runs; final once its stream ends. Times in milliseconds.

    waiting_ms: until no other prompt of the same model was in the way of this one's prefill.
    passages: passages in the prompt. reused_tokens: their tokens, taken from snapshots;
    repaired_tokens: those of them that were computed again (see `model.repair`), whose assembly is
    part of `prefill_ms`.
    passages_as_text: passages recognised and computed all the same, for want of slots or room.
    unrecognised_tokens: of a prompt, those that look like documents of the collection but are not
    word for word, so they are computed.
    prefix_tokens: computed tokens taken from the prefix cache. computed_tokens: tokens the prefill
    ran the model over. snapshots_found: read from the store, or kept on the device;
    snapshots_encoded: encoded now. With CUDA graphs copies go on behind `assembly_ms`, and
    `prefill_ms` waits for them. notice: what is doubtful about the model, such as an adapter on
    another base than it was trained on. dtype: what the model computed in, such as "float32";
    weights: "int8" where generated tokens took 8-bit ones.
    """

    retrieval_ms: float = 0.0
    layout_ms: float = 0.0
    read_ms: float = 0.0
    encode_ms: float = 0.0
    assembly_ms: float = 0.0
    waiting_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    passages: int = 0
    passages_as_text: int = 0
    unrecognised_tokens: int = 0
    reused_tokens: int = 0
    repaired_tokens: int = 0
    prefix_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    snapshots_found: int = 0
    snapshots_encoded: int = 0
    mode: str = "reuse"
    finish_reason: str = ""
    notice: str = ""
    dtype: str = ""
    weights: str = ""
    started: float = field(default_factory=time.perf_counter, repr=False)

    @contextmanager
    def stage(self, name: str, synchronize: Callable[[], None] | None = None) -> Iterator[None]:
        """Add the block's time to `<name>_ms`; `synchronize` waits for the device first."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if synchronize is not None:
                synchronize()
            field_name = f"{name}_ms"
            elapsed = (time.perf_counter() - start) * 1e3
            setattr(self, field_name, getattr(self, field_name) + elapsed)

    def restart(self) -> None:
        """Begin counting now."""
        self.started = time.perf_counter()

    def elapsed_ms(self) -> float:
        """Milliseconds since this trace began."""
        return (time.perf_counter() - self.started) * 1e3

    def to_dict(self) -> dict[str, float | int | str]:
        """All fields but the start time, times rounded to a microsecond."""
        fields = asdict(self)
        del fields["started"]
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}
