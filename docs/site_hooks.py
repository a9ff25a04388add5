"""Fills pages of the site with parts of README.md, recipes and benchmark results, so that each
text and each number is in one place.

    {{ readme: Title of a section }}     the section, without its heading; "top": what comes before
    {{ results: file.md }}               the file, without its title
    {{ results: file.json }}             its numbers, as tables
    {{ recipe: file.yaml }}              a file of recipes/
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """The page with its parts filled in; mkdocs calls this."""
    filled = re.sub(r"\{\{ readme: (.+?) \}\}", lambda m: readme_section(m[1]), markdown)
    filled = re.sub(r"\{\{ recipe: (.+?) \}\}", lambda m: recipe(m[1]), filled)
    return re.sub(r"\{\{ results: (.+?) \}\}", lambda m: results(m[1]), filled)


def recipe(name: str) -> str:
    """A file of recipes/ as a block of code."""
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8").rstrip()
    return f"```yaml\n{text}\n```"


def readme_section(title: str) -> str:
    """A section of README.md, with links that work from a page of the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    found["top"] = sections[0].partition("\n")[2]
    return site_links(found[title].strip())


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


def results(name: str) -> str:
    """A file of benchmarks/results as Markdown."""
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
