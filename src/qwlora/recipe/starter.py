"""The commented recipe that `qwlora init` writes, generated from the recipe's own fields, defaults and descriptions."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwlora.recipe import Adapter, Recipe

_HEAD = """\
# A QWLoRA recipe. Run it with: qwlora run THIS_FILE --out out
# Lines that begin with '#' show defaults; take the '#' away to change one.
"""
_PLACEHOLDERS = {
    "model.source": "path/to/model",
    "data.source": "path/to/text",
    "adapters.name": "first",
}


def starter_recipe() -> str:
    """YAML text: what must be set is set to a placeholder, everything else is a comment with its default."""
    return _HEAD + "\n".join(_section(Recipe, "", 0)) + "\n"


def _section(kind: type[BaseModel], path: str, depth: int) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        where = f"{path}.{name}".lstrip(".")
        inner = _inner(field)
        if depth == 0:
            lines.append("")
        if name == "adapters":
            lines += [f"adapters:{_comment(field)}", *_item(_section(Adapter, where, depth + 1))]
        elif inner is not None:
            required = any(f.is_required() for f in inner.model_fields.values())
            lines += [f"{'' if required else '# '}{name}:{_comment(field)}"]
            body = textwrap.indent("\n".join(_section(inner, where, depth + 1)), "  ").split("\n")
            lines += body if required else [f"# {line.replace('# ', '', 1)}" for line in body]
        else:
            default = _PLACEHOLDERS.get(where) if field.is_required() else field.default
            value = (
                yaml.safe_dump(default, default_flow_style=True)
                .removesuffix("\n")
                .removesuffix("\n...")
            )
            lines.append(f"{'' if field.is_required() else '# '}{name}: {value}{_comment(field)}")
    return lines


def _item(lines: list[str]) -> list[str]:
    """Lines of a section as the first item of a list."""
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _comment(field: FieldInfo) -> str:
    return f"  # {field.description}" if field.description else ""
