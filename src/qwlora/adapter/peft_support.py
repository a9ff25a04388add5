"""What of PEFT's LoRA is supported, as one table; whether an adapter's files are sound.

Reads adapter_config.json and adapter_model.safetensors of a folder; no model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwlora.errors import SourceError
from qwlora.messages import listed

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Keys of adapter_config.json whose values, other than these, would change what an adapter computes
# without a word: PEFT skips some of them on packed layers, and others change the frozen base.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": ((None, "none"), "its biases replace those of the frozen base"),
    "layer_replication": ((None, []), "it repeats layers of the base"),
    "trainable_token_indices": ((None, [], {}), "it replaces rows of a frozen embedding"),
    "alora_invocation_tokens": ((None, []), "it starts in the middle of a sequence"),
    "use_qalora": ((None, False), "its layers read pooled inputs"),
    "use_bdlora": ((None, False), "its factors are block-diagonal"),
    "arrow_config": ((None,), "it routes tokens between adapters"),
    "kasa_config": ((None,), "it changes the base's weights"),
}


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter in `folder`.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"adapter {str(folder)!r}: {CONFIG} cannot be read ({error}); copy it again, or train "
            "it again"
        ) from error
    if not isinstance(config, dict):
        raise SourceError(f"adapter {str(folder)!r}: {CONFIG} is not a mapping")
    return config


def check_contents(folder: Path) -> None:
    """Refuse an adapter with a damaged weight, or with a setting that is not supported.

    Raises:
        SourceError: with the first of `content_problems`.
    """
    if problem := next(content_problems(folder), None):
        raise SourceError(f"adapter {str(folder)!r}: {problem}")


def content_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the configuration and the weights in `folder`, in words.

    Raises:
        SourceError: one of them cannot be read.
    """
    config = read_config(folder)
    yield from _setting_problems(config)
    shapes = {}
    for name, shape, tensor in weights_of(folder, read=True):
        shapes[name] = shape
        if not bool(tensor.isfinite().all()):
            yield f"{name} has values that are not finite"
    if not shapes:
        yield f"{WEIGHTS} has no weights"
    copies = [name for name in shapes if "lora_" not in name]
    if copies and not config.get("modules_to_save"):
        yield (
            f"{listed(copies, 3)} would replace weights of the frozen base. If they are copies of "
            "its embeddings, save the adapter with save_embedding_layers=False"
        )
    yield from _rank_problems(shapes, config)
    for first, second in (
        ("lora_A", "lora_B"),
        ("lora_B", "lora_A"),
        ("lora_embedding_A", "lora_embedding_B"),
        ("lora_embedding_B", "lora_embedding_A"),
    ):
        for name in sorted(shapes):
            if f".{first}" in name and name.replace(f".{first}", f".{second}") not in shapes:
                yield f"{name} has no matching {second}"


def weights_of(folder: Path, read: bool) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and (with `read`) values of each tensor.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield (
                    name,
                    file.get_slice(name).get_shape(),
                    file.get_tensor(name) if read else None,
                )
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"adapter {str(folder)!r}: {WEIGHTS} cannot be read ({error}); copy it again from "
            "where it came, or train it again"
        ) from error


def _setting_problems(config: dict[str, Any]) -> Iterator[str]:
    for key, (accepted, why) in _UNSUPPORTED.items():
        if (value := config.get(key)) not in accepted:
            yield f"{CONFIG} has {key}: {value!r}, which is not supported ({why})"
    alphas = config.get("alpha_pattern")
    for key, alpha in (
        ("lora_alpha", config.get("lora_alpha", 8)),
        *(alphas.items() if isinstance(alphas, dict) else ()),
    ):
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            yield f"{CONFIG} has {key}: {alpha!r}, which is not a finite number"
        elif alpha == 0:
            yield f"{CONFIG} has {key}: 0, so it changes nothing; use the alpha of its training"


def _rank_problems(shapes: dict[str, list[int]], config: dict[str, Any]) -> Iterator[str]:
    """Check lora_A [rank, in] and lora_B [out, rank] of each layer.

    For a parameter in target_parameters: [experts * rank, in] and [out, experts * rank].
    """
    rank = config.get("r")
    parameters = [name for name in config.get("target_parameters") or () if isinstance(name, str)]
    for name, shape in shapes.items():
        if not name.endswith(".lora_A.weight"):
            continue
        rows = shape[:1]
        columns = shapes.get(name.replace(".lora_A", ".lora_B"), [0, *shape[:1]])[1:2]
        has_experts = _is_targeted(name.removesuffix(".lora_A.weight"), parameters)
        fits = rows == [rank] or (
            has_experts
            and bool(rows)
            and isinstance(rank, int)
            and rank > 0
            and rows[0] % rank == 0
        )
        if not fits and not config.get("rank_pattern"):
            yield f"{name} has rank {_one(rows)}, but adapter_config.json says {rank}" + (
                " for each expert" if has_experts else ""
            )
        elif len(shape) == 2 and rows != columns:  # a grouped convolution's lora_B has fewer
            yield f"{name} has rank {_one(rows)}, and its lora_B has rank {_one(columns)}"


def _one(sizes: list[int]) -> int | str:
    return sizes[0] if sizes else "none"


def _is_targeted(path: str, parameters: list[str]) -> bool:
    """Whether the module at `path` has one of `parameters`.

    PEFT wraps a module once per parameter, so `base_layer` can occur in the path.
    """
    owner = "." + path.replace(".base_layer", "")
    modules = [parameter.rpartition(".")[0] for parameter in parameters]
    return any(not module or owner.endswith(f".{module}") for module in modules)
