"""The connector that vLLM loads: prompts of kvlink_rag into its pages.

    scheduler   a request with an order: all its tokens but the last are elsewhere
                pages are there for them: begin a load, told to the worker with the next step
    worker      a thread: order → keys and values → pages; told when it ended
                vLLM computes the last token, then decodes

The whole prompt is handed over as one prefix, link tokens and question included, so vLLM never sees
that it has gaps. A request that is preempted is loaded again: what vLLM computes by itself, the
last token and those it said, sees all that is earlier, as the rule of visibility has it. Knows
vLLM; prompts and models are `prefill`'s affair. Of vLLM 0.32.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.model_executor.layers.attention import Attention

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError

from .loading import Loads
from .orders import FIELD, SALT, OrderError, same, secret_in
from .pages import slots
from .prefill import Entries, Prefiller
from .served import Served, check_model, check_setup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """Of one request: the tokens [start, stop) go into its pages `blocks`; refused: why not."""

    request: str
    order: Any
    salt: str | None
    blocks: tuple[int, ...]
    start: int
    stop: int
    refused: str = ""


@dataclass
class LoadsToBegin(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker with a step."""

    loads: list[Load] = field(default_factory=list)


class KVLinkConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module.

    kv_connector_extra_config: collection (its directory), remote (a tier, or ""), untried.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        groups = len(kv_cache_config.kv_cache_groups)
        served = Served.of(vllm_config, groups)
        check_setup(served, untried=extra.get("untried") is True)
        self._block_size: int = vllm_config.cache_config.block_size
        self._to_begin: list[Load] = []
        if role is KVConnectorRole.WORKER:
            self._start_worker(served, extra)

    def _start_worker(self, served: Served, extra: dict[str, Any]) -> None:
        if not isinstance(extra.get("collection"), str):
            raise ConfigError(
                "found no collection in kv_connector_extra_config, expected its directory: "
                '{"collection": "DIRECTORY"}'
            )
        rag = KVLinkRAG.open(
            extra["collection"],
            create=False,
            device=served.device,
            dtype=served.dtype,
            remote=extra.get("remote"),
        )
        check_model(served, rag.model)
        self._rag, self._prefiller = rag, Prefiller(rag, secret_in(rag.directory))
        self._loads = Loads()
        self._layers: list[Attention] = []

    # The scheduler's side

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All tokens of an ordered prompt but the last, beyond those in vLLM's own cache."""
        if _order(request) is None:
            return 0, False
        request.skip_reading_prefix_cache = False  # else it would compute the placeholders
        missing = request.num_prompt_tokens - 1 - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the load, its pages being there."""
        if num_external_tokens == 0:
            return
        (ids,) = blocks.get_block_ids()
        stop = request.num_prompt_tokens - 1
        self._to_begin.append(
            Load(
                request=request.request_id,
                order=_order(request),
                salt=request.cache_salt,
                blocks=tuple(ids),
                start=stop - num_external_tokens,
                stop=stop,
                refused=_refusal(request),
            )
        )

    def build_connector_meta(self, scheduler_output: Any) -> LoadsToBegin:
        """What was noted since the last step."""
        loads, self._to_begin = self._to_begin, []
        return LoadsToBegin(loads)

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the layers whose pages these are."""
        layers = get_layers_from_vllm_config(self._vllm_config, Attention, list(kv_caches))
        self._layers = [layers[name] for name in sorted(layers, key=_number)]
        if len(self._layers) != self._rag.model.backbone.layers:
            raise ConfigError(
                f"found {len(self._layers)} layers with pages, expected "
                f"{self._rag.model.backbone.layers}; this kind of model was not tried"
            )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads of this step."""
        for load in self._get_connector_metadata().loads:
            self._loads.begin(load.request, partial(self._load, load))

    @torch.inference_mode()
    def _load(self, load: Load) -> None:
        if load.refused:
            raise OrderError(load.refused)
        if not same(str(load.order.get("seal")), load.salt or ""):
            raise OrderError("the request's cache_salt is not its order's seal")
        entries = self._prefiller.entries(load.order, load.start, load.stop)
        self._write(entries, slots(load.blocks, self._block_size, load.start, load.stop))

    def _write(self, entries: Entries, at: torch.Tensor) -> None:
        """Into the pages, as the attention back end writes what it computes."""
        for layer, keys, values in zip(self._layers, entries.keys, entries.values, strict=True):
            tokens_first = (states.transpose(0, 1).contiguous() for states in (keys, values))
            layer.impl.do_kv_cache_update(layer, *tokens_first, layer.kv_cache, at)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended."""
        ended = self._loads.ended()
        return KVConnectorTransferResults(finished_recving=ended.all, failed_recving=ended.failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs when its load has ended."""

    def save_kv_layer(self, *given: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        """End what is under way and release the collection."""
        if self.role is KVConnectorRole.WORKER:
            self._loads.close()
            self._rag.close()


def _order(request: Any) -> Any:
    """What the front end ordered for a request; None for a request of vLLM's own.

    One that only looks like an ordered one is loaded too, and so fails by itself: computed as text
    it would leave pages under a salt that is not its.
    """
    given: dict[str, Any] = request.kv_transfer_params or {}
    order = given.get(FIELD)
    if order is None and not str(request.cache_salt or "").startswith(SALT):
        return None
    return order if isinstance(order, dict) else {}


def _refusal(request: Any) -> str:
    """Why a request cannot be had over pages that vLLM did not compute, or ""."""
    sampling = request.sampling_params
    if sampling is None:
        return "the request is for a pooling model, expected one that generates"
    if sampling.prompt_logprobs is not None:
        return "the request asks for log-probabilities of its prompt, which vLLM does not compute"
    return ""


def _number(name: str) -> list[int]:
    """The numbers in a layer's name, by which layers stand in order."""
    return [int(part) for part in name.split(".") if part.isdigit()]
