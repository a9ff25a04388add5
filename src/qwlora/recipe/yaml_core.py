"""YAML for recipes: the core schema of YAML 1.2 (section 10.3.2). PyYAML by itself does YAML 1.1.

    012                      12 (octal is 0o14)
    1:30, 2024-01-31         strings
    yes, no, on, off         strings
    5e-4                     a number

A repeated key in a mapping is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# In an integer. Python itself refuses more than 4300, without a line number.
MOST_DIGITS = 100

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
    # Merge keys (`<<: *anchor`) are of YAML 1.1 only, but many people write them.
    ("merge", r"<<", ["<"]),
)


def load_yaml(text: str) -> Any:
    """Parse `text`.

    Raises:
        yaml.YAMLError: `text` is not YAML, repeats a key in a mapping (the message names both
            lines), is nested too deeply, or has an integer of more than `MOST_DIGITS` digits.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise yaml.YAMLError(_in_words(error, text)) from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply; a recipe needs only a few levels") from error
    # PyYAML 6.0 constructs values of tags such as !!int by Python's own functions, and lets their
    # errors through.
    except Exception as error:
        raise yaml.YAMLError("a value does not fit its tag, such as !!int; remove it") from error


_PROBLEMS = {  # parts of PyYAML's messages, and what is wrong; the first that fits counts
    "'\\t' that cannot": "a tab; indent with spaces",
    "mapping values are": "a second colon; quote the value, or put its key on a line of its own",
    "expected ',' or": "the bracket opened in line {start} is not closed",
    "quoted scalar": "the quote opened in line {start} is not closed",
    "<block end>": "the indentation is not that of the lines before",
    "single document": "a second document (---); keep one",
    "": (
        "recipes cannot use this YAML feature; quote values that contain * & ! % @ ` or control "
        "characters"
    ),
}


def _in_words(error: yaml.YAMLError, text: str) -> str:
    parts = ("problem", "context", "reason", "problem_mark", "context_mark", "position")
    *facts, mark, start, place = (getattr(error, part, None) for part in parts)
    if mark is None and place is None:
        return str(error)  # raised here
    line, said = mark.line if mark else text.count("\n", 0, place), " ".join(filter(None, facts))
    reason = next(words for part, words in _PROBLEMS.items() if part in said)
    return f"line {line + 1}: {reason.format(start=start.line + 1 if start else 0)}"


def dump_yaml(content: Any) -> str:
    """Write YAML that both `load_yaml` and YAML 1.1 parsers read back as `content`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=150)


def flow(value: Any) -> str:
    """A value in one line, as written after a key."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000, sort_keys=False)
    # PyYAML ends a document that is one plain scalar with three periods.
    return text.removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    # Empty: those of PyYAML are of YAML 1.1, where `no` is false and 5e-4 is a string.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"key {key.value!r} appears twice, in lines {lines[key.value]} and {line}; "
                        "remove one"
                    )
                lines[key.value] = line
        return node


# libyaml's is five times as fast: results and report are written at every stage of a job.
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    """Quotes strings that would be read as another type in YAML 1.1 or by the core schema."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node)
    line = node.start_mark.line + 1
    if len(digits) > MOST_DIGITS:
        raise yaml.YAMLError(
            f"line {line}: an integer of {len(digits)} digits; at most {MOST_DIGITS} are allowed"
        )
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(digits if base == 10 else digits[2:], base)


for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
