"""Initialize an adapter: at zero, or at the best low-rank correction of the quantization error.

    zero    B = 0: PEFT's default
    svd     minimize |E|^2,                  E = D - s B A,    D = W - W_hat
    qera    minimize tr(G E R E^T),          R + damping = L L^T,    G + damping = K K^T

    s       the adapter's scaling
    R, G    second moments of a layer's inputs and output gradients (`observe_moments`)

    U S V^T = svd(K^T D L)                   (K = L = 1 for svd)
    B = K^-T U_k S_k C / sqrt(s),            A = C^-1 V_k^T L^-1 / sqrt(s)

C is diagonal. It makes each column of B as long as the same row of A L. If a step of Adam would
move outputs further through A (sqrt(tr R) |B|) than through B (sqrt(out) |A L|), the column is
sqrt(out / tr R) times as long.

A share of each layer's ranks corrects the error; the others keep PEFT's default and are free for
training. If scales were tuned after the solver, W_hat is the solver's result: tuned layers
compensate for each other, and a correction would undo that. R and G are measured on the frozen base
with the adapter's text. With G = 1 this is the exact solution of QERA
(https://arxiv.org/abs/2410.06040) and CLoQ (https://arxiv.org/abs/2501.18475).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwlora.adapter.attach import active_adapter
from qwlora.adapter.mergeable import lora_layers
from qwlora.errors import TrainingError, listed
from qwlora.grid.second_moments import LayerMoments, factor_damped
from qwlora.nn import PackedLinear, weight_out_in
from qwlora.system.device import device_of, exact_device, moved
from qwlora.system.progress import Track, untracked

Init = Literal["zero", "svd", "qera"]
# Relative to the mean of a moment's diagonal. G is less certain: few tokens have large gradients.
# Of 0.1, 1 and 4 for G, only 1 starts below svd everywhere (docs/log/initialization.md).
_DAMPING_INPUT, _DAMPING_OUTPUT = 0.1, 1.0
# Up to this smaller side, the Gram matrix is decomposed exactly; above, by random projection.
_MAX_EXACT_SIZE = 2048
_OVERSAMPLING, _POWER_ITERATIONS = 32, 4
_MIN_SINGULAR = 1e-6  # relative to the largest; smaller singular values are rounding errors
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InitReport:
    """Relative error `tr(G E R E^T) / tr(G W R W^T)` of one layer, R and G damped (1 for svd):
    before, without the adapter (E = D), and after."""

    before: float
    after: float


class InitReports(dict[str, InitReport]):
    """The error before and after initialization of each layer, by canonical path."""

    def __repr__(self) -> str:
        if not self:
            return "InitReports of no layer"
        before = sum(report.before for report in self.values()) / len(self)
        after = sum(report.after for report in self.values()) / len(self)
        return f"InitReports of {len(self)} layers: mean relative error {before:.3g} -> {after:.3g}"


def initialize_(
    model: nn.Module,
    init: Init,
    weights: nn.Module | Callable[[str], Tensor],
    moments: Mapping[str, LayerMoments] | Iterable[tuple[str, LayerMoments]] = (),
    share: float = 0.5,
    track: Track = untracked,
    solver_scales: Mapping[str, Tensor] | None = None,
) -> InitReports:
    """Initialize the active adapter of each quantized linear layer in `model`, in place. Other
    layers keep PEFT's default.

    Args:
        init: `zero`, `svd` or `qera`; the module has the equations.
        weights: the float model, or a function from a layer's canonical path to the float weight
            [out, in] that it was quantized from.
        moments: R and G of each layer by canonical path (`observe_moments`). Required by qera.
        share: share of a layer's ranks that correct the error, rounded up; in (0, 1].
        solver_scales: scales before tuning, by canonical path of the tuned layer
            (`TuningReport.solver_scales`).

    Returns:
        The error of each initialized layer, by canonical path.

    Raises:
        TrainingError: no layer fits `init`, moments of a layer are missing or not finite, or
            `solver_scales` are of another base. Earlier layers are initialized: call it again.
    """
    if init == "zero":
        return InitReports()
    if not 0 < share <= 1:
        raise TrainingError(
            f"the share of ranks that init {init} corrects with is in (0, 1], not {share:g}"
        )
    adapter, scales = active_adapter(model), solver_scales or {}
    layers: dict[str, LoraLayer] = {}  # packed linear layers that have the adapter
    for path, layer in lora_layers(model):
        if adapter in layer.lora_A and isinstance(layer.get_base_layer(), PackedLinear):
            layers[path] = layer
            if layer.use_dora.get(adapter):
                raise TrainingError(
                    f"{path}: a DoRA adapter has magnitudes, which depend on the "
                    "initial weights. Use init zero"
                )
    if not layers:
        raise TrainingError(
            f"init {init} corrects the quantization error, but no layer with adapter {adapter!r} "
            "is quantized; use init zero"
        )
    reports = InitReports()
    weight_of = partial(_weight, weights) if isinstance(weights, nn.Module) else weights
    given = moments.items() if isinstance(moments, Mapping) else moments
    pairs: Iterable[tuple[str, LayerMoments | None]] = given
    if init == "svd":
        pairs = ((path, None) for path in track(layers, "initializing the adapter", len(layers)))
    for path, moment in pairs:
        if (layer := layers.get(path)) is None:
            continue
        device = exact_device(device_of(layer.get_base_layer()))
        measure = Measure(moved(moment, device))
        weight = weight_of(path).detach().to(device).float()
        difference = solver_difference(path, layer, weight, scales)
        # Rounded up; 0.07 * 100 is slightly more than 7 in floats.
        ranks = math.ceil(share * layer.r[adapter] - 1e-9)
        b, a, singular = measure.best_correction(difference, ranks)
        used = int((singular > _MIN_SINGULAR * singular[0]).sum())
        root = float(layer.scaling[adapter]) ** 0.5
        # A keeps PEFT's default in all other ranks, which training needs: where A and B are zero,
        # so are their gradients.
        with torch.no_grad():
            layer.lora_A[adapter].weight[:used] = a[:used] / root
            layer.lora_B[adapter].weight[:, :used] = b[:, :used] / root
            layer.lora_B[adapter].weight[:, used:] = 0
        corrected = difference - b[:, :used] @ a[:used]
        whole, before, after = map(measure.of, (weight, difference, corrected))
        reports[path] = InitReport(before / whole, after / whole)
    if missing := [path for path in layers if path not in reports]:
        raise TrainingError(
            f"init qera has no moments of {listed(missing, 3)}. Observe them with "
            "observe_moments on text that reaches these layers, or use init svd"
        )
    return reports


def _weight(floats: nn.Module, path: str) -> Tensor:
    return weight_out_in(floats.get_submodule(path))


def solver_difference(
    path: str, layer: LoraLayer, weight: Float[Tensor, "out in"], scales: Mapping[str, Tensor]
) -> Float[Tensor, "out in"]:
    """D of the layer at `path`: its float weight minus the solver's, with the `scales` of that."""
    tensor = cast(PackedLinear, layer.get_base_layer()).tensor
    # Tuned layers compensate for one another, and a correction of the difference to tuned weights
    # would undo that: 1.073 of float LoRA, here 1.062 (docs/log/initialization.md).
    if (before := scales.get(path)) is not None:
        scale, minimum = tensor.parts.scale, tensor.parts.minimum
        if before.shape != scale.shape:
            raise TrainingError(
                f"{path}: the scale before tuning has shape {list(before.shape)}, but the layer's "
                f"scale has {list(scale.shape)}. Pass the scales of this base"
            )
        before = before.to(scale.device)
        # A float minimum is tuned with its scale, by the same factor (`tuned_parameters.py`).
        minimum = None if minimum is None else minimum.float() * (before.float() / scale.float())
        tensor = replace(tensor, parts=tensor.parts._replace(scale=before, minimum=minimum))
    return weight - tensor.dequantize().to(weight.device)


class Measure:
    """The cost of a weight error E: `|E|^2`, or with damped moments `|K^T E L|^2`."""

    def __init__(self, moment: LayerMoments | None):
        inner, outer = (None, None) if moment is None else (moment.input, moment.output)
        self._inner = None if inner is None else _root(inner, _DAMPING_INPUT)
        self._outer = None if outer is None else _root(outer, _DAMPING_OUTPUT)

    def of(self, matrix: Float[Tensor, "out in"]) -> float:
        """The cost of `matrix`; at least the smallest normal float32, so it can be a divisor."""
        energy = torch.linalg.vector_norm(self._weighted(matrix), dtype=torch.float64).square()
        return float(energy.clamp(min=_TINY))

    def best_correction(
        self, difference: Float[Tensor, "out in"], rank: int
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], Float[Tensor, " rank"]]:
        """B, A and S (decreasing) of the module's equation for scaling 1; fewer if D's rank is."""
        b, s, a = _leading_svd(self._weighted(difference), rank)
        b = b * s
        if self._outer is not None:
            b = torch.linalg.solve_triangular(self._outer.T, b, upper=True)
        if self._inner is not None:
            a = torch.linalg.solve_triangular(self._inner, a, upper=False, left=False)
        # Without C, the closed form makes B thousands of times too long, and training fails
        # (docs/log/initialization.md). B is shorter where inputs are large; |L|^2 = tr R.
        balance = b.norm(dim=0).clamp(min=_TINY).rsqrt()
        if self._inner is not None:
            size = float(self._inner.square().sum(dtype=torch.float64))
            balance = min(1.0, len(difference) / size) ** 0.25 * balance
        return b * balance, a / balance.unsqueeze(1), s

    def _weighted(self, matrix: Tensor) -> Tensor:
        """K^T M L."""
        matrix = matrix if self._inner is None else matrix @ self._inner
        return matrix if self._outer is None else self._outer.T @ matrix


def _root(moment: Tensor, damping: float) -> Tensor:
    """Lower triangular L of the damped moment; damping grows until it is positive definite."""
    if not bool(moment.isfinite().all()):
        raise TrainingError(
            "the moments contain nan or infinity. Quantize again, or use observe_moments"
        )

    def factor(damped: Tensor) -> Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(damped)
        return None if int(failed) else lower

    mean = float(moment.diagonal().mean()) or 1.0
    return factor_damped(moment, mean, damping, factor)[1]


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets: u [out, rank], s [rank], v^T [rank, in]."""
    rows, columns = matrix.shape
    kept = min(rank, rows, columns)
    wide = matrix if rows <= columns else matrix.T
    if min(rows, columns) <= _MAX_EXACT_SIZE:
        # In float64, because singular values are square roots of the Gram matrix's eigenvalues.
        gram = wide.double() @ wide.double().T
        u = torch.linalg.eigh(gram).eigenvectors[:, -kept:].flip(1).to(matrix.dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, *_ = torch.svd_lowrank(
                wide, q=min(kept + _OVERSAMPLING, rows, columns), niter=_POWER_ITERATIONS
            )
        u = u[:, :kept]
    projected = u.T @ wide
    s = projected.norm(dim=1)
    vt = projected / s.clamp(min=_TINY).unsqueeze(1)
    if rows > columns:
        u, vt = vt.T, u.T
    return u, s, vt
