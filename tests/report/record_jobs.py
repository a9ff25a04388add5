"""Record the jobs that the tests of the report read: real runs of a tiny model.

    python tests/report/record_jobs.py FOLDER

writes results.json and recipe.yaml of three jobs to tests/report/jobs/: one adapter, two adapters
with a text each, and one whose proof fails (limits that nothing can meet). FOLDER receives the
jobs.
"""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import byte_tokenizer, text, tiny_model
from qwlora.errors import VerificationError
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.targets.proof.checks import Limits

RECORDED = Path(__file__).parent / "jobs"
COUNTS = {"sequence_tokens": 32, "evaluation_sequences": 4, "calibration_sequences": 4}


def recipes(model: Path, corpus: Path, digits: Path) -> dict[str, dict[str, Any]]:
    train = {"rank": 4, "warmup_steps": 3, "learning_rate": 5e-3}
    base = {"name": "tiny", "model": {"source": str(model)}}
    one, fast = {"data": {"source": str(corpus), **COUNTS}}, {"preset": "fast"}
    first = {"name": "first", "steps": 60, **train}
    verify = {"verify": {"sequences": 8}}
    of_two = [
        {"name": name, "steps": 40, "data": {"source": str(source), **COUNTS}, **train}
        for name, source in (("words", corpus), ("digits", digits))
    ]
    failing = {"verify": {"sequences": 1, "perplexity_difference": 1e-9}}
    return {
        "finished": base | one | verify | {"adapters": [{**first, "evaluation_steps": 15}]},
        "two": base | fast | verify | {"data": COUNTS, "adapters": of_two},
        "failed": base | fast | one | failing | {"adapters": [first]},
    }


def main(folder: Path) -> None:
    model, corpus, digits = (folder / name for name in ("tiny-llama", "corpus", "digits"))
    tiny_model("llama", layers=3).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    generator = random.Random(1)
    for place in (corpus, digits):
        place.mkdir(exist_ok=True)
    for i in range(10):
        (corpus / f"{i}.txt").write_text(text(i, 60))
        numbers = " ".join(str(generator.randint(0, 999)) for _ in range(90))
        (digits / f"{i}.txt").write_text(numbers)
    for name, content in recipes(model, corpus, digits).items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        try:
            limits = partial(Limits, layer_steps=0.001) if name == "failed" else Limits
            with mock.patch("qwlora.pipeline.stages.file_stages.Limits", limits):
                run(load_recipe(path), folder / name, say=print)
        except VerificationError:
            assert name == "failed"
        (RECORDED / name).mkdir(parents=True, exist_ok=True)
        results = json.loads((folder / name / "results.json").read_text().replace(f"{folder}/", ""))
        results["run"]["machine"]["processor"] = "recorded on another machine"
        (RECORDED / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        recipe = dump_yaml(load_recipe(folder / name).model_dump(mode="json"))
        (RECORDED / name / "recipe.yaml").write_text(recipe.replace(f"{folder}/", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
