"""What a collection asks of an encoder. Knows texts and vectors, and no encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


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


@runtime_checkable
class Windowed(Protocol):
    """What an `Embedder` may say besides: how much of a passage it reads."""

    @property
    def window(self) -> int:
        """The most tokens of a passage that it reads; what is beyond them is cut off."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as a passage, uncut, all that it adds to a text included."""
        ...


def count_cut(embedder: Embedder, texts: Sequence[str]) -> int:
    """How many of `texts` the embedder cuts off; 0 where it does not say."""
    if not isinstance(embedder, Windowed):
        return 0
    return sum(count > embedder.window for count in embedder.count_tokens(texts))
