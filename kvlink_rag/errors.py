"""Every error this package raises on purpose.

    KVLinkError
    ├── ConfigError              a setting, a spec or an argument cannot be used
    │   ├── ModelNotSupported    architecture or RoPE type outside what reuse is proved for
    │   ├── SpecError            a kvlink.json (or Spec) that contradicts itself or the tokenizer
    │   └── SettingsMismatch     a directory remembers another model, embedder or dimension
    ├── DocumentError            a document that cannot be taken
    │   ├── DocumentNotFound     an id the collection does not hold
    │   └── PassageTooLong       more tokens than the model's window can hold
    ├── PromptError              a prompt that cannot be laid out
    │   ├── PromptTooLong        more tokens than the model's window
    │   └── TooManyPassages      more passages than the spec has link tokens for
    ├── ExampleError             a row of a data set that cannot be used
    ├── StorageError             a directory that cannot be opened or written
    │   ├── SnapshotCorrupt      a snapshot whose bytes are not what was written
    │   ├── IndexCorrupt         an index file whose bytes are not what was written
    │   └── CatalogError         the catalog (the truth) is missing or damaged
    ├── DeviceMemoryError        the GPU's memory does not hold what was asked for
    └── MissingExtra             an optional package is not installed

A message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class KVLinkError(Exception):
    """Base of all errors of this package."""


class ConfigError(KVLinkError, ValueError):
    """A setting, a spec or an argument cannot be used."""


class ModelNotSupported(ConfigError):
    """The architecture or RoPE type is outside what reuse is proved for."""


class SpecError(ConfigError):
    """A spec contradicts itself or the tokenizer."""


class SettingsMismatch(ConfigError):
    """A collection's directory remembers other settings than the ones given."""


class DocumentError(KVLinkError, ValueError):
    """A document cannot be taken."""


class DocumentNotFound(DocumentError, KeyError):
    """No document with this id in the collection."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class PassageTooLong(DocumentError):
    """A passage has more tokens than the model's window can hold."""


class PromptError(KVLinkError, ValueError):
    """A prompt cannot be laid out."""


class PromptTooLong(PromptError):
    """A prompt has more tokens than the model's window."""


class TooManyPassages(PromptError):
    """A prompt has more passages than the spec has link tokens for."""


class ExampleError(KVLinkError, ValueError):
    """A row of a data set cannot be used."""


class StorageError(KVLinkError, OSError):
    """A directory cannot be opened or written."""


class SnapshotCorrupt(StorageError):
    """A snapshot's bytes are not what was written."""


class IndexCorrupt(StorageError):
    """An index file's bytes are not what was written."""


class CatalogError(StorageError):
    """The catalog is missing or damaged."""


class DeviceMemoryError(KVLinkError, MemoryError):
    """The GPU's memory does not hold what was asked for; the process can go on."""


class MissingExtra(KVLinkError, ImportError):
    """An optional package is not installed; the message holds the pip line."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """The error for `package`, which `extra` would have installed."""
        return cls(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'kvlink-rag[{extra}]'"
        )


def first_line(error: BaseException) -> str:
    """What `error` says first, else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
