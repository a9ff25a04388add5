"""The files of an adapter: what of PEFT's LoRA is supported, as one table; whether the files are
sound, and which base they belong to.

Reads adapter_config.json, adapter_model.safetensors and qwlora.json; no model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwlora.errors import FingerprintError, QwloraError, SourceError, foreign_as, listed
from qwlora.formats import manifest
from qwlora.formats.base_files import RECORD, read_record
from qwlora.formats.model_source import downloaded, is_hub_id, looked_for, source_path
from qwlora.system import strict_json
from qwlora.system.regular_files import check_readable
from qwlora.system.seen import Seen

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILE = "qwlora.json"
MLX_WEIGHTS = "adapters.safetensors"
_COPY = "copy it again, or train it again"

# Keys of adapter_config.json whose values, other than these, would change what an adapter computes
# without a word: PEFT skips some of them on packed layers, and others change the frozen base.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": ((None, "none"), "its biases replace those of the frozen base"),
    "layer_replication": ((None, []), "it repeats layers of the base"),
    "trainable_token_indices": ((None, [], {}), "it replaces rows of a frozen embedding"),
    "use_qalora": ((None, False), "its layers read pooled inputs"),
    "alora_invocation_tokens": ((None, []), "it acts on the tokens after its invocation only"),
    "use_bdlora": ((None, False), "its factors are block-diagonal"),
    "arrow_config": ((None,), "it routes tokens between adapters"),
    "kasa_config": ((None,), "it changes the base's weights"),
    "init_lora_weights": (
        (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
        "it changes the base's weights; save it with path_initial_model_for_weight_conversion",
    ),
}


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter in `folder`."""
    label = f"adapter {str(folder)!r}: {CONFIG}"
    with foreign_as(SourceError, f"{label} cannot be read", _COPY):
        check_readable(folder)
        config = json.loads((folder / CONFIG).read_text())
    if not isinstance(config, dict):
        raise SourceError(f"{label} is not a mapping")
    return config


def weights_of(folder: Path, read: bool) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and (with `read`) values of each tensor."""
    label = f"adapter {str(folder)!r}: {WEIGHTS} cannot be read"
    with foreign_as(SourceError, label, _COPY), safe_open(folder / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            tensor = file.get_tensor(name) if read else None
            yield name, file.get_slice(name).get_shape(), tensor


def unsupported_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of PEFT's configuration of an adapter that are not supported, in words."""
    if (kind := config.get("peft_type")) != "LORA":
        kind = kind.value if isinstance(kind, Enum) else kind
        yield f"peft_type: {kind}; only LORA is supported"
        return
    for key, (accepted, why) in _UNSUPPORTED.items():
        if (value := config.get(key)) not in accepted:
            yield f"{key}: {value!r}, which is not supported ({why})"


def check_settings(configs: Mapping[str, Any]) -> None:
    """Refuse adapters that `save_adapter` would not write. `configs`: PEFT's, by adapter name."""
    for name, config in configs.items():
        if problem := next(unsupported_settings(config.to_dict()), None):
            raise SourceError(f"adapter {name!r}: its configuration has {problem}")


def content_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the configuration and the weights in `folder`, in words."""
    config = read_config(folder)
    yield from (f"{CONFIG} has {setting}" for setting in unsupported_settings(config))
    alphas = {"lora_alpha": config.get("lora_alpha", 8)}
    if isinstance(patterns := config.get("alpha_pattern"), dict):
        alphas |= patterns
    for key, alpha in alphas.items():
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            yield f"{CONFIG} has {key}: {alpha!r}, which is not a finite number"
        elif alpha == 0:
            yield (
                f"{CONFIG} has {key}: 0, so the adapter has no effect; use the alpha that it was "
                "trained with"
            )
    names, highest = list[str](), 0
    for name, shape, tensor in weights_of(folder, read=True):
        names.append(name)
        if "lora_A" in name or "lora_embedding_A" in name:
            highest = max(highest, *shape[:1])
        if not bool(tensor.isfinite().all()):
            yield f"{name} has values that are not finite; {_COPY}"
    if not names:
        yield f"{WEIGHTS} has no weights"
    patterns = config.get("rank_pattern")
    for rank in (config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())):
        # PEFT allocates factors of this size before it reads the weights.
        if isinstance(rank, int) and rank > highest:
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
                # With lora_bias, lora_B has a bias and lora_A has none.
                is_factor = f".{first}" in name and not name.endswith(".bias")
                if is_factor and partner not in names:
                    yield f"{name} has no matching {second}"


def check_adapter(folder: Path, base_fingerprint: str | None, unknown_base: str = "refuse") -> None:
    """Check that `folder` has a sound LoRA adapter of the right base, unchanged since it was saved.
    See `load_adapter`; without a fingerprint there is no base yet."""
    label = f"adapter {str(folder)!r}"
    if not (folder / CONFIG).exists():
        raise SourceError(f"{label} has no {CONFIG}; give a folder that PEFT or save_adapter wrote")
    if (kind := read_config(folder).get("peft_type")) != "LORA":
        raise SourceError(f"{label} is of PEFT type {kind}; only LORA is supported. Train one")
    if not (folder / WEIGHTS).is_file():
        raise SourceError(
            f"{label} has no {WEIGHTS}; copy it again, or load the adapter with PEFT and save it "
            "again. A pickle (adapter_model.bin) is not read, because it can run code"
        )
    check_base(folder, base_fingerprint, unknown_base)
    if base_fingerprint is not None or (folder / FILE).exists():
        manifest.check(folder, FILE, label, "train it again")
    if problem := next(content_problems(folder), None):
        raise SourceError(f"{label}: {problem}")


def check_base(folder: Path, base: str | None, unknown_base: str = "refuse") -> None:
    """Refuse an adapter that was trained on another base than that with fingerprint `base`; None
    compares nothing. See `load_adapter` for `unknown_base`."""
    if unknown_base != "other" and (unknown_base != "accept" or (folder / FILE).exists()):
        recorded = base_of(folder)
        if base not in (None, recorded):
            raise FingerprintError(
                f"adapter {str(folder)!r} was trained on the base with fingerprint {recorded}, but "
                f"this base has {base}. Load it onto its own base, or train it again on this one"
            )


def base_of(folder: Path) -> str:
    """Fingerprint of the base that the adapter in `folder` was trained on."""
    fingerprint = manifest.read(folder / FILE).get("base_fingerprint")
    if not isinstance(fingerprint, str):
        raise SourceError(
            f"adapter {str(folder)!r} does not say which base it belongs to: {FILE} is missing, "
            "unreadable, or without a base_fingerprint. If PEFT saved it and you know its base, "
            "set unknown_base: accept. Saving with qwlora.save_adapter records the base"
        )
    return fingerprint


def mergeable_record(folder: Path) -> dict[str, str | None] | None:
    """What the adapter in `folder` records of the float weights that its merging starts from
    (`mergeable.py`): `remainders`, a digest or None. None if it is not mergeable."""
    record = manifest.read(folder / FILE).get("mergeable")
    if record is not None and not (
        isinstance(record, dict) and isinstance(record.get("remainders", 0), str | None)
    ):
        raise SourceError(
            f"adapter {str(folder)!r}: mergeable in {FILE} is {record!r}, not a digest of "
            f"remainders; {_COPY}"
        )
    return record


def adapter_folder(source: str) -> Path:
    """The local folder of `source`: of PEFT, of mlx-lm, which is converted, or a hub id, which is
    downloaded (configuration, weights, fingerprint)."""
    path = source_path(source)
    if path.is_dir():
        if not (path / MLX_WEIGHTS).is_file() or (path / WEIGHTS).exists():
            return path
        # Digests are arguments, so that the cache converts again if the files change.
        digests = (Seen().content(path / name) for name in (MLX_WEIGHTS, CONFIG))
        return Path(_as_peft(path, *digests).name)
    if path.exists() or not is_hub_id(source):
        raise SourceError(
            f"adapter {source!r} is neither a folder nor a hub id like owner/name"
            f"{looked_for(source, path)}"
        )
    return downloaded("adapter", source, [CONFIG, WEIGHTS, FILE])


@dataclass(frozen=True)
class AdapterReport:
    """What one adapter folder contains."""

    name: str  # path relative to the searched folder
    kind: str  # LoRA, rsLoRA, DoRA (mergeable), or PEFT's name of another method
    rank: int | None  # for modules that no pattern matches
    alpha: float | None  # same
    modules: int  # number of layers with an adapter
    parameters: int
    base: str | None  # fingerprint of the base it was trained on; None if unknown


def find_adapters(folder: Path, may_be_none: bool = False) -> list[Path]:
    """Adapter folders in `folder`, itself included; not in hidden folders (checkpoints)."""
    if not folder.is_dir():
        raise SourceError(f"{str(folder)!r} is not a folder")
    adapters = sorted(
        p.parent
        for p in folder.rglob(CONFIG)
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not adapters and not may_be_none:
        raise SourceError(f"no adapter is in {str(folder)!r}: it contains no {CONFIG}")
    return adapters


def adapter_report(adapter: Path, below: Path) -> AdapterReport:
    """Describe the adapter in folder `adapter`; its name is relative to `below`."""
    if manifest.has_digests(adapter, FILE):
        manifest.check(adapter, FILE, f"adapter {str(adapter)!r}", "train it again", [CONFIG])
    config = read_config(adapter)
    shapes = {name: shape for name, shape, _ in weights_of(adapter, read=False)}
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    kind = f"mergeable {kind}" if mergeable_record(adapter) is not None else kind
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
    """What is wrong with `adapter`, in words; empty if it is complete and belongs to `base`."""
    wrong = [
        f"{file} changed after saving: copy it again, or train it again"
        for file in manifest.changed_files(adapter, FILE)
    ]
    try:
        wrong += content_problems(adapter)
        check_base(adapter, base, unknown_base)
    except QwloraError as error:
        wrong.append(str(error))
    return wrong


@cache
def _as_peft(folder: Path, *digests: str | None) -> TemporaryDirectory[str]:
    # The folder is deleted with the object, so the cache keeps it until the process ends.
    converted = TemporaryDirectory(prefix="qwlora-adapter-")
    convert_mlx_adapter(folder, Path(converted.name))
    return converted


def convert_mlx_adapter(source: Path, target: Path) -> None:
    """Write the adapter of mlx-lm in `source` into the empty folder `target`, as PEFT does.

        adapters.safetensors   MODULE.lora_a [in, rank], MODULE.lora_b [rank, out]
        adapter_config.json    fine_tune_type, lora_parameters: rank, scale, dropout

        W x + scale (x lora_a lora_b) = W x + alpha / rank B A x,
        A = lora_a^T, B = lora_b^T, alpha = scale rank

    Modules have the names that transformers gives them.
    """
    label = f"adapter {str(source)!r}"
    with foreign_as(SourceError, f"{label}: {CONFIG} of mlx-lm cannot be read", _COPY):
        config = read_config(source)
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
    with foreign_as(SourceError, f"{label}: {MLX_WEIGHTS} cannot be read", _COPY):
        tensors = load_file(source / MLX_WEIGHTS)
    if kind != "lora":
        raise SourceError(f"{label} is of mlx-lm's type {kind}; only lora can be imported")
    factors, ranks = _factors(tensors, label)
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


def _factors(tensors: dict[str, Tensor], label: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    modules = {name.rpartition(".")[0] for name in tensors}
    expected = {f"{module}.{factor}" for module in modules for factor in ("lora_a", "lora_b")}
    if not tensors or (wrong := sorted(expected ^ tensors.keys())):
        problem = listed(wrong) if tensors else "no tensor"
        raise SourceError(
            f"{label}: every module of {MLX_WEIGHTS} needs lora_a and lora_b and nothing else; "
            f"missing or unknown: {problem}"
        )
    factors, ranks = {}, {}
    for module in sorted(modules):
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise SourceError(
                f"{label}: {module} has lora_a {list(a.shape)} and lora_b {list(b.shape)}, which "
                "should be [in, rank] and [rank, out]"
            )
        ranks[module] = a.shape[1]
        factors[f"base_model.model.{module}.lora_A.weight"] = a.T.contiguous().float()
        factors[f"base_model.model.{module}.lora_B.weight"] = b.T.contiguous().float()
    return factors, ranks
