"""Saves and loads a QWLoRA base: the frozen model, its configuration and tokenizer in one folder.

    base/
      base.safetensors       packed codes, scales and offsets; float tensors in the narrowest type
                             that holds their values; in shards if large
      base.json              format, fingerprint, source, configuration, scheme and shape of each
                             packed layer, digests of tensors and files; written last: a folder
                             without it is not a base
      config.json, ...       the model's configuration and tokenizer, as Hugging Face writes them

`load_base` also loads diffusers models from their own config.json. Other modules have none, so the
caller builds the float model.

transformers loads the same model with the same checks, and chooses the dtype and devices:

    import qwlora.hf
    model = AutoModelForCausalLM.from_pretrained("out/base", device_map="auto")

`save_pretrained` writes a base. Quantizing a float model while loading it, offloading to disk and
tensor parallelism are refused. Written for transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwlora.errors import SourceError
from qwlora.formats.base_files import RECORD, WEIGHTS, BaseCheckpoint, read_record, write_base
from qwlora.formats.checkpoint import put_
from qwlora.formats.manifest import FILES
from qwlora.nn import PackedLayer

METHOD = "qwlora"


def save_base(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str | None = None,
) -> str:
    """Save the frozen base of `model`, without adapters, in `folder`.

    Args:
        model: a model with packed layers. Unless it is from transformers or diffusers, `load_base`
            needs its float model.
        folder: created if needed.
        tokenizer: saved with the base.
        source: origin of the model, recorded in base.json. Default: the model's `name_or_path`.

    Returns:
        The fingerprint of the base.

    Raises:
        GridError: the model has no packed layers, or they are not frozen.
        SourceError: a tensor has no data.
    """
    register_with_transformers()
    config = getattr(model, "config", None)
    return write_base(model, tokenizer, folder, source or str(getattr(config, "_name_or_path", "")))


def load_base(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    model: nn.Module | None = None,
) -> Any:
    """Load a base that `save_base` wrote, in evaluation mode.

    Args:
        model: the float model, on any device or meta, whose layers are replaced by those of the
            base. Needed if the base cannot be built from its files. If loading fails, some of its
            layers may be replaced: build it again.
        dtype: type of the float tensors. Scales keep their type; the fingerprint does not change.
        device: device of the model.
        trust_remote_code: run the model's own Python code. The base's folder contains it if the
            recipe set model.trust_remote_code.

    Returns:
        The model with packed layers, ready for PEFT.

    Raises:
        SourceError: the folder is not a base, has another format version, needs `model` or
            diffusers, or its tensors do not match those of the model (the message lists them).
        GridError: a layer has an invalid scheme, scale or offset.
        FingerprintError: a tensor, the configuration or the tokenizer was changed after saving.
    """
    register_with_transformers()
    base = BaseCheckpoint(folder, trust_remote_code=trust_remote_code)
    if model is None:
        model = base.skeleton(trust_remote_code)
    else:
        model.requires_grad_(False).eval()
    base.load_into_(model, dtype)
    model.to(device)
    return model


class QwloraConfig(QuantizationConfigMixin):
    """`quantization_config` in the config.json of a base."""

    # Without `import qwlora.hf`, transformers would warn of an unknown method and continue with
    # random weights. So the weights are in a file that it does not look for, which is named here.
    def __init__(self, weights: str = WEIGHTS, **unused: Any):
        self.quant_method, self.weights = METHOD, weights  # type: ignore[assignment]


class QwloraQuantizer(HfQuantizer):
    """Inserts packed layers before transformers reads the weights, and checks the base."""

    quantization_config: QwloraConfig
    _base: BaseCheckpoint

    @property
    def is_trainable(self) -> bool:
        # Trainer asks; it means that adapters can be trained on the model.
        return True

    def is_serializable(self) -> bool:
        # transformers' own method asks; here it writes only floats or an adapter.
        return True

    def validate_environment(self, device_map: Any = None, **unused: Any) -> None:
        if not self.pre_quantized:
            raise SourceError(
                "from_pretrained does not quantize to QWLoRA's integers. Load the float model "
                "without quantization_config, then call qwlora.quantize_(model, ...)"
            )
        self._refuse_disk(device_map)

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        # The last call before transformers 5.24 looks for the files: give the name of the weights
        # in place of the sentence that stops it without qwlora.
        if getattr(config, "distributed_config", None) is not None:
            raise SourceError(
                "a QWLoRA base cannot be split by distributed_config, tp_plan or tp_size; leave "
                "them out, or use device_map"
            )
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **unused: Any
    ) -> None:
        self._base = base = BaseCheckpoint(_folder_of(Path(checkpoint_files[0])), model.config)
        expected = base.record.get("class")
        if expected not in (None, type(model).__name__):
            raise SourceError(
                f"{base.where} is a {expected}, not a {type(model).__name__}; load it with "
                f"transformers.{expected}.from_pretrained"
            )
        # `model.tie_weights()`, which transformers switches off while it builds a model to load.
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            path, _, key = target.rpartition(".")
            model.get_submodule(path)._parameters[key] = model.get_parameter(source)
        base.place_packed_(model)
        # A packed layer has no parameter that transformers could tie: it reads the other's codes.
        for target in list(model.all_tied_weights_keys):
            if isinstance(model.get_submodule(target.rpartition(".")[0]), PackedLayer):
                del model.all_tied_weights_keys[target]
        # transformers casts what it loads to the dtype that it finds in the model. Scales must keep
        # the stored one, whatever dtype was asked for.
        for name, stored in base.verified(model):
            if base.layouts[name] and stored.is_floating_point():
                put_(model, [name], torch.empty_like(stored, device="meta"))

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        # Conversions are for files of older versions; a base has the names of the model in memory.
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: Any) -> None:
        self._refuse_disk(getattr(model, "hf_device_map", None))
        config: Any = model.config
        del config.transformers_weights
        model.requires_grad_(False)
        name = model.name_or_path or ""
        self._base.finish_(model, config.dtype)
        # `finish_` sets the folder, which is in the cache for an id on the hub. Adapters should
        # name the id.
        if not Path(name).is_dir():
            model.name_or_path = name
        # The model keeps the quantizer, and open files cannot be copied with it.
        del self._base

    def _refuse_disk(self, device_map: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            modules = [name or "the model" for name, where in device_map.items() if where == "disk"]
            raise SourceError(
                f"device_map puts {modules[0]} on disk, but packed integers stay in memory. Map "
                "all modules to devices or to the processor, or allow it more with max_memory"
            )


def register_with_transformers() -> None:
    """Let `from_pretrained`, `pipeline`, `Trainer` and PEFT load QWLoRA bases in this process.

    `load_base` and `save_base` call it; `import qwlora.hf` does too.
    """
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(QwloraConfig)
        auto.register_quantizer(METHOD)(QwloraQuantizer)


def _folder_of(weights: Path) -> Path:
    """The base's folder; in the hub's cache, its other files are downloaded into it."""
    folder = weights.parent
    cached = folder.parent.parent  # models--OWNER--NAME/snapshots/REVISION
    if folder.parent.name != "snapshots" or not cached.name.startswith("models--"):
        return folder
    files = [RECORD]
    # transformers has downloaded only the files it knows. Get base.json, then the files it lists.
    for _ in range(2):
        if missing := [file for file in files if not (folder / file).is_file()]:
            name = cached.name.removeprefix("models--").replace("--", "/")
            places: dict[str, Any] = {"revision": folder.name, "cache_dir": cached.parent}
            snapshot_download(name, allow_patterns=missing, **places)
        files = list(read_record(folder).get(FILES, {}))
    return folder
