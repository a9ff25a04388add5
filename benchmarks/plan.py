"""How well `qwlora plan` predicts peak memory: real jobs against their estimates.

    python benchmarks/plan.py                      all models; writes benchmarks/results/plan.json
    python benchmarks/plan.py smollm2 llama-1b     some of them

Each job runs in a process of its own, with every stage of the pipeline on few tokens. Peak memory
is the largest resident size of the whole process in a stage (VmHWM, counted anew for each stage).
`ratio` is measured / estimated. The
1B Llama has random bfloat16 weights, which are written into a temporary folder and deleted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import SMOLLM2, earlier_result, machine_line, run_python, write_result
from sources import gemma_file

RECIPE: dict[str, Any] = {
    "preset": "balanced",
    "data": {
        "source": "python:pydoc_data.topics:topics",
        "sequence_tokens": 256,
        "evaluation_sequences": 4,
        "calibration_sequences": 4,
    },
    "base": {"weights": "w4-block32", "calibration_sequences": 8},
    "adapters": [{"name": "a", "steps": 4, "warmup_steps": 1}],
    "verify": {"sequences": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"model": {"source": SMOLLM2}},
    "gemma3-270m": {"model": {"source": gemma_file()}},
    # no second moments of a 1B model on a small machine
    "llama-1b": {
        "model": {"source": ""},
        "preset": "fast",
        "data": RECIPE["data"]
        | {"sequence_tokens": 64, "evaluation_sequences": 1, "calibration_sequences": 1},
        "adapters": [{"name": "a", "steps": 1, "warmup_steps": 0}],
        "export": {"targets": []},
    },
}


def write_llama(folder: Path) -> None:
    """A Llama of 1.1 billion random bfloat16 weights, with the tokenizer of SmolLM2."""
    import quantize_memory
    from qwlora.formats.model_source import load_tokenizer

    tokenizer = load_tokenizer(MODELS["smollm2"]["model"]["source"])
    quantize_memory.VOCABULARY = len(tokenizer)
    quantize_memory.write_checkpoint(folder, quantize_memory.SIZES["1B"])
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(folder)


def measure(recipe_path: Path, out: Path) -> None:
    """Estimate and run one job in this process; prints JSON."""
    from qwlora.pipeline.forecast import plan_job
    from qwlora.pipeline.run import run
    from qwlora.pipeline.stages import model_stages
    from qwlora.recipe import load_recipe
    from qwlora.system.quiet import quiet_libraries

    quiet_libraries()
    model_stages.reset_peak_rss = lambda: None  # the peak of training includes its initialization
    estimates = plan_job(load_recipe(recipe_path), out)
    results = run(recipe_path, out, say=lambda line: print(line, file=sys.stderr, flush=True))
    parts = {
        name: part for stage in results["stages"].values() for name, part in stage["parts"].items()
    }
    rows = [
        {
            "stage": stage.stage,
            "estimated_bytes": round(stage.peak),
            "peak_bytes": (peak := parts[stage.stage]["peak_rss_bytes"]),
            "memory_ratio": round(peak / stage.peak, 3),
            "memory": {name: round(count) for name, count in stage.memory.items()},
        }
        for stage in estimates.stages
    ]
    print(json.dumps({"rows": rows}))


def job(name: str, scratch: Path) -> dict[str, Any]:
    """Run the job of one model in a process of its own."""
    recipe = {"name": name, **RECIPE, **MODELS[name]}
    if name == "llama-1b":
        folder = scratch / "llama"
        folder.mkdir()
        write_llama(folder)
        recipe["model"] = {"source": str(folder)}
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    found: dict[str, Any] = {"recipe": recipe}
    found |= run_python(__file__, "--job", path, scratch / "out")
    rows = found["rows"]
    peak, estimated = (max(r[key] for r in rows) for key in ("peak_bytes", "estimated_bytes"))
    found["job"] = {"memory_ratio": round(peak / estimated, 3)}
    print(name, json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--job", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        measure(*given.job)
        return
    found = earlier_result("plan")
    for name in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = {"machine": machine_line(), **job(name, Path(scratch))}
        write_result("plan", found)


if __name__ == "__main__":
    main()
