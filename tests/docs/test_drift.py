"""Pages that are generated equal the code, and every snippet in README.md and docs is true."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from packaging.version import Version

import qwlora
from cli import command_line
from docs.error_pages import PAGES, pages
from docs.snippets import LANGUAGES, ROOT, Block, blocks, commands, documents, problem_of_recipe
from docs.snippets import problem_of_command as problem_of
from qwlora import errors

CLIENTS = ("npu.qnn",)  # Qualcomm's QNN
# Blocks of Python, and the test that runs them.
PYTHON = {
    "python.md": (3, "tests/docs/test_python_page.py"),
    "first-five-minutes.md": (1, "tests/docs/test_newcomer.py"),
    "aimet-guide.md": (9, "tests/docs/test_aimet_guide.py"),
    "encodings.md": (1, "tests/docs/test_drift.py"),
    "results.md": (1, "tests/docs/test_python_page.py"),
    "push.md": (1, "tests/pipeline/test_push.py"),
    "runtimes.md": (1, "tests/pipeline/test_push.py"),
}


def test_the_command_line_reference_is_up_to_date() -> None:
    if Version(typer.__version__) < Version("0.29"):
        pytest.skip("docs/cli.md is from typer 0.29 or newer, whose words are others")
    written = runpy.run_path(str(ROOT / "docs/cli_page.py"))["page"]()
    assert (ROOT / "docs/cli.md").read_text() == written, "make docs/cli.md"


def test_the_recipe_reference_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "docs/recipe_page.py"))["page"]()
    assert (ROOT / "docs/recipe.md").read_text() == written, "make docs/recipe.md"


def test_the_error_pages_are_up_to_date() -> None:
    folder = ROOT / "docs" / "errors"
    written = {path.name: path.read_text() for path in folder.glob("*.md")}
    assert written == pages(), "make docs/errors/index.md"


def test_a_changed_message_or_docstring_changes_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = pages()["MissingExtraError.md"]
    monkeypatch.setattr("qwlora.system.optional_packages.MissingExtraError", _Reworded)
    with pytest.raises(AssertionError):
        pages()
    monkeypatch.undo()
    monkeypatch.setattr(errors.MissingExtraError, "__doc__", "Something else.")
    assert pages()["MissingExtraError.md"] != page


class _Reworded(errors.MissingExtraError):
    def __init__(self, message: str):
        super().__init__(f"Reworded: {message}")


def test_every_error_class_has_a_page_in_the_navigation() -> None:
    types = [value for value in vars(errors).values() if isinstance(value, type)]
    classes = {kind for kind in types if issubclass(kind, errors.QwloraError)}
    assert classes - {errors.QwloraError} == PAGES.keys()
    navigation = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"errors/(\w+)\.md", navigation)
    assert [name for name in listed if name != "index"] == sorted(k.__name__ for k in PAGES)


def test_every_public_name_is_in_the_api_reference() -> None:
    page = (ROOT / "docs/api.md").read_text()
    listed = set(re.findall(r"^- `(\w+)`: \S", page, re.MULTILINE))
    assert {*qwlora.__all__} <= listed <= {*qwlora.__all__, *vars(qwlora.formats.aimet_encodings)}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    log = (ROOT / "docs/log/README.md").read_text()  # outside the navigation, as all it lists
    indexed = [p for p in pages if p in navigation or f"]({p.removeprefix('log/')})" in log]
    assert sorted({*pages} - {*indexed}) == ["log/README.md"]


def test_parts_of_pages_are_what_other_files_say() -> None:
    filled = runpy.run_path(str(ROOT / "docs/page_parts.py"))["filled"]
    pages = {page: page.read_text() for page in (ROOT / "docs").rglob("*.md")}
    old = [page.name for page, text in pages.items() if filled(text) != text]
    assert old == [], "python docs/page_parts.py"
    parts = re.findall(r"<!-- (\w+): .+? -->\n(.*?)<!-- end -->", "".join(pages.values()), re.S)
    assert sum(text.count("- `") if kind == "api" else 1 for kind, text in parts) > 80
    assert [
        page.name for page, text in pages.items() if re.search(r"^(:::|\{\{) ", text, re.M)
    ] == []


def test_every_block_of_code_has_a_language_that_is_checked() -> None:
    found = [block for path in documents() for block in blocks(path)]
    assert len(found) > 60
    assert [block.where for block in found if block.language not in LANGUAGES] == []


def test_commands_in_the_documentation_exist_with_their_options() -> None:
    found = [(where, line) for path in documents() for where, line in commands(path)]
    assert len(found) > 60
    problems = {f"{where}: {line}": problem_of(line) for where, line in found}
    assert {command: problem for command, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("qwlora nun recipe.yaml --out out", "no command nun"),
        ("qwlora run recipe.yaml --outt out", "no option --outt"),
        ("qwlora merge out first --into float", "out"),
        ("qwlora adapters rename out one", "new"),
        ("qwlora generate out hello --max-new-tokens many", "integer"),
        ("notaprogram x", "unknown program"),
    ],
)
def test_a_planted_command_is_found(command: str, problem: str) -> None:
    assert problem in str(problem_of(command))


def test_recipes_in_the_documentation_are_valid(checkpoints: dict[str, Path], corpus: Path) -> None:
    found = [b for path in documents() for b in blocks(path) if b.language == "yaml"]
    assert len(found) >= 3
    problems = {b.where: problem_of_recipe(b.text, checkpoints["llama"], corpus) for b in found}
    assert {where: problem for where, problem in problems.items() if problem} == {}


def test_a_planted_key_is_found(checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    copied = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copied)
    copied.write_text(copied.read_text().replace("activation_bitwidth", "activation_bits", 1))
    found = [b.text for b in blocks(copied) if b.language == "yaml"]
    problems = [problem_of_recipe(text, checkpoints["llama"], corpus) for text in found]
    assert any("activation_bits" in problem for problem in problems if problem)


def test_every_python_block_is_run_by_a_test() -> None:
    found: dict[str, int] = {}
    for path in documents():
        count = sum(b.language == "python" and not needs_a_client(b) for b in blocks(path))
        found |= {path.name: count} if count else {}
    assert found == {name: count for name, (count, _) in PYTHON.items()}
    for name, (_, test) in PYTHON.items():
        assert name in (ROOT / test).read_text()


def needs_a_client(block: Block) -> bool:
    """Whether a block of Python runs only with a vendor's package, and is only checked here."""
    return any(f"qwlora.targets.{module} " in block.text for module in CLIENTS)


def test_blocks_that_need_a_client_import_what_exists() -> None:
    found = [b for path in documents() for b in blocks(path) if b.language == "python"]
    for block in filter(needs_a_client, found):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qwlora"):
                names = vars(importlib.import_module(str(node.module))).keys()
                public = {*names, *(qwlora.__all__ if node.module == "qwlora" else ())}
                assert {alias.name for alias in node.names} <= public, block.where


def test_the_snippets_of_the_encodings_page_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ROOT / "tests/formats/aimet_encodings/files"
    shutil.copy(files / "aimet-2.0.0.encodings", tmp_path / "model.encodings")
    monkeypatch.chdir(tmp_path)
    found = list(blocks(ROOT / "docs/encodings.md"))
    (code,) = [block.text for block in found if block.language == "python"]
    exec(compile(code, "encodings.md", "exec"), {})
    written = (tmp_path / "model-2.encodings").read_bytes()
    (tmp_path / "model-2.encodings").unlink()
    (lines,) = [block.text for block in found if block.language == "shell"]
    found_words = [shlex.split(line, comments=True)[1:] for line in lines.splitlines()]
    assert [command_line.qwlora(*words).returncode for words in found_words] == [0, 0, 0]
    assert (tmp_path / "model-2.encodings").read_bytes() == written
