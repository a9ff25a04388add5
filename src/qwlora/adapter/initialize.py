"""Where an adapter starts: at zero, or at the best correction of what quantization lost. The base is not touched, so one base still serves many adapters.

    zero    B = 0: PEFT's own start
    svd     minimize |E|^2,                          E = D - s B A,      D = W - W_hat,   s the adapter's scaling
    qera    minimize tr(G E R E^T),                  R + damping = L L^T,   G + damping = K K^T,      R and G from `base/observe.py`

    U S V^T = svd(K^T D L)  (K = L = 1 for svd),     B = K^-T U_k S_k C / sqrt(s),        A = C^-1 V_k^T L^-1 / sqrt(s)

C is diagonal and makes a column of B as long as its row of A L. A step of Adam moves every number by as much, so the outputs by sqrt(out) |A L| for one of B
and by sqrt(tr R) |B| for one of A: where inputs are so large that A's would be the farther, B is sqrt(out / tr R) times as long as A L, and both are alike.

The first k of an adapter's ranks correct, a share of all; the others start as PEFT's do, free for what is to be learnt. Where scales were tuned after the
solver, W_hat is what the solver made: tuned layers make up for one another, and what tuning did is not to be undone. R and G are of the model before.

Source: QERA (Zhang et al. 2024, https://arxiv.org/abs/2410.06040), whose exact solution, that of CLoQ (Deng et al. 2025, https://arxiv.org/abs/2501.18475) too,
is this one for G = 1: there all of a layer's outputs matter alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwlora.errors import TrainingError
from qwlora.grid.second_moments import Moment
from qwlora.messages import listed
from qwlora.nn import PackedLinear
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.parameter_names import canonical_name
from qwlora.progress import Track, untracked

Init = Literal["zero", "svd", "qera"]
# 2: qera weighs outputs; 3: what the solver lost is corrected; 4: shorter B where inputs are large
REVISION = 4
_DAMPING_INPUT, _DAMPING_OUTPUT = (
    0.1,
    1.0,
)  # of the mean of a moment's diagonal; few tokens have large gradients, so G is less certain than R
_WHOLE = 2048  # the smaller side of a matrix up to which its Gram matrix is decomposed whole; larger ones by random projection
_OVERSAMPLED, _POWERS = 32, 4
_NOTHING = 1e-6  # of the largest singular value: one below this is rounding


@dataclass(frozen=True)
class InitReport:
    """Relative error `tr(G E R E^T) / tr(G W R W^T)` of one layer without and with its adapter, R and G damped, and 1 for svd."""

    before: float
    after: float


def initialize_adapter_(
    model: PeftModel,
    init: Init,
    weights: Callable[[str], Tensor],
    moments: Mapping[str, Moment] | None = None,
    adapter: str | None = None,
    share: float = 0.5,
    track: Track = untracked,
    solver_scales: Mapping[str, Tensor] | None = None,
) -> dict[str, InitReport]:
    """Start the adapter of each quantized matrix product in `model`, in place; other layers keep PEFT's start.

    Args:
        weights: the float weight [out, in] that a layer was quantized from, by its canonical path.
        moments: R and G of a layer, likewise; qera needs them (`quantize_(..., moments=...)`, `observe_moments`).
        adapter: its name in `model`; the active one unless given.
        share: of a layer's ranks, rounded up, which correct; in (0, 1].
        solver_scales: a tuned layer's scale before, by its canonical path (`TuningReport.solver_scales`).

    Returns:
        The error of each layer that was started.

    Raises:
        TrainingError: there is no such layer, a moment is missing or none, a scale is another layer's, the share is out of its range, or the adapter is one
            (DoRA) whose other parameters depend on the start.
    """
    if init == "zero":
        return {}
    if not 0 < share <= 1:
        raise TrainingError(
            f"the share of ranks that init {init} corrects with is in (0, 1], not {share:g}"
        )
    adapter = adapter or model.active_adapter
    layers = dict(quantized_layers(model, adapter))
    if not layers:
        raise TrainingError(
            f"init {init} corrects what quantization lost, but no layer with adapter {adapter!r} is quantized; use init zero"
        )
    if init == "qera":
        check_moments(layers, moments or {})
    check_scales(model, solver_scales or {})
    reports = {}
    for path in track(list(layers), "starting the adapter", len(layers)):
        moment = moments[path] if init == "qera" and moments is not None else None
        weight = weights(path).detach().float()
        difference = solver_difference(path, layers[path], weight, solver_scales or {})
        reports[path] = _start(layers[path], adapter, weight, difference, moment, share)
    return reports


def check_moments(layers: Iterable[str], moments: Mapping[str, Moment]) -> None:
    """See that each layer has its moments.

    Raises:
        TrainingError: one has not.
    """
    if missing := [path for path in layers if path not in moments]:
        raise TrainingError(
            f"there are no moments of {listed(missing, 3)}, which init qera needs; "
            "give quantize_ calibration data and moments, take those of a base as it is with observe_moments, or use svd"
        )


def check_scales(model: nn.Module, solver_scales: Mapping[str, Tensor]) -> None:
    """See that each scale before tuning is of a module of `model`.

    Raises:
        TrainingError: one is not.
    """
    if unknown := sorted(
        solver_scales.keys() - {canonical_name(name) for name, _ in model.named_modules()}
    ):
        raise TrainingError(
            f"the model has no {listed(unknown, 3)}, whose scale before tuning was given; give those of this base, by canonical paths"
        )


def solver_difference(
    path: str,
    layer: LoraLayer,
    weight: Float[Tensor, "out in"],
    solver_scales: Mapping[str, Tensor],
) -> Float[Tensor, "out in"]:
    """D of the layer at `path`: what is between its float weight and what the solver made of that.

    Raises:
        TrainingError: the scale before tuning is of another shape than the layer's.
    """
    base: Any = layer.get_base_layer()
    tensor: PackedTensor = base.tensor
    if (before := solver_scales.get(path)) is not None:
        scale, minimum = tensor.parts.scale, tensor.parts.minimum
        if before.shape != scale.shape:
            raise TrainingError(
                f"{path}: the scale before tuning is {list(before.shape)} and the layer's {list(scale.shape)}; they are not of one base"
            )
        before = before.to(scale.device)
        minimum = None if minimum is None else minimum.float() * (before.float() / scale.float())
        tensor = replace(tensor, parts=tensor.parts._replace(scale=before, minimum=minimum))
    return weight - tensor.dequantize()


class Correction(NamedTuple):
    """B and A of the module's equation for scaling 1, and S, falling. Of a lower rank where the matrix has no more."""

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    singular: Float[Tensor, " rank"]


class Measure:
    """What an error of a layer's weight costs: `|E|^2`, or for a moment `|K^T E L|^2 = tr(G E R E^T)`, both damped.

    Raises:
        TrainingError: the moment holds nan or infinity, or is a matrix alone.
    """

    def __init__(self, moment: Moment | None):
        if isinstance(moment, Tensor):
            raise TrainingError(
                "a layer's moments are R and G (qwlora.Moment), not a matrix; of R alone make Moment(R)"
            )
        self._inner = None if moment is None else _root(moment.input, _DAMPING_INPUT)
        self._outer = (
            None
            if moment is None or moment.output is None
            else _root(moment.output, _DAMPING_OUTPUT)
        )

    def of(self, matrix: Float[Tensor, "out in"]) -> float:
        """What `matrix` costs as an error. Never quite zero, so that it divides."""
        energy = torch.linalg.vector_norm(self._weighed(matrix), dtype=torch.float64).square()
        return float(energy.clamp(min=torch.finfo(torch.float32).tiny))

    def best_correction(self, difference: Float[Tensor, "out in"], rank: int) -> Correction:
        """The best of its rank for `difference` D."""
        b, s, a = _leading(self._weighed(difference), rank)
        b = b * s
        if self._outer is not None:
            b = torch.linalg.solve_triangular(self._outer.T, b, upper=True)
        if self._inner is not None:
            a = torch.linalg.solve_triangular(self._inner, a, upper=False, left=False)
        balance = (
            self._shorter(len(difference))
            * b.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        )
        return Correction(b * balance, a / balance.unsqueeze(1), s)

    def _shorter(self, out: int) -> float:
        """What B is multiplied by, and A divided, where inputs are large: the root of how long B is beside A L."""
        return (
            1.0
            if self._inner is None
            else min(1.0, out / float(self._inner.square().sum(dtype=torch.float64))) ** 0.25
        )

    def _weighed(self, matrix: Tensor) -> Tensor:
        """K^T M L."""
        matrix = matrix if self._inner is None else matrix @ self._inner
        return matrix if self._outer is None else self._outer.T @ matrix


def corrected_ranks(rank: int, share: float) -> int:
    """How many of a layer's ranks correct: a share, rounded up but for what is whole within float's precision."""
    return math.ceil(share * rank - 1e-9)


def _start(
    layer: LoraLayer,
    adapter: str,
    weight: Tensor,
    difference: Tensor,
    moment: Moment | None,
    share: float,
) -> InitReport:
    scaling, measure = float(layer.scaling[adapter]), Measure(moment)
    b, a, singular = measure.best_correction(difference, corrected_ranks(layer.r[adapter], share))
    used = int((singular > _NOTHING * singular[0]).sum())
    with (
        torch.no_grad()
    ):  # A keeps PEFT's start in the other ranks, and in those that the difference does not have
        layer.lora_A[adapter].weight[:used] = a[:used] / scaling**0.5
        layer.lora_B[adapter].weight[:, :used] = b[:, :used] / scaling**0.5
        layer.lora_B[adapter].weight[:, used:] = 0
    whole, before, after = (
        measure.of(matrix) for matrix in (weight, difference, difference - b[:, :used] @ a[:used])
    )
    return InitReport(before / whole, after / whole)


def quantized_layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Packed linear layers that have the adapter, by canonical path.

    Raises:
        TrainingError: the adapter is DoRA.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        base = module.get_base_layer()
        if not isinstance(base, PackedLinear):
            continue
        if module.use_dora.get(adapter):
            raise TrainingError(
                f"{canonical_name(name)}: the start of a DoRA adapter fixes its magnitudes too; only init zero does that"
            )
        yield canonical_name(name), module


def _root(moment: Tensor, damping: float) -> Tensor:
    """Lower triangular L of the moment, damped by at least a share of its diagonal's mean."""
    if not bool(moment.isfinite().all()):
        raise TrainingError(
            "the moments hold nan or infinity; quantize again, or observe them again with observe_moments"
        )
    mean = float(moment.diagonal().mean()) or 1.0
    while True:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower
        damping *= 10


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets, fewer where the matrix has no more: u [out, rank], s [rank], v^T [rank, in]."""
    rows, columns = matrix.shape
    kept = min(rank, rows, columns)
    if min(rows, columns) <= _WHOLE:
        wide = matrix if rows <= columns else matrix.T
        u = (
            torch.linalg.eigh(wide.double() @ wide.double().T)
            .eigenvectors[:, -kept:]
            .flip(1)
            .to(matrix.dtype)
        )
    else:
        wide = matrix if rows <= columns else matrix.T
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, *_ = torch.svd_lowrank(
                wide, q=min(kept + _OVERSAMPLED, rows, columns), niter=_POWERS
            )
        u = u[:, :kept]
    projected = u.T @ wide
    s = projected.norm(dim=1)
    vt = projected / s.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    if rows > columns:
        u, vt = vt.T, u.T
    return u, s, vt
