"""Saves and loads a QWLoRA base: the frozen model, its configuration and tokenizer in one folder.

    base/
      base.safetensors       packed codes, scales and offsets; float tensors in the narrowest type
                             that holds their values; in shards if large
      base.json              format, fingerprint, source, scheme and shape of each packed layer,
                             digests of each tensor and of the files below (`manifest.py`); written
                             last, so a folder without it is not a base
      config.json, ...       the model's configuration and tokenizer, as Hugging Face writes them,
                             for transformers' `from_pretrained` (`hf_quantizer.py`)

transformers warns about a quantization method that it does not know and goes on with random
weights. So the weights are in a file that it does not look for, and `transformers_weights` in
config.json, which it takes as a file name and refuses, says what to install.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.formats.base_files import BaseCheckpoint, write_base
from qwlora.formats.hf_quantizer import register_with_transformers
from qwlora.formats.meta_model import empty_model, put_, read_generation_config_


def save_base(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str | None = None,
) -> str:
    """Save the frozen base of `model`, without adapters, in `folder`.

    Args:
        model: a model with packed layers.
        folder: created if needed.
        tokenizer: saved with the base.
        source: where the model came from; recorded in base.json. Default: what its configuration
            says.

    Returns:
        The fingerprint.

    Raises:
        GridError: the model has no packed layers, or they are not frozen.
        SourceError: a tensor has no data, or `load_base` could not build a model of this class.
    """
    register_with_transformers()
    return write_base(model, tokenizer, folder, source or str(model.config._name_or_path))


def load_base(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a base that `save_base` wrote.

    Args:
        folder: the base's folder.
        dtype: the type of the float tensors. Scales keep theirs, and the fingerprint is the saved
            one.
        device: where to put the model.
        trust_remote_code: run the model's own Python code. The base's folder contains it if the
            recipe set model.trust_remote_code.

    Raises:
        SourceError: the folder is not a base, has another format version, or its tensors do not
            match base.json and config.json (the message lists them).
        GridError: a layer has an invalid scheme, scale or offset.
        FingerprintError: a tensor, the configuration or the tokenizer was changed after saving.
    """
    register_with_transformers()
    base = BaseCheckpoint(folder, trust_remote_code=trust_remote_code)
    model = empty_model(base.config, trust_remote_code, base.record.get("class"))
    names = base.place_packed_(model)
    for name, tensor in base.verified(model, check_configuration=True):
        is_cast = tensor.is_floating_point() and name not in base.packed
        put_(model, names[name], tensor.to(dtype) if is_cast else tensor)
    read_generation_config_(model, base.path)
    base.finish_(model, dtype)
    model.to(device)  # type: ignore[arg-type] # transformers hides the signature of Module.to
    return model
