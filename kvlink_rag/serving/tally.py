"""Counts of a server for Prometheus, with those of its open collections. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvlink_rag.collection.prometheus import CollectionMetrics
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.trace import Trace

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Tally:
    """What a server has done since it started; `kvlink_server_…`."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "kvlink_server_requests", "requests served", ["endpoint", "status"], registry=own
        )
        self.tokens = Counter(
            "kvlink_server_tokens", "tokens of answers and prompts", ["kind"], registry=own
        )
        self.left = Counter(
            "kvlink_server_left", "answers whose client left before the end", registry=own
        )
        self.first_token = Histogram(
            "kvlink_server_first_token_seconds",
            "from the start of the work to the first token",
            buckets=_SECONDS,
            registry=own,
        )
        self.running = Gauge("kvlink_server_running", "requests being computed", registry=own)
        self.waiting = Gauge("kvlink_server_waiting", "requests waiting", registry=own)

    def answered(self, trace: Trace) -> None:
        """Count a finished answer."""
        self.tokens.labels("generated").inc(trace.generated_tokens)
        self.tokens.labels("computed").inc(trace.computed_tokens)
        self.tokens.labels("cached").inc(trace.reused_tokens + trace.prefix_tokens)
        self.first_token.observe(trace.first_token_ms / 1e3)

    def of_collections(self, opened: Callable[[], Mapping[str, KVLinkRAG]]) -> None:
        """Also tell the counts of the collections that are open when it is asked."""
        self.registry.register(_Collections(opened))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Collections:
    """`CollectionMetrics` of several collections, each metric once with all their samples."""

    def __init__(self, opened: Callable[[], Mapping[str, KVLinkRAG]]) -> None:
        self._opened = opened

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        for id, rag in self._opened().items():
            for family in CollectionMetrics(rag, name=id).collect():
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples += family.samples
        yield from families.values()

    def describe(self) -> list[Any]:
        return []
