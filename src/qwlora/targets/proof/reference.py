"""What exported files are compared with: tokens, and what the model says about them.

The model is the trained one, or its simulation where activations are on grids. For each state,
`base` without the adapter and `adapter` with it, n sequences of t tokens:

    ids, labels           int64 [n, t]; labels are IGNORED where a token does not count in the loss
    STATE.top             int32 [n, t, TOP], the likeliest next tokens
    STATE.log_probs       float32 [n, t, TOP], their log-probabilities
    STATE.losses          float64 [n, t - 1], of each token given those before it
    STATE.largest         float32 [n], the largest absolute logit

and, if two correct runtimes of this model differ by more than float32 rounding, what an `other`
computation gives, which is as valid:

    STATE.other_losses    as losses
    STATE.other_same      bool [n, t], whether its likeliest token is the same
    STATE.noise           float32 [n], root mean square of the differences of log-probabilities
    STATE.rounding        float32 [n], instead of `noise`: the largest difference of a logit

`noise` is that of simulations: there the last bit of one layer can become a whole step of a later
one, so a single logit may differ by any amount. It is measured on few sequences and with float32
alone, so it counts as no less than `least_noise`. `rounding` is that of a runtime that rounds
activations more coarsely than float32 (`Backend.rounding`).

The base has no more than BASE_SEQUENCES of the sequences, since all adapters share it. The file of
a bundle has the first BASE_SEQUENCES of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import SourceError, listed
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.simulation.placement_rules import Schemes

TOP = 64
BASE_SEQUENCES = 2  # a bundle need not hold more to be proven again
STATES = ("base", "adapter")
TOLERANCE = 1e-3  # of sums of probabilities, from float32 logits
# Graphs for NPUs round more than a simulation: cosines, masked scores, sigmoids. This share of the
# largest logit counts as noise, about 30 dB; docs/log/runtimes.md measures up to 0.0011.
GRAPHS_NOISE = 0.002
_OTHERS = ("other_losses", "other_same")
Logits = Callable[[Tensor], Tensor]  # of token ids [1, tokens]


@runtime_checkable
class Reference(Protocol):
    """A simulation to compare files with; `qwlora.Simulation` is one."""

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def graph(self) -> QuantizedGraph: ...


@torch.no_grad()
def make_reference(
    logits: Mapping[str, Logits],
    sequences: Sequences,
    perturbed: Mapping[str, Logits] | None = None,
    rounded: Mapping[str, Logits] | None = None,
    least_noise: float = 0.0,
) -> dict[str, Tensor]:
    """The reference that a model gives for a few sequences.

    Args:
        logits: by state, without the adapter and with it, or with it only.
        perturbed: the same with other, equally valid rounding, for models on a grid.
        rounded: the same with a runtime's rounding of activations, for other models.
        least_noise: the least noise that counts, as a share of the largest logit: where no value of
            these sequences falls on another step of a coarse grid, one may elsewhere.
    """
    others = perturbed or rounded
    reference = {"ids": sequences.input_ids, "labels": sequences.labels}
    for state in logits:
        part = sequences.first(BASE_SEQUENCES) if state == "base" else sequences
        rows: dict[str, list[Tensor]] = {}
        for ids, labels in zip(part.input_ids, part.labels, strict=True):
            expected = logits[state](ids[None])
            other = None if others is None else others[state](ids[None])
            row = _row(expected, labels, other)
            if perturbed is not None:
                del row["rounding"]
                row["noise"] = row["noise"].clamp_min(least_noise * row["largest"])
            elif rounded is not None:
                del row["noise"]
            for name, tensor in row.items():
                rows.setdefault(f"{state}.{name}", []).append(tensor)
        reference |= {name: torch.stack(tensors) for name, tensors in rows.items()}
    return reference


def least_noise(schemes: Schemes, cached_graphs: bool) -> float:
    """`least_noise` of `make_reference` for a simulation: a step of its activations, or what the
    graphs of a target with `cached_graphs` round on top. Without grids of activations, as for 16
    bits."""
    if schemes.policy == "weights-only":
        return 2.0**-16
    bits = min(schemes.activations.bitwidth, schemes.adapter_activation_bitwidth or 16)
    return max(2.0**-bits, GRAPHS_NOISE if cached_graphs else 0.0)


def _row(expected: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one sequence."""
    log_probs, top = expected[0].double().log_softmax(-1).topk(min(TOP, expected.shape[-1]))
    row = {
        "top": top.int(),
        "log_probs": log_probs.float(),
        "losses": token_losses(expected, labels),
        "largest": expected.abs().max().float(),
    }
    if other is not None:
        differences = other[0].double().log_softmax(-1).gather(-1, top) - log_probs
        row |= {
            "other_losses": token_losses(other, labels),
            "other_same": other[0].argmax(-1) == expected[0].argmax(-1),
            "noise": differences.square().mean().sqrt().float(),
            "rounding": (other - expected).abs().max().float(),
        }
    return row


def first_sequences(reference: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The reference of the first `count` sequences."""
    return {name: tensor[:count] for name, tensor in reference.items()}


def simulated_logits(simulation: Reference) -> tuple[Logits, Logits]:
    """Logits of a simulation, and with other, equally valid rounding."""
    primary = simulation.graph().interface.primary
    return (
        lambda ids: simulation.outputs({"input_ids": ids})[primary],
        lambda ids: simulation.perturbed_outputs({"input_ids": ids})[primary],
    )


def logits_of(
    model: PeftModel, rounding: AbstractContextManager[None] | None = None
) -> dict[str, Logits]:
    """Logits of a base with an adapter, without it and with it, computed inside `rounding`."""

    def base(ids: Tensor) -> Tensor:
        with model.disable_adapter():
            return whole(ids)

    def whole(ids: Tensor) -> Tensor:
        with rounding or nullcontext():
            logits: Tensor = model(input_ids=ids).logits
        return logits.float()

    return {"base": base, "adapter": whole}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each token given those before it; 0 for those not in the loss."""
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].double(), labels[1:], ignore_index=IGNORED, reduction="none"
    )


def check_reference(reference: Mapping[str, Tensor]) -> None:
    """Refuse a reference that proves nothing.

    Raises:
        SourceError: a tensor is missing, has another type or size, or holds what no model says.
    """
    if problems := list(_problems(reference)):
        raise SourceError(
            f"reference.safetensors proves nothing: {listed(problems)}. Copy the bundle again from "
            "whoever exported it, or verify the job again"
        )


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises SourceError: there are token ids that the runtime's model does not have."""
    if int(ids.max()) >= vocabulary:
        raise SourceError(
            f"reference.safetensors has token {int(ids.max())}, and the model a vocabulary of "
            f"{vocabulary:,} tokens: one of them is of another model. Copy the bundle again"
        )


def _problems(reference: Mapping[str, Tensor]) -> Iterator[str]:
    ids = reference.get("ids", torch.empty(0))
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        yield f"ids are {_form(ids)}, not int64 [1 or more sequences, 2 or more tokens]"
        return
    has_base = any(name.startswith("base.") for name in reference)
    states, forms = STATES if has_base else ("adapter",), {"ids": _form(ids), "labels": _form(ids)}
    for state in states:
        forms |= _forms(state, ids, reference)
    given = {name: _form(tensor) for name, tensor in reference.items()}
    wrong = [name for name in sorted(forms | given) if given.get(name) != forms.get(name)]
    if wrong:
        shown = (f"{n} is {given.get(n, 'missing')}, not {forms.get(n, 'known')}" for n in wrong)
        yield listed(shown)
        return
    if int(ids.min()) < 0:
        yield "ids are negative"
    counted = reference["labels"] != IGNORED
    if not bool(counted[:, 1:].any()) or bool((reference["labels"] != ids)[counted].any()):
        yield "labels count no token, or others than ids has"
    for state in states:
        parts = {n.partition(".")[2]: t for n, t in reference.items() if n.startswith(f"{state}.")}
        yield from (f"{state}: {problem}" for problem in _wrong_values(parts))


def _forms(state: str, ids: Tensor, reference: Mapping[str, Tensor]) -> dict[str, str]:
    """Types and sizes that the tensors of a state have to have, by name."""
    rows = min(len(ids), BASE_SEQUENCES) if state == "base" else len(ids)
    tokens, likeliest = ids.shape[1], reference.get(f"{state}.top", ids)
    top = likeliest.shape[-1] if likeliest.ndim else 0
    forms = {
        "top": f"int32 [{rows}, {tokens}, {top}]",
        "log_probs": f"float32 [{rows}, {tokens}, {top}]",
        "losses": f"float64 [{rows}, {tokens - 1}]",
        "largest": f"float32 [{rows}]",
    }
    if any(f"{state}.{name}" in reference for name in (*_OTHERS, "noise", "rounding")):
        bound = "rounding" if f"{state}.rounding" in reference else "noise"
        forms |= {
            "other_losses": f"float64 [{rows}, {tokens - 1}]",
            "other_same": f"bool [{rows}, {tokens}]",
            bound: f"float32 [{rows}]",
        }
    return {f"{state}.{name}": form for name, form in forms.items()}


def _wrong_values(parts: Mapping[str, Tensor]) -> Iterator[str]:
    """What no model says. Other computations may overflow: then nothing passes."""
    if not parts["top"].numel():
        yield "top is empty"
        return
    for name in ("log_probs", "losses", "largest"):
        if not bool(parts[name].isfinite().all()):
            yield f"{name} holds NaN or infinity"
            return
    total = parts["log_probs"].double().exp().sum(-1)
    if float(total.max()) > 1 + TOLERANCE or float(parts["losses"].min()) < -TOLERANCE:
        yield "log_probs or losses are no log-probabilities"
    for name in ("top", "largest", "noise", "rounding", "other_losses"):
        if name in parts and bool((parts[name] < -TOLERANCE).any()):
            yield f"{name} holds negative numbers"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
