"""The proof of any model: every output of the exported file, and every layer, compared with the simulation.

    sqnr    10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x the simulation's output and x_hat the file's; infinite where they are equal bit for bit
    floor   the same between two simulations that differ only in what float32 leaves open (see `verify.py`)

What is a right answer for the model's task, this does not know: `verify.py` does for causal language models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qwlora.errors import VerificationError
from qwlora.export.layer_parity import LayerLimits, LayerParity, Reference, compare_layers
from qwlora.export.onnx_runtime import OnnxModel
from qwlora.graph.call_arguments import as_arguments
from qwlora.grid.sqnr import sqnr_db
from qwlora.progress import Track, untracked


@dataclass
class Difference:
    """Running difference between one output of two computations."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def update(self, found: Tensor, expected: Tensor) -> None:
        """Add one batch's."""
        apart = (found.double() - expected.double()).abs()
        self.signal += float(expected.double().square().sum())
        self.noise += float(apart.square().sum())
        self.largest = max(self.largest, float(apart.max()))

    @property
    def sqnr(self) -> float:
        """In dB."""
        return sqnr_db(self.signal, self.noise)


@dataclass(frozen=True)
class OutputParity(LayerParity):
    """How far a file is from the simulation. Differences of outputs are absolute or in dB; steps are of a layer's own output grid."""

    primary: str
    sqnr: dict[str, float]
    floor_sqnr: dict[str, float]
    max_abs_difference: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class OutputLimits(LayerLimits):
    """What a proof must keep to: an output may lie `below_floor` dB below the floor, unless it is as close as `sqnr` dB."""

    sqnr: float = 60.0
    below_floor: float = 6.0


@dataclass
class _Outputs:
    file: dict[str, Difference] = field(default_factory=dict)
    floor: dict[str, Difference] = field(default_factory=dict)

    def update(
        self,
        found: Mapping[str, Tensor],
        perturbed: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
    ) -> None:
        for name, value in expected.items():
            self.file.setdefault(name, Difference()).update(found[name], value)
            self.floor.setdefault(name, Difference()).update(perturbed[name], value)


def verify_onnx_outputs(
    folder: str | Path,
    reference: Reference,
    batches: Collection[Any],
    track: Track = untracked,
) -> OutputParity:
    """Run the exported file in `folder` on `batches`, and compare every output; the layers on the first batch.

    Args:
        batches: dicts of arguments, tensors or tuples of tensors, see `call_arguments.py`.

    Raises:
        VerificationError: there is no batch.
        ExportError: ONNX Runtime refuses the file.
    """
    if not batches:
        raise VerificationError("verification needs at least one batch of the model's inputs")
    folder, outputs = Path(folder), _Outputs()
    inputs = reference.graph().interface.inputs
    batches = [as_arguments(batch, inputs) for batch in batches]
    runtime = OnnxModel(folder)
    layers = compare_layers(folder, reference, next(iter(batches)))
    for batch in track(batches, "verifying in ONNX Runtime", len(batches)):
        outputs.update(
            runtime.run(reference.bind(batch)),
            reference.perturbed_outputs(batch),
            reference.outputs(batch),
        )
    return OutputParity(
        primary=reference.graph().interface.primary,
        sqnr={name: difference.sqnr for name, difference in outputs.file.items()},
        floor_sqnr={name: difference.sqnr for name, difference in outputs.floor.items()},
        max_abs_difference={name: difference.largest for name, difference in outputs.file.items()},
        **layers.to_json(),
    )


def check_output_parity(parity: OutputParity, limits: OutputLimits, name: str) -> None:
    """Hold a proof to its limits.

    Raises:
        VerificationError: it does not keep to them; every limit that is broken is named.
    """
    broken = []
    for output, sqnr in parity.sqnr.items():
        least = min(limits.sqnr, parity.floor_sqnr[output] - limits.below_floor)
        if not sqnr >= least:
            broken.append(
                f"output {output} is {sqnr:.1f} dB from the simulation's (limit {least:.1f} dB, floor {parity.floor_sqnr[output]:.1f} dB)"
            )
    broken += parity.broken_layer_limits(limits)
    if broken:
        raise VerificationError(
            f"{name}: the exported file does not compute what was simulated\n  "
            + "\n  ".join(broken)
        )
