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
    """PEFT's configuration of the adapter in `folder`."""
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
    """Name, shape and (with `read`) values of each tensor."""
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
    """Refuse an adapter that has one of `content_problems`."""
    if problem := next(content_problems(folder), None):
        raise SourceError(f"adapter {str(folder)!r}: {problem}")


def content_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the configuration and the weights in `folder`, in words: damaged weights,
    settings that are not supported."""
    config = read_config(folder)
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
    names, highest = list[str](), 0
    for name, shape, tensor in weights_of(folder, read=True):
        names.append(name)
        if "lora_A" in name or "lora_embedding_A" in name:
            highest = max(highest, *shape[:1])
        if not bool(tensor.isfinite().all()):
            yield f"{name} has values that are not finite"
    if not names:
        yield f"{WEIGHTS} has no weights"
    patterns = config.get("rank_pattern")
    for rank in (config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())):
        if isinstance(rank, int) and rank > highest:  # PEFT would allocate factors of this size
            yield f"{CONFIG} asks for rank {rank}, but the weights have at most {highest}"
    copies = [name for name in names if "lora_" not in name]
    if copies and not config.get("modules_to_save"):
        yield (
            f"{listed(copies, 3)} would replace weights of the frozen base. If they are copies of "
            "its embeddings, save the adapter with save_embedding_layers=False"
        )
    for pair in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for first, second in (pair, pair[::-1]):
            for name in sorted(names):
                partner = name.replace(f".{first}", f".{second}")
                if f".{first}" in name and partner not in names:
                    yield f"{name} has no matching {second}"


def check_pattern_times(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Match each regular expression in `config`, PEFT's keys, with each module path of `model`.

    One like `(a+)+b` takes time that grows exponentially with the length of what it is matched
    with. PEFT matches without a limit, and an adapter from elsewhere brings its own. One that takes
    longer than `SECONDS` for all paths is refused.
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
