"""How a collection keeps its snapshots: by what was asked for and what it remembers.

Snapshots are kept in a codec and a dtype (`Storage`), whatever the model computes in, so that one
collection serves processors that compute in another dtype. Knows names and settings; loads nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvlink_rag.snapshots.codecs import Storage
from kvlink_rag.snapshots.snapshot import BF16, EXACT, EXACT_DTYPES

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel

Remembered = Mapping[str, Any]  # the catalog's settings


def model_identity(model: KVLinkModel, storage: Storage) -> str:
    """What a collection's snapshots depend on: weights, storage, how passages are rendered.

    Not the link tokens: a snapshot does not depend on them. Nor what the model computes in, where
    its weights are known by their files.
    """
    spec = model.spec
    rendering = [spec.passage_template, spec.untitled_template, spec.rank]
    facts = [model.fingerprint, str(storage.dtype), rendering]
    facts += [storage.codec] if storage.codec != EXACT else []  # as before there were codecs
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def known_codec(remembered: Remembered) -> str:
    """The codec's name that is remembered; "" where nothing is."""
    return str(remembered.get("codec", EXACT)) if "model_identity" in remembered else ""


def known_storage(remembered: Remembered, model: KVLinkModel) -> Storage | None:
    """What is remembered; None where nothing is.

    0.1.0 remembered no dtype: the one with which `model` has the identity that is remembered.
    """
    if not (codec := known_codec(remembered)):
        return None
    named = {str(dtype).removeprefix("torch."): dtype for dtype in EXACT_DTYPES}
    if found := named.get(remembered.get("dtype", "")):
        return Storage.of(codec, found)
    possible = (Storage.of(codec, dtype) for dtype in EXACT_DTYPES)
    wanted = remembered["model_identity"]
    return next((each for each in possible if model_identity(model, each) == wanted), None)


def storage_for(model: KVLinkModel, remembered: Remembered, asked: str | None) -> Storage:
    """How `model` keeps snapshots where the codec `asked` (None: any) was asked for.

    What is remembered stays, whatever the model computes in, as long as that has all the digits it
    takes. But who names both the model's dtype and "exact" is given that dtype.
    """
    codec = asked or known_codec(remembered) or model.codec
    known, computed = known_storage(remembered, model), model.backbone.dtype
    insists = asked == EXACT == model.codec
    if known and codec == known_codec(remembered) and known.takes(computed) and not insists:
        return known
    return Storage.of(codec, computed)


def exact_dtype(remembered: Remembered) -> str:
    """The dtype of the numbers in snapshots that are not quantised; "" where none is remembered."""
    exact = known_codec(remembered) in (EXACT, BF16)
    return str(remembered.get("dtype", "")) if exact else ""
