"""The adapters in a folder: what each is, and whether it is complete and fits the job's base.

Reads configurations and the headers of weight files; only `problems` reads weights. No model is
loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qwlora.adapter.adapter_folder import FILE, base_of, check_files
from qwlora.adapter.peft_support import CONFIG, content_problems, read_config, weights_of
from qwlora.errors import QwloraError, SourceError
from qwlora.formats import manifest
from qwlora.formats.base_files import RECORD, read_record


@dataclass(frozen=True)
class AdapterReport:
    """What one adapter folder contains."""

    name: str  # path relative to the searched folder
    kind: str  # LoRA, rsLoRA, DoRA, or PEFT's name of another method
    rank: int | None  # for modules that no pattern matches
    alpha: float | None  # same
    modules: int  # number of layers with an adapter
    parameters: int
    base: str | None  # fingerprint of the base it was trained on; None if unknown


def find_adapters(folder: Path) -> list[Path]:
    """Adapter folders in `folder`, itself included; not in hidden folders (checkpoints)."""
    if not folder.is_dir():
        raise SourceError(f"{str(folder)!r} is not a folder")
    adapters = sorted(
        p.parent
        for p in folder.rglob(CONFIG)
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not adapters:
        raise SourceError(f"no adapter is in {str(folder)!r}: it contains no {CONFIG}")
    return adapters


def adapter_report(adapter: Path, below: Path) -> AdapterReport:
    """Describe the adapter in folder `adapter`; its name is relative to `below`."""
    if manifest.has_digests(adapter, FILE):
        check_files(adapter, only=[CONFIG])
    config = read_config(adapter)
    shapes = {name: shape for name, shape, _ in weights_of(adapter, read=False)}
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    layers = {name.rpartition(".lora_")[0] for name in shapes if ".lora_" in name}
    return AdapterReport(
        name=str(adapter.relative_to(below)),
        kind=kind if config.get("peft_type") == "LORA" else str(config.get("peft_type")),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        modules=len(layers),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        base=base_of(adapter) if (adapter / FILE).exists() else None,
    )


def job_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the base of the job in directory `folder`; None if there is no job."""
    base = folder / "base"
    return str(read_record(base)["fingerprint"]) if (base / RECORD).exists() else None


def problems(adapter: Path, base: str | None, unknown_base: str = "accept") -> list[str]:
    """What is wrong with `adapter`, in words; empty if it is complete and belongs to `base`.

    Args:
        base: fingerprint to compare with; None compares nothing.
        unknown_base: whether to `refuse` or `accept` an adapter that does not record its base.
    """
    wrong = [
        f"{file} changed after saving: copy it again, or train it again"
        for file in manifest.changed_files(adapter, FILE)
    ]
    try:
        wrong += content_problems(adapter)
        if unknown_base == "refuse" or (adapter / FILE).exists():
            recorded = base_of(adapter)
            if base not in (None, recorded):
                wrong.append(
                    f"it was trained on the base with fingerprint {recorded[:16]}..., but the base "
                    f"here has {str(base)[:16]}...: train it again on this one"
                )
    except QwloraError as error:
        wrong.append(str(error))
    return wrong
