"""Processes that share a job get the results of one process, and one that fails ends the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapter.test_recipes import LAUNCHERS, started
from conftest import tiny_model
from qwlora import BitBudget, Schemes, fingerprint, observe_moments, quantize_, simulate
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.errors import CalibrationError
from qwlora.nn.packed_layer import packed_layers
from qwlora.quantize.quantize_blocks import batches_of

IDS = torch.randint(0, 250, (5, 12), generator=torch.Generator().manual_seed(0))
SHARED = """
import os, sys, torch
from qwlora.system.processes import connected, is_first_process, joined_stages, joint_stage
from system.test_processes import results
with connected():
    if is_first_process():
        with joint_stage(("name", "key"), True):
            found = results()
    for _ in () if is_first_process() else joined_stages():
        found = results()
torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""


def results() -> dict[str, Any]:
    """What processes share: bases, their moments, encodings of activations, and scores."""
    found: dict[str, Any] = {"codes": {}, "fingerprints": []}
    for name, options in {"gptq": {}, "budget": {"budget": BitBudget(bits=5)}}.items():
        model = tiny_model("llama", layers=1)
        quantize_(model, "w4-block32", "gptq", calibration=IDS, **options)
        found["fingerprints"].append(fingerprint(model))
        for path, layer in packed_layers(model).items():
            found["codes"][name, path] = layer.tensor.quantized.codes
    found["moments"] = dict(observe_moments(model, IDS))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 640), nn.ReLU(), nn.Linear(640, 32)).eval()
    quantize_(layers, "w4-block32", "rtn")
    batches = [{"input": torch.randn(n, 32) * (1 + i)} for i, n in enumerate((40, 7, 40))]
    simulation = simulate(layers, {"input": torch.randn(2, 32)}, Schemes(observer="sqnr"))
    simulation.observe(batches[:1])  # further calls add to the statistics
    found["report"] = simulation.calibrate(batches)
    found["encodings"] = dict(simulation.encodings)
    scored, other = (logits_of(tiny_model("llama", seed, layers=1)) for seed in (0, 1))
    found["scores"] = score_tokens(scored, IDS, "", reference=other).to_json()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of one process, and of each of two that share the work."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "shared.py").write_text(SHARED)
    done = started(LAUNCHERS["torchrun"], [str(folder / "shared.py"), str(folder)])
    assert done.returncode == 0, done.stderr
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return [results(), *saved]


def test_processes_hold_the_integers_and_moments_of_one_process(found: Any) -> None:
    alone, first, second = found
    assert first["fingerprints"] == second["fingerprints"]
    assert first["codes"].keys() == alone["codes"].keys()
    for layer, codes in alone["codes"].items():  # rounding may move a code next to a tie
        assert (codes != first["codes"][layer]).float().mean() < 0.01, layer
    alone, first, second = (results["moments"] for results in found)
    assert alone.keys() == first.keys() == second.keys() != set()
    for layer, moments in alone.items():
        for shared, other, expected in zip(first[layer], second[layer], moments, strict=True):
            assert torch.equal(shared, other)
            smallest = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(shared, expected, rtol=1e-3, atol=smallest)


def test_encodings_and_scores_are_of_all_sequences(found: Any) -> None:
    alone, *shared = found
    for own in shared:
        assert own["report"] == alone["report"]
        for name, encoding in alone["encodings"].items():
            assert encoding.equals(own["encodings"][name])  # counts add without rounding
        assert own["scores"].keys() == alone["scores"].keys()
        for key, expected in alone["scores"].items():
            assert own["scores"][key] == pytest.approx(expected), key


def test_too_few_sequences_for_the_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.quantize.quantize_blocks.share", lambda: (0, 6))
    with pytest.raises(CalibrationError, match=r"5 calibration sequences .* 6 processes"):
        batches_of(IDS, tiny_model("llama", layers=1))


FAILING = """
import os, sys
from qwlora.analysis import token_scores
from qwlora.cli.main import main
score, failing = token_scores._score_row, sys.argv.pop(1)
def fails(*arguments):
    if os.environ["RANK"] == failing:
        raise token_scores.NonFiniteError("planted")
    return score(*arguments)
token_scores._score_row = fails
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_process_that_fails_ends_the_job(recipe_for: Any, tmp_path: Path, failing: str) -> None:
    path, script = recipe_for("one-layer llama"), tmp_path / "failing.py"
    script.write_text(FAILING)
    words = [script, failing, "run", path, "--out", tmp_path / "out"]
    result = started(LAUNCHERS["torchrun"], [*map(str, words)])
    assert result.returncode
    assert result.stderr.count("\nqwlora: ") == result.stderr.count("\nqwlora: planted\n") == 1
