"""What the scheduler's side decides: which tokens of a request are handed over, into which pages.

Knows requests and blocks as vLLM names them, by their attributes; imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvlink_rag.errors import PromptError

from .handover import KEY, SALT, Handover


class Request(Protocol):
    """What is read of a vLLM request."""

    request_id: str
    prompt_token_ids: Sequence[int] | None
    cache_salt: str | None
    kv_transfer_params: Mapping[str, Any] | None
    sampling_params: Any  # of vLLM
    skip_reading_prefix_cache: bool | None


@dataclass(frozen=True, slots=True)
class Load:
    """Pages to fill: tokens `[first, first + count)` of a prompt.

    block_ids: of all of the request's pages, in order. handover: None where the request is refused,
    for the reason `refused`; its load then fails, which ends it with an error.
    """

    request_id: str
    block_ids: tuple[int, ...]
    first: int
    count: int
    handover: Handover | None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found in a request. loaded: tokens of its prompt that only the connector makes."""

    loaded: int
    handover: Handover | None
    refused: str = ""


class Scheduling:
    """The requests that are handed over, from their first scheduling to their end.

    vocabulary: of vLLM's model.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._known: dict[str, _Known] = {}
        self._loads: list[Load] = []

    def matched(self, request: Request, computed: int) -> int:
        """How many tokens beyond the first `computed` come from outside.

        All of the prompt but its last token, whose logits vLLM computes. The same again after a
        preemption: what was generated since is computed by vLLM, on pages that were loaded.
        """
        known = self._known.get(request.request_id) or self._look_at(request)
        if known is None:
            return 0
        self._known[request.request_id] = known
        request.skip_reading_prefix_cache = False  # else vLLM would compute the prompt after all
        return max(0, known.loaded - computed)

    def _look_at(self, request: Request) -> _Known | None:
        """What a request asks for; None where it is none of ours."""
        found = (request.kv_transfer_params or {}).get(KEY)
        ours = (request.cache_salt or "").startswith(SALT)
        if found is None and not ours:
            return None
        loaded = len(request.prompt_token_ids or ()) - 1
        try:
            if found is None:
                raise PromptError(
                    f"found a cache salt that begins with {SALT!r} and no {KEY}; that beginning is "
                    "kept for prompts that were laid out, use another salt"
                )
            sampling = request.sampling_params
            if sampling is None or sampling.prompt_logprobs is not None:
                raise PromptError(
                    "the request asks for log-probabilities of its prompt (prompt_logprobs), which "
                    "vLLM does not compute; leave it out"
                )
            handover = Handover.from_json(found)
            handover.check(request.prompt_token_ids or (), request.cache_salt, self._vocabulary)
        except PromptError as error:
            return _Known(loaded, None, str(error))
        return _Known(loaded, handover)

    def allocated(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        """Note the pages of a request of which `external` tokens come from outside."""
        known = self._known.get(request.request_id)
        if known is None or not external:
            return
        first = known.loaded - external
        self._loads.append(
            Load(
                *(request.request_id, tuple(block_ids), first, external),
                *(known.handover, known.refused),
            )
        )

    def loads(self, begun: Iterable[tuple[str, int]]) -> list[Load]:
        """What begins to be loaded with this step.

        begun: requests that start, or go on after a preemption, and their computed tokens.

        Raises `RuntimeError` where vLLM is about to compute passages of ours itself.
        """
        loads, self._loads = self._loads, []
        for request_id, computed in begun:
            known = self._known.get(request_id)
            if known is not None and computed < known.loaded:
                raise RuntimeError(
                    f"vLLM is about to compute tokens {computed} to {known.loaded} of {request_id} "
                    "causally, expected them to be handed over; the answer would be wrong"
                )
        return loads

    def finished(self, request_id: str) -> None:
        """Forget a request."""
        self._known.pop(request_id, None)
