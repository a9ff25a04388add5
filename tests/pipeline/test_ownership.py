"""What a job may write to, replace and remove."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from cli.command_line import refused
from pipeline.conftest import FakeJob
from qwlora.errors import DirectoryError, RecipeError
from qwlora.formats import manifest
from qwlora.formats.model_card import marked
from qwlora.pipeline.run import run
from qwlora.pipeline.store import Record, Store
from qwlora.system.output_path import as_directory_errors, check_output, lock_folder
from qwlora.system.seen import sealed
from qwlora.targets.proof.folder import RECORD, write_record


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The directory of a job that has made nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").touch()
    return tmp_path / "out"


def finish(out: Path, place: str = "base") -> None:
    """Commit an artifact of one file, as a stage does."""
    with (store := Store(out)).locked(), store.scratch(place) as scratch:
        (scratch / "model.safetensors").write_text(place)
        store.commit(place, Record("quantize", {}, {}), scratch)


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


def test_a_users_folder_with_a_recipe_is_refused_and_left_alone(recipe_for: Any) -> None:
    path: Path = recipe_for()
    for folder in ("base", "adapters/first"):
        (path.parent / folder).mkdir(parents=True)
        (path.parent / folder / "mine.txt").write_text("mine")
    before = contents(path.parent)
    assert "not made by qwlora" in refused("run", "recipe.yaml", "--out", ".", cwd=path.parent)
    assert contents(path.parent) == before


def test_a_folder_that_no_record_lists_is_not_replaced(job: FakeJob) -> None:
    job.run("quantize", "train")
    (job.out / "base" / "stage.json").unlink()
    for command in (lambda: job.run("quantize"), lambda: finish(job.out)):
        with pytest.raises(DirectoryError, match=r"base' contains 'part/settings.json' and 1 more"):
            command()
    assert not job.ran
    assert Store(job.out).records.keys() >= {"adapters/first"}


def test_a_users_file_among_a_jobs_is_not_removed(out: Path) -> None:
    finish(out)
    (out / "base" / "mine.txt").write_text("mine")
    record = (out / "base" / "stage.json").read_text()
    for text in (record, ""):  # also if the record of its folder is damaged
        (out / "base" / "stage.json").write_text(text)
        before = contents(out / "base")
        with pytest.raises(DirectoryError, match=r"base' contains 'mine.txt'.*Move it out"):
            finish(out)
        assert contents(out / "base") == before


@pytest.mark.parametrize("edited", [None, "edited"])
def test_a_readme_is_replaced_unless_edited(edited: str | None, out: Path) -> None:
    def export(text: str) -> None:
        with (store := Store(out)).locked(), store.scratch("export/qairt") as scratch:
            (scratch / "README.md").write_text(text)
            write_record(scratch, "qairt", None)
            store.commit("export/qairt", Record("export/qairt", {}, {}), scratch)

    files = out / "export" / "qairt"
    export(marked("old"))
    if edited:
        (files / "README.md").write_text(edited)
    export(marked("new"))
    assert (files / "README.md").read_text() == (edited or marked("new"))
    assert manifest.has_digests(files, RECORD)
    assert manifest.changed_files(files, RECORD) == []
    assert Store(out).problem("export/qairt") is None


HOSTILE = ({"files": {"../../mine": ""}}, {"files": {"/mine": ""}}, {"files": []}, {"needs": 3})


def test_a_damaged_record_leaves_an_artifact_that_is_ours(out: Path) -> None:
    finish(out)
    file = out / "base" / "stage.json"
    damages = ["", "{}", "[]", "[" * 100_000, file.read_text().replace("quantize", "train")]
    known = {"stage": "quantize", "inputs": {}, "needs": {}}
    for damage in (*damages, *(sealed({**known, **wrong}) for wrong in HOSTILE)):
        file.write_text(damage)
        assert Store(out).damaged == {"base"}
        finish(out)
        assert Store(out).records["base"].files.keys() == {"model.safetensors"}


def test_a_job_whose_recipe_is_gone_or_damaged_is_left_alone(job: FakeJob) -> None:
    job.run()
    recipe = job.recipe.read_text()
    job.recipe.write_text(recipe.replace("name: tiny", "name: other"))
    with pytest.raises(DirectoryError, match="was made by recipe 'tiny', and this one is 'other'"):
        job.run()
    job.recipe.write_text(recipe)
    for damage in ("", "{", "[]", "[" * 100_000, None):
        (job.out / "recipe.yaml").write_text(damage or "")
        if damage is None:
            (job.out / "recipe.yaml").unlink()
        before = contents(job.out)
        with pytest.raises((RecipeError, DirectoryError), match=r"recipe\.yaml"):
            job.run()
        assert contents(job.out) == before


def test_a_directory_without_a_finished_stage_is_as_before(job: FakeJob, tmp_path: Path) -> None:
    def fail(stage: str) -> None:
        assert (job.out / "recipe.yaml").is_file()
        raise ZeroDivisionError

    job.on_stage = fail
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for job.out in (tmp_path / "empty", tmp_path / "new" / "out"):
        with pytest.raises(ZeroDivisionError):
            job.run()
        assert contents(tmp_path) == before


def test_a_directory_without_a_recipe_is_free_unless_a_user_has_files(job: FakeJob) -> None:
    (job.out / ".qwlora").mkdir(parents=True)
    (job.out / ".qwlora" / "mine.txt").touch()
    with pytest.raises(DirectoryError, match="was not made by qwlora"):
        job.run()
    (job.out / ".qwlora" / "mine.txt").rename(job.out / ".qwlora" / "lock")
    job.run()


def test_a_second_first_run_leaves_the_first_ones_directory(job: FakeJob) -> None:
    def in_use(stage: str) -> None:
        before = contents(job.out)
        with pytest.raises(DirectoryError, match="in use by another"):
            run(job.recipe, job.out)
        assert contents(job.out) == before

    job.on_stage = in_use
    job.run("quantize")


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


UNUSABLE = {
    "loop": "Too many levels of symbolic links",
    "loop/out": "Too many levels of symbolic links",
    "dangling": "is a link to 'nowhere', which does not exist",
    "dangling/out": "dangling' is a link to 'nowhere', which does not exist",
    "x" * 300: "File name too long",
    "x/" * 2500: "File name too long",
    "file": "is a file",
    "file/out": "file' is a file",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    with pytest.raises(DirectoryError, match=UNUSABLE[name]) as caught:
        check_output(tmp_path / name)
    assert len(str(caught.value)) < 1000
    assert contents(tmp_path) == before


def test_an_artifact_behind_a_link_is_of_somebody_else(job: FakeJob, tmp_path: Path) -> None:
    job.run()
    (job.out / "simulation" / "first").rename(tmp_path / "mine")
    (job.out / "simulation" / "first").symlink_to(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    with pytest.raises(DirectoryError, match="first' exists and is not a folder"):
        job.run()
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize("name", [".", "sub/out", "../data/out"])
def test_an_output_in_the_data_is_refused(recipe_for: Any, tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.txt").write_text("a text")
    for sections in ({"data": {"source": str(data)}}, {"base": {"calibration": [str(data)]}}):
        with pytest.raises(DirectoryError, match=r"is inside the data folder .*outside"):
            run(recipe_for(**sections), data / name)
    assert contents(data) == {"text.txt": b"a text"}


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOLCK, "No locks available"), "cannot lock files.*local disk"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EIO, "Input/output error"), "disk or the connection to it failed"),
        (SafetensorError("Read-only file system (os error 30)"), "another --out"),
        (SafetensorError("Disk quota exceeded (os error 122)"), "no space left"),
    ],
)
def test_what_a_disk_refuses_has_a_remedy(error: Exception, remedy: str, tmp_path: Path) -> None:
    message = f"{tmp_path.name}.*{remedy}"
    with pytest.raises(DirectoryError, match=message), as_directory_errors(tmp_path):
        raise error
