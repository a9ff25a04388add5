"""The registry of solvers."""

import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_model
from qwlora import quantize_
from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.nn import packed_weights
from qwlora.quantize.scale_search import search_scale
from qwlora.quantize.solvers import REVISIONS, SOLVERS, Solver, solver_named
from qwlora.recipe import grid_sections

SCHEME = Scheme(3, granularity=PerBlock(16))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solver_that_needs_calibration_says_so_without_it(solver: Solver) -> None:
    refused = pytest.raises(CalibrationError, match="solver: search")
    with refused if solver.needs_calibration else nullcontext():
        solver.solve(torch.ones(2, 16), SCHEME, None, None)


def test_recipes_take_the_names_from_the_registry() -> None:
    for name in SOLVERS:
        assert grid_sections.BaseRule(match="*", solver=name).solver == name
    with pytest.raises(ValueError, match=r"gptq.* or 'keep'"):
        grid_sections.Base(solver="best")
    with pytest.raises(GridError, match="'best' is not one of rtn, search, sqnr, gptq"):
        solver_named("best")


def test_the_search_finds_a_narrow_range() -> None:
    """One outlier among many values: a tenth of the min-max range is best for one grid of all."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    weight[0, 0] = 40.0
    found = float(search_scale(weight, Scheme(4)).scale)
    assert found == pytest.approx(float(search_scale(weight[1:], Scheme(4)).scale), rel=0.15)
    assert found < 0.2 * 40 / 7


def test_a_solver_with_settings_is_a_module_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy multiplies the min-max scales by its setting."""

    @dataclass(frozen=True)
    class Settings:
        factor: float = 1.0

    def solve(weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: Any) -> Any:
        scaled = measure(weight, scheme)
        scaled = replace(scaled, scale=scaled.scale * (settings or Settings()).factor)
        return QuantizedTensor(scaled.quantize(weight), scaled), {}

    module = types.ModuleType("qwlora.quantize.toy")
    vars(module).update(solve=solve, Settings=Settings)
    monkeypatch.setitem(sys.modules, "qwlora.quantize.toy", module)
    toy = Solver("toy", "quantize.toy:solve", settings="quantize.toy:Settings")
    monkeypatch.setitem(SOLVERS, "toy", toy)
    monkeypatch.setitem(REVISIONS, "toy", 1)
    models = [tiny_model("llama") for _ in range(2)]
    for model, factor in zip(models, (1.0, 2.0), strict=True):
        settings = {"toy": toy.settings_of({"factor": factor})}
        report = quantize_(model, "w8-channel", "toy", settings=settings)
        assert {layer.solver for layer in report.layers.values()} == {"toy"}
    scales = [next(iter(packed_weights(model).values())).encoding.scale for model in models]
    assert torch.allclose(scales[1], 2 * scales[0], rtol=1e-3)
