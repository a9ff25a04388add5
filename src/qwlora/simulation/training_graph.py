"""QWA-LoRA: train the adapter through a graph with the base's activations quantized.

    base = simulate(model, example_inputs, schemes)            # before the adapter is attached
    base.calibrate(batches)
    known = base.activation_encodings
    model = get_peft_model(model, config).eval()
    graph = TrainingGraph(simulate(model, example_inputs, schemes, activation_encodings=known))
    logits = graph(input_ids=ids, attention_mask=mask)    # differentiable in the adapter's weights
    ...
    simulation = simulate(model, example_inputs, schemes, activation_encodings=known)
    simulation.calibrate(batches)                         # the adapter's activations only

QW-LoRA trains on integer weights and calibrates activations afterwards. Here the activations of the
base are calibrated first, and the adapter also learns to compensate their rounding. The adapter's
weights and activations stay float. The gradient is straight-through: 1 inside the range, 0 where a
value was clamped.

It does not support dropout or other randomness (the graph is in evaluation mode), gradient
checkpointing, data parallelism, or losses of other outputs than the logits. `detach` stops
gradients as in the model. `torch.no_grad()` in the model's forward is not captured and stops none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwlora.errors import CalibrationError, CaptureError, TrainingError
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.fake_quantizer import Mode, remove_quantizers_
from qwlora.simulation.simulation import Simulation
from qwlora.system.parameter_names import is_adapter_name

_aten = torch.ops.aten


class TrainingGraph(nn.Module):
    """A graph to train an adapter through quantized activations; see the module.

    Args:
        simulation: a simulation of base and adapter with the base's `activation_encodings`, not
            calibrated. It is modified.

    Raises:
        CalibrationError: the simulation has no activation encodings.
        CaptureError: the graph holds copies of the trainable parameters.
        TrainingError: the adapter has dropout.
    """

    def __init__(self, simulation: Simulation):
        super().__init__()
        model = simulation.origin.model
        adapter_modules = (m for path, m in model.named_modules() if is_adapter_name(path))
        if any(isinstance(m, nn.Dropout) and m.p for m in adapter_modules):
            raise TrainingError(
                "the adapter has dropout, which a captured graph does not have; set dropout to 0, "
                "or use workflow: qw-lora"
            )
        self.simulation, quantizers = simulation, simulation.quantizers.values()
        if not any(quantizer.fixed for quantizer in quantizers):
            raise CalibrationError(
                "the simulation has no activation encodings to train through. Calibrate the base "
                "without an adapter, and give them to the adapter's simulation: "
                "simulate(..., activation_encodings=base.activation_encodings)"
            )
        for quantizer in quantizers:
            quantizer.mode = Mode.SIMULATE if quantizer.fixed else Mode.FLOAT
        # the adapter's float weights instead of their quantized copies, which have no gradient
        adapter = [mark.node for mark in simulation.marks if mark.kind is Kind.ADAPTER]
        remove_quantizers_(simulation.graph_module, adapter)
        _keep_codes_(simulation.graph_module)
        trainable = [p for p in simulation.graph_module.parameters() if p.requires_grad]
        if not {id(p) for p in trainable} <= {id(p) for p in model.parameters()}:
            raise CaptureError(
                "The captured graph holds copies of the model's trainable parameters, so training "
                "would not change the model. Keep the adapter in float32, as PEFT does by default "
                "(autocast_adapter_dtype=True)"
            )

    def forward(self, **inputs: Any) -> Tensor:
        """Logits, from the model's arguments."""
        return self.simulation.primary(inputs)

    def __repr__(self) -> str:
        return f"TrainingGraph of {self.simulation!r}"


def _keep_codes_(graph_module: GraphModule) -> None:
    """Replace `linear(x, dequantize(codes))` by an operator whose backward dequantizes again."""
    # Autograd would otherwise keep every float weight in memory. A bias is added after the product,
    # which may change the last bit.
    graph, qwlora = graph_module.graph, torch.ops.qwlora
    for node in graph.find_nodes(op="call_function", target=_aten.linear.default):
        x, weight, *bias = node.args
        if weight.target is not qwlora.dequantize.default:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(qwlora.linear.default, (x, *weight.args))
            if bias and bias[0] is not None:
                product = graph.call_function(_aten.add.Tensor, (product, bias[0]))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
