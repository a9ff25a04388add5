"""Pages that are generated equal the code, every snippet in README.md and docs is true, and the site
builds without a warning."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from packaging.version import Version

from cli import command_line
from docs.snippets import LANGUAGES, ROOT, Block, blocks, commands, documents, problem_of_recipe
from docs.snippets import problem_of_command as problem_of
from qwlora import errors

# Blocks of Python, and the test that runs them.
PYTHON = {
    "coming-from.md": (1, "tests/formats/test_hf_quantizer.py"),
    "python.md": (4, "tests/docs/test_python_page.py"),
    "first-five-minutes.md": (1, "tests/docs/test_newcomer.py"),
    "aimet-guide.md": (9, "tests/docs/test_python_page.py"),
    "encodings.md": (1, "tests/docs/test_drift.py"),
    "results.md": (1, "tests/docs/test_python_page.py"),
    "push.md": (1, "tests/pipeline/test_push.py"),
    "deploy-pytorch.md": (1, "tests/pipeline/test_push.py"),
}


@pytest.mark.parametrize("page", ["cli", "errors", "recipe"])
def test_what_is_written_from_the_code_is_up_to_date(page: str) -> None:
    if Version(typer.__version__) < Version("0.29"):
        pytest.skip("docs/cli.md is from typer 0.29 or newer, whose words are others")
    written = runpy.run_path(str(ROOT / f"docs/{page}_page.py"))["page"]()
    assert (ROOT / f"docs/{page}.md").read_text() == written, f"make docs/{page}.md"


def test_every_error_class_has_a_section() -> None:
    documented = runpy.run_path(str(ROOT / "docs/errors_page.py"))["CAUSES"]
    types = [value for value in vars(errors).values() if isinstance(value, type)]
    classes = {kind for kind in types if issubclass(kind, errors.QwloraError)}
    assert classes - {errors.QwloraError} == documented.keys()


def test_parts_of_pages_and_the_list_of_pages_are_up_to_date() -> None:
    filled = runpy.run_path(str(ROOT / "docs/page_parts.py"))["filled"]
    paths = list((ROOT / "docs").rglob("*.md"))
    old = [page.name for page in paths if filled(page.read_text()) != page.read_text()]
    assert old == [], "python docs/page_parts.py"
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in paths if "log" not in page.parts}
    assert [page for page in pages if page not in navigation] == []


def test_commands_in_the_documentation_exist_with_their_options() -> None:
    found = [(where, line) for path in documents() for where, line in commands(path)]
    assert len(found) > 60
    assert [(*each, problem_of(each[1])) for each in found if problem_of(each[1])] == []
    assert problem_of("qwlora run recipe.yaml --outt out")


def test_recipes_in_the_documentation_are_valid(checkpoints: dict[str, Path], corpus: Path) -> None:
    found = [block for path in documents() for block in blocks(path)]
    assert [block.where for block in found if block.language not in LANGUAGES] == []
    recipes = [block for block in found if block.language == "yaml"]
    assert len(recipes) >= 3

    def problem(text: str) -> str | None:
        return problem_of_recipe(text, checkpoints["llama"], corpus)

    assert {b.where: problem(b.text) for b in recipes if problem(b.text)} == {}
    assert problem("simulation: {activation_bits: 8}")


def test_every_python_block_is_run_by_a_test() -> None:
    found: dict[str, int] = {}
    for path in documents():
        count = sum(b.language == "python" and not needs_a_client(b) for b in blocks(path))
        found |= {path.name: count} if count else {}
    assert found == {name: count for name, (count, _) in PYTHON.items()}
    for name, (_, test) in PYTHON.items():
        assert name in (ROOT / test).read_text()


def needs_a_client(block: Block) -> bool:
    """Whether a block of Python runs only with a vendor's package, so that it is only imported here."""
    if is_client := "qwlora.targets.npu.qnn " in block.text:
        exec("\n".join(re.findall(r"^(?:from|import) qwlora.*", block.text, re.MULTILINE)), {})
    return is_client


def test_the_snippets_of_the_encodings_page_work_one_after_the_other(tmp_path, monkeypatch) -> None:
    files = ROOT / "tests/formats/aimet_encodings/files"
    shutil.copy(files / "aimet-2.0.0.encodings", tmp_path / "model.encodings")
    monkeypatch.chdir(tmp_path)
    found = list(blocks(ROOT / "docs/encodings.md"))
    (code,) = [block.text for block in found if block.language == "python"]
    exec(compile(code, "encodings.md", "exec"), {})
    assert '"version": "2.1.0"' in (tmp_path / "model-2.encodings").read_text()
    (lines,) = [block.text for block in found if block.language == "shell"]
    assert command_line.qwlora(*shlex.split(lines, comments=True)[1:]).returncode == 0


README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "log" / "code.md").read_text()


def test_every_file_and_function_that_the_map_of_the_code_names_exists() -> None:
    places = (ROOT / "src/qwlora", ROOT)
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", MAP)
    assert [n for n in named if not any((place / n).exists() for place in places)] == []
    steps = re.findall(r"^\d\. `([\w/]+\.py)`: `(?:\w+\.)?(\w+)`", MAP, re.MULTILINE)
    assert min(len(named), len(steps)) > 12
    for file, name in steps:
        assert re.search(rf"\n *(def|class) {name}\b", (places[0] / file).read_text()), name


def test_links_lead_somewhere_and_make_targets_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)


@pytest.mark.slow
def test_the_site_builds_and_no_page_loads_anything_from_elsewhere(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -r requirements/docs.txt")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    loaded = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+stylesheet[^>]+https?:"""
    assert [p.name for p in pages if re.search(loaded, p.read_text())] == []
    left = re.compile(r"<!-- api: |^::: ", re.MULTILINE)  # a function that was not filled in
    assert [p.name for p in pages if left.search(p.read_text())] == []
    styles = list(tmp_path.rglob("*.css"))
    assert [p.name for p in styles if re.search(r"url\(.?https?:", p.read_text())] == []
