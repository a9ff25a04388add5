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
    if key is None:
        return capture(model, example_inputs)
    if key not in _captured:
        _captured[key] = capture(model, example_inputs)
        return _captured[key]
    captured = _captured[key]
    return rebound(captured, _over(captured.program, model), model, example_inputs)


def _structure(model: nn.Module, example_inputs: Mapping[str, Any]) -> Hashable:
    """Equal for models whose graphs are equal; None where that is not known.

    Not known: training mode, half precision, keys and values of earlier tokens, patched or hooked
    modules.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state = dict(model.state_dict(keep_vars=True))
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
        tuple(sorted(tuple(names) for names in _tied(state))),
    )


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [sorted(same) for same in names.values() if len(same) > 1]


def _over(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """The same graph over the tensors of `model`."""
    own = {
        f"model.{name}": tensor
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    return rebuilt(
        program,
        state_dict={name: own[name] for name in program.state_dict},
        constants={name: own.get(name, constant) for name, constant in program.constants.items()},
    )
