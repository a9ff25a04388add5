"""Changes of a module that end with a context.

Hooks and `parametrize` come first. `replaced` is for what they cannot do: compute the same result
in another way, without running the module's own forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(module: Any, value: Any, name: str = "forward") -> Iterator[None]:
    """Set attribute `name` of `module`; afterwards, restore what was set on the instance before."""
    attributes = vars(module)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block. Afterwards each module path has its previous mode again."""
    # paths, not modules: the block may replace modules, as quantization does
    training = [path for path, module in model.named_modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for path in training:
            model.get_submodule(path).training = True


@contextmanager
def gradients_disabled(module: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of every parameter of `module` to False inside the block."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def structure(model: nn.Module) -> Callable[[], None]:
    """A function that restores the modules, parameters and attributes that `model` has now."""
    # values of tensors are not copied
    states = [(module, type(module), dict(vars(module))) for module in model.modules()]
    # containers keep their identity: handles of hooks refer to them; a subclass may refuse changes
    containers: list[tuple[Any, Any]] = [
        (value, value.copy())
        for *_, state in states
        for value in state.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, kind, state in states:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(content, list) else container.update(content)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)

    return restore
