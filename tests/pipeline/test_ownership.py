"""Directories: what a job may write to, replace and remove. No stage runs here."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError

import qwlora.pipeline.job.directory as directory_module
from cli.command_line import refused
from qwlora.errors import DirectoryError
from qwlora.formats import manifest
from qwlora.formats.model_card import marked
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.output_path import as_directory_errors, check_output, lock_folder
from qwlora.pipeline.job.stage_records import Record, is_unclaimed, read_owner
from qwlora.pipeline.running.run_job import run
from qwlora.recipe import Recipe, load_recipe
from qwlora.targets.proof.folder import RECORD, write_record


@pytest.fixture
def recipe(recipe_for: Any) -> Recipe:
    return load_recipe(recipe_for())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def finish(out: Path, recipe: Recipe, stage: str = "quantize", artifact: str = "base") -> None:
    """Claim `out` and commit an artifact of one file, as a stage does."""
    with Directory.open(out, recipe) as directory, directory.scratch() as scratch:
        (scratch / "model.safetensors").write_text(stage)
        directory.commit(stage, Record("key", 1.0), scratch, artifact, ())


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


def fail(written: Path) -> None:
    assert written.is_file()
    raise ZeroDivisionError


def test_a_users_folder_with_a_recipe_is_refused_and_left_alone(recipe_for: Any) -> None:
    path: Path = recipe_for()
    for folder in ("base", "adapters/first"):
        (path.parent / folder).mkdir(parents=True)
        (path.parent / folder / "mine.txt").write_text("mine")
    before = contents(path.parent)
    said = refused("run", "recipe.yaml", "--out", ".", cwd=path.parent)
    assert "'.' is not empty and was not made by qwlora" in said
    assert contents(path.parent) == before


def test_a_folder_that_no_record_lists_is_not_replaced(recipe: Recipe, out: Path) -> None:
    finish(out, recipe, "train/first", "adapters/first")
    (out / "base").mkdir()
    (out / "base" / "mine.txt").write_text("mine")
    with pytest.raises(DirectoryError, match=r"base' contains 'mine.txt'.*Move it out"):
        run(recipe, out, ("quantize",))  # before a model is loaded
    with pytest.raises(DirectoryError, match=r"base' contains 'mine.txt'"):
        finish(out, recipe)
    assert (out / "base" / "mine.txt").read_text() == "mine"
    assert Directory.read(out).records.keys() == {"train/first"}


def test_a_users_file_among_a_jobs_is_not_removed(recipe: Recipe, out: Path) -> None:
    finish(out, recipe)
    (out / "base" / "README.md").write_text("mine")
    for damage in (None, ""):  # also if the record of its folder is damaged
        if damage is not None:
            (out / ".qwlora" / "records" / "quantize.json").write_text(damage)
        before = contents(out / "base")
        with pytest.raises(DirectoryError, match=r"base' contains 'README.md'.*Move it out"):
            finish(out, recipe)
        assert contents(out / "base") == before


@pytest.mark.parametrize("written_by", ["the job", "the user"])
def test_a_readme_is_replaced_unless_edited(written_by: str, recipe: Recipe, out: Path) -> None:
    def export(text: str) -> None:
        with Directory.open(out, recipe) as directory, directory.scratch() as scratch:
            (scratch / "README.md").write_text(text)
            write_record(scratch, {})
            directory.commit("export/qairt", Record("key", 1.0), scratch, "export/qairt", ())

    files = out / "export" / "qairt"
    export(marked("old"))
    if written_by == "the user":
        (files / "README.md").write_text("edited")
    export(marked("new"))
    expected = "edited" if written_by == "the user" else marked("new")
    assert (files / "README.md").read_text() == expected
    assert manifest.has_digests(files, RECORD)
    assert manifest.changed_files(files, RECORD) == []


def test_a_damaged_record_leaves_an_artifact_that_is_ours(recipe: Recipe, out: Path) -> None:
    finish(out, recipe)
    record = out / ".qwlora" / "records" / "quantize.json"
    for damage in ("", "{}", "[]", "[" * 100_000, record.read_text().replace("key", "kex")):
        record.write_text(damage)
        assert Directory.read(out).damaged == ["quantize"]
        finish(out, recipe)
        assert Directory.read(out).records["quantize"].files.keys() == {"base/model.safetensors"}


def test_killed_commit_recovers(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(out, recipe)

    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with Directory.open(out, recipe) as directory, directory.scratch() as scratch:
        (scratch / "new.safetensors").write_text("new")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                directory.commit("quantize", Record("other", 1.0), scratch, "base", ())
    assert [path.name for path in (out / "base").iterdir()] == ["model.safetensors"]
    assert Directory.read(out).records["quantize"].key == "other"
    assert [path.name for path in (out / "base").iterdir()] == ["new.safetensors"]


def test_a_job_whose_recipe_is_gone_is_of_nobody(recipe: Recipe, out: Path) -> None:
    finish(out, recipe)
    with pytest.raises(DirectoryError, match="was made by another recipe"):
        finish(out, recipe.model_copy(update={"name": "other"}))
    for damage in ("", "{", "[]", "[" * 100_000):
        (out / "recipe.yaml").write_text(damage)
        with pytest.raises(DirectoryError, match=r"recipe\.yaml' cannot be read"):
            finish(out, recipe)


def test_a_recipe_that_the_user_edited_is_not_overwritten(recipe: Recipe, out: Path) -> None:
    finish(out, recipe)
    file = out / "recipe.yaml"
    assert yaml.safe_load(file.read_text())["seed"] == 0
    changed = recipe.model_copy(update={"seed": 3})
    finish(out, changed)  # written by the job, and replaced by the job
    assert yaml.safe_load(file.read_text())["seed"] == 3
    edited = "# my notes\n" + file.read_text().replace("seed: 3", "seed: 5")
    file.write_text(edited)
    with pytest.raises(DirectoryError, match=r"recipe\.yaml' was edited"):
        finish(out, recipe)
    finish(out, load_recipe(file))
    assert file.read_text() == edited


def test_a_directory_without_a_finished_stage_is_as_before(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for out in (tmp_path / "empty", tmp_path / "new" / "out"):
        with pytest.raises(ZeroDivisionError), Directory.open(out, recipe):
            fail(out / "recipe.yaml")
        assert contents(tmp_path) == before


def test_a_directory_without_a_marker_is_free(recipe: Recipe, tmp_path: Path, out: Path) -> None:
    (out / ".qwlora").mkdir(parents=True)
    (out / ".qwlora" / "lock").touch()
    finish(out, recipe)
    other = tmp_path / "other"
    (other / ".qwlora").mkdir(parents=True)
    (other / ".qwlora" / "mine.txt").touch()
    with pytest.raises(DirectoryError, match="was not made by qwlora"):
        finish(other, recipe)


def test_a_second_first_run_leaves_the_first_ones_directory(recipe: Recipe, out: Path) -> None:
    with Directory.open(out, recipe):
        before = contents(out)
        with pytest.raises(DirectoryError, match="in use by another"), Directory.open(out, recipe):
            pass
        assert contents(out) == before


def test_a_job_that_is_finished_while_its_owner_is_checked_is_not_foreign(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir()

    def then_another_finishes(look: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def look_and_let_it(path: Path) -> Any:
            seen = look(path)
            monkeypatch.undo()
            finish(path, recipe)
            return seen

        return look_and_let_it

    for look in (read_owner, is_unclaimed):  # whichever comes first
        monkeypatch.setattr(directory_module, look.__name__, then_another_finishes(look))
    Directory(out).check_owner(recipe)
    assert Directory.read(out).records.keys() == {"quantize"}


def test_a_lock_on_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that gives up removes its lock file; one that has opened it already waits on air."""
    flock = fcntl.flock
    removed = []

    def remove_then_lock(file: Any, how: int) -> None:
        if not removed:
            removed.append((tmp_path / "folder" / "lock").unlink())
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", remove_then_lock)
    with (
        lock_folder(tmp_path / "folder", tmp_path),
        pytest.raises(DirectoryError, match="in use"),
        lock_folder(tmp_path / "folder", tmp_path),
    ):
        pass
    assert removed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loop", "Too many levels of symbolic links"),
        ("loop/out", "Too many levels of symbolic links"),
        ("dangling", r"is a link to 'nowhere', which does not exist"),
        ("dangling/out", r"dangling' is a link to 'nowhere', which does not exist"),
        ("x" * 300, "File name too long"),
        ("x/" * 2500, "File name too long"),
        ("file", "is a file; --out names a directory"),
        ("file/out", "file' is a file; choose another --out"),
    ],
)
def test_an_unusable_path_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    with pytest.raises(DirectoryError, match=message) as caught:
        check_output(tmp_path / name)
    assert len(str(caught.value)) < 1000
    assert contents(tmp_path) == before


def test_a_verb_says_the_same_of_a_path_in_which_it_looks_for_the_recipe() -> None:
    said = refused("train", "--out", "x/" * 2500)
    assert len(said) < 1000
    assert "File name too long; choose another --out" in said


def test_a_link_to_a_folder_is_that_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    finish(tmp_path / "out", recipe)
    assert (tmp_path / "disk" / "base").is_dir()
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", [".", "sub/out", "../data/out"])
def test_an_output_in_the_data_is_refused(recipe_for: Any, tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.txt").write_text("a text")
    for sections in ({"data": {"source": str(data)}}, {"base": {"calibration": [str(data)]}}):
        recipe = load_recipe(recipe_for(**sections))
        with pytest.raises(DirectoryError, match=r"is inside the data folder .*outside"):
            run(recipe, data / name)
    assert contents(data) == {"text.txt": b"a text"}


def test_an_artifact_that_is_replaced_is_never_visible_in_part(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the process dies while it removes the old files."""

    def write(text: str) -> None:
        with Directory.open(out, recipe) as directory, directory.scratch() as scratch:
            for name in ("a", "b", "c"):
                (scratch / name).write_text(text)
            directory.commit("quantize", Record(text, 1.0), scratch, "base", ())

    write("old")
    removed: list[str] = []

    def unlink(path: str, **options: Any) -> None:
        if path in ("a", "b", "c"):
            removed.append(path)
            if len(removed) > 1:
                raise KeyboardInterrupt
        real(path, **options)

    real = os.unlink
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            write("new")
    texts = [p.read_text() for p in (out / "base").iterdir()]
    assert (len(texts), len({*texts})) == (3, 1)
    write("newer")
    assert sorted(p.name for p in (out / ".qwlora").iterdir()) == ["lock", "records"]


def test_what_a_killed_run_left_is_removed_by_the_next(recipe: Recipe, out: Path) -> None:
    finish(out, recipe)
    for name in ("scratch", "trash"):
        (out / ".qwlora" / name).mkdir()
        (out / ".qwlora" / name / "model.safetensors").write_text("half")
    with Directory.open(out, recipe):
        pass
    assert {path.name for path in (out / ".qwlora").iterdir()} == {"lock", "records"}


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOLCK, "No locks available"), "cannot lock files.*local disk"),
        (OSError(errno.EOPNOTSUPP, "Operation not supported"), "cannot lock files"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (SafetensorError("I/O error: File too large (os error 27)"), "ulimit -f"),
        (OSError(errno.EIO, "Input/output error"), "disk or the connection to it failed"),
        (SafetensorError("Read-only file system (os error 30)"), "another --out"),
        (SafetensorError("Disk quota exceeded (os error 122)"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
    ],
)
def test_what_a_disk_refuses_has_a_remedy(error: Exception, remedy: str, tmp_path: Path) -> None:
    with (
        pytest.raises(DirectoryError, match=f"{tmp_path.name}.*{remedy}"),
        as_directory_errors(tmp_path),
    ):
        raise error
