"""Adapters that are added, renamed and removed: nothing else of the job changes."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.stage_records import Record, Stage
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.pipeline.plan.stale_stages import find_stale
from qwlora.pipeline.running.run_job import run
from typer.testing import CliRunner

from adapter.test_mlx_adapter import write_mlx
from cli import command_line
from conftest import Job, text, tiny_model
from pipeline.conftest import SETTINGS
from qwlora import load_adapter, load_base
from qwlora.cli.main import app
from qwlora.errors import DirectoryError, ExportError, RecipeError, SourceError
from qwlora.pipeline.commands.manage_adapters import (
    add_adapter,
    import_adapter,
    remove_adapter,
    rename_adapter,
)
from qwlora.pipeline.commands.open_job import JobModels, add_task_scores
from qwlora.pipeline.results.results_table import summary_rows
from qwlora.recipe import Recipe, load_recipe
from qwlora.report import results_view

VERBS = ("quantize", "train")


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    for i in range(8):
        (folder / f"{i}.txt").write_text(text(100 + i, 60))
    return folder


@pytest.fixture
def job(trained: Path, tmp_path: Path) -> Path:
    """A copy of the job with two trained adapters."""
    return Path(shutil.copytree(trained, tmp_path / "job"))


def files(job: Path, *names: str) -> dict[str, str]:
    """SHA-256 of the files in folders of the job, without model cards, which follow the results."""
    return {
        str(path.relative_to(job)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for path in (job / name).rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def records(job: Path) -> dict[str, Any]:
    files = (job / ".qwlora" / "records").rglob("*.json")
    return {(content := json.loads(file.read_text()))["stage"]: content for file in files}


def again(job: Path, *verbs: str) -> list[str]:
    """Run the job's own recipe again; returns the lines about its stages."""
    made = Job(job / "recipe.yaml", job)
    made.run(*(verbs or VERBS))
    return [line for line in made.said if line.split(":")[0].split(" ")[0] in records(job)]


def test_an_added_adapter_is_trained_and_no_other_file_changes(job: Path, other_text: Path) -> None:
    before, kept = files(job, "base", "adapters"), records(job)
    add_adapter(job, "third", str(other_text), changes=("steps=3",))
    assert next(line for line in again(job) if "skipped" not in line) == "train/third ..."
    after = files(job, "base", "adapters")
    assert {name: digest for name, digest in after.items() if "third" not in name} == before
    assert {name: record for name, record in records(job).items() if name in kept} == kept
    added = load_recipe(job / "recipe.yaml").adapters[-1]
    assert (added.name, added.rank, added.steps) == ("third", 2, 3)
    assert added.data is not None
    assert added.data.source == str(other_text)


def test_adding_an_existing_or_unusable_adapter_changes_nothing(job: Path) -> None:
    before = (job / "recipe.yaml").read_text()
    with pytest.raises(DirectoryError, match="already has adapter 'first'"):
        add_adapter(job, "first")
    with pytest.raises(DirectoryError, match="no adapter 'frist'; did you mean first"):
        add_adapter(job, "third", like="frist")
    with pytest.raises(RecipeError, match=r"adapters\.2\.stps: unknown key; did you mean steps"):
        add_adapter(job, "third", changes=("stps=3",))
    with pytest.raises(RecipeError, match=r"would change quantize, .*train/first"):
        add_adapter(job, "third", changes=("init=qera",))
    assert (job / "recipe.yaml").read_text() == before


def test_a_base_stays_calibrated_on_its_text(job_for: Any, corpus: Path, other_text: Path) -> None:
    made = job_for(
        "one-layer llama",
        data={"sequence_tokens": 32},
        base={"solver": "gptq", "calibration_sequences": 4},
        adapters=[{"name": "first", "data": {"source": str(corpus)}, **SETTINGS}],
    )
    made.run(*VERBS)
    add_adapter(made.out, "second", str(other_text))
    assert load_recipe(made.out / "recipe.yaml").base.calibrate_on == ["first"]
    said = again(made.out)
    skipped = [line.partition(":")[0] for line in said if "nothing it depends on has" in line]
    assert skipped == ["quantize", "train/first"]
    with pytest.raises(DirectoryError, match="base was calibrated on the text of adapter 'first'"):
        remove_adapter(made.out, "first")


def test_a_renamed_adapter_keeps_its_files_and_results(job: Path) -> None:
    before, results = files(job, "adapters"), json.loads((job / "results.json").read_text())
    rename_adapter(job, "first", "one")
    renamed = {n.replace("adapters/first/", "adapters/one/"): d for n, d in before.items()}
    assert files(job, "adapters") == renamed
    assert all("skipped" in line for line in again(job))
    now = json.loads((job / "results.json").read_text())
    assert now["train"] == {"one": results["train"]["first"], "second": results["train"]["second"]}


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
    run(load_recipe(job / "recipe.yaml", ("adapters.0.steps=3",)), job, VERBS, replace=True)
    tasks = json.loads((job / "results.json").read_text())["tasks"]
    assert tasks == {"base": arc | piqa, "adapted": {"second": arc}}


def test_use_cases_of_a_renamed_adapter_are_exported_again(job: Path) -> None:
    """Their files have its name."""
    cases = "export.use_cases=[first,first+second,none]"
    changes = ("export.targets=[qairt]", "simulation.residual_adds=quantize", cases)
    recipe = load_recipe(job / "recipe.yaml", changes)
    stages = [s for s in plan_of(recipe) if s.name in ("calibrate/_use_cases", "export/qairt")]
    for stage in stages:
        with Directory.open(job, recipe) as directory, directory.scratch() as scratch:
            (scratch / "first.encodings").write_text("{}")
            directory.commit(stage.name, Record(stage.key, 1.0), scratch, stage.artifact, ())
    rename_adapter(job, "first", "one")
    changed = load_recipe(job / "recipe.yaml")
    assert changed.export.use_cases == ["one", "one+second", "none"]
    stale = find_stale(plan_of(changed), Directory.read(job))
    assert [stale.get(stage.name) for stage in stages] == ["its inputs changed since it ran"] * 2
    assert "train/one" not in stale


def plan_of(recipe: Recipe) -> list[Stage]:
    return make_plan(resolve_compute(recipe), JobTexts(recipe))


def test_a_name_that_is_taken_is_refused(job: Path) -> None:
    before = files(job, "adapters")
    with pytest.raises(RecipeError, match="adapters second, second"):
        rename_adapter(job, "first", "second")
    (job / "adapters" / "mine").mkdir()
    with pytest.raises(DirectoryError, match="mine' exists"):
        rename_adapter(job, "first", "mine")
    assert files(job, "adapters") == before


def test_a_continued_adapter_is_renamed_there_too_not_removed(job_for: Any) -> None:
    second = {"name": "second", "continue_from": "first", "steps": 2, "warmup_steps": 0}
    made = job_for("one-layer llama", adapters=[{"name": "first", **SETTINGS}, second])
    made.run(*VERBS)
    with pytest.raises(DirectoryError, match="continued by second"):
        remove_adapter(made.out, "first")
    rename_adapter(made.out, "first", "one")
    assert load_recipe(made.out / "recipe.yaml").adapters[1].continue_from == "one"
    assert all("skipped" in line for line in again(made.out))


def test_a_removed_adapter_leaves_the_others_as_they_are(job: Path) -> None:
    before = files(job, "base", "adapters/second")
    answer = CliRunner().invoke(app, ["adapters", "remove", str(job), "first"])
    assert "--yes" in str(answer.exception)
    for said in ("n\n", ""):  # no, and Ctrl-D
        with mock.patch("sys.stdin", io.StringIO(said)) as stdin:
            stdin.isatty = lambda: True
            done = command_line.qwlora("adapters", "remove", job, "first")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "nothing was changed" in done.stderr
    remove_adapter(job, "first")
    assert not (job / "adapters" / "first").exists()
    assert files(job, "base", "adapters") == before
    assert all("skipped" in line for line in again(job))
    with pytest.raises(DirectoryError, match="only adapter"):
        remove_adapter(job, "second")


def test_an_adapter_trained_with_other_settings_is_replaced_only_on_request(job: Path) -> None:
    before, made = files(job, "adapters"), Job(job / "recipe.yaml", job)
    longer = ["adapters.0.steps=3"]
    with pytest.raises(DirectoryError, match=r"(?s)first:.*first.steps: 2, now 3.*--replace"):
        made.run(*VERBS, changes=longer)
    with pytest.raises(DirectoryError, match=r"(?s)ly, first, second:.*bitwidth: 4, now 3"):
        made.run("quantize", changes=["base.weights.bitwidth=3"])
    assert files(job, "adapters") == before
    made.run(*VERBS, changes=longer, replace=True)
    after = files(job, "adapters")
    changed = {name for name in before if before[name] != after[name]}
    assert "adapters/first/adapter_model.safetensors" in changed
    assert not any(name.startswith("adapters/second/") for name in changed)
    (job / "adapters" / "first" / "adapter_model.safetensors").unlink()
    again(job)  # a damaged one needs no request
    assert files(job, "adapters") == after
    recipe = (job / "recipe.yaml").read_text()
    (job / "recipe.yaml").write_text(recipe.replace("  steps: 3", "  steps: 4"))
    with pytest.raises(DirectoryError, match=r"first:\n  its recipe.yaml was edited, or a text"):
        made.run(*VERBS)


def test_a_recipe_that_lacks_an_adapter_of_the_job_is_refused(job: Path, tmp_path: Path) -> None:
    original = Path(shutil.copy(job / "recipe.yaml", tmp_path / "original.yaml"))
    content = yaml.safe_load(original.read_text())
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(yaml.safe_dump({**content, "adapters": content["adapters"][:1]}))
    for replace in (False, True):
        with pytest.raises(DirectoryError, match=r"adapters second.*adapters remove"):
            run(load_recipe(shorter), job, VERBS, replace=replace)
    assert "second" in (job / "recipe.yaml").read_text()
    add_adapter(job, "third")  # which is never trained
    with pytest.raises(DirectoryError, match=r"adapters third.*adapters remove .* third"):
        run(load_recipe(original), job, VERBS)
    assert "third" in (job / "recipe.yaml").read_text()
    text = (job / "recipe.yaml").read_text().rpartition("# Written")[0]
    text = text.replace(content["data"]["source"], "/moved/text")  # which the other recipe knows
    digest = hashlib.sha256(text.encode()).hexdigest()
    (job / "recipe.yaml").write_text(f"{text}# Written by qwlora: {digest}\n")
    with pytest.raises(DirectoryError, match=r"adapters third.*adapters remove .* third"):
        run(load_recipe(original), job, VERBS)


def test_a_job_generates_without_its_text_and_what_needs_that_names_it(job: Path) -> None:
    content = yaml.safe_load((job / "recipe.yaml").read_text())
    content["data"]["source"] = "/moved/text"
    content["model"]["source"] = "/moved/model"
    (job / "recipe.yaml").write_text(yaml.safe_dump(content))
    asked = ["generate", str(job), "a", "--models", "base,first", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    for command in (["report"], ["merge-check", "first"], ["run"]):
        name, *more = command
        arguments = [str(job / "recipe.yaml"), "--out"] if name == "run" else []
        result = CliRunner().invoke(app, [name, *arguments, str(job), *more])
        assert result.exit_code != 0
        assert "/moved/text" in str(result.exception) + result.output


def test_adapters_are_evaluated_before_they_are_calibrated(job: Path) -> None:
    made = Job(job / "recipe.yaml", job)
    assert made.run("evaluate")["perplexity"].keys() == {"float", "base", "adapted"}
    assert "evaluate/simulated/first: left out, calibrate/first has not run" in made.said
    shutil.rmtree(job / "adapters" / "first")
    with pytest.raises(DirectoryError, match=r"evaluate needs train/first"):
        made.run("evaluate")


@pytest.mark.parametrize(
    ("losses", "after", "warning"),
    [
        *(([3, 2], 4.0, ""), ([2, 3], 4.0, "")),
        ([2] * 5 + [3] * 5, 4.0, "did not learn"),
        ([3, 2], 6.0, "no better than the base"),
    ],
)
def test_training_without_success_is_said(losses: list[float], after: float, warning: str) -> None:
    train = {"steps": 2, "step_seconds": 1.0, "losses": losses}
    train |= {"peak_rss_bytes": 1, "trainable_parameters": 1}
    perplexity = {"base": 5.0, "adapted": {"a": after}}
    results = {"recipe": "r", "stages": {}, "train": {"a": train}, "perplexity": perplexity}
    job = results_view.Job(results, {}, "", "r")
    found = [text for title, text in summary_rows(job) if title == "Warning"]
    assert len(found) == bool(warning)
    assert all(warning in text for text in found)


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_an_imported_adapter_is_used_as_it_is(job: Path, tmp_path: Path, layout: str) -> None:
    source = tmp_path / "elsewhere"
    if layout == "mlx":
        write_mlx(source)
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model("llama", layers=1), config)
        model.save_pretrained(str(source), save_embedding_layers=False)
    before = files(job, "base", "adapters")
    import_adapter(job, "imported", str(source))
    results = run(load_recipe(job / "recipe.yaml"), job, (*VERBS, "evaluate"))
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
    shutil.rmtree(source)  # it is the job's own by now
    assert load_adapter(load_base(job / "base"), job / "adapters" / "imported")


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_an_import_that_a_target_of_the_job_cannot_hold_changes_nothing(
    job: Path, tmp_path: Path
) -> None:
    recipe = (job / "recipe.yaml").read_text()
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama", layers=1), config)
    model.save_pretrained(str(tmp_path / "elsewhere"), save_embedding_layers=False)
    with pytest.raises(ExportError, match=r"adapter imported.*magnitude.*onnx_each"):
        import_adapter(job, "imported", str(tmp_path / "elsewhere"))
    assert (job / "recipe.yaml").read_text() == recipe


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_an_imported_adapter_is_trained_further_on_request(job: Path, tmp_path: Path) -> None:
    source, changes = str(write_mlx(tmp_path / "elsewhere")), ("steps=2", "warmup_steps=0")
    import_adapter(job, "imported", source, continues=True, changes=changes)
    results = run(load_recipe(job / "recipe.yaml"), job, VERBS)
    assert results["train"]["imported"]["steps"] == 2
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        import_adapter(job, "other", "./nowhere")
