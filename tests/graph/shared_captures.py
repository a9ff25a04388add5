"""One `torch.export` for all models of a structure: most tests need a captured model, few test
the capture.

A test file opts in:

    pytestmark = pytest.mark.usefixtures("shared_captures")

The first model of a structure is captured. Later ones get its graph over their own tensors, and
`rebound` compares the result with the model bit for bit, so a graph that does not fit fails.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qwlora.graph.capture import Captured, capture, rebound
from qwlora.graph.quantized_graph import rebuilt
from qwlora.nn.packed_layer import PackedLayer

CALLERS = ("simulation.simulation", "simulation.adapter_simulations", "pipeline.stages.job_context")
# what decides about a graph, and is not in the text of a module
NOT_SHOWN = ("config", "scaling", "active_adapters", "merged_adapters", "disable_adapters")
_captured: dict[Hashable, Captured] = {}


def shared_capture(model: nn.Module, example_inputs: Mapping[str, Any]) -> Captured:
    """`capture`, from the graph of an earlier model of the same structure if there is one."""
    key = _structure(model, example_inputs)
    captured = _captured.get(key)
    if captured is not None:
        return rebound(captured, _over(captured.program, model), model, example_inputs)
    captured = capture(model, example_inputs)
    if key is not None:
        _captured[key] = captured
    return captured


def _structure(model: nn.Module, example_inputs: Mapping[str, Any]) -> Hashable:
    """Equal for models whose graphs are equal; None where that is not known.

    Not known: training mode, half precision, keys and values of earlier tokens, patched or hooked
    modules.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state = dict(model.state_dict(keep_vars=True))
    first_names = {id(tensor): name for name, tensor in reversed(state.items())}
    inputs = {
        name: (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
        for name, value in example_inputs.items()
    }
    if (
        any(m.training or "forward" in vars(m) or m._forward_hooks for m in modules.values())
        or any(t.is_floating_point() and t.dtype != torch.float32 for t in model.parameters())
        or not all(v is None or isinstance(v, bool | int | str | tuple) for v in inputs.values())
    ):
        return None
    return (
        repr(model),
        tuple(type(module) for module in modules.values()),
        repr(sorted(inputs.items())),
        tuple(inputs),
        repr([[getattr(module, name, None) for name in NOT_SHOWN] for module in modules.values()]),
        repr([m.scheme for m in modules.values() if isinstance(m, PackedLayer)]),
        tuple((n, t.dtype, tuple(t.shape), t.requires_grad, t.device) for n, t in state.items()),
        tuple(first_names[id(tensor)] for tensor in state.values()),  # which are tied
    )


def _over(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """The same graph over the tensors of `model`."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    own = {f"model.{name}": tensor for name, tensor in tensors.items()}
    state = {name: own[name] for name in program.state_dict}
    constants = {name: own.get(name, value) for name, value in program.constants.items()}
    return rebuilt(program, state_dict=state, constants=constants)
