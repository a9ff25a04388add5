"""Attach a LoRA adapter to a frozen base, fresh or from one that exists, and see that nothing but the adapter would be trained.

    y = base_layer(x) + scaling * lora_B(lora_A(x)),    scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA

The adapter is PEFT's; what is added here is refusal. PEFT takes a list of target modules of which one matches nothing, a pattern that no layer has, or a layer
number that the model lacks, without a word.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.adapter_folder import (
    FILE,
    WEIGHTS,
    base_of,
    check_adapter,
    check_files,
    of_parameters,
    read_config,
    reading,
)
from qwlora.adapter.module_patterns import check_pattern_times
from qwlora.errors import SourceError, TrainingError, foreign_as
from qwlora.formats.hub import downloaded
from qwlora.formats.user_path import user_path
from qwlora.messages import listed, near_names
from qwlora.nn import PackedLayer
from qwlora.nn.fingerprint import fingerprint
from qwlora.parameter_names import (
    canonical_name,
    is_adapter_name,
    parameter_name,
    pattern_problem,
)


@dataclass(frozen=True)
class LoraShape:
    """Which layers get an adapter, and of what size; each field is PEFT's, by the names of the recipe.

    Args:
        target_modules: `all-linear`, a regular expression, or names of modules (Linear, Conv1D, Conv1d to Conv3d, Embedding).
        target_parameters: names of fused experts besides (`mlp.experts.down_proj`), by the ends of their paths; each expert gets an adapter of the rank.
        rank_pattern, alpha_pattern: other ranks and alphas for modules whose name ends in the key (or matches it, a regular expression).
        layers: numbers of the transformer layers that get an adapter; all unless given.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: list[int] | None = None
    target_parameters: list[str] = field(default_factory=list)

    def config(self, model: nn.Module) -> LoraConfig:
        """PEFT's configuration, for `model`: with chosen layers PEFT takes no word for target modules, so `all-linear` becomes their names in a layer."""
        everything = (
            self.layers is not None
            and isinstance(self.target_modules, str)
            and self.target_modules.lower() == "all-linear"
        )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_linear_in_layers(model) if everything else self.target_modules,
            use_rslora=self.rslora,
            use_dora=self.dora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            layers_to_transform=self.layers,
            target_parameters=list(self.target_parameters) or None,
            task_type="CAUSAL_LM",
        )


def attach(model: PreTrainedModel, shape: LoraShape, seed: int) -> PeftModel:
    """A fresh LoRA adapter on `model`, seeded; the base below it is frozen.

    Raises:
        TrainingError: a pattern is no regular expression; a target parameter is not there, or a layer's; no layer matches the target modules; or a name,
            pattern or layer number in `shape` matches none.
    """
    if wrong := _irregular(shape) + _no_experts(model, shape):
        raise TrainingError(f"LoRA cannot be attached: {'; '.join(wrong)}")
    if problem := _missing_layers(model, shape.layers or ()):
        raise TrainingError(problem)
    check_pattern_times(model, asdict(shape), "LoRA cannot be attached")
    torch.manual_seed(seed)
    try:
        with of_parameters():  # what matches nothing is an error below
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out is set to"
            )  # PEFT corrects it, by the kind of layer that it finds
            adapted = get_peft_model(model, shape.config(model))
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"LoRA cannot be attached to target_modules {shape.target_modules!r}: {error}"
        ) from error
    if lost := list(_unmatched(adapted, shape)):
        raise TrainingError(
            f"the adapter asks for what the model does not have: {'; '.join(lost)}. Its layers are, for example, {_examples(adapted)}"
        )
    return adapted


def check_shape(skeleton: PreTrainedModel, shape: LoraShape) -> dict[str, tuple[int, ...]]:
    """What `attach` would refuse, found on a model without weights (on the meta device), which is changed by it; and a rank that no layer is as large as.

    Returns:
        the shapes of the adapter's weights by the names that they would have in a file.

    Raises:
        TrainingError: see `attach`; or a rank is above both sides of every layer that has it.
    """
    with torch.device("meta"):
        adapted = attach(skeleton, shape, seed=0)
    largest: dict[int, tuple[int, int, str]] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            weight = (
                module.get_param()[0]
                if isinstance(module, ParamWrapper)
                else module.get_base_layer().weight
            )
            sides = sorted((weight.shape[0], weight[0].numel()), reverse=True)
            for rank in module.r.values():
                largest[rank] = max(largest.get(rank, (0, 0, "")), (*sides, canonical_name(name)))
    for rank, (longer, shorter, name) in largest.items():
        if rank > longer:
            raise TrainingError(
                f"rank {rank} is above both sides of every layer that has it; the largest, {name}, is {longer} x {shorter}. Lower the rank"
            )
    return _shapes(adapted)


def attach_existing(
    model: PreTrainedModel, source: str, unknown_base: str = "refuse", seed: int = 0
) -> PeftModel:
    """The adapter at `source`, a PEFT folder or a hub id, on `model`, to go on from or to use as it is.

    Args:
        unknown_base: `accept` takes an adapter that does not say which base it was trained on, as those that PEFT saved; `refuse` does not.

    Raises:
        SourceError: there is no LoRA adapter at `source`, it does not fit the model, saves a packed layer whole, or does not say which base it belongs to.
        FingerprintError: it says that it belongs to another base.
    """
    torch.manual_seed(seed)  # dropout
    folder = adapter_folder(source)
    check_start(source, unknown_base)
    check_adapter(folder, fingerprint(model), unknown_base)
    packed = [
        parameter_name(name).removesuffix(".weight")
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer)
    ]
    if lost := saved_among(source, packed):
        raise SourceError(f"adapter {source!r} does not fit: {saved_on_integers(lost)}")
    with reading(folder, model):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def dropout_of(source: str) -> float:
    """The dropout with which the adapter at `source` was trained, and would go on; for a `source` that `check_start` took."""
    return float(read_config(adapter_folder(source)).get("lora_dropout") or 0.0)


def without_dropout_(model: PeftModel) -> None:
    """Let the adapters of `model` learn without dropout; they are saved so."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and is_adapter_name(path):
            module.p = 0.0
    for config in model.peft_config.values():
        config.lora_dropout = 0.0


def check_start(
    source: str, unknown_base: str = "refuse", skeleton: PreTrainedModel | None = None
) -> dict[str, tuple[int, ...]]:
    """What `attach_existing` would refuse, as far as it can be seen before there is a base; `skeleton`, a model without weights, is changed by it.

    Returns:
        the shapes of the adapter's weights by their names in its file; empty without a skeleton.

    Raises:
        SourceError: `source` holds no LoRA adapter, its weights are a pickle, it does not say which base it was trained on, or it does not fit the skeleton.
    """
    folder = adapter_folder(source)
    try:
        kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{source!r} holds no PEFT adapter: adapter_config.json cannot be read ({error})"
        ) from error
    if kind != "LORA":
        raise SourceError(
            f"adapter {source!r} is of PEFT's type {kind}, and only LORA can be trained and exported here"
        )
    if not (folder / WEIGHTS).exists():
        raise SourceError(
            f"adapter {source!r} has no {WEIGHTS}; older formats run code when they are read: load it with PEFT and save it again"
        )
    if unknown_base == "refuse" or (folder / FILE).exists():
        base_of(folder)
        check_files(folder)
    return {} if skeleton is None else _check_fit(skeleton, source, folder)


def _check_fit(skeleton: PreTrainedModel, source: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the weight file are those that the adapter's configuration gives on this model."""
    what = f"adapter {source!r} does not fit {type(skeleton).__name__}"
    check_pattern_times(skeleton, read_config(folder), f"adapter {source!r}")
    with foreign_as(SourceError, what):  # the configuration's values reach any line of PEFT's
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about this model's embeddings and convolutions; they come again when it is attached
            adapted = get_peft_model(skeleton, LoraConfig.from_pretrained(str(folder)))
        wanted = _shapes(adapted)
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if wrong := sorted(name for name in wanted if found.get(name) != wanted[name]):
        name = wrong[0]
        raise SourceError(
            f"{what}: {len(wrong)} of {len(wanted)} weights differ, "
            f"for example {name}, here {list(wanted[name])}, there {list(found[name]) if name in found else 'none'}"
        )
    return wanted


def _shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of the adapter, by its name in a file of PEFT's."""
    return {
        name: tuple(t.shape)
        for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def saved_among(source: str, paths: Iterable[str]) -> list[str]:
    """Which of the layers at `paths` the adapter at `source` holds whole: PEFT's modules_to_save, by the ends of their paths, with all that is in them."""
    names = read_config(adapter_folder(source)).get("modules_to_save") or ()
    return [
        path
        for path in paths
        if any(
            part.endswith(name)
            for name in names
            for part in accumulate(path.split("."), "{}.{}".format)
        )
    ]


def saved_on_integers(paths: Sequence[str]) -> str:
    """What to do about layers that an adapter holds whole, as floats, and the base as integers."""
    rules = ", ".join(f"{{match: {path}, keep: float}}" for path in paths[:3])
    return (
        f"its modules_to_save hold {listed(paths, 3)} whole, as floats, but the base holds integers there. Keep {'it' if len(paths) == 1 else 'them'} "
        f"float by base.rules, before the other rules: {rules}; or take an adapter without"
    )


def adapter_folder(source: str) -> Path:
    """The local folder of `source`; a hub id is downloaded (configuration, weights and fingerprint, nothing else).

    Raises:
        SourceError: it is neither a folder nor a hub id that can be reached.
    """
    path = user_path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise SourceError(f"adapter {source!r} is neither a folder nor a hub id like owner/name")
    return downloaded("adapter", source, ["adapter_config.json", WEIGHTS, FILE])


def check_trainable(model: nn.Module) -> int:
    """Number of trainable parameters, all of them the adapter's (LoRA's matrices, DoRA's magnitudes, PEFT's modules_to_save).

    Raises:
        TrainingError: something else would be trained, or nothing would.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strangers = [name for name in trainable if not is_adapter_name(name)]
    if strangers:
        raise TrainingError(
            f"training would move {listed(strangers, 3)}; only lora_A and lora_B and what else the adapter adds may be trained"
        )
    if not trainable:
        raise TrainingError("the model has no trainable parameter: attach a LoRA adapter first")
    return sum(trainable.values())


def _linear_in_layers(model: nn.Module) -> list[str]:
    """Names, below the first number in their path, of the modules that PEFT's `all-linear` takes: `mlp.up_proj`. Whole paths would be taken in every layer."""
    names = (
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    )
    found = (re.match(r".*?\.\d+\.(.+)", name) for name in names)
    return sorted({match[1] for match in found if match})


def _missing_layers(model: nn.Module, asked: Sequence[int]) -> str | None:
    """Layers that are asked for and not there: a layer's number is the first in a module's path."""
    found = (re.match(r"(?:.*?\.)?(\d+)(?:\.|$)", name) for name, _ in model.named_modules())
    numbers = {int(match[1]) for match in found if match}
    if not (beyond := [number for number in asked if number not in numbers]):
        return None
    held = (
        f"layers {min(numbers)} to {max(numbers)}; choose among these"
        if numbers
        else "no numbered layers; leave layers out"
    )
    return f"layers {', '.join(map(str, beyond))}: the model has {held}"


def _irregular(shape: LoraShape) -> list[str]:
    """What of the shape's patterns PEFT would fail on."""
    given = (
        [("target_modules", shape.target_modules, False)]
        if isinstance(shape.target_modules, str)
        else []
    )
    given += [(what, key, True) for what, patterns in _patterns(shape) for key in patterns]
    return [
        f"{what} {problem}"
        for what, pattern, is_end in given
        if (problem := pattern_problem(pattern, is_end))
    ]


def _no_experts(model: nn.Module, shape: LoraShape) -> list[str]:
    """What of target_parameters PEFT would not find, or take for something else than it is."""
    if not shape.target_parameters:
        return []
    found = {
        f"{path}.{name}": (module, p)
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
    }
    banks = sorted(
        {re.sub(r"^.*?\.\d+\.", "", name) for name, (_, p) in found.items() if p.ndim == 3}
    )
    lost = (
        []
        if shape.layers is None
        else ["layers: PEFT adapts target_parameters in all layers; remove one"]
    )
    for target in shape.target_parameters:
        there = [
            entry for name, entry in found.items() if name == target or name.endswith(f".{target}")
        ]
        if not there:
            near = near_names(target, banks) or banks[:3]
            remedy = (
                f"near are {', '.join(near)}"
                if near
                else "it has no fused experts, which this is for; give layers in target_modules"
            )
            lost.append(
                f"target_parameters {target!r} is no parameter of {type(model).__name__}; {remedy}"
            )
        elif any(
            isinstance(module, nn.Linear | Conv1D | nn.Embedding) or p.ndim not in (2, 3)
            for module, p in there
        ):
            lost.append(
                f"target_parameters {target!r} is a layer's own; give the layer in target_modules"
            )
    return lost


def _patterns(shape: LoraShape) -> list[tuple[str, list[str]]]:
    return [
        ("rank_pattern", list(shape.rank_pattern)),
        ("alpha_pattern", list(shape.alpha_pattern)),
    ]


def _unmatched(model: PeftModel, shape: LoraShape) -> list[str]:
    names: list[str] = model.targeted_module_names + model.base_model.targeted_parameter_names
    lost = []
    if isinstance(shape.target_modules, list):
        lost += [
            f"target_modules {t!r}"
            for t in shape.target_modules
            if not any(n == t or n.endswith(f".{t}") for n in _all_names(model, shape, names))
        ]
    for what, keys in _patterns(shape):
        lost += [
            f"{what} {key!r}"
            for key in keys
            if not any(re.match(rf"(.*\.)?({key})$", n) for n in names)
        ]
    numbers = {int(part) for n in names for part in n.split(".") if part.isdigit()}
    lost += [f"layer {number}" for number in shape.layers or () if number not in numbers]
    return lost


def _all_names(model: PeftModel, shape: LoraShape, targeted: list[str]) -> list[str]:
    """Where a target may be found: with chosen layers, a module outside them is no mistake of the target's."""
    return (
        targeted if shape.layers is None else [n for n, _ in model.get_base_model().named_modules()]
    )


def _examples(model: PeftModel) -> str:
    layers = (
        canonical_name(n)
        for n, m in model.get_base_model().named_modules()
        if isinstance(m, nn.Linear) and not is_adapter_name(n)
    )
    return ", ".join(list(dict.fromkeys(n.rpartition(".")[2] for n in layers))[:8]) or ", ".join(
        model.targeted_module_names[:4]
    )
