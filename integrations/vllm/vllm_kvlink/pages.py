"""Where the tokens of a request lie in vLLM's paged cache.

A page (block) holds `block_size` tokens; token n of a request lies in its page n // block_size, and
there at n % block_size. Knows numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slots(blocks: Sequence[int], block_size: int, start: int, stop: int) -> Tensor:
    """int64 [stop - start]: the slots of the tokens [start, stop), counted over all pages.

    blocks: the request's pages, in order. Raises `ValueError` where they do not reach.
    """
    if not 0 <= start <= stop <= len(blocks) * block_size:
        raise ValueError(
            f"tokens {start} to {stop} do not lie in {len(blocks)} pages of {block_size}"
        )
    at = torch.arange(start, stop)
    return torch.tensor(blocks)[at // block_size] * block_size + at % block_size
