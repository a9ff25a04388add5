"""QWA-LoRA: base and adapter as one graph to train through, the base's activations on their grids.

    graph = TrainingGraph(simulate(model, example_inputs, schemes), base_encodings)
    logits = graph(input_ids=ids, attention_mask=mask)     # differentiable in the adapter's weights, which are the model's own parameters

QW-LoRA trains on integer weights and calibrates activations afterwards; here they are calibrated first, on the base alone, and the adapter learns what undoes
their rounding too. Every value that the base has is on the grid that the base was calibrated to. What the adapter adds (rank space, branch, sum) is float while
it learns, and so are its weights. The gradient is straight-through: 1 inside a grid, 0 where a value was clamped.

Learned ranges (LSQ, https://arxiv.org/abs/1902.08153): one number r for each grid, `scale = scale_0 * exp(r)`, r = 0 at the beginning. A scale stays positive
whatever the step, and a step is relative, so one learning rate serves grids of any size. The offset stays, and with it the negative share of the range.

Not here: dropout and other randomness (the graph is of evaluation), gradient checkpointing, processes that share a model, terms beside the loss. `detach` stops
a gradient as in the model; `torch.no_grad()` in the model's forward leaves no trace in a captured graph, and stops none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwlora.errors import CalibrationError, CaptureError, TrainingError
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.messages import listed
from qwlora.parameter_names import is_adapter_name
from qwlora.simulation.fake_quantizer import Mode
from qwlora.simulation.model_inputs import complete
from qwlora.simulation.simulation import Simulation

_aten = torch.ops.aten


class TrainingGraph(nn.Module):
    """See the module's text.

    Args:
        simulation: of base and adapter, fresh; it is used up.
        base_encodings: of the activations of the base alone, by name.
        learns_ranges: make `ranges` a parameter.

    Raises:
        CalibrationError: an encoding belongs to no activation here; the base was captured otherwise.
        TrainingError: the adapter has dropout, or nothing in the graph can be trained.
    """

    ranges: nn.Parameter | None

    def __init__(
        self,
        simulation: Simulation,
        base_encodings: Mapping[str, Encoding],
        learns_ranges: bool = False,
    ):
        super().__init__()
        model = simulation.origin.model
        if any(
            isinstance(m, nn.Dropout) and m.p
            for path, m in model.named_modules()
            if is_adapter_name(path)
        ):
            raise TrainingError(
                "the adapter has dropout, which a graph of evaluation leaves out; set dropout to 0, or train without the graph"
            )
        self.simulation = simulation
        self._own_parameters = {id(p) for p in model.parameters()}
        simulation.take_over(base_encodings)
        for name, quantizer in simulation.quantizers.items():
            quantizer.mode = Mode.SIMULATE if name in base_encodings else Mode.FLOAT
        _free_adapter_(simulation)
        _keep_codes_(simulation.graph_module)
        self._check()
        self.names = (
            tuple(name for name in simulation.quantizers if name in base_encodings)
            if learns_ranges
            else ()
        )
        self._grids = [_LearnedGrid(base_encodings[name]) for name in self.names]
        self.ranges = nn.Parameter(torch.zeros(len(self.names))) if learns_ranges else None
        nodes = {mark.name: mark.node for mark in simulation.marks}
        for name, grid in zip(self.names, self._grids, strict=True):
            simulation.graph_module.add_submodule(f"quantizer_{nodes[name]}", grid)

    def forward(self, **inputs: Any) -> Tensor:
        """Logits of the model's arguments, by name.

        Raises:
            CaptureError: see `complete` and `Captured.bind`.
        """
        if self.ranges is not None:
            for grid, factor in zip(self._grids, self.ranges.exp().unbind(), strict=True):
                grid.factor = factor
        captured = self.simulation.captured
        outputs = self.simulation.graph_module(
            *captured.bind(complete(captured.interface.inputs, inputs))
        )
        return captured.named(outputs)[captured.interface.primary]

    def scales(self) -> dict[str, Tensor]:
        """The learned scale of each activation, by name; empty if ranges are not learned."""
        factors = self.ranges.detach().exp().cpu().unbind() if self.ranges is not None else ()
        return {
            name: grid.encoding.scale * factor
            for name, grid, factor in zip(self.names, self._grids, factors, strict=True)
        }

    def _check(self) -> None:
        parameters = list(self.simulation.graph_module.parameters())
        if not any(p.requires_grad for p in parameters):
            raise TrainingError(
                "nothing in the graph can be trained: attach an adapter before it is captured"
            )
        if any(p.requires_grad and id(p) not in self._own_parameters for p in parameters):
            raise CaptureError(
                "The captured graph holds copies of the model's trainable parameters, so training would "
                "not change the model. Keep the adapter in float32, as PEFT does by default "
                "(autocast_adapter_dtype=True)"
            )


class _LearnedGrid(nn.Module):
    """Fake-quantizes with a scale that learns; `factor` is put in before each forward."""

    factor: Tensor

    def __init__(self, encoding: Encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, x: Tensor) -> Tensor:
        return replace(self.encoding, scale=self.encoding.scale * self.factor).fake_quantize(x)


def with_scales(
    encodings: Mapping[str, Encoding], scales: Mapping[str, Tensor]
) -> dict[str, Encoding]:
    """Encodings with learned scales in the place of their own.

    Raises:
        CalibrationError: a scale belongs to no encoding, or has another shape.
    """
    if strangers := [
        name
        for name in scales
        if name not in encodings or encodings[name].scale.shape != scales[name].shape
    ]:
        raise CalibrationError(
            f"learned scales belong to no activation of the base: {listed(strangers, 3)}; calibrate the base, and train again"
        )
    return {
        name: replace(e, scale=scales[name]) if name in scales else e
        for name, e in encodings.items()
    }


def _free_adapter_(simulation: Simulation) -> None:
    """Let the adapter's weights be what they are at each forward, and not what they were on their grids."""
    graph_module = simulation.graph_module
    frozen = {f"quantizer_{mark.node}" for mark in simulation.marks if mark.kind is Kind.ADAPTER}
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target in frozen:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
            graph_module.delete_submodule(str(node.target))
    graph_module.recompile()


def _keep_codes_(graph_module: GraphModule) -> None:
    """Turn `linear(x, dequantize(codes))` into the operator whose backward unpacks again: autograd would keep every unpacked weight, which is the float model.

    A bias is then added to the product and not within it, which may differ in the last bit.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _aten.linear.default:
            continue
        x, weight, *bias = node.args
        source = _through_views(weight)
        if source is None:
            continue
        with graph_module.graph.inserting_before(node):
            product = graph_module.graph.call_function(
                torch.ops.qwlora.linear.default, (x, *source.args)
            )
            if bias and bias[0] is not None:
                product = graph_module.graph.call_function(_aten.add.Tensor, (product, bias[0]))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _through_views(node: Any) -> Node | None:
    """The dequantize that `node` is a view of, in its own shape."""
    while isinstance(node, Node) and node.target in (_aten.view.default, _aten.reshape.default):
        viewed: Any = node.args[0]
        if node.meta["val"].shape != viewed.meta["val"].shape:
            return None
        node = viewed
    return (
        node
        if isinstance(node, Node) and node.target is torch.ops.qwlora.dequantize.default
        else None
    )
