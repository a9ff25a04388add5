"""Attach a LoRA adapter to a frozen base, new or existing; check that only the adapter is trained.

    y = base_layer(x) + scaling * lora_B(lora_A(x))
    scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA

The adapter is PEFT's. This module adds errors where PEFT is silent: a target module, pattern or
layer number that matches nothing in the model.

Functions that list and switch adapters take a `PeftModel`, or a transformers model after
`peft.inject_adapter_in_model`. transformers 5.24 refuses every released PEFT in its own
`model.load_adapter`; write `PeftModel.from_pretrained(model, folder)`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.adapter_files import CONFIG, adapter_folder, check_adapter
from qwlora.adapter.adapter_folder import (
    check_fit,
    load_adapter,
    reading,
    shapes_of,
    without_pattern_warnings,
)
from qwlora.errors import SourceError, TrainingError, listed
from qwlora.system.parameter_names import canonical_name, is_adapter_name, is_factor_name


@dataclass(frozen=True)
class LoraShape:
    """Which layers get an adapter, and its size. The recipe's reference documents each field."""

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
        """PEFT's configuration of this shape for `model`."""
        targets = self.target_modules
        # PEFT does not support `all-linear` with `layers`. Names inside a layer (`mlp.up_proj`)
        # select the same modules.
        if self.layers is not None and isinstance(targets, str) and targets.lower() == "all-linear":
            linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D))
            matches = (re.match(r".*?\.\d+\.(.+)", name) for name in linear)
            targets = sorted({match[1] for match in matches if match})
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            layers_to_transform=self.layers,
            target_parameters=list(self.target_parameters) or None,
            task_type="CAUSAL_LM",
        )


def attach(model: PreTrainedModel, shape: LoraShape, seed: int) -> PeftModel:
    """Attach a new LoRA adapter to `model` with seeded initial weights; the base is frozen."""
    if shape.layers:
        # PEFT ignores numbers that no layer has. A layer's number is the first in its path.
        paths = (re.match(r"(?:.*?\.)?(\d+)(?:\.|$)", name) for name, _ in model.named_modules())
        numbers = {int(match[1]) for match in paths if match}
        if missing := [number for number in shape.layers if number not in numbers]:
            existing = (
                f"layers {min(numbers)} to {max(numbers)}; choose among these"
                if numbers
                else "no numbered layers; leave layers out"
            )
            raise TrainingError(f"layers {', '.join(map(str, missing))}: the model has {existing}")
    torch.manual_seed(seed)
    try:
        # `_check_matches` raises errors for what PEFT only warns about. PEFT itself corrects
        # fan_in_fan_out by the type of the layer.
        with without_pattern_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", "target_parameters=.* no parameter was matched")
            adapted = get_peft_model(model, shape.config(model))
    except (ValueError, TypeError, re.error) as error:
        raise TrainingError(
            f"LoRA cannot be attached to target_modules {shape.target_modules!r}: {error} "
            f"{_known_names(model)}"
        ) from error
    _check_matches(adapted, shape)
    return adapted


def zeroed_(model: PeftModel) -> PeftModel:
    """`model` with zeros in all factors of its adapters, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor_name(canonical_name(name)):
                parameter.zero_()
    return model


def _check_matches(model: PeftModel, shape: LoraShape) -> None:
    """Check that every name and pattern in `shape` matched something: PEFT ignores others."""
    base = model.get_base_model()
    modules, parameters = model.targeted_module_names, model.base_model.targeted_parameter_names
    # With `layers`, a name may belong to other layers only: that is a choice, not a typo.
    everywhere = [name for name, _ in base.named_modules()]
    names = modules if shape.layers is None else everywhere
    targets = [] if isinstance(shape.target_modules, str) else shape.target_modules
    ends = [("target_modules", name, names) for name in targets]
    ends += [("target_parameters", name, parameters) for name in shape.target_parameters]
    unmatched = [
        f"{key} {end!r}"
        for key, end, names in ends
        if not any(name == end or name.endswith(f".{end}") for name in names)
    ]
    unmatched += [
        f"{key} {pattern!r}"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(shape, key)
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules + parameters)
    ]
    if unmatched:
        raise TrainingError(
            f"the model does not have: {'; '.join(unmatched)}. {_known_names(base)}"
        )
    for path in parameters:
        owner = base.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, LoraLayer) and isinstance(
            owner.get_base_layer(), nn.Linear | Conv1D | nn.Embedding
        ):
            raise TrainingError(
                f"target_parameters: {path} belongs to a layer; name the layer in target_modules"
            )


def _known_names(model: nn.Module) -> str:
    layers = [
        canonical_name(name).rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_adapter_name(name)
    ]
    experts = {
        re.sub(r"^.*?\.\d+\.", "", canonical_name(name))
        for name, p in model.named_parameters()
        if p.ndim == 3 and not is_adapter_name(name)
    }
    return (
        f"Its layers are, for example, {', '.join(list(dict.fromkeys(layers))[:8])}; its fused "
        f"experts: {listed(sorted(experts))}"
    )


def check_shape(skeleton: PreTrainedModel, shape: LoraShape) -> dict[str, tuple[int, ...]]:
    """Check `shape`, as `attach` does, on a model without weights, which is changed. Returns the
    shapes of the adapter's weights, by their names in its file."""
    with torch.device("meta"):
        return shapes_of(attach(skeleton, shape, seed=0))


def attach_existing(
    model: PreTrainedModel,
    source: str,
    unknown_base: str = "refuse",
    seed: int = 0,
    weight: Callable[[str], Tensor] | None = None,
) -> PeftModel:
    """`load_adapter` of the adapter at `source` (see `adapter_folder`), to train it further."""
    torch.manual_seed(seed)  # for dropout
    return load_adapter(model, adapter_folder(source), True, unknown_base, weight=weight)


def check_existing(
    source: str, unknown_base: str = "refuse", skeleton: PreTrainedModel | None = None
) -> dict[str, tuple[int, ...]]:
    """Check what `attach_existing` would refuse, as far as possible before there is a base.
    `skeleton` and result as in `check_shape`."""
    folder = adapter_folder(source)
    try:
        check_adapter(folder, None, unknown_base)
        if skeleton is None:
            return {}
        with reading(folder, skeleton), torch.device("meta"):
            warnings.simplefilter("ignore")  # repeated when the adapter is attached
            config = LoraConfig.from_pretrained(str(folder))
            transposed = config.fan_in_fan_out
            adapted = get_peft_model(skeleton, config)
        # PEFT warns and unsets it for layers other than Conv1D: the factors load without an error,
        # but were trained for transposed weights.
        if transposed and not config.fan_in_fan_out:
            raise SourceError(
                f"adapter {source!r} does not fit {type(skeleton).__name__}: {CONFIG} has "
                "fan_in_fan_out: true, for weights stored [in, out], but the model stores "
                "[out, in]. Import it onto the model that it was trained on, or set "
                "fan_in_fan_out to false if this is that model"
            )
        check_fit(folder, adapted)
        return shapes_of(adapted)
    except SourceError as error:
        # The folder may be a downloaded or converted copy, which the user has never seen.
        raise SourceError(str(error).replace(str(folder), source)) from error


def without_dropout_(model: PeftModel) -> None:
    """Set the dropout of the adapters of `model` to 0, in their configurations too."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and is_adapter_name(path):
            module.p = 0.0
    for config in model.peft_config.values():
        config.lora_dropout = 0.0


def check_trainable(model: nn.Module) -> int:
    """Number of trainable parameters; all must be finite and belong to the adapter."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name in trainable if not is_adapter_name(name)]
    if others:
        raise TrainingError(
            f"training would change {listed(others, 3)}, but only the adapter (lora_A, lora_B) may "
            "be trained. Set requires_grad to False on the others"
        )
    if not trainable:
        raise TrainingError("the model has no trainable parameter: attach a LoRA adapter first")
    for name, p in trainable.items():
        if not bool(p.isfinite().all()):
            raise TrainingError(
                f"{name} has values that are not finite before training. Attach the adapter again, "
                "from files or initial weights that are"
            )
    return sum(p.numel() for p in trainable.values())


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters; empty if there is none."""
    return list(getattr(cast(Any, model), "peft_config", None) or ())


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters, in order."""
    # The layers are asked, since methods of this name in transformers 5.24 refuse every released
    # PEFT ("use a version >= 0.22.0").
    return list(dict.fromkeys(name for layer in _layers(model) for name in layer.active_adapters))


def active_adapter(model: nn.Module) -> str:
    """The active adapter, the first if there are several."""
    if active := active_adapters(model):
        return active[0]
    raise TrainingError(
        f"{type(model).__name__} has no active adapter. Attach one with peft.get_peft_model, or "
        "activate one with set_adapter(NAME)"
    )


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Make adapters the active ones; PEFT then lets their parameters require gradients."""
    if isinstance(model, PeftModel):
        model.base_model.set_adapter(list(names))
        model.active_adapter = names[0]
        return
    for layer in _layers(model):
        layer.set_adapter(list(names))


@contextlib.contextmanager
def restored_adapters(model: nn.Module) -> Iterator[None]:
    """On exit, restore which adapters are active or disabled, and which parameters train."""
    # A PeftModel's own `active_adapter` may differ from the first that its layers have.
    active, first = active_adapters(model), isinstance(model, PeftModel) and model.active_adapter
    disabled = [layer for layer in _layers(model) if layer.disable_adapters]
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        activate_(model, active)
        if first:
            model.active_adapter = first
        for layer in disabled:
            layer.enable_adapters(False)
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone, until the context ends."""
    with contextlib.ExitStack() as stack:
        for layer in _layers(model):
            stack.callback(layer.enable_adapters, not layer.disable_adapters)
            layer.enable_adapters(False)
        yield


def _layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module
