"""Codes that move by one step where the output of their block gains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapter.small_models import mixture
from conftest import ARCHITECTURES, byte_tokenizer, tiny_model
from formats.test_precomputed import Held
from qwlora import fingerprint, quantize_
from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.packed_layer import packed_layers
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import QuantizeReport, quantize_checkpoint

LEARNED = GptqSettings(rounding_steps=40, rounding_rate=0.2)


class Sum(nn.Module):
    """Layers on the same input: what one loses by rounding another one can give back, which no
    solver of single layers sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv1d = nn.Linear(32, 32), Conv1D(32, 32)
        nn.init.normal_(self.linear.weight)
        nn.init.normal_(self.conv1d.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv1d(x)


class Sums(nn.Module):
    def __init__(self, count: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Sum() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 16, 32, generator=torch.Generator().manual_seed(seed))


def of_sums(
    scheme: str, settings: GptqSettings, sequences: int = 24, blocks: int = 1, **more: Any
) -> tuple[Sums, QuantizeReport]:
    model, batches = Sums(blocks), [{"x": x[None]} for x in inputs(sequences)]
    how: dict[str, Any] = {"settings": {"gptq": settings}, "calibration": batches, **more}
    return model, quantize_(model, scheme, "gptq", **how)


def layers_of(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {path: layer.quantized for path, layer in packed_layers(model).items()}


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """On inputs that neither solver nor learning has seen."""
    x = inputs(16, seed=1)
    wanted = Sums()(x)
    return float(((model(x) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean())


SCHEMES = (
    *("w2-block16-asymmetric", "w3-block32", "w3-signed16", "w4-lpbq16"),
    *("w3-channel", "w4-channel-asymmetric", "w4-tensor"),
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_compensate_each_other_on_the_grids_of_the_solver(scheme: str) -> None:
    solved, _ = of_sums(scheme, GptqSettings())
    model, report = of_sums(scheme, LEARNED)
    assert loss(model) < 0.95 * loss(solved)
    for path, before in layers_of(solved).items():
        after, layer = layers_of(model)[path], report.layers[f"{path}.weight"]
        assert after.encoding.equals(before.encoding)
        moves = after.codes.int() - before.codes.int()
        assert set(moves.unique().tolist()) == {-1, 0, 1}
        assert int(after.codes.max()) <= before.encoding.scheme.steps
        assert layer.moved == pytest.approx(float((moves != 0).float().mean()))
        assert layer.block_loss is not None
        assert layer.block_loss < 0.95
        difference = Sums().get_submodule(path).weight.detach()
        difference = difference.T if path.endswith("conv1d") else difference
        energy = difference.square().sum()
        lost = (difference - after.dequantize()).square().sum() / energy
        assert layer.weight_error == pytest.approx(float(lost))


@pytest.mark.parametrize("rate", [1e-6, 1e3], ids=["too low", "too high"])
def test_codes_of_the_solver_are_kept_where_held_out_inputs_gain_nothing(rate: float) -> None:
    settings = GptqSettings(rounding_steps=40, rounding_rate=rate)
    solved, _ = of_sums("w3-block32", GptqSettings())
    model, report = of_sums("w3-block32", settings)
    assert fingerprint(model) == fingerprint(solved)
    assert {(layer.moved, layer.block_loss) for layer in report.layers.values()} == {(0, 1)}


def test_one_sequence_is_too_few() -> None:
    with pytest.raises(CalibrationError, match=r"at least two sequences.*rounding_steps: 0"):
        of_sums("w3-block32", LEARNED, sequences=1)


@pytest.mark.parametrize(
    "wrong", [{"rounding_steps": -1}, {"rounding_rate": 0.0}, {"rounding_rate": float("inf")}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GridError, match=next(iter(wrong))):
        GptqSettings(**wrong)


def test_an_interrupted_call_ends_with_the_same_codes(tmp_path: Path) -> None:
    def stopped(items: Any, description: str, total: int | None = None) -> Any:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_sums("w3-block32", LEARNED, blocks=2, work=tmp_path, track=stopped)
    assert len(list(tmp_path.iterdir())) == 1
    whole, resumed = (
        of_sums("w3-block32", LEARNED, blocks=2, **more) for more in ({}, {"work": tmp_path})
    )
    assert (fingerprint(resumed[0]), resumed[1]) == (fingerprint(whole[0]), whole[1])
    assert whole[1].layers["blocks.0.linear.weight"].moved


def test_a_layer_compensates_one_of_another_solver() -> None:
    rule = LayerRule("*.conv1d", parse_scheme("w3-block32"), "rtn")
    solved, _ = of_sums("w3-block32", GptqSettings(), rules=[rule])
    model, report = of_sums("w3-block32", LEARNED, rules=[rule])
    assert loss(model) < 0.95 * loss(solved)
    assert report.layers["blocks.0.conv1d.weight"].moved is None
    assert layers_of(model)["blocks.0.conv1d"].equals(layers_of(solved)["blocks.0.conv1d"])


def slow(architecture: str) -> Any:
    return pytest.param(architecture, marks=pytest.mark.slow)


def options(steps: int = 40, **more: Any) -> dict[str, Any]:
    """Of `quantize_` and `quantize_checkpoint`; layers of random weights take small steps only."""
    ids = torch.randint(0, 250, (32, 48), generator=torch.Generator().manual_seed(0))
    settings = GptqSettings(rounding_steps=steps, rounding_rate=0.03)
    return {"settings": {"gptq": settings}, "calibration": ids, **more}


@pytest.mark.parametrize("architecture", ["llama", *map(slow, ARCHITECTURES[1:])])
def test_whole_models_from_memory_and_from_files(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, layers=1)
    report = quantize_(model, "w2-block32-asymmetric", "gptq", **options())
    assert all(layer.moved for layer in report.layers.values())
    from_files = quantize_checkpoint(
        Held(tiny_model(architecture, layers=1)),
        byte_tokenizer(),
        tmp_path,
        "x",
        "w2-block32-asymmetric",
        "gptq",
        **options(),
    )
    assert from_files == (fingerprint(model), report)


def test_fused_experts_keep_their_codes() -> None:
    plain, model = mixture(), mixture()
    for one, steps in ((plain, 0), (model, 2)):
        how = options(steps)
        how["calibration"] = how["calibration"][:4]
        report = quantize_(one, "w2-channel", "gptq", **how)
    experts = {path for path in layers_of(model) if "experts" in path}
    assert {name for name, layer in report.layers.items() if layer.moved is None} == {
        path.replace(".packed_parameters", "") for path in experts
    }
    assert all(layers_of(model)[path].equals(layers_of(plain)[path]) for path in experts)
