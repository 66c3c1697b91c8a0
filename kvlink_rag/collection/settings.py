"""What a collection remembers of its model and embedder, and loading them.

A directory's snapshots fit one model, one way to keep them (`Storage`, whatever the model computes
in) and one way to render passages, its vectors one embedder.
Names are remembered for convenience, identities (fingerprints, and the vectors of a few probes) for
safety. What loads them brings transformers, seconds of start-up, so it is imported here, when
something is loaded, and nowhere above: a collection opens without.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvlink_rag.arguments import (
    HALF,
    NO_REPAIR,
    Budget,
    check_codec,
    check_order,
    check_search,
    check_weights,
    parse_budget,
    parse_repair,
)
from kvlink_rag.disk.checked_file import check_compression
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.errors import ConfigError, SettingsMismatch, StorageError
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.pretrained.model_files import find_device
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.retrieval.embedder import Embedder, Vectors
from kvlink_rag.retrieval.framework_embedders import AnyEmbedder, ForeignEmbedder, same_vectors
from kvlink_rag.snapshots.codecs import Storage, default_codec
from kvlink_rag.snapshots.snapshot import BF16, EXACT

from .catalog import Catalog
from .storage import exact_dtype, known_codec, known_storage, model_identity, storage_for

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel

GONE = "bundled"  # the demonstration pair that came with earlier releases
UNFINISHED = "unfinished"  # an identity that nothing has: a re-encoding that was cut short


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asks of a collection; None and "auto": what it remembers, else the defaults.

    model, embedder: names, directories or loaded objects (see `as_embedder`). codec, compression,
    search, order, repair, budget: names. Raises `ConfigError` for a name that there is not,
    `MissingExtra`.
    """

    model: KVLinkModel | str | Path | None = None
    embedder: Embedder | str | Path | None = None
    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    weights: str = "own"
    spec: Spec | None = None
    codec: str | None = None
    compression: str | None = None
    search: str | None = None
    order: str | None = None
    repair: str | None = None
    budget: int | str | None = None

    def __post_init__(self) -> None:
        checks = {
            "weights": check_weights,
            "codec": check_codec,
            "compression": check_compression,
            "search": check_search,
            "order": check_order,
            "repair": parse_repair,
            "budget": parse_budget,
        }
        for name, check in checks.items():
            if (value := getattr(self, name)) is not None:
                check(value)

    def to_remember(self) -> dict[str, str]:
        """What the collection remembers without a look at any model."""
        remembered = ("compression", "search", "order", "repair", "budget")
        names = {name: getattr(self, name) for name in remembered}
        return {name: str(value) for name, value in names.items() if value is not None}


class Settings:
    """The model and embedder of one collection, loaded once, checked against what it remembers.

    Each is loaded under a lock of its own, so that a search does not wait for the language model.
    Without a word and without memory: the pair `small`, and snapshots as `default_codec` says.
    """

    def __init__(self, catalog: Catalog, asked: Asked) -> None:
        self._catalog, self._asked = catalog, asked
        if values := asked.to_remember():
            catalog.set_settings(values)
        self._remembered = catalog.settings()
        self._unfinished: set[str] = set()
        self._model_lock, self._embedder_lock = ForkSafeLock(), ForkSafeLock()
        self._model = _loaded(asked.model)
        if self._model is not None and asked.weights != "own":
            raise ConfigError(
                f"found weights={asked.weights!r} and a model that is loaded; give them to "
                "KVLinkModel.from_pretrained"
            )
        self._embedder = None if isinstance(asked.embedder, str | Path) else asked.embedder
        self.model_name = self._name("model", asked.model)
        self.embedder_name = self._name("embedder", asked.embedder)

    @property
    def codec(self) -> str:
        """The name of how snapshots are kept: as asked for, as remembered, or the default."""
        return self._asked.codec or known_codec(self._remembered) or self._default_codec()

    @property
    def storage(self) -> Storage:
        """How snapshots are kept. Loads the model: "exact" is what it computes in."""
        return storage_for(self._load_model(), self._remembered, self._asked.codec)

    @property
    def storage_dtype(self) -> str:
        """As `storage.exact_dtype`. Loads nothing."""
        return exact_dtype(self._remembered)

    @property
    def compression(self) -> str:
        """What compresses new snapshots, "zstd" or "none"."""
        return str(self._remembered.get("compression", "none"))

    def order(self, asked: str | None = None) -> str:
        """How hits follow each other in a prompt: `asked`, else as the collection remembers."""
        return check_order(asked or str(self._catalog.settings().get("order", "score")))

    @property
    def budget(self) -> Budget:
        """What snapshots may take before they are asked for."""
        return parse_budget(str(self._remembered.get("budget", HALF)))

    @property
    def repair(self) -> str:
        """How reused passages are repaired."""
        return str(self._remembered.get("repair", NO_REPAIR))

    def model(self) -> KVLinkModel:
        """The model. Raises `SettingsMismatch` where it is not the one remembered."""
        model = self._load_model()
        self._remembered = self._catalog.settings()  # by now, by whichever process
        self._check("model", model_identity(model, self.storage))
        return model

    def embedder(self) -> Embedder:
        """The embedder. Raises `SettingsMismatch` where it is not the one remembered."""
        embedder = self._load_embedder()
        self._check("embedder", embedder.fingerprint)
        if isinstance(embedder, ForeignEmbedder) and self._known_probes() is None:
            self._remember_probes(embedder)
        return embedder

    def uses(
        self,
        model: KVLinkModel | str | Path | None,
        embedder: AnyEmbedder | str | Path | None,
        device: str,
        codec: str | None = None,
    ) -> bool:
        """Whether these arguments ask for what is in use here; None and "auto" agree with all."""
        return (
            self._is("model", model, self._model)
            and self._is("embedder", embedder, self._embedder)
            and device in ("auto", self._asked.device)
            and (codec in (None, self.codec) or self._means_known(codec))
        )

    def format(self) -> PromptFormat:
        """How the model's prompts are written, without its weights."""
        if self._model is not None:
            return self._model.format
        from kvlink_rag.model.loading import find_model

        with self._where_it_moved("model"):
            return find_model(self.model_name, self._asked.spec).format

    def settle_model(self, allow: bool) -> bool:
        """Check model and codec that were asked for; True where one is new and `allow` takes it."""
        if "model_identity" not in self._remembered:
            return False
        if not allow:
            self._check_codec()
        if not allow:
            if self._asked.model is not None:
                self.model()
            return False
        return self._begin("model", model_identity(self._load_model(), self.storage))

    def settle_embedder(self, allow: bool) -> bool:
        """Check an embedder that was asked for; True where it is new and `allow` takes it.

        What a framework's object computes is asked when it is first used.
        """
        if "embedder_identity" not in self._remembered:
            return False
        if allow:
            return self._begin("embedder", self._load_embedder().fingerprint)
        if self._asked.embedder is not None:
            embedder = self._load_embedder()
            if not isinstance(embedder, ForeignEmbedder):
                self.embedder()
        return False

    def finish_model(self) -> None:
        """Remember the model now set: every document is encoded for it."""
        self._remember("model", model_identity(self._load_model(), self.storage))

    def finish_embedder(self) -> None:
        """Remember the embedder now set: every document is embedded by it."""
        self._remember("embedder", self._load_embedder().fingerprint)

    def _name(self, what: str, asked: Any) -> str:
        if asked is None:
            return str(self._remembered.get(what, DEFAULT))
        if isinstance(asked, str | Path):
            path = Path(asked).expanduser()
            return str(path.resolve()) if path.is_dir() else str(asked)
        return str(getattr(asked, "name", type(asked).__name__))

    def _is(self, what: str, asked: Any, held: Any) -> bool:
        if isinstance(held, ForeignEmbedder):
            held = held.source
        if asked is None or asked == held:
            return True
        return isinstance(asked, str | Path) and self._name(what, asked) == getattr(
            self, f"{what}_name"
        )

    def _default_codec(self) -> str:
        if self._model is not None:
            return self._model.codec
        return default_codec(self._asked.dtype, find_device(self._asked.device))

    def _means_known(self, codec: str) -> bool:
        """Whether `codec` is what is remembered, perhaps by another name: "bf16" or "exact"."""
        known = known_codec(self._remembered)
        if codec == known or {codec, known} != {EXACT, BF16}:
            return codec == known
        model = self._load_model()
        kept = known_storage(self._remembered, model)
        return Storage.of(codec, model.backbone.dtype) == kept

    def _load_model(self) -> KVLinkModel:
        with self._model_lock:
            if self._model is None:
                asked = self._asked
                from kvlink_rag.model.model import KVLinkModel

                with self._where_it_moved("model"):
                    self._model = KVLinkModel.from_pretrained(
                        self.model_name,
                        device=asked.device,
                        dtype=asked.dtype,
                        weights=asked.weights,
                        spec=asked.spec,
                    )
            return self._model

    def _load_embedder(self) -> Embedder:
        with self._embedder_lock:
            if self._embedder is None:
                from kvlink_rag.retrieval.embedder_kinds import load_embedder

                with self._where_it_moved("embedder"):
                    self._embedder = load_embedder(self.embedder_name, device=self._asked.device)
            return self._embedder

    @contextlib.contextmanager
    def _where_it_moved(self, what: str) -> Iterator[None]:
        """Where a remembered path or pair is no more, say what to do."""
        name = getattr(self, f"{what}_name")
        try:
            yield
        except ConfigError as error:
            if self._remembered.get(what) == name == GONE:
                raise ConfigError(self._told_gone(what)) from error
            if self._remembered.get(what) != name or not os.path.isabs(name) or Path(name).exists():
                raise
            raise ConfigError(
                f"this collection was made with the {what} at {name}, where nothing is now; if it "
                f"moved, name its place once: {what}=… (kvlink-rag: --{what} …)"
            ) from error

    def _told_gone(self, what: str) -> str:
        parts = [part for part in ("model", "embedder") if self._remembered.get(part) == GONE]
        arguments = ", ".join(f"{part}={DEFAULT!r}" for part in parts)
        options = " ".join(f"--{part} {DEFAULT}" for part in parts)
        return (
            f"this collection was made with the {what} {GONE!r}, a demonstration of earlier "
            f"releases that is gone; open it once with {arguments}, reencode=True (kvlink-rag: "
            f"{options} --reencode) to encode its documents again"
        )

    def _check(self, what: str, identity: str) -> None:
        """Compare with what is remembered now, by whichever process; the first to come is it."""
        self._remembered = self._catalog.settings()
        if f"{what}_identity" not in self._remembered:
            self._remembered = self._catalog.set_first(self._facts(what, identity))
        if what not in self._unfinished and not self._is_remembered(what, identity):
            if self._remembered[f"{what}_identity"] == UNFINISHED:
                raise SettingsMismatch(
                    "encoding this collection again was interrupted; open it with reencode=True "
                    "(kvlink-rag: --reencode) to finish it"
                )
            if what == "model":
                self._check_dtype()
            found, known = getattr(self, f"{what}_name"), self._remembered.get(what)
            raise SettingsMismatch(
                f"this collection was made with the {what} {known!r}, found {found!r} with other "
                f"weights or settings; open it with that {what}, in another directory, or with "
                "reencode=True (kvlink-rag: --reencode) to encode it again"
            )
        self._remember_place(what)

    def _remember_place(self, what: str) -> None:
        """Of what was named anew, as it moved, remember where it is now."""
        name, asked = getattr(self, f"{what}_name"), getattr(self._asked, what)
        if isinstance(asked, str | Path) and self._remembered.get(what) != name:
            with contextlib.suppress(StorageError):  # one that is only read stays as it is
                self._catalog.set_settings({what: name})
                self._remembered[what] = name

    def _is_remembered(self, what: str, identity: str) -> bool:
        """Whether what is in use is what is remembered; by its vectors where those are known."""
        embedder = self._embedder
        if what == "embedder" and isinstance(embedder, ForeignEmbedder):
            known = self._known_probes()
            if known is not None:
                return same_vectors(embedder.probes(), known)
        return bool(self._remembered[f"{what}_identity"] == identity)

    def _known_probes(self) -> Vectors | None:
        """The probes of the embedder that is remembered, float32 [texts, dimension].

        None where there are none, or of another, which an older release left there.
        """
        try:
            found = self._remembered["embedder_probes"]
            vectors = np.frombuffer(base64.b64decode(found["vectors"]), dtype="<f4")
            shaped = vectors.reshape(-1, int(self._remembered["dimension"])).astype(np.float32)
        except (KeyError, TypeError, ValueError):
            return None
        return shaped if found.get("of") == self._remembered.get("embedder_identity") else None

    def _remember_probes(self, embedder: ForeignEmbedder) -> None:
        """Of an embedder that a collection older than probes knows by name."""
        values = _probes(embedder, str(self._remembered["embedder_identity"]))
        with contextlib.suppress(StorageError):  # one that is only read stays as it is
            self._catalog.set_settings(values)
        self._remembered.update(values)

    def _check_dtype(self) -> None:
        """Of a model that is another one, raise where it already differs in its dtype.

        A model that was handed over is known by its numbers, so in another dtype it is another.
        """
        model = self._load_model()
        backbone, known = model.backbone, known_storage(self._remembered, model)
        wanted = self.storage.dtype if backbone.source is not None else backbone.dtype
        if known is None or known.dtype == wanted:
            return
        raise SettingsMismatch(
            f"this collection's snapshots are {known.dtype_name}, found the model "
            f"{self.model_name!r} in {backbone.dtype_name}; open it with dtype="
            f"{known.dtype_name!r} (kvlink-rag: --dtype {known.dtype_name})"
            f"{' or without a codec' if self._asked.codec else ''}, in another directory, or with "
            "reencode=True (kvlink-rag: --reencode) to encode it again"
        )

    def _check_codec(self) -> None:
        asked, known = self._asked.codec, known_codec(self._remembered)
        if asked is not None and not self._means_known(asked):
            raise SettingsMismatch(
                f"this collection keeps its snapshots as {known!r}, found codec {asked!r}; "
                f"open it without a codec, in another directory, or with reencode=True "
                "(kvlink-rag: --reencode) to encode it again"
            )

    def _begin(self, what: str, identity: str) -> bool:
        """Whether `identity` is new; if so, nothing matches until `finish` has been called."""
        if self._is_remembered(what, identity):
            return False
        self._remember(what, UNFINISHED)
        self._unfinished.add(what)
        return True

    def _facts(self, what: str, identity: str) -> dict[str, Any]:
        values: dict[str, Any] = {what: getattr(self, f"{what}_name"), f"{what}_identity": identity}
        if what == "model":
            values |= {"codec": self.codec, "dtype": self.storage.dtype_name}
        if what == "embedder":
            embedder = self._load_embedder()
            values["dimension"] = embedder.dimension
            if isinstance(embedder, ForeignEmbedder) and identity != UNFINISHED:
                values |= _probes(embedder, identity)
        return values

    def _remember(self, what: str, identity: str) -> None:
        values = self._facts(what, identity)
        self._catalog.set_settings(values)
        self._remembered.update(values)
        self._unfinished.discard(what)


def _loaded(model: object) -> KVLinkModel | None:
    """`model`, if it is one."""
    if model is None or isinstance(model, str | Path):
        return None
    from kvlink_rag.model.model import KVLinkModel

    return model if isinstance(model, KVLinkModel) else None


def _probes(embedder: ForeignEmbedder, identity: str) -> dict[str, Any]:
    """The setting that remembers what an embedder computes."""
    data = embedder.probes().astype("<f4").tobytes()
    return {"embedder_probes": {"of": identity, "vectors": base64.b64encode(data).decode()}}
