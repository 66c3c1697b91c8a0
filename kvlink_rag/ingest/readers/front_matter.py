"""What stands before a Markdown text: the fields of its front matter, in YAML or TOML.

Front matter is a mapping at the very beginning, between lines of --- (YAML) or +++ (TOML). All else
between such lines is text. Values stay as written: no date, time or version becomes a number.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from kvlink_rag.documents import bounded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LONGEST = 64 * 2**10  # characters
_YAML = re.compile(r"---[ \t]*\n(?P<fields>.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.M)
_TOML = re.compile(r"\+\+\+[ \t]*\n(?P<fields>.*?)^\+\+\+[ \t]*(?:\n|\Z)", re.DOTALL | re.M)


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The fields before `text`, and the text after them."""
    for pattern, read in ((_YAML, _yaml), (_TOML, _toml)):
        if (found := pattern.match(text, 0, _LONGEST)) is not None:
            fields = read(found["fields"])
            if isinstance(fields, Mapping):
                return {str(key): value for key, value in fields.items()}, text[found.end() :]
    return {}, text


def _toml(fields: str) -> object:
    try:
        return bounded(tomllib.loads(fields))
    except (ValueError, RecursionError):
        return None


def _yaml(fields: str) -> object:
    try:
        return bounded(_Loader(fields).get_single_data())
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values, no references: those let a short text stand for one without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node. Raises `YAMLError` for a reference to another."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("front matter with references")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"~|null|", ["~", "n", ""]),
    ("int", r"-?[1-9][0-9]{0,14}|0", "-0123456789"),
    ("float", r"-?(?:[1-9][0-9]{0,9}|0)\.(?:[0-9]{0,4}[1-9]|0)", "-0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )
