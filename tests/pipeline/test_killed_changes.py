"""Commands that change adapters and are killed at any change of the disk: the next command finishes
or undoes what they began."""

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
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.journal import JOURNAL
from qwlora.pipeline.job.stage_records import Record
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.pipeline.plan.stale_stages import find_stale, job_recipe
from typer.testing import CliRunner

from adapter.test_mlx_adapter import write_mlx
from qwlora.cli.main import app
from qwlora.errors import DirectoryError
from qwlora.pipeline.commands.manage_adapters import (
    add_adapter,
    import_adapter,
    remove_adapter,
    rename_adapter,
)
from qwlora.pipeline.commands.open_job import JobModels, ModelName, add_task_scores
from qwlora.recipe import load_recipe

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR
_UNSTABLE = {".qwlora/digests.json", ".qwlora/lock"}
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


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with adapters `first`, trained and exported, and `second`, with unfinished training."""
    job = Path(shutil.copytree(trained, tmp_path_factory.mktemp("finished") / "job"))
    shutil.rmtree(job / "adapters" / "second")
    (job / ".qwlora" / "records" / "train" / "second.json").unlink()
    recipe = resolve_compute(load_recipe(job / "recipe.yaml", ("export.targets=[hf]",)))
    with Directory.open(job, recipe) as directory:
        plan = {stage.name: stage for stage in make_plan(recipe, JobTexts(recipe))}
        for name in ("export/hf", "export/hf/first", "verify/hf/first"):
            with directory.scratch() as scratch:
                (scratch / "file.bin").write_text(name)
                stage = plan[name]
                directory.commit(name, Record(stage.key, 1.0), scratch, stage.artifact, ())
        unfinished = directory.work("train/second", plan["train/second"].key)
        unfinished.mkdir(parents=True)
        (unfinished / "checkpoint").write_text("half")
    models = JobModels(job)
    add_task_scores(models, ModelName("adapted", "first"), {"first": {"acc": 1}})
    return job


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mlx(tmp_path_factory.mktemp("elsewhere") / "mlx")


def state(job: Path) -> dict[str, bytes]:
    """Every file of a job by its path, without scratch files; the folder's own path does not count."""
    return {
        name: path.read_bytes().replace(str(job).encode(), b"JOB")
        for path in sorted(job.rglob("*"))
        if path.is_file()
        and (name := str(path.relative_to(job))) not in _UNSTABLE
        and not path.name.endswith(".part")
        and not name.startswith(".qwlora/trash/")
    }


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "add": lambda job, source: add_adapter(job, "third", changes=("steps=3",)),
    "import": lambda job, source: import_adapter(job, "third", str(source)),
    "rename": lambda job, source: rename_adapter(job, "first", "one"),
    "rename of an unfinished one": lambda job, source: rename_adapter(job, "second", "two"),
    "remove": lambda job, source: remove_adapter(job, "first"),
}


def listed(job: Path) -> None:
    CliRunner().invoke(app, ["adapters", "list", str(job)])


def ran(job: Path) -> None:
    arguments = ["train", "--out", str(job), "--quiet"]
    assert CliRunner().invoke(app, arguments, standalone_mode=False).exception is None


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_is_recovered(command: str, finished: Path, source: Path, tmp_path: Path) -> None:
    """Repeated, it ends as if it had not been killed. Every ninth change; attack/test_sweeps.py: all."""
    change, job = COMMANDS[command], tmp_path / "job"

    def fresh() -> Path:
        shutil.rmtree(job, ignore_errors=True)
        return Path(shutil.copytree(finished, job))

    before = state(fresh())
    change(job, source)
    after = state(job)
    assert after != before
    readers = [listed, job_recipe, Directory.read, lambda j: Directory.read(j, job_recipe(j))]
    others = itertools.cycle(readers)
    for number in itertools.count(1 + len(command) % 9, 9):
        fresh()
        with contextlib.suppress(Stopped), stopping(number):
            change(job, source)
            break
        killed = tmp_path / "killed"
        shutil.copytree(job, killed)
        next(others)(job)
        with Directory.edit(job):  # what a command leaves that is killed before it decided
            pass
        assert state(job) in (before, after), number
        recipe = resolve_compute(job_recipe(job))
        stale = find_stale(make_plan(recipe, JobTexts(recipe)), Directory.read(job))
        assert not {"quantize", "train/first", "train/one", "export/hf/one"} & stale.keys(), number
        shutil.rmtree(job)
        killed.rename(job)
        is_made = state(job) == after  # only the trash was still there
        with contextlib.suppress(DirectoryError) if is_made else contextlib.nullcontext():
            change(job, source)
        assert state(job) == after, number
    assert number > 8


def test_a_run_after_a_killed_rename_skips_what_is_trained(job: Path) -> None:
    with pytest.raises(Stopped), stopping(6):
        rename_adapter(job, "first", "one")
    assert (job / ".qwlora" / JOURNAL).is_file()
    answer = CliRunner().invoke(app, ["train", "--out", str(job)])
    assert answer.exit_code == 0, answer.output
    assert "train/one: skipped" in answer.output
    ends = answer.output.splitlines()[-3:]
    assert [line.split()[0] for line in ends] == ["verdict", "report", "next"]
    assert ends[1].endswith(str(job / "report.html"))
    assert ends[2].endswith(f"qwlora run {job / 'recipe.yaml'} --out {job}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is damaged"),
        ('{"command": [], "moves": 3, "files": {}}', "is damaged"),
        ('{"command": [], "moves": [], "files": {"../victim": null}}', "leads out of"),
        ('{"command": [], "moves": [["VICTIM", "adapters/x"]], "files": {}}', "leads out of"),
        ('{"command": [], "moves": [], "files": {"link/victim": "a"}}', "leads out of"),
    ],
)
def test_a_hostile_journal_is_refused(
    content: str, problem: str, job: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (job / "link").symlink_to(tmp_path)
    (job / ".qwlora" / JOURNAL).write_text(content.replace("VICTIM", str(victim)))
    before = state(job)
    with pytest.raises(DirectoryError, match=problem):
        job_recipe(job)
    assert (state(job), victim.read_text()) == (before, "mine")


def test_names_are_checked_before_writing(job: Path, source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    before = state(tmp_path)
    for name in ("../../../victim", "a/b", "", ".hidden"):
        with pytest.raises(Exception, match=r"adapters\.2\.name"):
            import_adapter(job, name, str(source))
    assert state(tmp_path) == before


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_the_source_of_an_import_stays(job: Path, source: Path, tmp_path: Path) -> None:

    def sources() -> dict[str, bytes]:
        known = {a.name: a.continue_from for a in job_recipe(job).adapters if a.continue_from}
        weights = "adapter_model.safetensors"
        return {name: (Path(place) / weights).read_bytes() for name, place in known.items()}

    import_adapter(job, "old", str(source))
    before = sources()["old"]
    rename_adapter(job, "old", "new")
    other = write_mlx(tmp_path / "other", {"lora_parameters": {"rank": 4, "scale": 1.0}})
    (other / "adapters.safetensors").write_bytes((source / "adapters.safetensors").read_bytes())
    import_adapter(job, "old", str(other))
    import_adapter(job, "again", str(source))
    assert sources()["new"] == sources()["again"] == before
    places = {a.name: a.continue_from for a in job_recipe(job).adapters}
    assert places["old"] != places["new"] == places["again"]
    remove_adapter(job, "again")
    assert sources()["new"] == before
    remove_adapter(job, "new")
    (left,) = (job / ".qwlora" / "imports").iterdir()
    assert left.name == Path(str(places["old"])).name


def test_no_adapter_added_meanwhile_is_lost(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwlora.pipeline.commands import manage_adapters

    plans = manage_adapters._plans

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(DirectoryError, match="in use by another qwlora process"):
            remove_adapter(job, "second")
        return plans(*arguments)

    monkeypatch.setattr(manage_adapters, "_plans", meanwhile)
    add_adapter(job, "third")
    assert [a.name for a in job_recipe(job).adapters] == ["first", "second", "third"]


def test_removing_an_unknown_adapter_does_not_ask(finished: Path) -> None:
    answer = CliRunner().invoke(app, ["adapters", "remove", str(finished), "frist"])
    assert "did you mean first" in str(answer.exception)
    assert "--yes" not in str(answer.exception)
