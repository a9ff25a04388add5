"""Sentences that are hard to read become fewer: in README and docs, docstrings, messages and help.

python tests/docs/test_plain_english.py     lists them
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["qwlora-text"]

PARTICIPLE = (
    r"(?:[A-Z]\w+ed|Given|Made|Left|Kept|Shown|Written|Taken|Chosen|Found|Known|Held|Built)"
)
PATTERNS = {
    # "Refused are pipes.", "Not supported is int3.", "Left out are norms."
    "inverted": re.compile(
        rf"(?:Not \w+|{PARTICIPLE}|Missing)(?: also| here| too)?,? (?:is|are|was|were)\b"
    ),
    # "Of a folder, only text is read.", "Read from a file, it is checked."
    "opening": re.compile(
        rf"Of (?!course)\w+|{PARTICIPLE} (?!by )[^,.;:]{{3,60}}, \w+ (?:is|are|\w+s)\b"
    ),
    "nested": re.compile(r"[^(]*\([^()]* \([^()]*\)[^()]*\)"),
    "long": re.compile(r"(?:\S+ ){35}\S"),
}


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown or a docstring, without code, tables and links' addresses."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    # Definitions in columns are no sentences.
    text = re.sub(r"^ .*\S {3,}\S.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "x", re.sub(r"\]\([^)]*\)", "]", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#>|]|\d+\.) ?)|\n(?=\s*\w+: )|\|", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z*x\[])", paragraph):
            if cleaned := " ".join(sentence.split()).lstrip("-*#>0123456789. "):
                yield cleaned


def strings(code: str) -> Iterator[str]:
    """The strings of a module that hold more than three words; a value in an f-string is `x`."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            found = "".join(p.value if isinstance(p, ast.Constant) else "x" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = "" if id(node) in inside else node.value
        else:
            continue
        if found.count(" ") > 3:
            yield found


def texts() -> Iterator[tuple[str, str]]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        yield str(page.relative_to(ROOT)), page.read_text()
    for module in sorted((ROOT / "src").rglob("*.py")):
        for string in strings(module.read_text()):
            yield str(module.relative_to(ROOT)), string


def hard_sentences(pattern: str) -> list[str]:
    match = PATTERNS[pattern].match
    return [f"{file}: {s}" for file, text in texts() for s in sentences(text) if match(s)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hard_sentences_do_not_become_more(pattern: str) -> None:
    found = hard_sentences(pattern)
    assert len(found) <= MOST[pattern], "write these in plain English:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("sentence", "pattern"),
    [
        ("Refused are compressed files.", "inverted"),
        ("Not supported is int3.", "inverted"),
        ("Of an adapter from elsewhere the recipe does not say the layers.", "opening"),
        ("A file (of a folder (or two) of text) is read.", "nested"),
        ("word " * 36, "long"),
    ],
)
def test_a_hard_sentence_is_found(sentence: str, pattern: str) -> None:
    assert [p for p in PATTERNS if PATTERNS[p].match(sentence.strip())] == [pattern]


def test_words_of_the_documentation() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert sum(len(p.read_text().split()) for p in pages) <= MOST["words"], "cut a page first"


if __name__ == "__main__":
    for name in PATTERNS:
        lines = hard_sentences(name)
        print(f"{name}: {len(lines)}", *lines, sep="\n  ")
