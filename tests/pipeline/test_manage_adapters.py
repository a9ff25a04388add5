"""Adapters that are added, renamed and removed: nothing else of the job changes. And commands that are
killed before a change of the disk: the next one finishes or undoes what they began. Some changes are
here, all in attack/test_sweeps.py."""

import contextlib
import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from adapter.test_mlx_adapter import write_mlx
from cli import command_line
from conftest import Job, text, tiny_model
from pipeline.conftest import SETTINGS, contents, left_alone, planned, pretend_run
from qwlora import load_adapter, load_base
from qwlora.errors import DirectoryError, QwloraError
from qwlora.pipeline.commands import manage_adapters
from qwlora.pipeline.commands.manage_adapters import (
    add_adapter,
    import_adapter,
    remove_adapter,
    rename_adapter,
)
from qwlora.pipeline.commands.open_job import JobModels, add_task_scores
from qwlora.pipeline.job import OpenJob, job_recipe
from qwlora.pipeline.results import read_job, rebuild_reports
from qwlora.pipeline.run import run
from qwlora.pipeline.store import TMP, Store
from qwlora.recipe import load_recipe
from qwlora.system.seen import sealed

VERBS = ("quantize", "train")
CARD = "README.md"
pytestmark = pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    (tmp_path / "other.txt").write_text("\n\n".join(text(100 + i, 60) for i in range(8)))
    return tmp_path / "other.txt"


@pytest.fixture
def job(trained: Path, tmp_path: Path) -> Path:
    """A copy of the job with two trained adapters."""
    return Path(shutil.copytree(trained, tmp_path / "job"))


def files(job: Path, *names: str) -> dict[str, bytes | None]:
    """The files in folders of the job, without model cards, which follow the results."""
    found = {n: content for n, content in contents(job).items() if n.startswith(names)}
    return {n: content for n, content in found.items() if content is not None and CARD not in n}


def write_peft(folder: Path, **options: Any) -> str:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model("llama", layers=1), config)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def again(job: Path, *verbs: str, **options: Any) -> list[str]:
    """Run the job's own recipe again; returns the stages that ran."""
    made = Job(job / "recipe.yaml", job)
    made.run(*(verbs or VERBS), **options)
    return made.done


def edit(job: Path, old: str, new: str) -> None:
    """Edit the job's recipe by hand."""
    text = (job / "recipe.yaml").read_text()
    assert old in text
    (job / "recipe.yaml").write_text(text.replace(old, new))


def test_an_added_adapter_is_trained_and_no_other_file_changes(job: Path, other_text: Path) -> None:
    edit(job, "name: tiny", "name: tiny  # mine")
    before, kept = files(job, "base", "adapters"), Store(job).records
    add_adapter(job, "third", str(other_text), changes=("steps=3",))
    assert "adapters/third: not trained yet" in command_line.answered("adapters", "list", job)
    assert again(job, changes=["adapters.third.rank=4"]) == ["train/third"]
    assert "name: tiny  # mine\n" in (job / "recipe.yaml").read_text()
    after = files(job, "base", "adapters")
    assert {name: digest for name, digest in after.items() if "third" not in name} == before
    assert Store(job).records.items() >= kept.items()
    added = load_recipe(job / "recipe.yaml").adapters[-1]
    assert (added.name, added.rank, added.steps) == ("third", 4, 3)
    assert added.data.source == str(other_text)


def table(job: Path) -> Path:
    """A file of records, next to the job."""
    file = job.with_name("table.csv")
    file.write_text("question,answer\nWhere is it?,Here.\n")
    return file


def import_dora(job: Path) -> None:
    import_adapter(job, "third", write_peft(job.with_name("it"), use_dora=True))


REFUSED: dict[str, Any] = {  # what is refused, by what the message names
    "already has adapter 'first'": lambda job: add_adapter(job, "first"),
    "'frist'.* did you mean first": lambda job: add_adapter(job, "third", like="frist"),
    "--set data.prompt_column=question": lambda job: add_adapter(job, "third", str(table(job))),
    "adapter third.*magnitude.*onnx_each": import_dora,
    "nor a hub id": lambda job: import_adapter(job, "third", "./nowhere"),
    "second, second": lambda job: rename_adapter(job, "first", "second"),
    "mine' exists": lambda job: rename_adapter(job, "first", "mine"),
    "no adapter 'frist'": lambda job: remove_adapter(job, "frist"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_changes_nothing(job: Path, message: str) -> None:
    (job / "adapters" / "mine").mkdir()
    with left_alone(job, message, QwloraError):
        REFUSED[message](job)


def test_a_base_stays_calibrated_on_its_text(job_for: Any, corpus: Path, other_text: Path) -> None:
    sections: Any = {"base": {"solver": "gptq", "calibration_sequences": 4}}
    sections["adapters"] = [{"name": "first", "data": {"source": str(corpus)}, **SETTINGS}]
    made = job_for("one-layer llama", data={"sequence_tokens": 32}, **sections)
    made.run(*VERBS)
    add_adapter(made.out, "second", str(other_text), changes=("init=qera",))
    assert load_recipe(made.out / "recipe.yaml").base.calibrate_on == ["first"]
    assert again(made.out) == ["train/second"]
    with pytest.raises(DirectoryError, match="base was calibrated on the text of adapter 'first'"):
        remove_adapter(made.out, "first")


def test_scores_of_tasks_belong_to_the_model_that_was_scored(job: Path) -> None:
    arc, piqa = {"arc": {"value": 0.5}}, {"piqa": {"value": 0.6}}
    base, first, second = JobModels(job).named("base,first,second")
    add_task_scores(JobModels(job), base, arc)
    add_task_scores(JobModels(job), first, {"first": {"value": 0.7}})
    tasks = add_task_scores(JobModels(job), base, piqa)["tasks"]
    assert tasks == {"base": arc | piqa, "adapted": {"first": {"first": {"value": 0.7}}}}
    assert json.loads((job / "results.json").read_text())["tasks"] == tasks
    rename_adapter(job, "first", "one")  # and not the task of the same name
    tasks = add_task_scores(JobModels(job), second, arc)["tasks"]
    assert tasks["adapted"] == {"one": {"first": {"value": 0.7}}, "second": arc}
    again(job, changes=["adapters.0.steps=3"], replace=["one"])
    tasks = json.loads((job / "results.json").read_text())["tasks"]
    assert tasks == {"base": arc | piqa, "adapted": {"second": arc}}


def test_use_cases_of_a_renamed_adapter_are_exported_again(job: Path) -> None:
    """Their files have its name."""
    cases = "export.use_cases=[first,first+second,none]"
    changes = ["export.targets=[qairt]", "simulation.residual_adds=quantize", cases]
    changes += ["base.weights=w4-signed32"]  # Qualcomm's targets have another default
    again(job, "quantize", changes=changes)
    with (store := Store(job)).locked():
        pretend_run(store, planned(job / "recipe.yaml"))
        for place in ("simulation/_use_cases", "export/qairt"):
            with store.scratch(place) as scratch:
                (scratch / "first.encodings").write_text("{}")
                store.commit(place, store.records[place], scratch)
    rename_adapter(job, "first", "one")
    changed = OpenJob(job)
    assert changed.recipe.export.use_cases == ["one", "one+second", "none"]
    stages = ("calibrate/_use_cases", "export/qairt")
    assert "export.use_cases.0: first -> one" in changed.judge.stale[stages[0]]
    assert {*stages} <= changed.judge.stale.keys()
    assert "train/one" not in changed.judge.stale


def test_a_continued_adapter_is_renamed_there_too_not_removed(job_for: Any) -> None:
    second = {"name": "second", "continue_from": "first", "steps": 2, "warmup_steps": 0}
    made = job_for("one-layer llama", adapters=[{"name": "first", **SETTINGS}, second])
    made.run(*VERBS)
    with pytest.raises(DirectoryError, match="continued by second"):
        remove_adapter(made.out, "first")
    rename_adapter(made.out, "first", "one")
    assert load_recipe(made.out / "recipe.yaml").adapters[1].continue_from == "one"
    assert again(made.out) == []


def test_a_removed_adapter_leaves_the_others_as_they_are(job: Path) -> None:
    before = files(job, "base", "adapters/second")
    assert "--yes" in command_line.refused("adapters", "remove", job, "first")
    for said in ("n\n", "", "y\n"):  # no, Ctrl-D, and yes
        with mock.patch("sys.stdin", io.StringIO(said)) as stdin:
            stdin.isatty = lambda: True
            done = command_line.qwlora("adapters", "remove", job, "first")
        assert ("nothing was changed" in done.stderr) == (said != "y\n")
        assert (job / "adapters" / "first").exists() == (said != "y\n")
    assert files(job, "base", "adapters") == before
    assert again(job) == []
    with pytest.raises(DirectoryError, match="only adapter"):
        remove_adapter(job, "second")


def test_a_recipe_that_lacks_an_adapter_of_the_job_is_refused(job: Path, tmp_path: Path) -> None:
    original = Path(shutil.copy(job / "recipe.yaml", tmp_path / "original.yaml"))
    content = yaml.safe_load(original.read_text())
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(yaml.safe_dump({**content, "adapters": content["adapters"][:1]}))
    with pytest.raises(DirectoryError, match=r"adapters second.*adapters remove"):
        run(shorter, job, VERBS, replace=["second"])
    add_adapter(job, "third")  # which is never trained
    edit(job, content["data"]["source"], "/moved/text")  # which the other recipe knows
    before = (job / "recipe.yaml").read_text()
    with pytest.raises(DirectoryError, match=r"adapters third.*adapters remove .* third"):
        run(original, job, VERBS)
    assert (job / "recipe.yaml").read_text() == before


def test_a_recipe_that_is_edited_by_hand_loses_no_adapter(job: Path) -> None:
    content = yaml.safe_load((job / "recipe.yaml").read_text())
    first, second = content["adapters"]

    def write(*adapters: dict[str, Any]) -> None:
        (job / "recipe.yaml").write_text(yaml.safe_dump({**content, "adapters": [*adapters]}))

    before = files(job, "adapters/second")
    write(first)
    made = Job(job / "recipe.yaml", job)
    made.run(*VERBS)
    assert any(f"qwlora adapters remove {job} second" in line for line in made.said)
    # a new one of equal settings does not take its place
    write({**second, "name": "new"}, first, second)
    assert again(job) == ["train/new"]
    assert files(job, "adapters/second") == before
    write(first)
    with pytest.raises(DirectoryError, match="second' exists, but belongs to no adapter"):
        rename_adapter(job, "first", "second")
    remove_adapter(job, "second")
    assert sorted(path.name for path in (job / "adapters").iterdir()) == ["first", "new"]


def test_adapters_that_differ_in_their_text_are_not_mixed_up(finished, tmp_path) -> None:
    """Not even by commands that read no text."""
    job = Path(shutil.copytree(finished / "job", tmp_path / "job"))
    before = [files(job / "adapters" / name, "") for name in ("first", "second")]
    edit(job, "name: first", "name: one")
    edit(job, "name: second", "name: another")
    read_job(job)
    assert [files(job / "adapters" / name, "") for name in ("one", "another")] == before


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_an_imported_adapter_is_used_as_it_is(job: Path, tmp_path: Path, layout: str) -> None:
    source = str({"mlx": write_mlx, "peft": write_peft}[layout](tmp_path / "elsewhere"))
    before = files(job, "base", "adapters")
    import_adapter(job, "imported", source)
    results = run(job / "recipe.yaml", job, (*VERBS, "evaluate"))
    after = files(job, "base", "adapters")
    assert {name: digest for name, digest in after.items() if "imported" not in name} == before
    assert results["train"]["imported"]["steps"] == 0
    perplexity = results["perplexity"]
    assert perplexity["imported"]["imported"] != perplexity["adapted"]["imported"]
    if layout == "peft":  # its B is zero, so that it changes nothing
        assert perplexity["imported"]["imported"] == pytest.approx(perplexity["float"])
        assert perplexity["adapted"]["imported"] == pytest.approx(perplexity["base"])
        assert results["kl"]["imported"]["imported"]["mean"] == pytest.approx(0, abs=1e-6)
    else:
        assert results["kl"]["imported"]["imported"]["mean"] > 1e-4
        changes = ("steps=2", "warmup_steps=0")
        import_adapter(job, "further", source, continues=True, changes=changes)
        assert run(job / "recipe.yaml", job, VERBS)["train"]["further"]["steps"] == 2
    shutil.rmtree(source)  # it is the job's own by now
    assert load_adapter(load_base(job / "base"), job / "adapters" / "imported")


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


def state(job: Path) -> dict[str, bytes]:
    """Every file of a job by its path, without those that any command may write."""
    volatile = (".qwlora/seen.json", ".qwlora/lock", "report.html")
    return {
        name: content.replace(str(job).encode(), b"JOB")
        for name, content in contents(job).items()
        if content is not None and not name.endswith(".part") and name not in volatile
    }


def edited(job: Path) -> None:
    with manage_adapters._editing(job):
        pass


def import_mlx(job: Path) -> None:
    source = job.with_name("mlx")
    import_adapter(job, "third", str(source if source.exists() else write_mlx(source)))


KILLED: dict[str, Callable[[Path], Any]] = {
    "add": lambda job: add_adapter(job, "third", changes=("steps=3",)),
    "import": import_mlx,
    "rename": lambda job: rename_adapter(job, "first", "one"),
    "remove": lambda job: remove_adapter(job, "first"),
    "swapped by hand": read_job,
}


@pytest.mark.parametrize("command", KILLED)
def test_a_killed_change_is_finished_or_undone(command, finished, tmp_path) -> None:
    change, job = KILLED[command], tmp_path / "job"

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
            remove_adapter(job, "second")
        return write(*arguments)

    monkeypatch.setattr(manage_adapters, "_write", meanwhile)
    add_adapter(job, "third")
    assert [a.name for a in job_recipe(job).adapters] == ["first", "second", "third"]
