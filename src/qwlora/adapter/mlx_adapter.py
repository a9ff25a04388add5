"""Adapters that mlx-lm trained, converted to PEFT.

    adapters.safetensors   MODULE.lora_a [in, rank], MODULE.lora_b [rank, out]
    adapter_config.json    fine_tune_type, lora_parameters: rank, scale, dropout

    W x + scale (x lora_a lora_b) = W x + alpha / rank B A x,
    A = lora_a^T, B = lora_b^T, alpha = scale rank

Modules have the names that transformers gives them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwlora.adapter.adapter_files import CONFIG, WEIGHTS
from qwlora.errors import SourceError, listed
from qwlora.system import strict_json

MLX_WEIGHTS = "adapters.safetensors"


def is_mlx_adapter(folder: Path) -> bool:
    """Whether `folder` has an adapter in the layout of mlx-lm."""
    return (folder / MLX_WEIGHTS).is_file() and not (folder / WEIGHTS).exists()


def convert_mlx_adapter(source: Path, target: Path) -> None:
    """Write the adapter in `source` into the empty folder `target`, as PEFT does."""
    what = f"adapter {str(source)!r}"
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
        tensors = load_file(source / MLX_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{what}: {CONFIG} of mlx-lm cannot be read ({error!r})") from error
    except SafetensorError as error:
        raise SourceError(f"{what}: {MLX_WEIGHTS} cannot be read ({error})") from error
    if kind != "lora":
        raise SourceError(f"{what} is of mlx-lm's type {kind}; only lora can be imported")
    factors, ranks = _factors(tensors, what)
    rank = max(ranks.values())
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{m}": scale * r for m, r in ranks.items() if r != rank},
        "inference_mode": True,
    }
    save_file(factors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _factors(tensors: dict[str, Tensor], what: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """PEFT's A and B of every module, and the ranks."""
    modules = {name.rpartition(".")[0] for name in tensors}
    expected = {f"{module}.{factor}" for module in modules for factor in ("lora_a", "lora_b")}
    if not tensors or (wrong := sorted(expected ^ tensors.keys())):
        found = listed(wrong) if tensors else "no tensor"
        raise SourceError(
            f"{what}: every module of {MLX_WEIGHTS} needs lora_a and lora_b and nothing else; "
            f"missing or unknown: {found}"
        )
    factors, ranks = {}, {}
    for module in sorted(modules):
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise SourceError(
                f"{what}: {module} has lora_a {list(a.shape)} and lora_b {list(b.shape)}, which "
                "should be [in, rank] and [rank, out]"
            )
        ranks[module] = a.shape[1]
        factors[f"base_model.model.{module}.lora_A.weight"] = a.T.contiguous().float()
        factors[f"base_model.model.{module}.lora_B.weight"] = b.T.contiguous().float()
    return factors, ranks
