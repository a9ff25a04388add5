"""Use cases: adapters that a runtime switches to, alone or several at once, in one shape.

    A           W x + B_A A_A x
    A+B         W x + [B_A B_B] [A_A; A_B] x      concatenated along the rank
    none        W x                               the zero adapter

Every use case has factors for every layer that any of them adapts, of one rank: zeros fill what is
missing. Scales are folded into B (`canonical_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.graph.adapter_branch import unaffected_nodes
from qwlora.simulation.adapter_simulations import BASE, AdapterSimulations

NONE, AND = "none", "+"
_NAME = "case{}"  # of a PEFT adapter: a use case's own name may hold a plus sign


def members(case: str) -> list[str]:
    """Names of the adapters of a use case."""
    return [] if case == NONE else case.split(AND)


def peft_names(cases: Sequence[str]) -> dict[str, str]:
    """The name in `use_case_model`, and in its simulations, of each use case."""
    return {c: BASE if c == NONE else _NAME.format(i) for i, c in enumerate(cases)}


def use_case_model(
    base: PreTrainedModel, adapters: Mapping[str, CanonicalAdapter], cases: Sequence[str]
) -> PeftModel:
    """The base with one PEFT adapter for every use case but "none"; see `peft_names`.

    Args:
        adapters: by name.
    """
    own = {case: [adapters[name] for name in members(case)] for case in cases if case != NONE}
    rank = max(
        _rank(adapters, module) for adapters in own.values() for module in _modules(adapters)
    )
    modules = sorted({module for adapters in own.values() for module in _modules(adapters)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=False)
    names, model = peft_names(cases), None
    for case, together in own.items():
        if model is None:
            model = get_peft_model(base, config, names[case])
        else:
            model.add_adapter(names[case], config)
        for module in modules:
            layer = model.get_submodule(f"base_model.model.{module}")
            a, b = layer.lora_A[names[case]].weight, layer.lora_B[names[case]].weight
            with torch.no_grad():
                a.copy_(_padded([f[module][0] for f in _factors(together, module)], a, 0))
                b.copy_(_padded([f[module][1] for f in _factors(together, module)], b, 1))
    assert model is not None, "the recipe refuses use cases without an adapter"
    return model.eval()


def share_unaffected(simulations: AdapterSimulations) -> None:
    """Give values that no adapter changes the encodings of the base's simulation, so that all use
    cases have the same base."""
    base = simulations[BASE]
    for simulation in simulations.values():
        unaffected = unaffected_nodes(simulation.program)
        for mark in simulation.marks:
            if mark.node in unaffected and mark.name in simulation.quantizers:
                quantizer = simulation.quantizers[mark.name]
                quantizer.encoding = base.quantizers[mark.name].encoding


def _modules(adapters: Sequence[CanonicalAdapter]) -> set[str]:
    return {module for adapter in adapters for module in adapter.factors}


def _factors(
    adapters: Sequence[CanonicalAdapter], module: str
) -> list[Mapping[str, tuple[Tensor, Tensor]]]:
    return [adapter.factors for adapter in adapters if module in adapter.factors]


def _rank(adapters: Sequence[CanonicalAdapter], module: str) -> int:
    return sum(len(factors[module][0]) for factors in _factors(adapters, module))


def _padded(parts: Sequence[Tensor], like: Tensor, axis: int) -> Tensor:
    result, start = torch.zeros_like(like), 0
    for part in parts:
        result.narrow(axis, start, part.shape[axis]).copy_(part)
        start += part.shape[axis]
    return result
