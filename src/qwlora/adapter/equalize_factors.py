"""Rank-space equalization: other factors of the same product, with less error on an integer grid.

    B A = (B M^-1)(M A)                          exact for every invertible M [rank, rank]

    u = A x     rank-space activation, with one step t
    a_k, b_i    steps of the rows of A and of B
    R           second moment of x (`grid/second_moments.py`)

To first order, rounding costs

    12 E|error|^2  =  tr(R) sum_k |B_k|^2 a_k^2
                      +  sum_i b_i^2 sum_k (A R A^T)_kk
                      +  t^2 sum_k |B_k|^2

diagonal    M = diag(m). If each row of A has its own step, scaling a row scales its step, and the
            first term does not change. The second is least if all columns of B are equally long
            (m_k = |B_k|), the third if all u_k are (m_k = 1 / sqrt (A R A^T)_kk). Tried are the
            powers between: m_k = |B_k|^p (A R A^T)_kk^((p - 1) / 2), p from 0 to 1.

hadamard    The steps of flat rows are proportional to their lengths, which leaves
            |B|^2 tr(A (R + tr(R) / in) A^T) to minimize. It is least at the singular value
            decomposition of B A in that norm, singular values shared equally. An orthogonal matrix
            H with entries of similar size then spreads each component over all ranks:

            U S V^T = B A (R + tr(R) / in)^(1/2)
            B' = U S^(1/2) H^T,    A' = H S^(1/2) V^T (R + tr(R) / in)^(-1/2)

            A few sign patterns of H's columns are tried.

Every candidate is judged by its actual error. `auto` takes the best, and leaves a layer unchanged
if nothing is better. The result is still a plain PEFT adapter.

Equalized are Linear, Conv1D, Embedding and ungrouped convolutions, with or without DoRA, whose
magnitudes depend on the product only. Not equalized are factors that several layers share, those of
fused experts (several products in one), and PEFT's other variants, which may compute something
between A and B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwlora.adapter.active_adapters import active_adapter, adapter_names
from qwlora.errors import CalibrationError, TrainingError
from qwlora.grid.observers import measure
from qwlora.grid.scheme import Scheme
from qwlora.grid.second_moments import Moment
from qwlora.parameter_names import canonical_name
from qwlora.progress import Track, untracked

Equalization = Literal["auto", "none", "diagonal", "hadamard"]
Pair = tuple[Tensor, Tensor]

_POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)
_SIGNS = 8
_CREST = 6.0  # assumed range of a rank-space activation, in standard deviations (from R)


@dataclass(frozen=True)
class EqualizationReport:
    """The chosen method of one layer, and its relative error before and after.

    The error is `E|(B_hat A_hat - B A) x|^2 / E|B A x|^2`, with the rounding of the rank-space
    activation if its grid was given.
    """

    method: Equalization
    before: float
    after: float


@torch.no_grad()
def equalize_adapter_(
    model: nn.Module,
    scheme: Scheme,
    method: Equalization = "auto",
    moments: Mapping[str, Moment] | None = None,
    rank_space: Scheme | None = None,
    adapter: str | None = None,
    track: Track = untracked,
) -> dict[str, EqualizationReport]:
    """Rewrite the factors of an adapter for their integer grid, in place.

    The product stays the same, up to rounding in the weights' dtype.

    Args:
        scheme: the grid of lora_A and lora_B.
        method: `diagonal` and `hadamard` take the best candidate of their kind, even if it is worse
            than no change.
        moments: canonical path to the layer's moments; R = 1 for layers without.
        rank_space: the grid of `lora_A(x)`, per tensor; its range is assumed to be six standard
            deviations on either side. Default: its rounding is not counted.
        adapter: name of the adapter; default: the active one.

    Returns:
        A report for each considered layer, by canonical path. A product of zeros is left
        unchanged and reported with errors of zero.

    Raises:
        TrainingError: the model has no adapter of this name.
        CalibrationError: a factor contains nan or infinity.
    """
    adapter = adapter or active_adapter(model)
    if adapter not in (known := adapter_names(model)):
        raise TrainingError(f"the model has no adapter {adapter!r}; it has {', '.join(known)}")
    pairs = dict(_pairs(model, adapter))
    if method == "none":
        return {}
    reports = {}
    for path in track(list(pairs), "equalizing the adapter", len(pairs)):
        a, b = pairs[path]
        found = moments.get(path) if moments is not None else None
        moment = None if found is None else found.input
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise CalibrationError(
                f"{path}: lora_A or lora_B contains nan or infinity; train the adapter again"
            )
        grids = _Grids(a.flatten(1), b.flatten(1), moment, scheme, rank_space)
        chosen, (new_a, new_b), reports[path] = _choose(grids, method)
        if chosen != "none":
            a.copy_(new_a.view(a.shape))
            b.copy_(new_b.view(b.shape))
    return reports


class _Grids:
    """Two factors and their grids; measures the error of replacing the factors."""

    def __init__(
        self,
        a: Float[Tensor, "rank in"],
        b: Float[Tensor, "out rank"],
        moment: Tensor | None,
        scheme: Scheme,
        rank_space: Scheme | None,
    ):
        self.a, self.b, self.dtype = a.double(), b.double(), a.dtype
        self.moment = None if moment is None else moment.double()
        self.scheme, self.rank_space = scheme, rank_space
        self.energy = self._energy(self.b, self.a)

    def error(self, pair: Pair) -> float:
        """Relative error of the quantized product; `pair` is in the weights' dtype."""
        a, b = (
            measure(x, self.scheme).fake_quantize(x).double() for x in (x.float() for x in pair)
        )
        error = self._energy(torch.cat([b, -self.b], 1), torch.cat([a, self.a]))
        if self.rank_space is not None:
            spread = self.gram(a).diagonal().max().clamp(min=0).sqrt()
            step = 2 * _CREST * spread / self.rank_space.steps
            error += float(b.square().sum() * step**2 / 12)
        return error / self.energy

    def gram(self, a: Tensor) -> Float[Tensor, "rank rank"]:
        """A R A^T."""
        return (a if self.moment is None else a @ self.moment) @ a.T

    def _energy(self, b: Tensor, a: Tensor) -> float:
        """tr(B A R A^T B^T), without computing B A."""
        return float(((b.T @ b) * self.gram(a)).sum().clamp(min=0))


def _choose(grids: _Grids, method: Equalization) -> tuple[Equalization, Pair, EqualizationReport]:
    stored: Pair = (grids.a.to(grids.dtype), grids.b.to(grids.dtype))
    if grids.energy == 0:
        return "none", stored, EqualizationReport("none", 0.0, 0.0)
    before = grids.error(stored)
    tried: list[tuple[Equalization, Pair]] = [("none", stored)] if method == "auto" else []
    for kind, make in (("diagonal", _diagonals), ("hadamard", _rotations)):
        if method in ("auto", kind):
            pairs = [(a.to(grids.dtype), b.to(grids.dtype)) for a, b in make(grids)]
            tried += [(kind, pair) for pair in pairs]  # type: ignore[misc]
    errors = [grids.error(pair) for _, pair in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    kind, pair = tried[best]
    return kind, pair, EqualizationReport(kind, before, errors[best])


def _diagonals(grids: _Grids) -> Iterator[Pair]:
    lengths, spreads = (
        _without_zeros(grids.b.norm(dim=0)),
        _without_zeros(grids.gram(grids.a).diagonal().clamp(min=0).sqrt()),
    )
    for power in _POWERS:
        m = lengths**power * spreads ** (power - 1)
        m = m / m.log().mean().exp()  # geometric mean 1: neither factor grows
        yield m.unsqueeze(1) * grids.a, grids.b / m


def _without_zeros(sizes: Tensor) -> Tensor:
    """`sizes` with zeros replaced by 1.

    A component that is zero in one factor may have any size in the other.
    """
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _rotations(grids: _Grids) -> Iterator[Pair]:
    a, b = _balanced(grids)
    rank = len(a)
    flat = flat_rotation(rank)
    generator = torch.Generator().manual_seed(0)
    for index in range(_SIGNS if rank > 1 else 1):
        signs = (
            torch.randint(0, 2, (rank,), generator=generator).double() * 2 - 1
            if index
            else torch.ones(rank, dtype=torch.float64)
        )
        rotation = (flat * signs).to(a.device)
        yield rotation @ a, b @ rotation.T


def _balanced(grids: _Grids) -> Pair:
    """A' and B' of the module docstring without H, from decompositions of size [rank, rank]."""
    lengths = _without_zeros(grids.a.norm(dim=1))
    # Normalized, so that small components are not lost in the rounding of large ones.
    a, b = grids.a / lengths.unsqueeze(1), grids.b * lengths
    mean = 1.0 if grids.moment is None else float(grids.moment.diagonal().mean())
    values, vectors = torch.linalg.eigh(grids.gram(a) + mean * a @ a.T)
    nonzero = values > values[-1] * len(a) * torch.finfo(values.dtype).eps
    root = torch.where(nonzero, values.clamp(min=0).sqrt(), 0)
    inverse = torch.where(nonzero, 1 / root.clamp(min=torch.finfo(values.dtype).tiny), 0)
    left, triangle = torch.linalg.qr(b)  # [out, k], [k, rank], k = min(out, rank)
    u, s, vt = torch.linalg.svd(triangle @ (vectors * root) @ vectors.T, full_matrices=False)
    new_a = s.sqrt().unsqueeze(1) * vt @ (vectors * inverse) @ vectors.T @ a
    new_b = left @ u * s.sqrt()
    missing = len(a) - len(s)
    pad = torch.nn.functional.pad
    return pad(new_a, (0, 0, 0, missing)), pad(new_b, (0, missing))


def flat_rotation(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal float64 matrix with entries of similar size.

    For powers of 2, it is Sylvester's Hadamard matrix, scaled. For `size = 2^p q` with odd q, it is
    the Kronecker product of that of 2^p with the Hartley matrix
    `(cos(2 pi j k / q) + sin(2 pi j k / q)) / sqrt(q)`, whose entries are at most `sqrt(2 / q)`.
    """
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while size % 2 == 0:
        hadamard = torch.kron(
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard
        )
        size //= 2
    hadamard /= math.sqrt(len(hadamard))
    index = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * (torch.outer(index, index) % size)
    return torch.kron(hadamard, (angles.cos() + angles.sin()) / math.sqrt(size))


def _pairs(model: nn.Module, adapter: str) -> Iterator[tuple[str, Pair]]:
    """(lora_A, lora_B) of each layer to equalize, by canonical path; see the module docstring."""
    found: list[tuple[str, Pair]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        elif adapter in module.lora_embedding_A:
            a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            continue
        variant = adapter in module.lora_variant and not module.use_dora.get(adapter)
        if len(a) == b.shape[1] == module.r[adapter] and not variant:
            found.append((canonical_name(name), (a.data, b.data)))
    readers = Counter(x.data_ptr() for _, pair in found for x in pair)
    yield from (
        (path, (a, b))
        for path, (a, b) in found
        if readers[a.data_ptr()] == readers[b.data_ptr()] == 1
    )
