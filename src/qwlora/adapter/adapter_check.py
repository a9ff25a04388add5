"""The adapters below a folder: what each is, and whether it is whole and belongs to the base beside it.

Reads configurations and the headers of weight files; only `check` reads weights. No model is loaded.
"""

from __future__ import annotations

import json
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
    """One adapter folder.

    Args:
        name: relative to the folder that was searched.
        kind: LoRA, rsLoRA, DoRA, or PEFT's name of another method.
        rank, alpha: those of modules that no pattern gives others.
        modules: layers that have an adapter.
        base: the fingerprint of the base it was trained on; None if it does not say.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    modules: int
    parameters: int
    base: str | None


def find_adapters(folder: Path) -> list[Path]:
    """Adapter folders below `folder`, itself included; hidden folders (checkpoints of unfinished runs) are left out.

    Raises:
        SourceError: there is none.
    """
    if not folder.is_dir():
        raise SourceError(f"{str(folder)!r} is not a folder")
    found = sorted(
        p.parent
        for p in folder.rglob("adapter_config.json")
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not found:
        raise SourceError(f"no adapter is in {str(folder)!r}: no adapter_config.json below it")
    return found


def adapter_report(adapter: Path, below: Path) -> AdapterReport:
    """What `adapter` says of itself.

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
        parameters=sum(_count(shape) for shape in shapes.values()),
        base=base_of(adapter) if says_base(adapter) else None,
    )


def base_beside(folder: Path) -> str | None:
    """The fingerprint of the base of the job whose directory is `folder`, if it is one."""
    try:
        found = json.loads((folder / "base" / "base.json").read_text())["fingerprint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{str(folder / 'base')!r}: base.json cannot be read ({error}); quantize again"
        ) from error
    return str(found)


def says_base(adapter: Path) -> bool:
    """Whether `adapter` says which base it was trained on; those that PEFT saved do not."""
    return (adapter / FILE).exists()


def is_verifiable(adapter: Path) -> bool:
    """Whether `adapter` has digests of its files; PEFT and earlier versions write none."""
    return manifest.has_digests(adapter, FILE)


def changed_files(adapter: Path) -> list[str]:
    """Files of `adapter` that changed after it was saved; none if it has no digests."""
    return manifest.changed_files(adapter, FILE)


def problems(adapter: Path, base: str | None, unknown_base: str = "accept") -> list[str]:
    """What is wrong with `adapter`, in words; nothing if it is whole and belongs to `base` (which is not looked at if it is None).

    Args:
        unknown_base: whether it is wrong not to say which base it was trained on (`refuse`) or not (`accept`).
    """
    found = [
        f"{file} changed after saving: copy it again, or train it again"
        for file in changed_files(adapter)
    ]
    try:
        found += _weight_problems(adapter, read_config(adapter))
    except QwloraError as error:
        return [*found, str(error)]
    if unknown_base == "accept" and not says_base(adapter):
        return found
    try:
        said = base_of(adapter)
    except QwloraError as error:
        return [*found, str(error)]
    if base is not None and said != base:
        found.append(
            f"it was trained on the base with fingerprint {said[:16]}..., but the base here has {base[:16]}...: train it again on this one"
        )
    return found


def _weight_problems(adapter: Path, config: dict[str, Any]) -> Iterator[str]:
    shapes = {}
    for name, shape, tensor in _weights(adapter, read=True):
        shapes[name] = shape
        if not bool(tensor.isfinite().all()):
            yield f"{name} holds numbers that are not finite"
    if not shapes:
        yield f"{WEIGHTS} holds no weights"
    yield from _rank_problems(shapes, config)
    for first, second in (
        ("lora_A", "lora_B"),
        ("lora_B", "lora_A"),
        ("lora_embedding_A", "lora_embedding_B"),
        ("lora_embedding_B", "lora_embedding_A"),
    ):
        for name in sorted(shapes):
            if f".{first}" in name and name.replace(f".{first}", f".{second}") not in shapes:
                yield f"{name} has no {second} beside it"


def _rank_problems(shapes: dict[str, list[int]], config: dict[str, Any]) -> Iterator[str]:
    """lora_A [rank, in] and lora_B [out, rank]; of a parameter that target_parameters names, [experts * rank, in] and [out, experts * rank]."""
    rank, parameters = (
        config.get("r"),
        [name for name in config.get("target_parameters") or () if isinstance(name, str)],
    )
    for name, shape in shapes.items():
        if not name.endswith(".lora_A.weight"):
            continue
        rows, columns = (
            shape[:1],
            shapes.get(name.replace(".lora_A", ".lora_B"), [0, *shape[:1]])[1:2],
        )
        is_bank = _reached(name.removesuffix(".lora_A.weight"), parameters)
        fits = rows == [rank] or (
            is_bank and bool(rows) and isinstance(rank, int) and rank > 0 and rows[0] % rank == 0
        )
        if not fits and not config.get("rank_pattern"):
            yield f"{name} has rank {_one(rows)}, and adapter_config.json says {rank}" + (
                " for each expert" if is_bank else ""
            )
        elif rows != columns:
            yield f"{name} has rank {_one(rows)}, and lora_B beside it {_one(columns)}"


def _one(sizes: list[int]) -> int | str:
    return sizes[0] if sizes else "none"


def _reached(path: str, parameters: list[str]) -> bool:
    """Whether the module at `path` has one of `parameters`; of several wrapped ones, all but one have `base_layer` in their path."""
    owner = "." + path.replace(".base_layer", "")
    modules = [parameter.rpartition(".")[0] for parameter in parameters]
    return any(not module or owner.endswith(f".{module}") for module in modules)


def _weights(adapter: Path, read: bool) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and, if asked for, contents of each tensor."""
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


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
