"""What a job may write to, replace and remove."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from cli.command_line import refused
from pipeline.conftest import FakeJob, contents, left_alone
from qwlora.errors import DirectoryError, RecipeError
from qwlora.formats import manifest
from qwlora.formats.model_card import marked
from qwlora.pipeline.run import run
from qwlora.pipeline.store import Record, Store
from qwlora.system import output_path
from qwlora.system.output_path import as_directory_errors, check_output, lock_folder, new_folder
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


def test_a_users_folder_with_a_recipe_is_refused_and_left_alone(recipe_for: Any) -> None:
    folder = recipe_for().parent
    (folder / "base").mkdir()
    (folder / "base" / "mine.txt").write_text("mine")
    before = contents(folder)
    assert "not made by qwlora" in refused("run", "recipe.yaml", "--out", ".", cwd=folder)
    assert contents(folder) == before


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
        with left_alone(out / "base", "base' contains 'mine.txt'.*Move it out"):
            finish(out)


def test_a_readme_is_replaced_unless_edited(out: Path) -> None:
    def exported(text: str) -> str:
        with (store := Store(out)).locked(), store.scratch("export/qairt") as scratch:
            (scratch / "README.md").write_text(text)
            write_record(scratch, "qairt", None)
            store.commit("export/qairt", Record("export/qairt", {}, {}), scratch)
        return (files / "README.md").read_text()

    files = out / "export" / "qairt"
    exported(marked("old"))
    assert exported(marked("new")) == marked("new")
    (files / "README.md").write_text("edited")
    assert exported(marked("newer")) == "edited"
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
    with pytest.raises(DirectoryError, match="belongs to recipe 'tiny', not 'other'"):
        job.run()
    job.recipe.write_text(recipe)
    for damage in ("", "{", "[]", "[" * 100_000, None):
        (job.out / "recipe.yaml").write_text(damage or "")
        if damage is None:
            (job.out / "recipe.yaml").unlink()
        with left_alone(job.out, r"recipe\.yaml", (RecipeError, DirectoryError)):
            job.run()


def test_a_directory_without_a_finished_stage_is_as_before(job: FakeJob, tmp_path: Path) -> None:
    job.errors["evaluate/float"] = ZeroDivisionError()
    (tmp_path / "empty").mkdir()
    for job.out in (tmp_path / "empty", tmp_path / "new" / "out"):
        with left_alone(tmp_path, None, ZeroDivisionError):
            job.run()


def test_a_directory_without_a_recipe_is_free_unless_a_user_has_files(job: FakeJob) -> None:
    (job.out / ".qwlora").mkdir(parents=True)
    (job.out / ".qwlora" / "mine.txt").touch()
    with pytest.raises(DirectoryError, match="was not made by qwlora"):
        job.run()
    (job.out / ".qwlora" / "mine.txt").rename(job.out / ".qwlora" / "lock")
    job.run()


def test_a_second_first_run_leaves_the_first_ones_directory(job: FakeJob) -> None:
    def in_use(stage: str) -> None:
        with left_alone(job.out, "in use by another"):
            run(job.recipe, job.out)

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
    folder, in_use = tmp_path / "folder", pytest.raises(DirectoryError, match="in use")
    with lock_folder(folder, tmp_path), in_use, lock_folder(folder, tmp_path):
        pass
    assert removed


def test_an_unusable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name, message in {
        "loop/out": "Too many levels of symbolic links",
        "dangling": "dangling' is a link to 'nowhere'",
        "dangling/out": "dangling' is a link to 'nowhere'",
        "x/" * 2500: "File name too long",
        "file/out": "file' is a file",
    }.items():
        with left_alone(tmp_path, message) as caught:
            check_output(tmp_path / name)
        assert len(str(caught.value)) < 1000


def test_an_artifact_behind_a_link_is_of_somebody_else(job: FakeJob, tmp_path: Path) -> None:
    job.run()
    (job.out / "simulation" / "first").rename(tmp_path / "mine")
    (job.out / "simulation" / "first").symlink_to(tmp_path / "mine")
    with left_alone(tmp_path / "mine", "first' exists and is not a folder"):
        job.run()


def test_an_output_in_the_data_is_refused(recipe_for: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.txt").write_text("a text")
    for sections in ({"data": {"source": str(data)}}, {"base": {"calibration": [str(data)]}}):
        for name in (".", "sub/out", "../data/out"):
            with left_alone(data, "is inside the data folder .*outside"):
                run(recipe_for(**sections), data / name)


def test_what_a_disk_refuses_has_a_remedy(tmp_path: Path) -> None:
    for error, remedy in (
        (OSError(errno.ENOLCK, "No locks available"), "cannot lock files.*local disk"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EIO, "Input/output error"), "disk or the connection to it failed"),
        (SafetensorError("Read-only file system (os error 30)"), "another --out"),
        (SafetensorError("Disk quota exceeded (os error 122)"), "no space left"),
    ):
        message = f"{tmp_path.name}.*{remedy}"
        with pytest.raises(DirectoryError, match=message), as_directory_errors(tmp_path):
            raise error


def test_a_failed_merge_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a" / "merged"
    for is_there in (False, True):
        if is_there:
            place.mkdir(parents=True)
        with left_alone(tmp_path, None, KeyboardInterrupt), new_folder(place) as folder:
            write_half(folder)


def write_half(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise KeyboardInterrupt


def test_a_second_merge_into_the_folder_is_refused_and_harms_nothing(tmp_path, monkeypatch) -> None:
    """Also while the first one's lock moves away with the folder that holds it."""
    (tmp_path / ".merged.part").mkdir()  # a user's
    place, move = tmp_path / "merged", output_path.move_into_place

    def refused(message: str) -> None:
        with pytest.raises(DirectoryError, match=message), new_folder(place):
            pass

    def moved(part: Path, target: Path) -> None:
        refused("is in use")
        move(part, target)

    with monkeypatch.context() as patched, new_folder(place) as folder:
        (folder / "config.json").write_text("{}")
        refused("is in use")
        patched.setattr(output_path, "move_into_place", moved)
    refused("is not empty")
    assert contents(tmp_path).keys() == {".merged.part", "merged", "merged/config.json"}


@pytest.mark.parametrize("is_moving", [False, True])
def test_what_a_killed_merge_left_is_replaced(tmp_path: Path, is_moving: bool) -> None:
    """Killed while it writes, or before the model takes the folder's place."""
    place = tmp_path / "merged"
    if not (child := os.fork()):
        try:
            with pytest.MonkeyPatch.context() as patched, new_folder(place) as folder:
                (folder / "config.json").write_text("old")
                (folder / "half.safetensors").touch()
                if not is_moving:
                    os._exit(9)
                patched.setattr(output_path, "move_into_place", lambda *_: os._exit(9))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(name.endswith("config.json") for name in contents(tmp_path))
    with new_folder(place) as folder:
        (folder / "config.json").write_text("new")
    assert contents(tmp_path) == {"merged": None, "merged/config.json": b"new"}
