"""Orders to keys and values: the worker's side, without vLLM.

    order → documents of the catalog → layout, its seal compared → snapshots → keys and values

Snapshots come from the collection's store or its tier; what is missing is encoded. Knows a
collection; knows no pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvlink_rag import KVLinkRAG

from .orders import OrderError, read_order, same, seal_of


@dataclass(frozen=True, slots=True)
class Entries:
    """Keys (after RoPE) and values of the tokens [start, stop) of a prompt, of all layers.

    keys, values: [layers, kv_heads, tokens, head_dim].
    """

    keys: Tensor
    values: Tensor


class Prefiller:
    """One collection and its model. For any number of threads. secret: of the seals."""

    def __init__(self, rag: KVLinkRAG, secret: bytes) -> None:
        self._rag, self._secret = rag, secret

    def entries(self, given: object, start: int, stop: int) -> Entries:
        """Those of the tokens [start, stop) of an order's prompt.

        Raises `OrderError` where the prompt is no longer, or never was, what its seal says, such as
        after a document was deleted, and the collection's errors.
        """
        order = read_order(given, self._rag.get)
        laid = self._rag.model.layout(order.parts)
        if not same(order.seal, seal_of(laid, self._secret)):
            raise OrderError(
                "the prompt's seal is another one: it was not made by the front end of this "
                "collection, or a document has changed since; send the request again"
            )
        if not 0 <= start < stop <= len(laid):
            raise OrderError(
                f"found tokens {start} to {stop}, expected some of the prompt's {len(laid)}"
            )
        made = self._rag.model.prompt_cache(order.parts, reuse=self._rag.reuse)
        return Entries(made.keys[:, :, start:stop], made.values[:, :, start:stop])
