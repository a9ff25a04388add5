"""Jobs that write the files of AI Hub and QAIRT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwlora.errors import DirectoryError, RecipeError
from qwlora.pipeline.run_job import run
from qwlora.pipeline.stages import VERBS
from qwlora.recipe import load_recipe

ADAPTERS = [
    {"name": name, "rank": rank, "steps": 4, "warmup_steps": 1, "rslora": rank == 3}
    for name, rank in (("first", 2), ("second", 3))
]
CASES = ["first", "second", "first+second", "none"]


@pytest.mark.slow
def test_a_job_writes_and_verifies_every_use_case_and_refuses_an_edited_file(
    recipe_for: Any, tmp_path: Path
) -> None:
    export = {"targets": ["aimet", "qairt"], "use_cases": CASES, "encodings_version": "2.0.0"}
    recipe = load_recipe(recipe_for(export=export, adapters=ADAPTERS))
    job = tmp_path / "job"
    results = run(recipe, job, VERBS)
    assert results["parity"]["qairt"].keys() == set(CASES)
    assert results["parity"]["aimet"].keys() == {"first", "second"}
    for target in ("aimet", "qairt"):
        assert all(found["passed"] for found in results["parity"][target].values())
    assert results["export"]["qairt"].keys() == {"base", *CASES}
    document = json.loads((job / "export/aimet/first/model.aimet/model.encodings").read_text())
    assert document["version"] == "2.0.0"
    for edited in ("qairt/golden/none/logits.npy", "aimet/second/submit_aihub.py"):
        path = job / "export" / edited
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        name = edited.removeprefix("qairt/").removeprefix("aimet/second/")
        with pytest.raises(DirectoryError, match=rf"{name} has changed"):
            run(recipe, job, ["verify"])
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"export": {"targets": ["qairt"], "use_cases": ["first+third"]}}, "no adapter third"),
        ({"export": {"targets": ["qairt"], "use_cases": ["first+first"]}}, "an adapter twice"),
        ({"export": {"targets": ["qairt"], "use_cases": ["none"]}}, "must hold an adapter"),
        ({"export": {"targets": ["onnx"], "use_cases": ["first"]}}, "no effect without"),
        (
            {
                "export": {"targets": ["qairt"]},
                "adapters": [{"name": "none", "steps": 4, "warmup_steps": 1}],
            },
            "choose another name",
        ),
        ({"export": {"targets": ["qairt"]}, "workflow": "qwa-lora"}, "use workflow qw-lora"),
        (
            {
                "export": {"targets": ["qairt"]},
                "adapters": [ADAPTERS[0], {**ADAPTERS[1], "data": {"sequence_tokens": 16}}],
            },
            "sequence_tokens: first 32, second 16; .* remove qairt",
        ),
    ],
)
def test_use_cases_that_cannot_be_are_refused(
    sections: dict[str, Any], said: str, recipe_for: Any
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_for(**{"adapters": ADAPTERS, **sections}))
