"""Which adapters of a model are active, and switching them: of a `PeftModel`, and of a transformers
model after `peft.inject_adapter_in_model`.

transformers gives its models methods of the same names (`active_adapters()`, `set_adapter`,
`disable_adapters`). Those of 5.24 refuse every released PEFT ("use a version >= 0.22.0"), so the
layers are asked instead. `model.load_adapter` of transformers refuses it too; write

    model = PeftModel.from_pretrained(model, folder)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from qwlora.errors import TrainingError


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters; empty if there is none."""
    return list(getattr(cast(Any, model), "peft_config", None) or ())


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters, in order."""
    return list(dict.fromkeys(name for layer in _layers(model) for name in layer.active_adapters))


def active_adapter(model: nn.Module) -> str:
    """The active adapter, the first if there are several."""
    if active := active_adapters(model):
        return active[0]
    raise TrainingError(
        f"{type(model).__name__} has no active adapter; attach one with peft.get_peft_model, or "
        "say which"
    )


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Make adapters the active ones; PEFT then lets their parameters require gradients."""
    if isinstance(model, PeftModel):
        model.base_model.set_adapter(list(names))
        model.active_adapter = names[0]
        return
    for layer in _layers(model):
        layer.set_adapter(list(names))


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone, until the context ends."""
    with contextlib.ExitStack() as stack:
        for layer in _layers(model):
            stack.callback(layer.enable_adapters, not layer.disable_adapters)
            layer.enable_adapters(False)
        yield


def _layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module
