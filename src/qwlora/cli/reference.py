"""Generates docs/cli.md, the command line reference, from the commands themselves.

`make docs/cli.md` writes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperArgument, TyperGroup, TyperOption

from qwlora.cli.main import app

_HEAD = """\
# Command line reference

Every command with its arguments and options. `--debug`, anywhere on the command line, prints the
traceback of an error. Exit codes: 0 done; 1 verification failed, or a check found a problem; 2 any
other error; 128 + n stopped by signal n (130: Ctrl-C).

This page is generated from the code: `make docs/cli.md`.
"""


def command_line_reference() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for path, command in _commands(typer.main.get_command(app), ("qwlora",)):
        lines += _section(path, command)
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Commands without subcommands, in the order of the help."""
    if not isinstance(command, TyperGroup):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _commands(inner, (*path, name))


def _section(path: tuple[str, ...], command: Any) -> list[str]:
    parameters = [p for p in command.params if p.name not in ("help", "debug")]
    arguments = [p for p in parameters if isinstance(p, TyperArgument)]
    options = [p for p in parameters if isinstance(p, TyperOption)]
    words = [_word(p) for p in arguments] + ["[OPTIONS]" if options else ""]
    lines = [f"## {' '.join(path)}\n", f"{inspect.cleandoc(command.help or '')}\n"]
    lines += ["```text", " ".join([*path, *words]).rstrip(), "```\n"]
    if parameters:
        lines += ["| | default | meaning |", "|---|---|---|"]
        lines += [_row(p, _word(p)) for p in arguments]
        lines += [_row(p, _flags(p)) for p in options]
        lines.append("")
    return lines


def _word(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()).rstrip(".")
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    flags = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return flags
    kinds = {int: "N", float: "X", str: "TEXT"}
    return f"{flags} {parameter.metavar or kinds.get(type(parameter.default), 'VALUE')}"


def _row(parameter: Any, shown: str) -> str:
    default = parameter.default
    is_shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    text = "required" if parameter.required else f"`{default}`" if is_shown else ""
    meaning = re.sub(r"\s+", " ", parameter.help or "").replace("|", "\\|")
    return f"| `{shown}` | {text} | {meaning} |"


if __name__ == "__main__":
    print(command_line_reference(), end="")
