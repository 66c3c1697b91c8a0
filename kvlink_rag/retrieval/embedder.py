"""What a collection asks of an encoder. Knows texts and vectors, and no encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
