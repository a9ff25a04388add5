"""Commands that are killed before a change of the disk: the next one finishes or undoes what they
began. Some changes here, all in attack/test_sweeps.py."""

import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter.test_mlx_adapter import write_mlx
from qwlora.errors import DirectoryError
from qwlora.pipeline.commands import manage_adapters
from qwlora.pipeline.job import OpenJob, job_recipe
from qwlora.pipeline.results import read_job, rebuild_reports
from qwlora.pipeline.store import TMP
from qwlora.system.seen import sealed

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
changes_left: list[int] = []  # until the process counts as killed; empty if it is not to be


class Killed(BaseException):
    """Stands for SIGKILL: no handler for errors catches it."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if changes_left and event in CHANGES:
        changes_left[0] -= 1
        if changes_left[0] < 0:
            raise Killed


sys.addaudithook(_hook)


def is_killed(number: int, action: Callable[..., Any], *arguments: Any) -> bool:
    """Run `action`, and refuse all changes of the disk after so many; False if there are no more."""
    changes_left.append(number)
    try:
        action(*arguments)
    except Killed:
        return True
    finally:
        changes_left.clear()
    return False


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished job, to change."""
    return Path(shutil.copytree(finished / "job", tmp_path / "job"))


def state(job: Path) -> dict[str, bytes]:
    """Every file of a job by its path."""
    found = {
        str(path.relative_to(job)): path.read_bytes().replace(str(job).encode(), b"JOB")
        for path in sorted(job.rglob("*"))
        if path.is_file() and not path.name.endswith(".part")
    }
    for name in (".qwlora/seen.json", ".qwlora/lock", "report.html"):
        found.pop(name, None)
    return found


def edited(job: Path) -> None:
    with manage_adapters._editing(job):
        pass


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], Any]]:
    source = str(write_mlx(tmp_path_factory.mktemp("elsewhere") / "mlx"))
    return {
        "add": lambda job: manage_adapters.add_adapter(job, "third", changes=("steps=3",)),
        "import": lambda job: manage_adapters.import_adapter(job, "third", source),
        "rename": lambda job: manage_adapters.rename_adapter(job, "first", "one"),
        "remove": lambda job: manage_adapters.remove_adapter(job, "first"),
        "swapped by hand": read_job,
    }


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
@pytest.mark.parametrize("command", ["add", "import", "rename", "remove", "swapped by hand"])
def test_a_killed_change_is_finished_or_undone(command, commands, finished, tmp_path) -> None:
    change, job = commands[command], tmp_path / "job"

    def fresh() -> None:
        shutil.rmtree(job, ignore_errors=True)
        shutil.copytree(finished / "job", job)
        if command == "swapped by hand":
            text = (job / "recipe.yaml").read_text().replace("name: first", "name: x")
            text = text.replace("name: second", "name: first").replace("name: x", "name: second")
            (job / "recipe.yaml").write_text(text)

    fresh()
    edited(job)
    before = state(job)
    change(job)
    after = state(job)
    others = itertools.cycle([edited, lambda job: rebuild_reports([job])])
    for number in itertools.count(len(command) % 4, 4):
        fresh()
        if not is_killed(number, change, job):
            break
        killed = Path(shutil.copytree(job, tmp_path / "killed"))
        next(others)(job)
        assert state(job) in (before, after), number
        assert not (job / TMP).exists()
        assert {name for name in OpenJob(job).judge.stale if "/third" not in name} == set()
        shutil.rmtree(job)
        killed.rename(job)
        with contextlib.suppress(DirectoryError):  # it is done already
            change(job)
        edited(job)
        assert state(job) == after, number
    assert number > 4


def test_what_a_stranger_left_in_tmp_leads_nowhere(job: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    before = state(job)
    record = sealed({"stage": "train", "inputs": {}, "needs": {}})
    for name in ("..%2Fhere", "adapters%2F..%2F..%2Fhere", "link%2Fhere", "%2Ftmp%2Fhere"):
        (job / TMP / name).mkdir(parents=True)
        (job / TMP / name / "stage.json").write_text(record)
    (job / TMP / "adapters%2Fthere").symlink_to(victim)
    (job / "link").symlink_to(tmp_path)
    read_job(job)
    assert not (job / TMP).exists()
    assert not (tmp_path / "here").exists()
    assert (victim / "mine").read_text() == "mine"
    assert before.keys() <= state(job).keys()


def test_no_adapter_added_meanwhile_is_lost(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = manage_adapters._write

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(DirectoryError, match="in use by another qwlora process"):
            manage_adapters.remove_adapter(job, "second")
        return write(*arguments)

    monkeypatch.setattr(manage_adapters, "_write", meanwhile)
    manage_adapters.add_adapter(job, "third")
    assert [a.name for a in job_recipe(job).adapters] == ["first", "second", "third"]
