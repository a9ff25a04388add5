"""How much each token matters."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import EACH_ARCHITECTURE, tiny_model
from qwlora.errors import CalibrationError
from qwlora.quantize.block_runner import BlockRunner
from qwlora.quantize.layer_statistics import Observed, observe


class Part(nn.Module):
    """A layer, and what a model makes of it."""

    def __init__(self, then: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.then = nn.Linear(8, 400, bias=False), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


def observations(part: nn.Module, names: list[str], *batches: Tensor) -> dict[str, Observed]:
    """Of layers in a model with one part."""
    model = nn.Sequential(part)
    with BlockRunner(model, ["0"], [{"input": batch} for batch in batches]) as runner:
        next(iter(runner))
        return observe(model, "0", names, runner)


def observed(then: Callable[[Tensor], Tensor], batch: Tensor) -> Observed:
    """Of the only layer of a part."""
    name = "0.layer.weight"
    return observations(Part(then).to(batch.dtype), [name], batch)[name]


def rows(seed: int = 0) -> Tensor:
    return torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(seed))


def test_a_token_with_a_huge_output_hardly_counts_and_one_of_zeros_is_no_infinity() -> None:
    x = rows()
    spiked, silent = x.clone(), x.clone()
    spiked[0, 0] *= 5000
    silent[0, 0] = 0
    found = (observed(nn.Identity(), b).input.matrix for b in (x[:, 1:], spiked, silent))
    without, *others = (moment / moment.trace() for moment in found)
    assert all((other - without).norm() < 0.3 * without.norm() for other in others)


@dataclass
class Result:
    """As a model's own class would be."""

    first: Tensor
    rest: dict[str, Tensor]


class Tangled(nn.Module):
    """A layer called twice, its input and output changed in place, and one that nothing reads."""

    def __init__(self, in_place: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.unread = nn.Linear(8, 8), nn.Linear(8, 8)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Result:
        x = x.clone()
        y = self.layer(self.layer(x))
        x = x.add_(1) if self.in_place else x + 1
        z = torch.relu_(y) if self.in_place else torch.relu(y)
        self.unread(x)
        return Result(self.unread.bias.sum(), {"hidden": z + x})


def test_calls_in_place_changes_and_results_of_all_kinds() -> None:
    names, parts = ["0.layer.weight", "0.unread.weight"], [Tangled(False), Tangled(True)]
    found = [observations(part, names, rows(0), rows(1)) for part in parts]
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())
    assert set(found[0]) == set(found[1]) == {"0.layer.weight"}
    for side in ("input", "output"):
        torch.testing.assert_close(*(getattr(one["0.layer.weight"], side).matrix for one in found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    found = [observed(lambda z: 3000 * z, rows().to(kind)) for kind in (torch.float32, dtype)]
    for one, half in ((getattr(o, side).matrix for o in found) for side in ("input", "output")):
        assert (half - one).norm() < 0.05 * one.norm()


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_the_layers_of_a_block_against_its_jacobian(architecture: str) -> None:
    """From all derivatives of a block's output, and from many probes of the same three tokens."""
    model, ids = tiny_model(architecture), torch.tensor([[7, 3, 200]])
    lists = (path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    part = f"{next(lists)}.1"
    named = model.get_submodule(part).named_modules()
    products = [f"{part}.{p}.weight" for p, m in named if isinstance(m, nn.Linear | Conv1D)]
    with BlockRunner(model, [part], [{"input_ids": ids, "use_cache": False}] * 300) as runner:
        next(iter(runner))
        found = observe(model, part, products, runner)
        for name in products:
            for side, expected in _by_jacobian(model, name, runner).items():
                off = (getattr(found[name], side).matrix - expected).norm() / expected.norm()
                assert off < {"input": 0.12, "output": 0.3}[side], (name, side)


def _by_jacobian(model: nn.Module, name: str, runner: BlockRunner) -> dict[str, Tensor]:
    """R and G of one layer."""
    seen: dict[str, Tensor] = {}

    def outcome(change: Tensor) -> Tensor:
        def hook(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
            seen["x"] = args[0].detach().reshape(3, -1)
            return z + change

        handle = model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)
        result = next(iter(runner.repeat()))
        handle.remove()
        y: Tensor = result[0] if isinstance(result, tuple) else result
        return y / y.detach().norm(dim=-1, keepdim=True)

    module = model.get_submodule(name.removesuffix(".weight"))
    width = module.nf if isinstance(module, Conv1D) else module.out_features
    derivatives = torch.autograd.functional.jacobian(outcome, torch.zeros(1, 3, width))
    # from [*y, 1, 3, width] to [3, y, width]
    by_token = derivatives.flatten(0, -4).squeeze(1).transpose(0, 1)
    weights = by_token.square().sum((1, 2))
    rows_ = by_token.flatten(0, 1)
    return {
        "input": (seen["x"].T * weights) @ seen["x"] / weights.sum(),
        "output": rows_.T @ rows_ / 3,
    }


def test_what_cannot_be_followed_is_named() -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            return z.clone()

    for then, message in (
        (torch.Tensor.detach, r"no tensor in the result of 0 can be .*, which gptq.*by a rule"),
        (lambda z: z.detach() + torch.zeros(1, requires_grad=True), "no tensor in the result of 0"),
        (lambda z: (z - z).sqrt(), r"0\.layer\.weight: the gradient of .* nan or infinity"),
        (Forward.apply, r"0 cannot be differentiated .*, which gptq"),
    ):
        with pytest.raises(CalibrationError, match=message):
            observed(then, rows())
    with pytest.raises(CalibrationError, match=r"0\.layer\.weight: the layer's input, or its"):
        observed(nn.Identity(), rows() * torch.nan)


def test_a_layer_that_returns_no_tensor_is_not_followed() -> None:
    class Router(nn.Linear):  # as Llama 4's
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    assert observations(Router(8, 8), ["0.weight"], rows()) == {}
