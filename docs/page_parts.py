"""Parts of pages that are written from other files, so that each text and each number has one home,
and a page still reads without building the site.

    python docs/page_parts.py        writes them all again; a test compares

A part begins with a comment, and ends with `<!-- end -->`:

    <!-- results: file.md -->               of benchmarks/results, without its title
    <!-- results: file.json -->             its numbers, as tables
    <!-- results: file.md: w4* | float* --> only rows whose cells, joined by spaces, fit a pattern
    <!-- results: file.md [way; seconds] --> only these columns
    <!-- recipe: file.yaml -->              a file of src/qwlora/recipe/examples/
    <!-- docstring: qwlora.grid.scheme -->  of a module or a class, without its arguments
    <!-- docstring: NAME: 1-3 5 -->         only these paragraphs of it, equations counted too
    <!-- api: qwlora -->                    the first sentence of the docstring of each name that is
                                            listed; on the site, all of it

As a hook of mkdocs, it fills in what the site alone has, and keeps the log out of the search:
`<!-- readme -->` is what README.md says before its first section.
"""

from __future__ import annotations

import ast
import fnmatch
import inspect
import json
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LISTED = re.compile(r"^- `(\w+)`", re.MULTILINE)
_PART = re.compile(r"<!-- (\w+): (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """The page as the site has it; mkdocs calls this."""
    if page.file.src_uri.startswith("log/"):
        page.meta["search"] = {"exclude": True}
    if "<!-- readme -->" in markdown:
        markdown = markdown.replace("<!-- readme -->", readme_top())

    def references(match: re.Match[str]) -> str:
        homes = (_home(f"{match[1]}.{name}") for name in _LISTED.findall(match[0]))
        return "\n\n".join(f"::: {home}" for home in homes)

    return re.sub(r"<!-- api: (\S+) -->\n.*?<!-- end -->", references, markdown, flags=re.DOTALL)


def filled(markdown: str) -> str:
    """The page with its parts written again."""
    kinds = {"results": results, "recipe": recipe, "docstring": docstring}

    def part(match: re.Match[str]) -> str:
        if match[1] == "api":
            names = _LISTED.findall(match[0])
            text = "\n".join(f"- `{name}`: {summary(f'{match[2]}.{name}')}" for name in names)
        else:
            text = kinds[match[1]](match[2])
        return f"<!-- {match[1]}: {match[2]} -->\n{text}\n<!-- end -->"

    return _PART.sub(part, markdown)


def docstring(what: str) -> str:
    """The docstring of a module or class as Markdown, whole or the paragraphs that are numbered."""
    name, _, numbers = what.partition(": ")
    text = re.split(r"\n\n(?:Args|Returns|Raises|Warns):\n", _docstring(name))[0]
    if numbers:
        ranges = [(int(first), int(last or first)) for first, last in _RANGE.findall(numbers)]
        paragraphs = text.split("\n\n")
        text = "\n\n".join(p for first, last in ranges for p in paragraphs[first - 1 : last])
    blocks = re.sub(r"^(?:    .*\n|\n(?=    ))+", _fenced, f"{text}\n", flags=re.MULTILINE)
    return blocks.strip()


def _fenced(match: re.Match[str]) -> str:
    return f"\n```text\n{textwrap.dedent(match[0]).strip()}\n```\n"


def summary(name: str) -> str:
    """The first sentence of the docstring of a function or class."""
    paragraph = _docstring(_home(name)).partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def _home(name: str) -> str:
    """`name`, or of what `qwlora` imports from one of its modules, the name there."""
    package, _, last = name.rpartition(".")
    if package == "qwlora":
        for node in ast.walk(_tree(ROOT / "src/qwlora/__init__.py")):
            if isinstance(node, ast.ImportFrom) and any(n.name == last for n in node.names):
                return f"{node.module}.{last}"
    return name


def _docstring(name: str) -> str:
    """The docstring of a module, or of a class or function in one, read without importing it."""
    path = ROOT / "src" / name.replace(".", "/")
    owner = path if path.with_suffix(".py").exists() else path.parent
    for file in (owner.with_suffix(".py"), owner / "__init__.py"):
        if file.exists() and owner == path:
            return inspect.cleandoc(ast.get_docstring(_tree(file)) or "")
        for node in _tree(file).body if file.exists() else []:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == path.name:
                return ast.get_docstring(node) or ""
            if isinstance(node, ast.ImportFrom) and any(n.name == path.name for n in node.names):
                return _docstring(f"{node.module}.{path.name}")
    return ""


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def recipe(name: str) -> str:
    """A file of src/qwlora/recipe/examples/ as a block of code."""
    text = (ROOT / "src/qwlora/recipe/examples" / name).read_text(encoding="utf-8").rstrip()
    return f"```yaml\n{text}\n```"


def readme_top() -> str:
    """What README.md says before its first section, with links that work from a page of docs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    return site_links(text.partition("\n")[2].strip())


def site_links(text: str) -> str:
    """`text` with the links of a file in the repository's root as those of a page of the site."""
    text = re.sub(r"\[docs/[^]]*\]\(docs/([^)#]+)\)", lambda m: f"[{_title(m[1])}]({m[1]})", text)
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = re.sub(r"\[[^]]*\]\(benchmarks/results/([\w-]+)\.\w+\)", r"[\1](benchmarks.md)", text)
    return re.sub(r"\[([^]]+)\]\(((?:benchmarks|recipes|examples|tests)/[^)]*)\)", r"`\1`", text)


def _title(page: str) -> str:
    """The heading of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return match[1] if match else page


def results(what: str) -> str:
    """A file of benchmarks/results as Markdown, whole or some rows and columns of it."""
    name, _, patterns = what.partition(": ")
    name, _, columns = name.removesuffix("]").partition(" [")
    text = _whole_results(name)
    if patterns:
        text = _fitting(text, patterns.split(" | "))
    if columns:
        text = "\n\n".join(_narrowed(block, columns.split("; ")) for block in text.split("\n\n"))
    return text


def _narrowed(block: str, columns: list[str]) -> str:
    """`block`, of a table only these columns."""
    if not block.startswith("|"):
        return block
    head, _, *rows = (re.split(r" *(?<!\\)\| *", line)[1:-1] for line in block.split("\n"))
    kept = [head.index(column) for column in columns]
    return _table(columns, [[row[i].replace("\\|", "|") for i in kept] for row in rows])


def _fitting(text: str, patterns: list[str]) -> str:
    """`text` with those rows of its tables that fit a pattern. Tables without any, and the machine,
    which the file names, are left out."""
    kept: list[str] = []
    for block in text.split("\n\n"):
        head, rows = block.split("\n")[:2], block.split("\n")[2:]
        if not block.startswith("|"):
            kept += [re.sub(r"^Machine: .*\n?", "", block, flags=re.MULTILINE).rstrip()]
            continue
        cells = [(row, re.sub(r"[| ]+", " ", row).strip()) for row in rows]
        fits = [row for row, text in cells if any(fnmatch.fnmatch(text, p) for p in patterns)]
        kept += ["\n".join([*head, *fits])] if fits else []
    return "\n\n".join(filter(None, kept))


def _whole_results(name: str) -> str:
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        return re.sub(r"^# .+\n", "", text).strip()
    content = json.loads(text)
    machine = content.pop("machine", None)
    parts = [f"Machine: {machine}" if machine else ""]
    rows = content.pop("rows", [])
    if isinstance(rows, dict):
        rows = [{"": key, **row} for key, row in rows.items()]
    scalars = list(_scalars(content))
    parts += [_table(["", ""], scalars)] if scalars else []
    names = list(dict.fromkeys(key for row in rows for key, v in row.items() if _is_scalar(v)))
    if rows:
        parts.append(_table(names, [[row.get(name, "") for name in names] for row in rows]))
    return "\n\n".join(part for part in parts if part)


def _scalars(content: Any, path: str = "") -> Any:
    for key, value in content.items():
        where = f"{path}.{key}" if path else key
        if _is_scalar(value):
            yield [f"`{where}`", value]
        elif isinstance(value, dict) and where.count(".") < 2 and len(value) <= 24:
            yield from _scalars(value, where)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _table(names: list[str], rows: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))
