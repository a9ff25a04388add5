"""An adapter in the one form that every runtime reads alike: factors with the scale folded in.

    W x + scaling B A x  =  W x + B' A x,    B' = scaling B

`scaling` is alpha / r, or alpha / sqrt(r) for rsLoRA, with the rank and alpha of each module's
pattern. Runtimes disagree about it: some ignore alpha, some ignore rsLoRA or the patterns, some
have one scale for all modules. With alpha = r and no pattern all of their defaults are right.

Read from the files of an adapter, as PEFT writes them. DoRA, embeddings, convolutions, fused
experts, biases and whole modules have no such form and are refused.

A use case is adapters that a runtime switches to, alone or several at once, in one shape:

    A           W x + B_A A_A x
    A+B         W x + [B_A B_B] [A_A; A_B] x      concatenated along the rank
    none        W x                               the zero adapter

Every use case has factors for every layer that any of them adapts, of one rank: as many places as
the largest has adapters, each of the highest rank. Zeros fill what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from qwlora.adapter.adapter_files import (
    CONFIG,
    FILE,
    WEIGHTS,
    mergeable_record,
    read_config,
    weights_of,
)
from qwlora.errors import ExportError, listed
from qwlora.formats import manifest
from qwlora.graph.graph_analysis import computed_from
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.system import strict_json
from qwlora.system.parameter_names import BASE, is_adapter_name
from qwlora.targets.proof.contents import NUMBER, OTHER_KEYS, PLAIN, Form
from qwlora.targets.refusals import AdapterParts, Subject, refusals
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import NONE, members

PREFIX = "base_model.model."  # of PEFT's names
PEFT_FILES = (CONFIG, WEIGHTS)
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight")
_FIXED = {  # what PEFT's configuration says of every adapter here
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
}
PEFT_FORM: Form = {
    **_FIXED,
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "r": int,
    "rank_pattern": {OTHER_KEYS: int},  # regular expressions: see `adapter_files.py`
    "alpha_pattern": {OTHER_KEYS: NUMBER},
    "target_modules": [PLAIN],
}


@dataclass(frozen=True)
class CanonicalAdapter:
    """Factors by module path: A [r, in] and B [out, r], scaled, both float32 or rounded to float16.

    Args:
        base_fingerprint: None if the adapter does not record its base.
        common: the rank that all adapters of a bundle get, by each module that one of them changes.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    base_fingerprint: str | None
    common: Mapping[str, int] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {module: len(a) for module, (a, _) in self.factors.items()}

    def rounded(self) -> CanonicalAdapter:
        """The same in float16; see `rounded_floats.py`."""
        return replace(
            self, factors={m: (a.half(), b.half()) for m, (a, b) in self.factors.items()}
        )

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(*self.ranks.values(), *self.common.values(), 0)

    def padded(self) -> CanonicalAdapter:
        """The same, of rank `rank` in all modules."""
        # mlx-lm and QAIRT's pipeline read one rank for all modules.
        factors = {}
        for module, (a, b) in self.factors.items():
            missing = self.rank - len(a)
            factors[module] = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
        return replace(self, factors=factors)

    def inputs(self, none: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The value of every adapter input of a graph: M.lora_A [in, r], M.lora_B [r, out].

        Args:
            none: the same of rank 0, for the modules that the adapter lacks.
        """
        if missing := [module for module in self.factors if f"{module}.lora_A" not in none]:
            raise ExportError(
                f"the exported base has no place for the adapter's {listed(missing)}: they are not "
                "linear layers of the captured graph. Train the adapter without them"
            )
        # Runtimes run x @ A @ B, so both factors are transposed.
        return {**none} | {
            f"{module}.lora_{half}": factor.t().contiguous().float().numpy()
            for module, pair in self.factors.items()
            for half, factor in zip("AB", pair, strict=True)
        }


def read_canonical(folder: Path) -> CanonicalAdapter:
    """The adapter in `folder`, which PEFT or `save_adapter` wrote.

    Raises:
        SourceError: its files cannot be read.
        ExportError: it is mergeable, or is more than pairs of LoRA factors of linear layers.
    """
    config, other = read_config(folder), list[str]()
    halves: dict[str, dict[str, Tensor]] = {}
    for name, _, tensor in weights_of(folder, read=True):
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            other.append(name)
        else:
            # The scaling is multiplied into B, which a half-precision B would round.
            halves.setdefault(match[1], {})[match[2]] = tensor.float()
    other += [module for module, pair in halves.items() if len(pair) < 2]
    other += [key for key in ("use_dora", "target_parameters") if config.get(key)]
    is_mergeable = mergeable_record(folder) is not None
    parts = AdapterParts(repr(str(folder)), other, (), is_mergeable)
    # All targets that switch factors refuse the same adapters.
    if reasons := refusals(TARGETS["hf"], Subject(adapters=[parts])):
        raise ExportError(". ".join(reasons))
    patterns, factors = config.get("alpha_pattern") or {}, {}
    for module, pair in halves.items():
        a, b, rank = pair["A"].contiguous(), pair["B"], len(pair["A"])
        # PEFT's own rule: of several patterns that match, the first in the file counts.
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
        scaling = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        factors[module] = (a, b * scaling)
    fingerprint = manifest.read(folder / FILE).get("base_fingerprint")
    return CanonicalAdapter(factors, None if fingerprint is None else str(fingerprint))


def write_peft(adapter: CanonicalAdapter, folder: Path, ends: Collection[str] = ()) -> None:
    """Write a PEFT directory with scaling 1 in every module.

    Args:
        ends: target_modules. Default: the full paths.
    """
    ranks = adapter.ranks
    save_file(
        {
            f"{PREFIX}{module}.lora_{half}.weight": factor.contiguous()
            for module, pair in adapter.factors.items()
            for half, factor in zip("AB", pair, strict=True)
        },
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    # PEFT matches keys of a pattern as regular expressions, in which a dot is any character.
    others = {re.escape(module): r for module, r in ranks.items() if r != adapter.rank}
    config: dict[str, Any] = {
        **_FIXED,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "r": adapter.rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ends or ranks),
    }
    (folder / CONFIG).write_text(strict_json.dumps(config, indent=2) + "\n")


def peft_names(cases: Sequence[str]) -> dict[str, str]:
    """The name in `use_case_model`, and in its simulations, of each use case."""
    # not its own name, which may hold a plus sign
    return {c: BASE if c == NONE else f"case{i}" for i, c in enumerate(cases)}


def use_case_model(
    base: PreTrainedModel, adapters: Mapping[str, CanonicalAdapter], cases: Sequence[str]
) -> PeftModel:
    """The base with one PEFT adapter for every use case but "none"; see `peft_names`."""
    used = {case: [adapters[name] for name in members(case)] for case in cases if case != NONE}
    factors = [adapter.factors for joined in used.values() for adapter in joined]
    width = max(len(a) for pairs in factors for a, _ in pairs.values())
    modules = sorted({module for pairs in factors for module in pairs})
    rank = width * max(map(len, used.values()))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=False)
    names, (first_case, *others) = peft_names(cases), used
    model = get_peft_model(base, config, names[first_case])
    for case in others:
        model.add_adapter(names[case], config)
    for case, joined in used.items():
        for module in modules:
            layer = model.get_submodule(f"{PREFIX}{module}")
            a, b = layer.lora_A[names[case]].weight, layer.lora_B[names[case]].weight
            with torch.no_grad():
                # PEFT leaves both factors random, and rows that no adapter fills must add nothing.
                a.zero_()
                b.zero_()
                for number, adapter in enumerate(joined):
                    if module in adapter.factors:
                        lora_a, lora_b = adapter.factors[module]
                        first, last = number * width, number * width + len(lora_a)
                        a[first:last].copy_(lora_a)
                        b[:, first:last].copy_(lora_b)
    return model.eval()


def share_unaffected(simulations: AdapterSimulations) -> None:
    """Give values that no adapter changes the encodings of the base's simulation."""
    # Each use case was calibrated on text of its own, but all must have the same base.
    base = simulations[BASE]
    for simulation in simulations.values():
        specs = simulation.program.graph_signature.input_specs
        of_base = [s.arg.name for s in specs if not is_adapter_name(str(s.target))]
        unaffected = computed_from(simulation.program, of_base)
        for mark in simulation.marks:
            if mark.node in unaffected and mark.name in simulation.quantizers:
                simulation.quantizers[mark.name].encoding = base.quantizers[mark.name].encoding
