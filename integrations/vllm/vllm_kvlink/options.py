"""What `kv_connector_extra_config` may say.

Knows names and their values; opens the collection that they name, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """collection: the directory of a kvlink_rag collection, which exists.

    model, device, codec, remote: as in `KVLinkRAG.open`. min_tokens: the shortest text that is
    recognised as a passage in a prompt. untried: back ends and model types to take although nobody
    has tried them here, such as "FLASH_ATTN".
    """

    collection: str
    model: str | None = None
    device: str = "auto"
    codec: str | None = None
    remote: str | None = None
    min_tokens: int = 16
    untried: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Options:
        """Read vLLM's mapping. Raises `ConfigError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(config) - set(known)):
            raise ConfigError(
                f"found {', '.join(unknown)} in kv_connector_extra_config, expected only "
                f"{', '.join(known)}"
            )
        if not isinstance(config.get("collection"), str):
            raise ConfigError(
                "found no collection in kv_connector_extra_config, expected the directory of a "
                'kvlink_rag collection: {"collection": "/path/to/collection"}'
            )
        untried = config.get("untried", ())
        if not isinstance(untried, list | tuple) or not all(isinstance(e, str) for e in untried):
            raise ConfigError(f"untried is {untried!r}, expected a list of names")
        return cls(**{**config, "untried": tuple(untried)})

    def open(self, dtype: Any = "auto") -> KVLinkRAG:
        """The collection. Loads no model yet. Errors as in `KVLinkRAG.open`.

        dtype: what the model is to compute in; vLLM's.
        """
        return KVLinkRAG.open(
            self.collection,
            model=self.model,
            device=self.device,
            dtype=dtype,
            codec=self.codec,
            remote=self.remote,
            min_tokens=self.min_tokens,
            create=False,
        )
