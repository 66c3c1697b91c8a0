"""What a request carries from the front end, which lays its prompt out, to the connector.

    parts ⇄ JSON, documents by id         layout → seal

vLLM knows a prompt as token ids of its own vocabulary, so link tokens stand there as placeholders
and two prompts may look alike that are not. The seal tells them apart: an HMAC over the whole
layout, with a secret that lies in the collection's directory. It is the salt of vLLM's prefix
cache, so nobody without the secret can leave pages there that such a request would find.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag import Document, KVLinkError, Layout, Part, Passage, Text

FIELD = "kvlink"  # of `kv_transfer_params`
SALT = "kvlink:"  # how the salts of such requests begin
SECRET = "vllm.secret"  # in the collection's directory
SECRET_BYTES = 32


class OrderError(KVLinkError):
    """A request whose prompt is not what its front end laid out."""


@dataclass(frozen=True, slots=True)
class Order:
    """A prompt over documents of the collection, and the seal of its layout."""

    parts: tuple[Part, ...]
    seal: str

    def to_json(self) -> dict[str, Any]:
        """As `kv_transfer_params` carry it; of passages the ids alone."""
        return {"parts": [_written(part) for part in self.parts], "seal": self.seal}


def read_order(given: object, find: Callable[[Sequence[str]], list[Document]]) -> Order:
    """The order in `kv_transfer_params`. find: the documents of ids, in order.

    Raises `OrderError` for what no front end wrote, and what `find` raises.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("parts"), list):
        raise OrderError(f"found {type(given).__name__} without parts, expected an order")
    parts, seal = given["parts"], given.get("seal")
    if not isinstance(seal, str) or not all(map(_is_part, parts)):
        raise OrderError("found an order of another form, expected parts and a seal")
    ids = [part["passage"] for part in parts if "passage" in part]
    documents = iter(find(ids))
    read: list[Part] = [
        Passage(next(documents))
        if "passage" in part
        else Text(part["text"], special=part["special"])
        for part in parts
    ]
    return Order(tuple(read), seal)


def seal_of(layout: Layout, secret: bytes) -> str:
    """The seal of a layout: all its ids, positions, segments and its header."""
    made = hmac.new(secret, digestmod=hashlib.sha256)
    for numbers in (layout.token_ids, layout.positions, layout.segments):
        made.update(len(numbers).to_bytes(8, "little"))
        made.update(numbers.numpy().astype("<i8").tobytes())
    made.update(repr(layout.header).encode())
    return SALT + made.hexdigest()


def same(seal: str, other: str) -> bool:
    """Whether two seals are the same, in a time that tells nothing."""
    return hmac.compare_digest(seal.encode("utf-8", "replace"), other.encode())


def secret_in(directory: Path) -> bytes:
    """The secret of a collection, made by whoever asks first. For several processes at once."""
    path = directory / SECRET
    with contextlib.suppress(FileExistsError):
        made = path.with_name(f"{SECRET}.{secrets.token_hex(8)}")
        try:
            with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
            os.link(made, path)  # whole or not at all, and never over another's
        finally:
            made.unlink(missing_ok=True)
    found = path.read_bytes()
    if len(found) != SECRET_BYTES:
        raise OrderError(
            f"found {len(found)} bytes in {path}, expected {SECRET_BYTES}; remove it and start "
            "vLLM again"
        )
    return found


def _written(part: Part) -> dict[str, Any]:
    if isinstance(part, Passage):
        return {"passage": part.document.identified().id}
    return {"text": part.text, "special": part.special}


def _is_part(part: object) -> bool:
    if not isinstance(part, Mapping):
        return False
    if "passage" in part:
        return isinstance(part["passage"], str)
    return isinstance(part.get("text"), str) and isinstance(part.get("special"), bool)
