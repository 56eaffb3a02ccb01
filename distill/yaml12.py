"""Plain data from YAML 1.2, strictly: no word means more than it says, no key is given twice, no tag makes an object."""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = {
    "null": (["", *"~nN"], r"|~|null|Null|NULL"),
    "bool": ([*"tTfF"], r"true|True|TRUE|false|False|FALSE"),
    "int": ([*"-+0123456789"], r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": ([*"-+.0123456789"], r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
}
"""Kinds of a word without quotes, as in YAML 1.2: its first characters and its pattern. PyYAML knows YAML 1.1, in which
`1e-4` is text, `no` (a precision, here) is false, 1:30 is 90 and 017 is 15."""


class _Loader(yaml.SafeLoader):
    """A loader of plain data only: any other tag is an error, and so is a key that is given twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way)
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map")))
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """PyYAML's mapping, without repeated keys: the first value would be lost without a word."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; drop one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, (_first, _pattern) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text; no tag can construct an object."""
    return yaml.load(text, Loader=_Loader)
