"""`qwlora score DIR TASK`: scores of lm-eval on a task file, without a network."""

import json
import random
from pathlib import Path

import pytest
import yaml

from cli.command_line import answered, refused
from conftest import WORDS, byte_tokenizer, tiny_model, write_recipe

TASK = "offline_choice"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lm_eval")


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task with a dataset next to it."""
    folder = tmp_path_factory.mktemp("task")
    pick = random.Random(0)

    def words(count: int) -> str:
        return " ".join(pick.choices(WORDS, k=count))

    rows = [
        {"question": words(3), "choices": [words(1), words(2), words(3)], "gold": pick.randrange(3)}
        for _ in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metric = {"aggregation": "mean", "higher_is_better": True}
    content = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", **metric}, {"metric": "acc_norm", **metric}],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    return folder / "task.yaml"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished job with an ONNX file."""
    folder = tmp_path_factory.mktemp("job")
    tiny_model("llama", layers=1).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    first = {"name": "first", "steps": 20, "learning_rate": 0.01, "compute": "float32"}
    recipe = write_recipe(folder, folder / "model", corpus, adapters=[first])
    answered("run", recipe, "--out", folder / "out", "--quiet")
    return folder / "out"


@pytest.mark.client
def test_every_model_is_scored_the_float_model_as_by_lm_eval(job: Path, task_file: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = json.loads(answered("score", job, task_file, "--json"))
    assert list(found) == ["float", "base", "adapted", "simulated", "onnx"]
    model = tiny_model("llama", layers=1).eval()
    harness = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    by_lm_eval = lm_eval.simple_evaluate(model=harness, tasks=[str(task_file)], log_samples=False)
    expected, score = by_lm_eval["results"][TASK], found["float"][TASK]
    for metric in ("acc", "acc_norm"):
        value, error = expected[f"{metric},none"], expected[f"{metric}_stderr,none"]
        assert score["metrics"][metric] == {"value": value, "stderr": error}
    assert (score["value"], score["metric"], score["shots"]) == (expected["acc,none"], "acc", 0)
    assert score["documents"] == 12
    assert found["onnx"]["first"] == found["simulated"]["first"]  # they compute the same
    rows = [line.split() for line in answered("score", job, task_file, "--limit", "4").splitlines()]
    assert rows[0] == ["task", "metric", "model", "value", "±", "stderr"]
    assert any("adapted/first" in row for row in rows)
    before = json.loads((job / "results.json").read_text())["tasks"]
    answered("run", job / "recipe.yaml", "--out", job, "--quiet")
    results = json.loads((job / "results.json").read_text())
    assert (results["tasks"], results["run"]["state"]) == (before, "finished")


@pytest.mark.client
def test_unknown_tasks_and_missing_files_are_named(job: Path, tmp_path: Path) -> None:
    said = refused("score", job, "hellaswagg", "--models", "base")
    assert "hellaswag" in said.replace("hellaswagg", "")
    assert "none.yaml" in refused("score", job, tmp_path / "none.yaml", "--models", "base")
