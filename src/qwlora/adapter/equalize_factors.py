"""Rank-space equalization: another pair of factors with the same product, that loses less on an integer grid.

    B A = (B M^-1)(M A)                          exact for every invertible M [rank, rank]

With rows of A on steps a_k, rows of B on steps b_i, the rank-space activation u = A x on one step t, and R the second moment of x (`grid/moment.py`), rounding
costs, to first order,

    12 E|error|^2  =  tr(R) sum_k |B_k|^2 a_k^2  +  sum_i b_i^2 sum_k (A R A^T)_kk  +  t^2 sum_k |B_k|^2

diagonal    M = diag(m). Scaling a row of A scales its step, so the first term never moves where A has a step a row. The second is least where all columns of B
            are equally long (m_k = |B_k|), the third where all u_k are (m_k = 1 / sqrt (A R A^T)_kk). The powers between the two are tried:
            m_k = |B_k|^p (A R A^T)_kk^((p - 1) / 2), p from 0 to 1.
hadamard    Flat rows have steps in proportion to their length, so what is left to choose is |B|^2 tr(A (R + tr(R) / in) A^T), least at the singular value
            decomposition of B A in that norm, shared out evenly; an orthogonal matrix H with entries of like size then spreads each component over all ranks:
            U S V^T = B A (R + tr(R) / in)^(1/2),   B' = U S^(1/2) H^T,   A' = H S^(1/2) V^T (R + tr(R) / in)^(-1/2).   A few signs of H's columns are tried.

Whatever is tried is judged by the error that it really has; `auto` takes the best, and leaves a layer alone where nothing is better. The adapter stays a plain
PEFT adapter. Linear layers, Conv1D, embeddings and convolutions in one group are equalized, with DoRA or without (its magnitudes see the product only). Left
alone are factors that several layers share, those of fused experts, which hold many products, and PEFT's other variants, which may compute between A and B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

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
_CREST = 6.0  # how many standard deviations, as R has them, the range of a rank-space activation is taken to reach


@dataclass(frozen=True)
class EqualizationReport:
    """One layer: what was done to it, and `E|(B_hat A_hat - B A) x|^2 / E|B A x|^2` before and after, activation included if its grid was given."""

    method: Equalization
    before: float
    after: float


@torch.no_grad()
def equalize_adapter_(
    model: PeftModel,
    scheme: Scheme,
    method: Equalization = "auto",
    moments: Mapping[str, Moment] | None = None,
    rank_space: Scheme | None = None,
    adapter: str | None = None,
    track: Track = untracked,
) -> dict[str, EqualizationReport]:
    """Rewrite the factors of an adapter for the grid they will be quantized to, in place; the product stays, to the accuracy of the weights' type.

    Args:
        scheme: the grid of lora_A and lora_B.
        method: `diagonal` and `hadamard` take the best of their kind even where that is worse than nothing.
        moments: of a layer, by canonical path; layers without are judged with R = 1.
        rank_space: the grid of `lora_A(x)`, per tensor; its range is taken to be six standard deviations on either side. Not counted unless given.
        adapter: its name in `model`; the active one unless given.

    Returns:
        A report for each layer that was looked at; an all-zero product needs nothing, and has errors of zero.

    Raises:
        TrainingError: the model has no adapter of this name.
        CalibrationError: a factor holds nan or infinity.
    """
    adapter = adapter or model.active_adapter
    if adapter not in model.peft_config:
        raise TrainingError(
            f"the model has no adapter {adapter!r}; it has {', '.join(model.peft_config)}"
        )
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
                f"{path}: lora_A or lora_B holds nan or infinity; train the adapter again"
            )
        grids = _Grids(a.flatten(1), b.flatten(1), moment, scheme, rank_space)
        chosen, (new_a, new_b), reports[path] = _choose(grids, method)
        if chosen != "none":
            a.copy_(new_a.view(a.shape))
            b.copy_(new_b.view(b.shape))
    return reports


class _Grids:
    """Two factors, and what replacing them costs on the grids they will lie on."""

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
        """The relative error of the product, `pair` being in the weights' type."""
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
        """tr(B A R A^T B^T), without making the product."""
        return float(((b.T @ b) * self.gram(a)).sum().clamp(min=0))


def _choose(grids: _Grids, method: Equalization) -> tuple[Equalization, Pair, EqualizationReport]:
    stored: Pair = (grids.a.to(grids.dtype), grids.b.to(grids.dtype))
    if grids.energy == 0:
        return "none", stored, EqualizationReport("none", 0.0, 0.0)
    before = grids.error(stored)
    tried: list[tuple[Equalization, Pair]] = [("none", stored)] if method == "auto" else []
    for kind, make in (("diagonal", _diagonals), ("hadamard", _rotations)):
        if method in ("auto", kind):
            tried += [(kind, (a.to(grids.dtype), b.to(grids.dtype))) for a, b in make(grids)]  # type: ignore[misc]
    errors = [grids.error(pair) for _, pair in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    kind, pair = tried[best]
    return kind, pair, EqualizationReport(kind, before, errors[best])


def _diagonals(grids: _Grids) -> Iterator[Pair]:
    lengths, spreads = (
        _usable(grids.b.norm(dim=0)),
        _usable(grids.gram(grids.a).diagonal().clamp(min=0).sqrt()),
    )
    for power in _POWERS:
        m = lengths**power * spreads ** (power - 1)
        m = m / m.log().mean().exp()  # neither factor grows at the other's cost
        yield m.unsqueeze(1) * grids.a, grids.b / m


def _usable(sizes: Tensor) -> Tensor:
    """`sizes` with 1 in the place of zero: a component that is zero in one factor may have any size in the other."""
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
    """U S^(1/2) and S^(1/2) V^T of the module's text, from matrices of the rank's size."""
    lengths = _usable(grids.a.norm(dim=1))
    a, b = (
        grids.a / lengths.unsqueeze(1),
        grids.b * lengths,
    )  # small components must not drown in the rounding of large ones
    mean = 1.0 if grids.moment is None else float(grids.moment.diagonal().mean())
    values, vectors = torch.linalg.eigh(grids.gram(a) + mean * a @ a.T)
    there = values > values[-1] * len(a) * torch.finfo(values.dtype).eps
    root = torch.where(there, values.clamp(min=0).sqrt(), 0)
    inverse = torch.where(there, 1 / root.clamp(min=torch.finfo(values.dtype).tiny), 0)
    left, triangle = torch.linalg.qr(b)  # [out, k], [k, rank], k = min(out, rank)
    u, s, vt = torch.linalg.svd(triangle @ (vectors * root) @ vectors.T, full_matrices=False)
    new_a = s.sqrt().unsqueeze(1) * vt @ (vectors * inverse) @ vectors.T @ a
    new_b = left @ u * s.sqrt()
    missing = len(a) - len(s)
    return torch.nn.functional.pad(new_a, (0, 0, 0, missing)), torch.nn.functional.pad(
        new_b, (0, missing)
    )


def flat_rotation(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose entries are of like size, float64: Sylvester's Hadamard matrix for powers of two.

    For `size = 2^p q` with odd q it is the Kronecker product of that of 2^p with the Hartley matrix `(cos(2 pi j k / q) + sin(2 pi j k / q)) / sqrt(q)`, whose
    entries are at most `sqrt(2 / q)`.
    """
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while size % 2 == 0:
        hadamard = torch.kron(
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard
        )
        size //= 2
    hadamard /= math.sqrt(len(hadamard))
    turns = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * (torch.outer(turns, turns) % size)
    return torch.kron(hadamard, (angles.cos() + angles.sin()) / math.sqrt(size))


def _pairs(model: PeftModel, adapter: str) -> Iterator[tuple[str, Pair]]:
    """(lora_A, lora_B) of each layer by canonical path; what the module's text leaves alone is left out."""
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
