"""Blocks of code in Markdown, and checks of those that are commands and recipes."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer.main

from qwlora.cli.main import app
from qwlora.errors import QwloraError
from qwlora.recipe import parse_recipe
from qwlora.recipe.yaml_core import load_yaml

ROOT = Path(__file__).parents[2]
# Programs that snippets may call. What they do with their arguments is theirs.
PROGRAMS = {"make", "pip", "git", "cd", "hf", "vllm", "llama-cli", "mlx_lm.generate", "python"}
PROGRAMS |= {"torchrun", "accelerate"}
_FENCE = re.compile(r"^(`{3,})([\w-]*)[^\n]*\n(.*?)^\1 *$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`(qwlora [^`\n]+)`(?!`)")
LANGUAGES = {"python", "shell", "yaml", "json", "text"}


class Block(NamedTuple):
    """A block of code, with its file and line."""

    language: str
    text: str
    where: str


def documents(root: Path = ROOT) -> list[Path]:
    """README.md and the pages, without the log and the one that typer writes."""
    pages = [p for p in sorted((root / "docs").rglob("*.md")) if p.stem != "cli"]
    return [root / "README.md", *(p for p in pages if "log" not in p.parts)]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a file; an indented block has no language and is an error."""
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match[2], match[3], f"{path.name}:{line}")
    for match in re.finditer(r"(?<=\n\n) {4}\S.*", _FENCE.sub(_blank, text)):
        if not text[: match.start()].rstrip().rpartition("\n")[2].startswith(("- ", ":::")):
            line = text.count("\n", 0, match.start()) + 1
            yield Block("", match[0].strip(), f"{path.name}:{line}")


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every command, in blocks and in the text."""
    for block in blocks(path):
        if block.language == "shell":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := line.strip():
                    yield block.where, words
    text = _FENCE.sub(_blank, path.read_text(encoding="utf-8"))
    for match in _INLINE.finditer(text):
        yield f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1]


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def problem_of_command(command: str) -> str | None:
    """What is wrong with a command: no such program, subcommand, option or argument."""
    words = shlex.split(command, comments=True)
    if not words:
        return None
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] != "qwlora":
        return None if words[0] in PROGRAMS else f"unknown program {words[0]}"
    found = command_line()
    rest = [word for word in words[1:] if word != "--debug"]
    while "commands" in vars(found) and rest:
        name = rest.pop(0)
        if name not in found.commands:
            return f"there is no command {name}"
        found = found.commands[name]
    if "commands" in vars(found):
        return None  # `qwlora adapters` names a group
    options = {flag: p for p in found.params for flag in (*p.opts, *p.secondary_opts)}
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--help" and flag not in options:
            return f"{found.name} has no option {flag}"
    if not rest or (len(rest) == 1 and rest[0].startswith("--")):
        return None  # names the command, or one option of it, in a sentence
    try:
        found.make_context(found.name, list(rest)).close()
    except Exception as error:
        return f"{found.name}: {error}"
    return None


def problem_of_recipe(text: str, model: Path, data: Path) -> str | None:
    """What is wrong with a recipe, or with a part of one."""
    content = load_yaml(text)
    whole = {
        "name": "snippet",
        "model": {"source": str(model)},
        "data": {"source": str(data)},
        "adapters": [{"name": name} for name in ("support", "chat", "code")],
        **content,
    }
    whole["model"] = {**whole["model"], "source": str(model)}
    for section in (whole["data"], *(a.get("data", {}) for a in whole["adapters"])):
        if "source" in section:
            section["source"] = str(data)
    try:
        parse_recipe(whole, "snippet")
    except QwloraError as error:
        return str(error)
    return None
