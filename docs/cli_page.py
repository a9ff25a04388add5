"""docs/cli.md: what typer writes of the command line, with what many commands share said once.

python docs/cli_page.py        prints the page; a test compares
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from typer.cli import app
from typer.testing import CliRunner

from qwlora.pipeline import VERBS

SHARED = 2  # commands that have an option or an argument of the same words
HEAD = """\
## Shared arguments and options

Required arguments of a command are in braces.

"""


# What typer adds to a number's help: "; x>=1" after its default, or "[0<=x<=1]".
_BOUNDS = r"(?:[\d.]+<=)?x[<>]=[\d.]+"
_RANGE = re.compile(rf"; {_BOUNDS}(?=\])|  \[{_BOUNDS}\]")


class Command(NamedTuple):
    """A command, or a group of commands, which has no `call`."""

    heading: str
    description: str
    call: str
    items: list[str]


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cli.md"
        options = ("--name", "qwlora", "--output", str(file))
        ended = CliRunner().invoke(app, ["qwlora.cli.main", "utils", "docs", *options])
        assert ended.exit_code == 0, ended.output
        texts = re.split(r"\n(?=##+ )", file.read_text(encoding="utf-8"))
    first, *commands = map(_command, texts)
    counted = Counter(item for command in commands for item in command.items)
    commonest = {_name(item): item for item, _ in reversed(counted.most_common())}  # of each name
    shared = [item for item in counted if counted[item] >= SHARED and item in commonest.values()]
    stages = commands[: 1 + len(VERBS)]
    names = (command.heading.replace("## `qwlora ", "`") for command in stages)
    texts = (command.description.replace("\n\n", " ") for command in stages)
    listed = [f"* {name}: {text}" for name, text in zip(names, texts, strict=True)]
    together = Command("## All stages, or one", "\n".join(listed), *commands[0][2:])
    parts = [_section(first, []), HEAD + "\n".join(shared) + "\n"]
    return "\n".join([*parts, *(_section(c, shared) for c in [together, *commands[len(stages) :]])])


def _command(text: str) -> Command:
    text = text.partition("\n**Commands**:")[0]  # typer cuts their descriptions off
    usage = re.search(r"\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```\n", text)
    assert usage is not None, text
    heading, _, description = text[: usage.start()].strip().partition("\n\n")
    call = "" if "COMMAND" in usage[1] else usage[1].partition(" [OPTIONS]")[2].strip()
    items = re.findall(r"^\* `(?!--help|--show-completion)[^`]+`: .*", text, re.MULTILINE)
    # arguments as in `call`, without their type
    arguments = re.compile(r"^(\* `)(?!-)(\S+) <[\w\[\]]+>(.*?)(?:  \[required\])?$")
    items = [_RANGE.sub("", arguments.sub(r"\1\2\3", item)) for item in items]
    items = [re.sub(" <(?:int|float)(?: range)?>", " N", item) for item in items]
    return Command(heading, description, call, items)


def _name(item: str) -> str:
    return re.split(r"[` ]+", item)[1]


def _section(command: Command, shared: list[str]) -> str:
    """Heading, description, usage on one line, and the items that the command alone has."""
    also = [_name(item) for item in command.items if item in shared]
    usage = [command.call, *(f"[{name}]" for name in also if name.startswith("--"))]
    call = f"`{' '.join(usage).strip()}`" if command.call else ""
    own = [item for item in command.items if item not in shared]
    parts = [command.heading, command.description, call, "\n".join(own)]
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    print(page(), end="")
