"""Ways to compute the same thing, of which only some have their inner values in a graph.

    attention   "eager": two products and a softmax, each a node; the others are one
    experts     "batched_mm": each product a node; the default is one opaque operator, and "eager" loops over data and cannot be captured

transformers keeps both choices in a model's config. They are set while a graph is captured, and put back: the user's model stays as it was.
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
    """Within, every transformers model inside `model` computes attention and experts in the ways that a graph shows."""
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
            if id(each) not in inside:  # the outermost ones pass it on
                inside.update(id(m) for m in each.modules())
                if each._can_set_attn_implementation():
                    each.set_attn_implementation(ATTENTION)
                each.set_experts_implementation(EXPERTS)
        yield
    finally:
        for config, key, choice in before:
            setattr(config, key, choice)


def _configs(models: list[PreTrainedModel]) -> list[PreTrainedConfig]:
    """Every config of the models, those inside others too, once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [model.config for model in models]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())
