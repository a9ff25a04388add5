"""Changes of a module that end with a context.

Hooks and `parametrize` come first. `replaced` is for what they cannot do: compute the same result
in another way, without running the module's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(module: nn.Module, value: Any, name: str = "forward") -> Iterator[None]:
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
    """Evaluation mode inside the block; then what is at a path has the mode that was there."""
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
