"""The proof: what the exported file computes, compared with the simulation, on text that was not trained on.

end to end       logits, the likeliest token, perplexity of both
floor            the same between two simulations that differ only in what float32 leaves open (`Reference.perturbed_logits`). A deep model on a grid turns
                 the last bit of one layer into a whole step of a later one, so no file can agree with a simulation better than simulations agree with
                 each other. The share of agreeing tokens is a sample, and so is the file's; the floor is the lower end of the 95 % interval of
                     their difference
layer by layer   each layer gets the simulation's own input, so nothing accumulates: the difference is in steps of that layer's output grid

This is the proof of a causal language model; `verify_outputs.py` has that of any model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.errors import VerificationError
from qwlora.export.layer_parity import LayerLimits, LayerParity, Reference, compare_layers
from qwlora.export.onnx_runtime import OnnxLanguageModel
from qwlora.graph.quantized_graph import Interface
from qwlora.progress import Track, untracked


@dataclass(frozen=True)
class Parity(LayerParity):
    """How far a file is from the simulation. Differences of logits are absolute; steps are of the layer's own output grid."""

    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    top1_agreement: float
    perturbed_top1_agreement: float
    floor_top1_agreement: float
    perturbed_max_abs_logit_difference: float
    perplexity: float
    simulated_perplexity: float
    sequences: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Limits(LayerLimits):
    """What a proof must keep to."""

    perplexity_difference: float = 0.003


@dataclass
class _Comparison:
    """Running differences between logits of two computations."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    agreeing: int = 0
    tokens: int = 0

    def update(self, found: Tensor, expected: Tensor) -> None:
        difference = (found - expected).abs()
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.double().sum())
        self.count += difference.numel()
        self.agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
        self.tokens += found.shape[0] * found.shape[1]

    @property
    def agreement(self) -> float:
        return self.agreeing / self.tokens

    @property
    def lowest_agreement(self) -> float:
        """Lower end of the 95 % (Wilson) interval for another sample of the same size: the variance of a difference of two is that of half as many tokens."""
        n, share, z = self.tokens / 2, self.agreement, 1.96
        return (
            share + z * z / (2 * n) - z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        ) / (1 + z * z / n)


def verify_onnx(
    folder: str | Path,
    reference: Reference,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    layer_tokens: int,
    track: Track = untracked,
) -> Parity:
    """Run the exported file in `folder` on `sequences` and compare; the layers on the first `layer_tokens` tokens of the first sequence.

    Where only some tokens are learnt (see `Sequences`), the logits that predict those are compared.

    Raises:
        VerificationError: the graph is not that of a causal language model.
    """
    _refuse_other_tasks(reference.graph().interface)
    folder, data = Path(folder), as_sequences(sequences)
    layers = compare_layers(
        folder, reference, {"input_ids": next(data.rows())[0][None, :layer_tokens]}
    )
    runtime = OnnxLanguageModel(folder)
    file, floor = _Comparison(), _Comparison()
    nll = {"file": 0.0, "simulation": 0.0}
    for ids, labels in track(data.rows(), "verifying in ONNX Runtime", len(data)):
        expected = reference.logits(ids[None])
        found = runtime.logits(ids[None])
        predicting = (labels != IGNORED).roll(-1)
        predicting[-1] = (
            labels[-1] != IGNORED
        )  # nothing follows the last token of a sequence; its logits are compared with it
        file.update(found[:, predicting], expected[:, predicting])
        floor.update(reference.perturbed_logits(ids[None])[:, predicting], expected[:, predicting])
        nll["file"] += _nll(found, labels)
        nll["simulation"] += _nll(expected, labels)
    predicted = data.loss_tokens
    return Parity(
        max_abs_logit_difference=file.largest,
        mean_abs_logit_difference=file.total / file.count,
        top1_agreement=file.agreement,
        perturbed_top1_agreement=floor.agreement,
        floor_top1_agreement=floor.lowest_agreement,
        perturbed_max_abs_logit_difference=floor.largest,
        perplexity=math.exp(nll["file"] / predicted),
        simulated_perplexity=math.exp(nll["simulation"] / predicted),
        **layers.to_json(),
        sequences=len(data),
        tokens=file.tokens,
    )


def _refuse_other_tasks(interface: Interface) -> None:
    """Refuse graphs without token ids, or without logits [batch, tokens, vocabulary]."""
    shape = interface.shapes[interface.primary]
    if "input_ids" not in interface.inputs or interface.primary != "logits" or len(shape) != 3:
        raise VerificationError(
            "verify_onnx compares the next-token logits [batch, tokens, vocabulary] of a causal language "
            f"model. This graph takes {', '.join(interface.inputs)} and returns {interface.primary} "
            f"[{', '.join(map(str, shape))}]. Use qwlora.verify_onnx_outputs(folder, simulation, batches)"
        )


def check_parity(parity: Parity, limits: Limits, name: str) -> None:
    """Hold a proof to its limits.

    Raises:
        VerificationError: it does not keep to them; every limit that is broken is named.
    """
    broken = []
    drift = abs(parity.perplexity / parity.simulated_perplexity - 1)
    if not drift <= limits.perplexity_difference:
        simulated = f"the simulation's {parity.simulated_perplexity:.4f}"
        broken.append(
            f"perplexity {parity.perplexity:.4f} is {drift:.2%} from {simulated} (limit {limits.perplexity_difference:.2%})"
        )
    if not parity.top1_agreement >= parity.floor_top1_agreement:
        broken.append(
            f"the likeliest token agrees in {parity.top1_agreement:.2%} of cases, below the floor of {parity.floor_top1_agreement:.2%}"
        )
    broken += parity.broken_layer_limits(limits)
    if broken:
        raise VerificationError(
            f"{name}: the exported file does not compute what was simulated\n  "
            + "\n  ".join(broken)
        )


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        )
    )
