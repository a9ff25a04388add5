"""The registry of solvers; each stored algorithm gives its golden result under its revision.

If a result changes on purpose, raise the revision in `quantize/solvers.py` and write both numbers here.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora import BitBudget, quantize_
from qwlora.adapter.initialize import initialize_
from qwlora.analysis.generate_text import sample_sequences
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.errors import CalibrationError
from qwlora.grid.activation_ranges import RangeObserver, estimate_ranges
from qwlora.grid.scheme import Lpbq, PerBlock, RangeEstimator, Scheme
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.quantize.solvers import REVISIONS, SOLVERS, Solver
from qwlora.quantize.tune_scales import TuningSettings, tune_
from qwlora.recipe import grid_sections
from qwlora.targets.proof.canary import contexts_of, make_canary

LAYER = "model.layers.0.mlp.up_proj"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ids(count: int = 2) -> Tensor:
    return torch.randint(256, (count, 16), generator=torch.Generator().manual_seed(0))


def codes(solver: str) -> str:
    """Codes of 2 x 16 weights, by block and by LPBQ."""
    weight, x, found = random(2, 16), random(64, 16), []
    for scheme in (Scheme(3, granularity=PerBlock(16)), Scheme(4, granularity=Lpbq(8))):
        solved, _ = SOLVERS[solver].solve(weight * weight.abs(), scheme, x.T @ x / 64, None)
        found.append("".join(f"{code:x}" for code in solved.codes.flatten().tolist()))
    return " ".join(found)


def budgeted() -> list[float]:
    model = tiny_model("llama", layers=1)
    layers = quantize_(model, "w4-block32", "rtn", calibration=ids(), budget=BitBudget(4.0)).layers
    return [float(layer.scheme.removeprefix("int")[0]) for layer in layers.values()]


def packed_llama() -> Any:
    return packed_model("llama", layers=1)


def observed_moments() -> list[float]:
    moment = dict(observe_moments(packed_llama(), ids()))[LAYER]
    return [float(matrix.trace()) for matrix in moment]


def tuned() -> list[float]:
    settings = TuningSettings(steps=3, compute="float32")
    report = tune_(packed_llama(), tiny_model("llama", layers=1), ids(4), settings)
    return [report.before, report.after]


def initialized() -> list[float]:
    floats, base = tiny_model("llama", layers=1), packed_llama()
    moments = dict(observe_moments(base, ids()))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    initialize_(model, "qera", floats, moments)
    return [float(p.detach().norm()) for name, p in model.named_parameters() if "lora_" in name]


def ranged() -> list[float]:
    observer = RangeObserver(has_histogram=True)
    for i in range(3):
        observer.update(random(64, 512) * (i + 1))
    names = ("percentile", "squared-error", "sqnr")
    found = [estimate_ranges([observer], Scheme(8, False), RangeEstimator(n, 99.0)) for n in names]
    return [float(end) for ends in found for end in ends]


def written() -> list[float]:
    model = tiny_model("llama", layers=1)
    return sample_sequences(model, byte_tokenizer(), 1, 8).flatten().tolist()


def scored() -> list[float]:
    reference = logits_of(tiny_model("llama", layers=1))
    found = score_tokens(logits_of(packed_llama()), ids(), "", reference=reference).to_json()
    return [found["perplexity"], found["kl"]["mean"], found["top1"]["share"]]


def asked() -> list[float]:
    model, tokenizer = tiny_model("llama", layers=1), byte_tokenizer()
    texts = sample_sequences(model, tokenizer, 1, 8).tolist()
    canary = make_canary(logits_of(model), contexts_of(texts, [], tokenizer), tokenizer)
    return [value for answer in canary.answers for value in answer.values()][:4]


GOLDEN: dict[str, tuple[int, Any, Callable[[], list[float]] | None]] = {
    "rtn": (1, "33445440434445542145424744446653 6688998080988fe84299938fa788dfa6", None),
    "search": (2, "33445440434445542145414754446753 6688998081988fe84299938fa788efb6", None),
    "sqnr": (2, "33445440434445542145424754446653 6688998081988fe84299938fa788efb6", None),
    "gptq": (2, "33445440434445542145514754446753 6688998091988fe84299938fa788efb6", None),
    "layer_statistics": (2, [63.998, 1.2683], observed_moments),
    "bit_budget": (1, [4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 4.0], budgeted),
    "sampled_text": (1, [172, 120, 115, 150, 251, 191, 33, 33], written),
    "tune_scales": (4, [0.0065848, 0.0065477], tuned),
    "initialize_adapter": (5, [0.87175, 0.59711], initialized),
    "activation_ranges": (3, [-5.75, 5.75, -11.354, 11.090, -12.201, 11.549], ranged),
    "canary": (1, [-3.73931, -4.28076, -4.33957, -4.36615], asked),
    "token_scores": (2, [386.71, 0.0074511, 0.66667], scored),
}


@pytest.mark.parametrize("name", sorted(REVISIONS.keys() | SOLVERS))
def test_another_result_has_another_revision(name: str) -> None:
    revision, expected, compute = GOLDEN[name]
    result = codes(name) if compute is None else compute()
    assert REVISIONS[name] == revision
    assert result == (expected if compute is None else pytest.approx(expected, rel=1e-3))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solver_that_needs_calibration_says_so_without_it(solver: Solver) -> None:
    refused = pytest.raises(CalibrationError, match="solver: search")
    with refused if solver.needs_calibration else nullcontext():
        solver.solve(torch.ones(2, 16), Scheme(3, granularity=PerBlock(16)), None, None)


def test_recipes_take_names_and_settings_from_the_registry() -> None:
    for name in SOLVERS:
        assert grid_sections.BaseRule(match="*", solver=name).solver == name
    with pytest.raises(ValueError, match=r"gptq.* or 'keep'"):
        grid_sections.Base(solver="best")
    base = grid_sections.Base(gptq={"sweeps": 3})
    assert SOLVERS["gptq"].settings_of(base.gptq.model_dump()) == GptqSettings(sweeps=3)
