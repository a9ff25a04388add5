"""What of PEFT's LoRA is supported, as one table; whether an adapter's files are sound.

Reads adapter_config.json and adapter_model.safetensors of a folder; no model is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from qwlora.errors import SourceError, listed
from qwlora.system.time_limit import SECONDS, time_limit

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
_PARTNERS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# Keys of adapter_config.json that hold regular expressions, and what PEFT makes of one.
_PATTERNS = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
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


def weights_of(folder: Path, read: bool) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and (with `read`) values of each tensor.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name) if read else None
                yield name, file.get_slice(name).get_shape(), tensor
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"adapter {str(folder)!r}: {WEIGHTS} cannot be read ({error}); copy it again from "
            "where it came, or train it again"
        ) from error


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
    for pair in _PARTNERS:
        for first, second in (pair, pair[::-1]):
            for name in sorted(shapes):
                partner = name.replace(f".{first}", f".{second}")
                if f".{first}" in name and partner not in shapes:
                    yield f"{name} has no matching {second}"


def _setting_problems(config: dict[str, Any]) -> Iterator[str]:
    for key, (accepted, why) in _UNSUPPORTED.items():
        if (value := config.get(key)) not in accepted:
            yield f"{CONFIG} has {key}: {value!r}, which is not supported ({why})"
    alphas = {"lora_alpha": config.get("lora_alpha", 8)}
    if isinstance(patterns := config.get("alpha_pattern"), dict):
        alphas |= patterns
    for key, alpha in alphas.items():
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            yield f"{CONFIG} has {key}: {alpha!r}, which is not a finite number"
        elif alpha == 0:
            yield f"{CONFIG} has {key}: 0, so it changes nothing; use the alpha of its training"


def _rank_problems(shapes: dict[str, list[int]], config: dict[str, Any]) -> Iterator[str]:
    """Check lora_A [rank, in] and lora_B [out, rank] of each layer.

    For a parameter in target_parameters: [experts * rank, in] and [out, experts * rank]. PEFT wraps
    its module once per parameter, so `base_layer` can occur in the path.
    """
    rank = config.get("r")
    targets = [name for name in config.get("target_parameters") or () if isinstance(name, str)]
    owners = [target.rpartition(".")[0] for target in targets]
    for name, shape in shapes.items():
        if not name.endswith(".lora_A.weight"):
            continue
        rows = shape[0] if shape else None
        partner = shapes.get(name.replace(".lora_A", ".lora_B"))
        columns = rows if partner is None else next(iter(partner[1:2]), None)
        path = "." + name.removesuffix(".lora_A.weight").replace(".base_layer", "")
        has_experts = any(not owner or path.endswith(f".{owner}") for owner in owners)
        fits = rows == rank or (
            has_experts and rows and isinstance(rank, int) and rank > 0 and rows % rank == 0
        )
        if not fits and not config.get("rank_pattern"):
            each = " for each expert" if has_experts else ""
            yield f"{name} has rank {rows}, but {CONFIG} says {rank}{each}"
        elif len(shape) == 2 and rows != columns:  # a grouped convolution's lora_B has fewer
            yield f"{name} has rank {rows}, and its lora_B has rank {columns}"


def check_pattern_times(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Match each regular expression in `config`, PEFT's keys, with each module path of `model`.

    One like `(a+)+b` takes time that grows exponentially with the length of what it is matched
    with. PEFT matches without a limit, and an adapter from elsewhere brings its own.

    Raises:
        SourceError: one takes longer than `SECONDS` for all paths.
    """
    paths = [path for path, _ in model.named_modules()]
    for key, form in _PATTERNS.items():
        value = config.get(key)
        if isinstance(value, str):
            value = [value]
        elif key.endswith("_modules") or not isinstance(value, list | dict):
            continue  # names, or nothing
        for pattern in value:
            error = SourceError(
                f"{where}: {key} {pattern!r} takes more than {SECONDS:g} s to match the model's "
                "module paths; write it without nested repetitions like (a+)+"
            )
            with suppress(re.error), time_limit(error):
                compiled = re.compile(form.replace("{}", str(pattern)))
                for path in paths:
                    compiled.match(path)
