"""Jobs for the tests of the report: recorded runs, and jobs derived from them."""

import copy
import json
from pathlib import Path
from typing import Any

from qwlora.recipe.yaml_core import load_yaml
from qwlora.report.results_view import Job

RECORDED = Path(__file__).parent / "jobs"
NAMES = ("finished", "two", "failed")


def job_of(name: str, results: Any = None, targets: Any = None, **options: Any) -> Job:
    """A recorded job, with other results and targets if they are given."""
    text = (RECORDED / name / "recipe.yaml").read_text()
    recipe = load_yaml(text)
    if targets is not None:
        recipe["export"] = {"targets": [*targets]}
    return Job(results_of(name) if results is None else results, recipe, text, name, **options)


def results_of(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / name / "results.json").read_text())


def check_of(results: dict[str, Any], what: str, case: str = "first") -> dict[str, Any]:
    """The row of a proof whose name begins with `what`, to change it."""
    rows = results["parity"]["onnx"][case]["checks"]
    return next(row for row in rows if row["what"].startswith(what))


def failing(results: dict[str, Any], what: str, value: Any, case: str = "first") -> dict[str, Any]:
    """The results with one row of a proof that failed."""
    row = check_of(results, what, case)
    row |= {"value": value, "passed": False}
    results["parity"]["onnx"][case] |= {"passed": False, "problems": [row["what"]]}
    return results


def running(step: int = 37) -> Job:
    """The recorded job as it was while its adapter was trained."""
    results = results_of("finished")
    train = results.pop("train")["first"]
    done = ("evaluate/float", "quantize", "evaluate/base")
    for verb in list(results["stages"]):
        parts = results["stages"][verb]["parts"]
        results["stages"][verb]["parts"] = {n: p for n, p in parts.items() if n in done}
        if not results["stages"][verb]["parts"]:
            del results["stages"][verb]
    for key in ("simulation", "export", "parity"):
        del results[key]
    for key in ("perplexity", "perplexity_stderr", "perplexity_document_stderr", "kl", "top1"):
        del results[key]["adapted"], results[key]["simulated"]
    del results["run"]["finished"]
    results["run"] |= {"state": "running", "stage": "train/first"}
    results["run"]["training"] = {
        "adapter": "first",
        "step": step,
        "steps": train["steps"],
        "losses": train["losses"][:step],
        "evaluations": [e for e in train["evaluations"] if e[0] <= step],
        "step_seconds": train["step_seconds"],
    }
    return job_of("finished", results)


def compared() -> Job:
    """The recorded job as if its adapter had been trained on the float model too."""
    results = results_of("finished")
    results["perplexity"]["reference"] = {"first": 50.0}
    results["reference"] = {
        key: {kind: results[key].pop(kind) for kind in ("adapted", "simulated")}
        for key in ("kl", "top1")
    }
    return job_of("finished", results)


def shipped() -> Job:
    """The recorded job as if it had been exported for llama.cpp, and checked as shipped too."""
    results = results_of("finished")
    own = {"perplexity": 50.5, "top1_agreement": 0.9629, "max_log_prob_difference": 0.963}
    proof = {"of": "trained", "reference_perplexity": 50.0}
    proof |= {f"shipped_{key}": value for key, value in own.items()}
    results["parity"] = {"gguf": {"first": results["parity"]["onnx"]["first"] | proof}}
    return job_of("finished", results, targets=["gguf"])


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys of nested dicts."""
    if not isinstance(value, dict):
        return []
    return [p for k, v in value.items() for p in ((*path, k), *leaves(v, (*path, k)))]


def without(results: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `results` without one key."""
    changed = copy.deepcopy(results)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return changed
