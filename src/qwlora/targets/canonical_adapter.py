"""An adapter in the one form that every runtime reads alike: factors with the scale folded in.

    W x + scaling B A x  =  W x + B' A x,    B' = scaling B

`scaling` is alpha / r, or alpha / sqrt(r) for rsLoRA, with the rank and alpha of each module's
pattern. Runtimes disagree about it: some ignore alpha, some ignore rsLoRA or the patterns, some
have one scale for all modules. With alpha = r and no pattern all of their defaults are right.

Read from the files of an adapter, as PEFT writes them. DoRA, embeddings, convolutions, fused
experts, biases and whole modules have no such form and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from qwlora.adapter.adapter_files import CONFIG, FILE, WEIGHTS, mergeable_record, read_config
from qwlora.errors import ExportError, SourceError, listed
from qwlora.formats import manifest
from qwlora.system import strict_json
from qwlora.targets.proof.contents import NUMBER, OTHER_KEYS, PLAIN, Form

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
    """Factors by module path in the base model.

    Args:
        factors: A [r, in] and B [out, r], scaled, both float32.
        base_fingerprint: of the base that it was trained on; None if it does not record one.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    base_fingerprint: str | None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(len(a) for a, _ in self.factors.values())

    def padded(self) -> CanonicalAdapter:
        """The same, of rank `rank` in all modules: zeros fill what is missing."""
        factors = {}
        for module, (a, b) in self.factors.items():
            missing = self.rank - len(a)
            factors[module] = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
        return CanonicalAdapter(factors, self.base_fingerprint)


def read_canonical(folder: Path) -> CanonicalAdapter:
    """The adapter in `folder`, which PEFT or `save_adapter` wrote.

    Raises:
        SourceError: its files cannot be read.
        ExportError: it is mergeable, or holds something that is no pair of LoRA factors of a
            linear layer.
    """
    config, what = read_config(folder), f"adapter {str(folder)!r}"
    if mergeable_record(folder) is not None:
        raise ExportError(
            f"{what} is mergeable: it was trained as merged integers, which its factors alone do "
            "not compute. Merge it (`qwlora merge`, qwlora.merged_model) and export the merged base"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{what}: {WEIGHTS} cannot be read ({error}); copy it again") from error
    halves: dict[str, dict[str, Tensor]] = {}
    other = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            other.append(name)
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor.float()
    other += [module for module, found in halves.items() if len(found) < 2]
    if other or config.get("use_dora") or config.get("target_parameters"):
        raise ExportError(
            f"{what} holds {listed(other) or 'DoRA magnitudes or experts'}: only LoRA factors of "
            "linear layers can be exported to this target. Remove it from export.targets, or train "
            "an adapter without DoRA, embeddings, convolutions and experts"
        )
    patterns, factors = config.get("alpha_pattern") or {}, {}
    for module, pair in halves.items():
        a, b, rank = pair["A"].contiguous(), pair["B"], len(pair["A"])
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
        scaling = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        factors[module] = (a, b * scaling)
    fingerprint = manifest.read(folder / FILE).get("base_fingerprint")
    return CanonicalAdapter(factors, None if fingerprint is None else str(fingerprint))


def write_peft(adapter: CanonicalAdapter, folder: Path, ends: Collection[str] = ()) -> None:
    """Write it as a PEFT directory whose alpha is its rank, without patterns of alpha; with the
    `ends` of all paths, or else the paths, as target_modules."""
    ranks = {module: len(a) for module, (a, _) in adapter.factors.items()}
    save_file(
        {
            f"{PREFIX}{module}.lora_{half}.weight": factor.contiguous()
            for module, pair in adapter.factors.items()
            for half, factor in zip("AB", pair, strict=True)
        },
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    others = {re.escape(module): r for module, r in ranks.items() if r != adapter.rank}
    config = {
        **_FIXED,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "r": adapter.rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ends or ranks),
    }
    (folder / CONFIG).write_text(strict_json.dumps(config, indent=2) + "\n")
