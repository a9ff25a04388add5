"""Comparisons that several tests make."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.data.sequences import Sequences, as_sequences
from qwlora.errors import VerificationError
from qwlora.graph.graph_analysis import FACTOR, branch_nodes
from qwlora.graph.nodes import operation
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.checks import LIMITS, Limits, Parity
from qwlora.targets.proof.compare import compare_layers, compare_outputs
from qwlora.targets.proof.prove import measure
from qwlora.targets.proof.reference import (
    GRAPHS_NOISE,
    Logits,
    Reference,
    Rounding,
    make_reference,
    reference_of_trained,
    simulated_logits,
)
from qwlora.targets.target import Runtime


def verify_weights(
    runtime: Runtime,
    model: Any,
    adapter: Path,
    sequences: Sequences,
    rounding: Rounding | None = None,
) -> Parity:
    """A runtime against the trained model."""
    return measure(runtime, adapter, reference_of_trained(model, sequences, rounding))


def verify_simulation(
    runtime: Runtime, simulation: Reference, ids: Any, layer_tokens: int
) -> Parity:
    """A runtime with base and adapter together against the simulation of a language model."""
    run = measure(runtime, None, reference_of(simulation, ids))
    parity = Parity(run.figures["exact"]["adapter"], run.checks)
    if not runtime.has_layers:
        return parity
    batch = {"input_ids": as_sequences(ids).input_ids[:1, :layer_tokens]}
    layers = compare_layers(runtime, simulation, batch)
    return parity.extended(layers.figures, *layers.checks)


def verify_onnx(folder: Path, simulation: Reference, ids: Tensor, layer_tokens: int) -> Parity:
    """A language model in ONNX Runtime against its simulation; raises if a check fails."""
    return _passed(verify_simulation(OnnxModel(folder), simulation, ids, layer_tokens), folder)


def verify_onnx_outputs(
    folder: Path, simulation: Reference, batches: Any, limits: Limits = LIMITS
) -> Parity:
    """Any model in ONNX Runtime against its simulation; raises if a check fails."""
    outputs = compare_outputs(simulation, batches, OnnxModel(folder), limits)
    layers = compare_layers(OnnxModel(folder), simulation, batches[0], limits)
    return _passed(outputs.extended(layers.figures, *layers.checks), folder)


def _passed(parity: Parity, folder: Path) -> Parity:
    if parity.problems or not parity.checks:
        raise VerificationError(str(folder), parity.problems or ["nothing was compared"])
    return parity


def reference_of(simulation: Reference, ids: Any, least_noise: float = 0.0) -> dict[str, Tensor]:
    """What a simulation says about token ids."""
    logits, perturbed = simulated_logits(simulation)
    text = as_sequences(ids)
    return make_reference({"adapter": logits}, text, {"adapter": perturbed}, None, least_noise)


def verify_graphs(
    logits: Logits, simulation: Reference, ids: Tensor, limits: Limits = LIMITS
) -> Parity:
    """Graphs with a key-value cache against their simulation."""
    return measure_logits(logits, reference_of(simulation, ids, GRAPHS_NOISE), limits)


def measure_logits(
    logits: Logits, reference: Mapping[str, Tensor], limits: Limits = LIMITS
) -> Parity:
    """Files that hold base and adapter together, with these logits, against a reference."""

    class Computed(Runtime):
        def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
            return logits(ids)

    return measure(Computed(), None, reference, limits)


def with_strength(simulation: Simulation, alpha: float) -> Callable[[Tensor], Tensor]:
    """The simulation's logits with its scaling times alpha."""
    branch = branch_nodes(simulation.program, FACTOR)
    scalings = {
        node: node.args[1]
        for node in simulation.graph_module.graph.nodes
        if node.name in branch and operation(node) == "mul" and isinstance(node.args[1], float)
    }
    assert scalings

    def set_(strength: float) -> None:
        for node, scaling in scalings.items():
            node.args = (node.args[0], scaling * strength)
        simulation.graph_module.recompile()

    def logits(ids: Tensor) -> Tensor:
        set_(alpha)
        found = simulation.logits(ids)
        set_(1.0)
        return found

    return logits


def sqnr(logits: Tensor, expected: Tensor) -> float:
    """In dB."""
    noise = (logits.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))
