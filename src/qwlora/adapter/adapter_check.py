"""The adapters in a folder: what each is, and whether it is complete and fits the job's base.

Reads configurations and the headers of weight files; only `problems` reads weights. No model is
loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwlora.adapter.adapter_folder import CONFIG, FILE, WEIGHTS, base_of, check_files, read_config
from qwlora.errors import QwloraError, SourceError
from qwlora.formats import manifest


@dataclass(frozen=True)
class AdapterReport:
    """What one adapter folder contains.

    Args:
        name: path relative to the searched folder.
        kind: LoRA, rsLoRA, DoRA, or PEFT's name of another method.
        rank, alpha: defaults, for modules that no pattern matches.
        modules: number of layers with an adapter.
        base: fingerprint of the base it was trained on; None if unknown.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    modules: int
    parameters: int
    base: str | None


def find_adapters(folder: Path) -> list[Path]:
    """Adapter folders in `folder`, itself included; not in hidden folders (training checkpoints).

    Raises:
        SourceError: there is none, or `folder` is not a folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{str(folder)!r} is not a folder")
    found = sorted(
        p.parent
        for p in folder.rglob("adapter_config.json")
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not found:
        raise SourceError(f"no adapter is in {str(folder)!r}: it contains no adapter_config.json")
    return found


def adapter_report(adapter: Path, below: Path) -> AdapterReport:
    """Describe the adapter in folder `adapter`; its name is relative to `below`.

    Raises:
        SourceError: its configuration or its weights cannot be read.
        FingerprintError: its configuration changed after it was saved.
    """
    if is_verifiable(adapter):
        check_files(adapter, only=[CONFIG])
    config = read_config(adapter)
    shapes = {name: shape for name, shape, _ in _weights(adapter, read=False)}
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    layers = {name.rpartition(".lora_")[0] for name in shapes if ".lora_" in name}
    return AdapterReport(
        name=str(adapter.relative_to(below)),
        kind=kind if config.get("peft_type") == "LORA" else str(config.get("peft_type")),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        modules=len(layers),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        base=base_of(adapter) if records_base(adapter) else None,
    )


def job_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the base of the job in directory `folder`; None if there is no job.

    Raises:
        SourceError: base.json cannot be read.
    """
    try:
        found = json.loads((folder / "base" / "base.json").read_text())["fingerprint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{str(folder / 'base')!r}: base.json cannot be read ({error}); quantize again"
        ) from error
    return str(found)


def records_base(adapter: Path) -> bool:
    """Whether `adapter` records which base it was trained on; PEFT alone does not record it."""
    return (adapter / FILE).exists()


def is_verifiable(adapter: Path) -> bool:
    """Whether `adapter` has digests of its files; PEFT and earlier versions do not write them."""
    return manifest.has_digests(adapter, FILE)


def changed_files(adapter: Path) -> list[str]:
    """Files of `adapter` that changed after it was saved; none if it has no digests."""
    return manifest.changed_files(adapter, FILE)


def problems(adapter: Path, base: str | None, unknown_base: str = "accept") -> list[str]:
    """What is wrong with `adapter`, in words; empty if it is complete and belongs to `base`.

    Args:
        base: fingerprint to compare with; None compares nothing.
        unknown_base: `refuse` reports an adapter that does not record its base; `accept` does not.
    """
    found = [
        f"{file} changed after saving: copy it again, or train it again"
        for file in changed_files(adapter)
    ]
    try:
        found += _weight_problems(adapter, read_config(adapter))
    except QwloraError as error:
        return [*found, str(error)]
    if unknown_base == "accept" and not records_base(adapter):
        return found
    try:
        said = base_of(adapter)
    except QwloraError as error:
        return [*found, str(error)]
    if base is not None and said != base:
        found.append(
            f"it was trained on the base with fingerprint {said[:16]}..., but the base here has "
            f"{base[:16]}...: train it again on this one"
        )
    return found


def _weight_problems(adapter: Path, config: dict[str, Any]) -> Iterator[str]:
    shapes = {}
    for name, shape, tensor in _weights(adapter, read=True):
        shapes[name] = shape
        if not bool(tensor.isfinite().all()):
            yield f"{name} has values that are not finite"
    if not shapes:
        yield f"{WEIGHTS} has no weights"
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
        elif rows != columns:
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


def _weights(adapter: Path, read: bool) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and (with `read`) values of each tensor."""
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield (
                    name,
                    file.get_slice(name).get_shape(),
                    file.get_tensor(name) if read else None,
                )
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"adapter {str(adapter)!r}: {WEIGHTS} cannot be read ({error})"
        ) from error
