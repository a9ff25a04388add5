"""docs/cli.md: what typer writes of the command line, with what many commands share said once.

python docs/cli_page.py        prints the page; a test compares
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

from typer.cli import app
from typer.testing import CliRunner

SHARED = 2  # commands that have an option or an argument of the same words
HEAD = """
## Shared arguments and options

Commands below name these without repeating what they mean.

"""


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cli.md"
        options = ("--name", "qwlora", "--output", str(file))
        ended = CliRunner().invoke(app, ["qwlora.cli.main", "utils", "docs", *options])
        assert ended.exit_code == 0, ended.output
        first, *commands = re.split(r"\n(?=##+ )", file.read_text(encoding="utf-8"))
    counted = Counter(line for text in commands for line in _items(text) if "--help" not in line)
    commonest = {_name(line): line for line, _ in reversed(counted.most_common())}  # of each name
    shared = [line for line in counted if counted[line] >= SHARED and line in commonest.values()]
    parts = [_condensed(first, []) + HEAD + "\n".join(shared) + "\n"]
    return "\n".join([*parts, *(_condensed(text, shared) for text in commands)])


def _items(text: str) -> list[str]:
    return re.findall(r"^\* `[^`]+`: .*", text, re.MULTILINE)


def _name(item: str) -> str:
    return re.split(r"[` ]+", item)[1]


def _condensed(text: str, shared: list[str]) -> str:
    """A command's heading, usage on one line, description, and what it alone has."""
    text = text.partition("\n**Commands**:")[0]  # typer cuts their descriptions off
    usage = re.search(r"\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```\n", text)
    assert usage is not None, text
    heading, _, description = text[: usage.start()].strip().partition("\n\n")
    own = [line for line in _items(text) if line not in shared and "`--help`" not in line]
    also = [_name(line) for line in _items(text) if line in shared]
    call = "" if "COMMAND" in usage[1] else f"`{usage[1].replace(' [OPTIONS]', '')}`"
    paragraphs = [heading, call, description, "\n".join(own)]
    if flags := [f"`{flag}`" for flag in also if flag.startswith("--")]:
        paragraphs.append(f"Shared: {', '.join(flags)}.")
    return "\n\n".join(filter(None, paragraphs)) + "\n"


if __name__ == "__main__":
    print(page(), end="")
