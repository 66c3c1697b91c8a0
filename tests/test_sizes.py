"""Sizes as people write them, and counts."""

from __future__ import annotations

import numpy as np
import pytest

from kvlink_rag.arguments import is_count, parse_size
from kvlink_rag.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (7, 7),
        (np.int64(9), 9),
        ("500", 500),
        ("500b", 500),
        ("500kB", 500_000),
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 2g ", 2_000_000_000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "1 XB", "-1", "1e9", "1,5GB", -1, 1.5, True, None, []])
def test_what_is_no_size_names_the_argument(size: object) -> None:
    with pytest.raises(ConfigError, match=r"size_limit is .*expected at least 0 bytes"):
        parse_size(size, "size_limit")  # type: ignore[arg-type]


def test_less_than_the_least_is_refused() -> None:
    assert parse_size("1kB", least=1000) == 1000
    with pytest.raises(ConfigError, match="expected at least 1000 bytes"):
        parse_size(999, least=1000)


def test_counts() -> None:
    assert all(map(is_count, (1, 5, np.int32(3))))
    assert not any(map(is_count, (0, -1, 2.0, "3", True, None)))
