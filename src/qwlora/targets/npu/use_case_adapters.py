"""Use cases: adapters that a runtime switches to, alone or several at once, in one shape.

    A           W x + B_A A_A x
    A+B         W x + [B_A B_B] [A_A; A_B] x      concatenated along the rank
    none        W x                               the zero adapter

Every use case has factors for every layer that any of them adapts, of one rank: as many places as
the largest has adapters, each of the highest rank. Zeros fill what is missing. Scales are folded
into B (`canonical_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qwlora.graph.graph_analysis import computed_from
from qwlora.simulation.adapter_simulations import BASE, AdapterSimulations
from qwlora.system.parameter_names import is_adapter_name
from qwlora.targets.canonical_adapter import PREFIX, CanonicalAdapter
from qwlora.targets.target import NONE, members

_NAME = "case{}"  # of a PEFT adapter: a use case's own name may hold a plus sign


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
    used = {case: [adapters[name] for name in members(case)] for case in cases if case != NONE}
    factors = [own.factors for joined in used.values() for own in joined]
    place = max(len(a) for own in factors for a, _ in own.values())
    modules = sorted({module for own in factors for module in own})
    rank = place * max(map(len, used.values()))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=False)
    names, model = peft_names(cases), None
    for case, joined in used.items():
        if model is None:
            model = get_peft_model(base, config, names[case])
        else:
            model.add_adapter(names[case], config)
        for module in modules:
            layer = model.get_submodule(f"{PREFIX}{module}")
            a, b = layer.lora_A[names[case]].weight, layer.lora_B[names[case]].weight
            with torch.no_grad():
                a.zero_()
                b.zero_()
                for number, adapter in enumerate(joined):
                    if module in adapter.factors:
                        own_a, own_b = adapter.factors[module]
                        first, last = number * place, number * place + len(own_a)
                        a[first:last].copy_(own_a)
                        b[:, first:last].copy_(own_b)
    assert model is not None, "the recipe refuses use cases without an adapter"
    return model.eval()


def share_unaffected(simulations: AdapterSimulations) -> None:
    """Give values that no adapter changes the encodings of the base's simulation, so that all use
    cases have the same base."""
    base = simulations[BASE]
    for simulation in simulations.values():
        specs = simulation.program.graph_signature.input_specs
        of_base = [s.arg.name for s in specs if not is_adapter_name(str(s.target))]
        unaffected = computed_from(simulation.program, of_base)
        for mark in simulation.marks:
            if mark.node in unaffected and mark.name in simulation.quantizers:
                quantizer = simulation.quantizers[mark.name]
                quantizer.encoding = base.quantizers[mark.name].encoding
