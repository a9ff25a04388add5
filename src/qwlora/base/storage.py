"""A base on disk.

    base/
      model.safetensors      packed codes, scales, offsets, and the float remainder, by module path
      base.json              format version, fingerprint, source, and the scheme of each packed layer
      config.json, ...       the model's configuration and tokenizer, as Hugging Face writes them

Loading builds the model without weights, puts packed layers in their places, maps the file and checks the fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qwlora.base.packed import PackedLinear
from qwlora.errors import FingerprintError, SourceError
from qwlora.grid.fingerprint import base_tensors, fingerprint
from qwlora.grid.scheme import Scheme

FORMAT = 1


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str) -> str:
    """Write the base into `folder`, which must exist; returns its fingerprint."""
    identity = fingerprint(model)
    schemes = {name: layer.scheme.to_json() for name, layer in _packed_layers(model).items()}
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file({name: t.detach().contiguous() for name, (_, t) in base_tensors(model).items()}, folder / "model.safetensors", metadata={"format": "pt"})
    record = {"format": FORMAT, "fingerprint": identity, "source": source, "layers": schemes}
    (folder / "base.json").write_text(json.dumps(record, indent=1) + "\n")
    return identity


def load_base(folder: str | Path) -> PreTrainedModel:
    """Load a base that `save_base` wrote.

    Raises:
        SourceError: the folder holds no base, its format is newer, or tensors are missing or unknown (all named).
        FingerprintError: the tensors are not the ones that were saved.
    """
    folder = Path(folder)
    record = read_record(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, scheme in record["layers"].items():
        float_layer = model.get_submodule(name)
        out_features, in_features = float_layer.weight.shape if isinstance(float_layer, nn.Linear) else float_layer.weight.shape[::-1]
        model.set_submodule(name, PackedLinear(in_features, out_features, Scheme.from_json(scheme), float_layer.bias, device=torch.device("meta")))
    model.tie_weights()
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"base {str(folder)!r}: model.safetensors cannot be read ({error}); quantize again") from error
    expected = set(base_tensors(model))
    if wrong := sorted(expected ^ set(tensors)):
        raise SourceError(f"base {str(folder)!r}: model.safetensors and config.json disagree about {', '.join(wrong[:5])}; quantize again")
    model.load_state_dict(tensors, strict=False, assign=True)  # tied names are absent from the file; all others were compared above
    model.tie_weights()
    found = fingerprint(model)
    if found != record["fingerprint"]:
        raise FingerprintError(
            f"base {str(folder)!r} has fingerprint {found}, but base.json says {record['fingerprint']}: the file was changed; quantize again"
        )
    model.name_or_path = record["source"] if Path(record["source"]).is_dir() else ""  # what PEFT writes into an adapter as its base
    return model.requires_grad_(False).eval()


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of `base.json`.

    Raises:
        SourceError: it is missing, unreadable, or of a newer format.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "base.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SourceError(f"{str(folder)!r} is not a QWLoRA base: base.json cannot be read ({error})") from error
    if record.get("format") != FORMAT:
        raise SourceError(f"base {str(folder)!r} has format {record.get('format')}; this version reads format {FORMAT}")
    return record


def _packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
