"""Select the implementations of attention and experts whose inner values are nodes of a graph.

    attention   "eager": two matrix products and a softmax; the others are one operator
    experts     "batched_mm": one node per product; the default is one opaque operator, and "eager"
                loops over data, which cannot be captured

transformers stores both choices in the model's config. They are restored after the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION, EXPERTS = "eager", "batched_mm"
_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


@contextmanager
def visible_implementations(model: nn.Module) -> Iterator[None]:
    """Within, transformers models inside `model` use the implementations that can be captured."""
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [
        (config, key, config.__dict__[key])
        for config in _configs(models)
        for key in _CHOICES
        if key in config.__dict__
    ]
    try:
        inside: set[int] = set()
        for each in models:
            if id(each) not in inside:  # the outer model sets it for its inner models
                inside.update(id(m) for m in each.modules())
                if each._can_set_attn_implementation():
                    each.set_attn_implementation(ATTENTION)
                each.set_experts_implementation(EXPERTS)
        yield
    finally:
        for config, key, choice in before:
            setattr(config, key, choice)


def _configs(models: list[PreTrainedModel]) -> list[PreTrainedConfig]:
    """Every config of the models, including nested ones, once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [model.config for model in models]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())
