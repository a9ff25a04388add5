"""A job whose stages are fakes: they write a few bytes, so that tests of skipping take no time."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Job, text, write_recipe
from qwlora.errors import DirectoryError
from qwlora.pipeline import run as run_module
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.store import Record, Store
from qwlora.recipe import load_recipe
from qwlora.system.seen import Seen


@dataclass
class FakeJob(Job):
    """A job of fake stages.

    Args:
        ran: names of the stages that the last run ran, in their order.
        on_stage: called by each stage that runs, with its name.
        errors: what stages raise, by their names.
        written: what artifacts hold, besides the name of their stage.
    """

    ran: list[str] = field(default_factory=list)
    on_stage: Callable[[str], None] = lambda name: None
    errors: dict[str, BaseException] = field(default_factory=dict)
    written: bytes = b"weights"

    def run(self, *verbs: str, **options: Any) -> dict[str, Any]:
        self.ran.clear()
        return super().run(*verbs, **options)

    def stage(self, context: Any, stage: Any, scratch: Path, work: Path) -> dict[str, Any]:
        self.ran.append(stage.name)
        self.on_stage(stage.name)
        if stage.name in self.errors:
            raise self.errors[stage.name]
        if stage.artifact:
            (scratch / "part").mkdir()
            (scratch / "weights.bin").write_bytes(stage.name.encode() + self.written)
            (scratch / "part" / "settings.json").write_text('{"a": 1}')
        return {stage.name: {"measured": 1}}


def planned(path: Path, *changes: str, seen: Seen | None = None) -> list[Stage]:
    """The stages of a recipe's job."""
    recipe = load_recipe(path, changes)
    return make_plan(recipe, Sources(recipe, seen))


def stage_keys(path: Path, *changes: str, seen: Seen | None = None) -> dict[str, str]:
    """What each stage of a recipe's job depends on, as one string."""
    keys = dict[str, str]()
    for stage in planned(path, *changes, seen=seen):
        needs = {name: keys[need] for name, need in stage.needs.items()}
        keys[stage.name] = Record(stage.kind, dict(stage.inputs), needs).key
    return keys


def pretend_run(store: Store, plan: Sequence[Stage]) -> None:
    """Give a store the records of a finished run, without files."""
    places = {stage.name: stage.place for stage in plan}
    for stage in plan:
        needs = {name: store.version(places[need]) for name, need in stage.needs.items()}
        store.records[stage.place] = Record(stage.kind, dict(stage.inputs), needs)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All paths below a folder; None for what is no file."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


@contextmanager
def left_alone(folder: Path, message: str | None, error: Any = DirectoryError) -> Iterator[Any]:
    """What is done is refused with this message, and nothing in the folder changes."""
    before = contents(folder)
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert contents(folder) == before


@pytest.fixture
def fake_job(recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob(recipe_for(), tmp_path / "out")
    monkeypatch.setattr(run_module, "run_stage", fake.stage)
    context = SimpleNamespace(all_texts=dict, stage=lambda name, verb: nullcontext({}))
    monkeypatch.setattr(run_module, "new_context", lambda *arguments: context)
    monkeypatch.setattr("qwlora.pipeline.preflight.preflight", lambda *arguments: None)
    return fake


@pytest.fixture
def job(fake_job: FakeJob) -> FakeJob:
    """The same, unless a module has another `job`."""
    return fake_job


SETTINGS = {"rank": 2, "steps": 2, "warmup_steps": 0}


@pytest.fixture(scope="session")
def trained(checkpoints, corpus, tmp_path_factory) -> Path:
    """A job with the trained adapters `first` and `second`. Tests change copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    adapters = [{"name": name, **SETTINGS} for name in ("first", "second")]
    path = write_recipe(folder, checkpoints["one-layer llama"], corpus, adapters=adapters)
    run_module.run(path, folder / "job", ("quantize", "train"))
    return folder / "job"


@pytest.fixture(scope="session")
def finished(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished job of two adapters, `model`, and their texts `text` and `more`."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoints["one-layer llama"], place / "model")
    for number, name in enumerate(("text", "more")):
        (place / name).mkdir()
        for document in range(8):
            (place / name / f"{document}.txt").write_text(text(10 * number + document, 60))
    adapters: list[dict[str, Any]] = [{"name": name, **SETTINGS} for name in ("first", "second")]
    adapters[1]["data"] = {"source": str(place / "more")}
    sections = {"adapters": adapters, "export": {"targets": ["hf"]}}
    recipe = write_recipe(place, place / "model", place / "text", **sections)
    run_module.run(recipe, place / "job")
    return place
