"""The registry of model families: complete, proved by the oracle, and the only place that asks."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

import kvlink_rag
from kvlink_rag.engine.families import FAMILIES, check_supported, masks_by_layer, window_of
from kvlink_rag.errors import ModelNotSupported


def test_the_oracle_covers_every_family_and_no_other() -> None:
    """`test_oracle` runs the models of `conftest`."""
    assert {config.model_type for config, _, _ in conftest.FAMILIES.values()} == set(FAMILIES)


def test_other_families_are_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(ModelNotSupported, match="'gpt2', expected one of llama, mistral, qwen2"):
        check_supported(SimpleNamespace(model_type="gpt2"))


def test_nothing_else_tests_a_model_type() -> None:
    test = re.compile(r"model_type\s*(?:==|!=|in\b|not\b)")
    root = Path(kvlink_rag.__file__).parent
    found = {f.name for f in root.rglob("*.py") if test.search(f.read_text(encoding="utf-8"))}
    assert found == set()


def asked_windows(name: str) -> tuple[int | None, list[int | None]]:
    """The window, and the windows for which a model of `conftest` wants masks."""
    make, _, extra = conftest.FAMILIES[name]
    config = make(**{**conftest.SHAPE, **extra})
    asked: list[int | None] = []
    masks_by_layer(config, asked.append)
    return window_of(config), asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (None, [None])),
        ("mistral", (None, [None])),
        ("mistral-window", (24, [24])),
        ("qwen2", (None, [None])),
        ("qwen2-window", (24, [None, 24])),
        ("qwen3", (None, [None])),
    ],
)
def test_masks_and_windows(name: str, expected: object) -> None:
    assert asked_windows(name) == expected
