"""Who asks, and what they may read and change: API keys, each bound to collections.

    KVLINK_API_KEYS="sk-…=handbook,manuals:write; sk-…=*"

A key without `=` may do everything. Knows text and digests; knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvlink_rag.errors import ConfigError

VARIABLE = "KVLINK_API_KEYS"
SHORTEST = 16  # characters of a key
ALL, WRITE = "*", ":write"


@dataclass(frozen=True, slots=True)
class Asker:
    """A key's rights. id: a digest of the key, "" where no key is needed. name: for logs.

    grants: collections and whether they may be changed; `*` is every one.
    """

    id: str
    name: str
    grants: Mapping[str, bool] = field(default_factory=dict)

    def may_read(self, collection: str, owner: str = "") -> bool:
        """owner: the id of the asker who made the collection."""
        return self._owns(owner) or collection in self.grants or ALL in self.grants

    def may_write(self, collection: str, owner: str = "") -> bool:
        """Whether documents of a collection may be changed."""
        named = self.grants.get(collection, False) or self.grants.get(ALL, False)
        return self._owns(owner) or named

    @property
    def may_create(self) -> bool:
        """Whether it may upload files and make collections, which are then its own."""
        return any(self.grants.values())

    @property
    def sees_all(self) -> bool:
        """Whether nothing is kept from it."""
        return ALL in self.grants

    def _owns(self, owner: str) -> bool:
        return bool(owner) and owner == self.id


EVERYBODY = Asker("", "-", {ALL: True})  # where no key is needed
NOBODY = Asker("", "-")  # without a key where one is needed


class Keys:
    """The keys of a server; none: everybody may do everything."""

    def __init__(self, askers: Sequence[tuple[bytes, Asker]] = ()) -> None:
        self._askers = list(askers)

    def __bool__(self) -> bool:
        return bool(self._askers)

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Keys as `VARIABLE` has them. Raises `ConfigError`, which never holds a key."""
        entries = re.split(r"[;\s]+", re.sub(r"\s*([=,:])\s*", r"\1", text.strip()))
        return cls([_entry(number, e) for number, e in enumerate(filter(None, entries), 1)])

    def asker(self, key: str) -> Asker | None:
        """Whose key it is; every key is compared, each in constant time."""
        if not self._askers:
            return EVERYBODY
        digest, found = _digest(key), None
        for known, asker in self._askers:
            if hmac.compare_digest(known, digest):
                found = asker
        return found


def _entry(number: int, entry: str) -> tuple[bytes, Asker]:
    key, given, names = entry.partition("=")
    if len(key) < SHORTEST or not key.isascii():
        raise ConfigError(
            f"key {number} of {VARIABLE} has {len(key)} characters, expected at least {SHORTEST}, "
            "all ASCII; make one with: openssl rand -hex 24"
        )
    grants = {}
    for name in names.split(",") if given else [ALL + WRITE]:
        if not (plain := name.removesuffix(WRITE)):
            raise ConfigError(
                f"key {number} of {VARIABLE} names an empty collection, expected KEY=NAME,NAME "
                "with :write after those it may change, or * for all"
            )
        grants[plain] = name != plain
    digest = _digest(key)
    return digest, Asker(digest.hex()[:16], f"key {number}", grants)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
