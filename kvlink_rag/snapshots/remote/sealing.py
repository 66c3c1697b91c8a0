"""Values of a remote tier: a snapshot's file behind a mark that only who has the secret can make.

Whoever can write to the tier could else change answers with a well-formed file. Knows bytes.
"""

from __future__ import annotations

import hashlib
import hmac

from kvlink_rag.errors import SnapshotCorrupt

MAGIC = b"KVLINK\x01\n"
_MARK = hashlib.sha256().digest_size
SEALED = len(MAGIC) + _MARK  # bytes that a value has beside its file


def seal(secret: bytes, name: str, file: bytes) -> bytes:
    """The value for `file` under `name`; without a secret its mark is zeros."""
    return MAGIC + _mark(secret, name, file) + file


def unseal(secret: bytes, name: str, value: bytes) -> bytes:
    """The file in a value. Raises `SnapshotCorrupt` where it is not what `seal` made of `name`."""
    if value[: len(MAGIC)] != MAGIC or len(value) < SEALED:
        raise SnapshotCorrupt(f"{name} in the remote tier does not begin as a value of kvlink-rag")
    file = value[SEALED:]
    if not hmac.compare_digest(value[len(MAGIC) : SEALED], _mark(secret, name, file)):
        raise SnapshotCorrupt(
            f"{name} in the remote tier was changed, or was not signed with this machine's "
            "KVLINK_REMOTE_SECRET"
        )
    return file


def _mark(secret: bytes, name: str, file: bytes) -> bytes:
    if not secret:
        return bytes(_MARK)
    made = hmac.new(secret, name.encode() + b"\0", hashlib.sha256)
    made.update(file)
    return made.digest()
