"""A collection's counts for Prometheus, read when they are asked for.

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(CollectionMetrics(rag))

Knows `KVLinkRAG.stats` and the shape of a Prometheus collector. The package `prometheus-client` is
the extra `prometheus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvlink_rag.errors import MissingExtra

if TYPE_CHECKING:
    from .rag import KVLinkRAG

_GAUGES = {
    "documents": "documents in the collection",
    "embedded": "documents with a vector",
    "tokens": "tokens of all passages",
    "snapshots": "snapshots in the store",
    "snapshot_bytes": "bytes of the snapshots in the store",
    "prefix_bytes": "bytes of kept runs in memory",
}
_COUNTERS = {
    "hits": "snapshots asked for and found",
    "misses": "snapshots asked for and not found",
    "corrupt": "snapshots refused because their bytes were not what was written",
    "encoded": "snapshots made for questions because they were missing",
    "evicted": "snapshots removed to keep the size limit",
    "prefix_hits": "computed runs taken from earlier questions",
    "prefix_misses": "computed runs that no earlier question had",
}

_REMOTE = {
    "hits": "snapshots taken from the remote tier",
    "misses": "snapshots that the remote tier did not have",
    "written": "snapshots written to the remote tier",
    "erased": "snapshots erased in the remote tier",
    "dropped": "snapshots not offered to the remote tier",
    "refused": "values of the remote tier that were not what they claimed to be",
    "faults": "calls of the remote tier that failed or took too long",
    "resting": "whether the remote tier is left alone for now",
}


class CollectionMetrics:
    """A Prometheus collector: `kvlink_documents`, `kvlink_hits_total` and so on.

    Each metric carries the collection's directory as the label `collection`, or `name` where
    given. Raises `MissingExtra` without the package `prometheus-client`.
    """

    def __init__(self, rag: KVLinkRAG, *, name: str | None = None) -> None:
        try:
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        except ImportError as error:
            raise MissingExtra.of("prometheus-client", "prometheus", "Exporting metrics") from error
        self._rag, self._name = rag, name or str(rag.directory)
        self._kinds = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        stats = self._rag.stats().to_dict()
        for family, metrics in self._kinds:
            for field, text in metrics.items():
                metric = family(f"kvlink_{field}", text, labels=["collection"])
                metric.add_metric([self._name], stats[field])
                yield metric
        yield from self._remote(stats["remote"] or {})

    def _remote(self, counts: Mapping[str, int]) -> Iterator[Any]:
        """Those of a tier that machines share, where there is one."""
        counter, gauge = self._kinds[1][0], self._kinds[0][0]
        for field, text in _REMOTE.items():
            if field in counts:
                family = gauge if field == "resting" else counter
                metric = family(f"kvlink_remote_{field}", text, labels=["collection"])
                metric.add_metric([self._name], int(counts[field]))
                yield metric

    def describe(self) -> list[Any]:
        """None: registering reads nothing."""
        return []
