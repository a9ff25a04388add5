"""Recipes as YAML, by the core schema of YAML 1.2 (section 10.3.2), where PyYAML alone follows YAML 1.1.

    012                      12 (octal is 0o14)
    1:30, 2024-01-31         strings
    yes, no, on, off         strings
    5e-4                     a number

Each key of a mapping may be given once. Merge keys (`<<: *anchor`) of YAML 1.1 are kept, since
recipes are often written with them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_DIGITS = 100  # of an integer; Python refuses to convert more than 4300

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def load_yaml(text: str) -> Any:
    """The value that `text` describes.

    Raises:
        yaml.YAMLError: it is not YAML, has a key twice in one mapping (both lines are named), is
            nested too deeply, or has an integer of more than `MOST_DIGITS` digits.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except Exception as error:  # PyYAML's own for a value that an explicit tag does not fit
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from error


def dump_yaml(content: Any) -> str:
    """YAML that `load_yaml` and readers of YAML 1.1 both read back as `content`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=150)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"the key {key.value!r} is given twice, in lines {lines[key.value]} and "
                        f"{line}; remove one"
                    )
                lines[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes strings that are something else in YAML 1.1, or by the core schema."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node)
    line = node.start_mark.line + 1
    if len(digits) > MOST_DIGITS:
        raise yaml.YAMLError(
            f"line {line} has an integer of {len(digits)} digits; the most are {MOST_DIGITS}"
        )
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(digits if base == 10 else digits[2:], base)


for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
