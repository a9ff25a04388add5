"""Commands that are killed at any change of the disk: the next one finishes or undoes what they
began. Some changes here, all in attack/test_sweeps.py."""

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapter.test_mlx_adapter import write_mlx
from pipeline.conftest import FakeJob
from qwlora.cli.main import app
from qwlora.errors import DirectoryError
from qwlora.pipeline.commands import manage_adapters
from qwlora.pipeline.commands.manage_adapters import (
    add_adapter,
    import_adapter,
    remove_adapter,
    rename_adapter,
)
from qwlora.pipeline.job import OpenJob, job_recipe, settle
from qwlora.pipeline.results import read_job, rebuild_reports
from qwlora.pipeline.store import TMP, Store
from qwlora.system.seen import sealed

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR
_stop: Callable[[], None] | None = None


class Stopped(BaseException):
    """Stands for SIGKILL: no handler for errors catches it."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _stop is None or str(arguments[:1]).startswith("('/dev"):
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if event in _CHANGES or writes:
        _stop()


sys.addaudithook(_hook)


@contextmanager
def stopping(number: int) -> Iterator[None]:
    """Refuse the nth change of the disk and all that follow, as if the process were gone."""
    global _stop
    count = itertools.count(1)

    def stop() -> None:
        if next(count) >= number:
            raise Stopped

    _stop = stop
    try:
        yield
    finally:
        _stop = None


def killed_at(every: int, first: int, action: Callable[[], Any]) -> Iterator[int]:
    """Run `action` until it is not killed any more, each time killed somewhat later."""
    for number in itertools.count(first, every):
        with contextlib.suppress(Stopped), stopping(number):
            action()
            assert number > every
            return
        yield number


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished job, to change."""
    return Path(shutil.copytree(finished / "job", tmp_path / "job"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mlx(tmp_path_factory.mktemp("elsewhere") / "mlx")


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


def swap(job: Path) -> None:
    """Two adapters change their names by hand; then a command that only looks."""
    recipe = job / "recipe.yaml"
    text = recipe.read_text()
    if text.index("name: first") < text.index("name: second"):
        text = text.replace("name: first", "name: x").replace("name: second", "name: first")
        with _unwatched():
            recipe.write_text(text.replace("name: x", "name: second"))
    read_job(job)


@contextmanager
def _unwatched() -> Iterator[None]:
    global _stop
    stop, _stop = _stop, None
    yield
    _stop = stop


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "add": lambda job, source: add_adapter(job, "third", changes=("steps=3",)),
    "import": lambda job, source: import_adapter(job, "third", str(source)),
    "rename": lambda job, source: rename_adapter(job, "first", "one"),
    "remove": lambda job, source: remove_adapter(job, "first"),
    "names swapped by hand": lambda job, source: swap(job),
}


def edited(job: Path) -> None:
    with manage_adapters._editing(job):
        pass


def listed(job: Path) -> None:
    CliRunner().invoke(app, ["adapters", "list", str(job)])


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_change_is_finished_or_undone(
    command: str, finished: Path, source: Path, tmp_path: Path
) -> None:
    change, job = COMMANDS[command], tmp_path / "job"

    def fresh() -> None:
        shutil.rmtree(job, ignore_errors=True)
        shutil.copytree(finished / "job", job)

    def fresh_change() -> None:
        with _unwatched():
            fresh()
        change(job, source)

    fresh()
    edited(job)
    before = state(job)
    change(job, source)
    after = state(job)
    assert after != before
    swapped = command.startswith("names")
    others = itertools.cycle([edited, lambda job: rebuild_reports([job])])
    for number in killed_at(6, 1 + len(command) % 6, fresh_change):
        killed = Path(shutil.copytree(job, tmp_path / "killed"))
        listed(job)
        next(others)(job)
        assert state(job) in ([after] if swapped else [before, after]), number
        assert not (job / TMP).exists()
        assert not {name for name in OpenJob(job).judge.stale if not name.endswith("/third")}, (
            number
        )
        shutil.rmtree(job)
        killed.rename(job)
        with contextlib.suppress(DirectoryError):  # it is done already
            change(job, source)
        edited(job)
        assert state(job) == after, number


def made(job: FakeJob) -> dict[str, Any]:
    """What records say, without what was measured."""
    records = Store(job.out).records.items()
    return {place: (r.stage, r.inputs, r.needs, r.files) for place, r in records}


@pytest.mark.parametrize("command", ["run", "replace"])
def test_a_killed_run_is_continued(command: str, fake_job: FakeJob) -> None:
    """What is in its place is whole at any moment, and an adapter is never gone."""
    job, old = fake_job, fake_job.out.with_name("old")
    if command == "replace":
        job.run()
        job.out.rename(old)
    options: dict[str, Any] = {"changes": ["adapters.0.rank=8"], "replace": ["first"]}

    def run() -> None:
        with _unwatched():
            shutil.rmtree(job.out, ignore_errors=True)
            if old.exists():
                shutil.copytree(old, job.out)
        job.run(**options)

    run()
    after = made(job)
    for number in killed_at(41, 1, run):
        store = Store(job.out)
        assert not store.damaged
        assert not {place: p for place in store.records if (p := store.problem(place))}
        for file in job.out.rglob("weights.bin"):
            assert ".qwlora" in file.parts or (file.parent / "stage.json").is_file()
        assert (job.out / "recipe.yaml").is_file() or not store.records
        if command == "replace":
            with store.locked():
                settle(store, job_recipe(job.out))
            assert "adapters/first" in store.records
        job.run(**options)
        assert len(job.ran) <= len(after)
        assert made(job) == after, number
        assert not (job.out / TMP).exists()
        assert [path.name for path in (job.out / ".qwlora").glob("work/*")] == []


def test_what_a_stranger_left_in_tmp_leads_nowhere(job: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    record = sealed({"stage": "train", "inputs": {}, "needs": {}})
    for name in ("..%2Fhere", "adapters%2F..%2F..%2Fhere", "link%2Fhere", "%2Ftmp%2Fhere"):
        (job / TMP / name).mkdir(parents=True)
        (job / TMP / name / "stage.json").write_text(record)
    (job / TMP / "adapters%2Fthere").symlink_to(victim)
    (job / "link").symlink_to(tmp_path)
    before = state(job.parent / "job")
    read_job(job)
    assert not (job / TMP).exists()
    assert [path.name for path in tmp_path.iterdir() if path.name == "here"] == []
    assert (victim / "mine").read_text() == "mine"
    assert not {name for name in before.keys() - state(job).keys() if TMP not in name}


def test_no_adapter_added_meanwhile_is_lost(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = manage_adapters._write

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(DirectoryError, match="in use by another qwlora process"):
            remove_adapter(job, "second")
        return write(*arguments)

    monkeypatch.setattr(manage_adapters, "_write", meanwhile)
    add_adapter(job, "third")
    assert [a.name for a in job_recipe(job).adapters] == ["first", "second", "third"]
