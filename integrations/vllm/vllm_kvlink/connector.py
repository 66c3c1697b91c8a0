"""The connector: vLLM's interface on one side, `scheduling`, `prefilling` and `pages` on the other.

vLLM makes two of it, one in the scheduler and one in the worker. The only module that imports vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)

from kvlink_rag.errors import ConfigError

from .identity import check_same
from .loading import Loading
from .options import Options
from .pages import PagedLayer, find_layers, slots, write
from .prefilling import Prefiller
from .refusals import check_backend, check_engine, check_groups, told_of_version
from .scheduling import Load, Scheduling

IDLE = 0.05  # seconds that a step with nothing to run waits for loads; whoever asks then waits too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker with a step."""

    loads: tuple[Load, ...] = ()


class KVLinkConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """kvlink_rag prefills, vLLM decodes. Named in `--kv-transfer-config`; see the README.

    Raises `ConfigError` and its kin for what cannot be served.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = Options.of(transfer.kv_connector_extra_config)
        check_engine(vllm_config, self._options.untried)
        if told := told_of_version(vllm_version):
            logger.warning(told)
        if kv_cache_config is not None:
            check_groups(kv_cache_config.kv_cache_groups)
        self._block_size: int = vllm_config.cache_config.block_size
        self._scheduling = Scheduling(vllm_config.model_config.hf_config.vocab_size)
        self._loading = Loading()
        self._layers: list[PagedLayer] = []
        self._prefiller: Prefiller | None = None
        if role == KVConnectorRole.WORKER:
            self._prefiller = self._open(vllm_config.model_config)

    def _open(self, served: Any) -> Prefiller:
        """The model that prefills, loaded and compared with the one that vLLM serves."""
        directory = Path(served.model)
        if not directory.is_dir():
            raise ConfigError(
                f"vLLM serves {served.model!r}, expected a directory on this machine, whose "
                "weights can be compared; write one with: vllm-kvlink export"
            )
        prefiller = Prefiller(self._options.open(served.dtype))
        check_same(prefiller.model, directory, served.hf_config, served.dtype)
        return prefiller

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on."""
        return False

    # In the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Find the layers whose pages are written. Raises `ConfigError`."""
        if self._prefiller is None:
            return
        context = self._vllm_config.compilation_config.static_forward_context
        count = self._prefiller.model.backbone.layers
        self._layers = find_layers(context, list(kv_caches), count)
        for name in kv_caches:
            check_backend(context[name].attn_backend.get_name(), self._options.untried)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to fill pages, in threads beside this step and those that follow.

        In a step that runs nothing, vLLM would ask again at once, and again, and keep the threads
        from Python's lock: it waits for them.
        """
        for load in self._get_connector_metadata().loads:
            self._loading.begin(load.request_id, partial(self._load, load))
        if forward_context.attn_metadata is None:
            self._loading.wait(IDLE)

    def _load(self, load: Load) -> None:
        if self._prefiller is None or load.handover is None:
            raise ConfigError(load.refused)
        states = self._prefiller.states(load.handover)
        some = slice(load.first, load.first + load.count)
        at = slots(load.block_ids, self._block_size, load.first, load.count)
        write(self._layers, states.keys[:, :, some], states.values[:, :, some], at)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose pages are filled, and those that vLLM is to end with an error."""
        ended = self._loading.ended()
        return KVConnectorTransferResults(finished_recving=ended.all, failed_recving=ended.failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs when its pages are filled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: what vLLM computes is not kept."""

    def wait_for_save(self) -> None:
        """Nothing."""

    def shutdown(self) -> None:
        """End what is under way and close the collection."""
        self._loading.close()
        if self._prefiller is not None:
            self._prefiller.close()
            self._prefiller = None

    # In the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All of a laid-out prompt but its last token, loaded while others go on."""
        matched = self._scheduling.matched(request, num_computed_tokens)
        return matched, matched > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the pages of a request that is about to run."""
        if num_external_tokens:
            (block_ids,) = blocks.get_block_ids()
            self._scheduling.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the worker is to begin to load."""
        return Loads(tuple(self._scheduling.loads(_begun(scheduler_output))))

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its pages are vLLM's to free."""
        self._scheduling.finished(request.request_id)
        return False, None


def _begun(output: Any) -> Iterator[tuple[str, int]]:
    """Requests that start in this step, or go on after a preemption, with their computed tokens."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    going = output.scheduled_cached_reqs
    for request_id, computed in zip(going.req_ids, going.num_computed_tokens, strict=True):
        if request_id in going.resumed_req_ids:
            yield request_id, computed
