"""Saves and loads a QWLoRA base: the frozen model, its configuration and tokenizer in one folder.

    base/
      model.safetensors      packed codes, scales and offsets; float tensors in the narrowest type
      that
                             holds their values; in shards if large
      base.json              format, fingerprint, source, scheme and shape of each packed layer,
      digests
                             of each tensor and of the files below (`manifest.py`); written last, so
                             a folder without it is not a base
      config.json, ...       the model's configuration and tokenizer, as Hugging Face writes them

Loading builds the model without data, inserts empty packed layers, checks all tensor names, shapes
and types against it, and maps the files into memory. Each tensor is read once to check its digest.
A float tensor is copied only if another dtype is requested.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from qwlora.atomic import files_in, replacing_files
from qwlora.errors import FingerprintError, GridError, SourceError, reading
from qwlora.formats import manifest
from qwlora.formats.meta_model import Place, empty_model, put_, tensor_at, tensor_places
from qwlora.formats.model_config import read_config
from qwlora.formats.safetensors_files import SafetensorsFiles, read_json
from qwlora.formats.shard_writer import SHARD_BYTES, ShardWriter
from qwlora.grid.scheme import Scheme
from qwlora.messages import lines, listed
from qwlora.nn import PackedLayer, is_packed, place_empty_, tie_weights_
from qwlora.nn.fingerprint import (
    base_tensors,
    combined_fingerprint,
    config_numbers,
    keep_fingerprint_,
    remember_floats_,
    tensor_digest,
)
from qwlora.nn.finite import check_finite
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.meta_tensors import refuse_meta
from qwlora.nn.packed_tensor import narrowest
from qwlora.parameter_names import canonical_name

FORMAT = 3
RECORD = "base.json"
_FLOATS = ("F32", "BF16", "F16")
_TYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float64: "F64",
}


def save_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    source: str,
) -> str:
    """Save the frozen base of `model`, without adapters, in `folder`.

    Args:
        model: a model with packed layers.
        tokenizer: saved with the base; None for none.
        folder: created if needed.
        source: where the model came from; recorded in base.json.

    Returns:
        The fingerprint.

    Raises:
        GridError: the model has no packed layers, or they are not frozen.
        SourceError: a tensor has no data, or `load_base` could not build a model of this class.
    """
    assert_frozen(model)
    refuse_meta(model, SourceError)
    _class_name(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = BaseWriter(Path(folder))
    writer.add(model)
    identity = writer.finish(model, tokenizer, source)
    remember_floats_(model, writer.digests)
    return identity


class BaseWriter:
    """Writes a base module by module; for a whole model, use `save_base`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        (folder / RECORD).unlink(missing_ok=True)
        self._shards = ShardWriter(folder, shard_bytes)
        self.digests: dict[str, str] = {}
        self._layers: dict[str, Any] = {}

    def add(self, module: nn.Module, path: str = "") -> None:
        """Add the tensors of the module at `path` in the model, except those without data.

        They must not be modified before `finish`.
        """
        for name, (layout, tensor) in base_tensors(module).items():
            if tensor.is_meta:
                continue
            full = f"{path}.{name}" if path else name
            is_buffer = not layout and not isinstance(tensor, nn.Parameter)
            check_finite(full, tensor, allow_infinity=is_buffer)
            self.digests[full] = tensor_digest(full, layout, tensor)
            self._shards.add(full, narrowest(tensor) if tensor.dtype == torch.float32 else tensor)
        for below, layer in module.named_modules(prefix=path):
            if (
                isinstance(layer, PackedLayer)
                and is_packed(layer)
                and not layer.is_tied
                and not layer.tensor.parts.packed.is_meta
            ):
                self._layers[canonical_name(below)] = {
                    "shape": list(layer.tensor.shape),
                    **layer.scheme.to_json(),
                }

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: str
    ) -> str:
        """Write the last shard, configuration, tokenizer and base.json. Returns the fingerprint."""
        self._shards.finish()
        files = self._write_configuration(model, tokenizer)
        identity = combined_fingerprint(self.digests, config_numbers(model))
        record = {
            "format": FORMAT,
            "fingerprint": identity,
            "source": source,
            "class": _class_name(model),
            "layers": self._layers,
            "tensors": self.digests,
        }
        if any(_is_remote(type(part)) for part in (model, model.config, tokenizer)):
            record["trust_remote_code"] = True
        manifest.write(self.folder, RECORD, record, files)
        return identity

    def _write_configuration(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> list[str]:
        """Write configuration, tokenizer and generation settings; returns the paths of these
        files."""
        with replacing_files(self.folder) as scratch:
            if _is_remote(type(model)):  # save_pretrained copies only config's and tokenizer's code
                config: Any = model.config  # annotated as a dict there
                custom_object_save(model, scratch, config)
            model.config.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(scratch)
            return files_in(scratch)


def _class_name(model: PreTrainedModel) -> str | None:
    """The class of transformers that `load_base` will build; None if the model has its own code.

    Raises:
        SourceError: the class is from another library, so config.json does not determine it.
    """
    kinds = type(model).__mro__
    if any(_is_remote(kind) for kind in kinds):
        return None
    ours = (k.__name__ for k in kinds if getattr(transformers, k.__name__, None) is k)
    name = next(ours, "PreTrainedModel")
    if name.endswith("PreTrainedModel"):
        raise SourceError(
            f"{type(model).__name__} ({type(model).__module__}) is not a model class of "
            "transformers, so load_base could not build it from config.json. Save its "
            "state_dict() and call quantize_ again with the same settings, or derive it from a "
            "class of transformers"
        )
    return name


def _is_remote(kind: type) -> bool:
    """Whether transformers loaded this class from Python code in a model's folder."""
    return kind.__module__.startswith("transformers_modules.")


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

    Warns:
        UnverifiedWarning: an earlier version wrote the base without digests of its configuration
            and tokenizer, so only its tensors are checked.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_files(folder)
    files = SafetensorsFiles(folder)
    count = len(files.names())
    config = read_config(folder, count, trust_remote_code)
    model = empty_model(config, count, trust_remote_code, record.get("class"))
    where = f"base {str(folder)!r}"
    _place_packed_(model, read_layers(record, where), where)
    places = tensor_places(model)
    _check_headers(model, files, places, where)
    digests = _read_(model, files, places, record, dtype, where)
    _check_grids(model, where)
    remember_floats_(model, digests)
    now = combined_fingerprint(digests, config_numbers(model))
    if now != record["fingerprint"]:
        keep_fingerprint_(model, now, record["fingerprint"])
    if (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = (
        record["source"] if Path(record["source"]).is_dir() else ""
    )  # what PEFT writes into an adapter as its base
    model.to(device)  # type: ignore[arg-type] # transformers hides the signature of Module.to
    return model


def check_files(folder: Path) -> None:
    """Compare the base's configuration and tokenizer with their digests; see `manifest.check`.

    Weights are not listed there: each tensor has its own digest, checked when it is read.
    """
    manifest.check(folder, RECORD, f"base {str(folder)!r}", "quantize again")


def read_record(folder: Path) -> dict[str, Any]:
    """Read `base.json`.

    Raises:
        SourceError: it is missing, unreadable, or has another format version.
    """
    if not (folder / RECORD).is_file():
        raise SourceError(f"{str(folder)!r} is not a QWLoRA base: it has no {RECORD}")
    record = read_json(folder / RECORD)
    found = record.get("format")
    if found != FORMAT:
        remedy = "update qwlora" if isinstance(found, int) and found > FORMAT else "quantize again"
        raise SourceError(
            f"base {str(folder)!r} has format {found!r}, but this version reads format {FORMAT}; "
            f"{remedy}"
        )
    kinds = {"fingerprint": str, "source": str, "layers": dict, "tensors": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
        raise SourceError(
            f"base {str(folder)!r}: missing or malformed in {RECORD}: {' and '.join(wrong)}; "
            "quantize again"
        )
    return record


def read_layers(record: Mapping[str, Any], where: str) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
    """Scheme and shape of each packed layer in a `base.json`, by module path.

    Raises:
        GridError: the record of a layer is invalid.
    """
    layers = {}
    for name, layer in record["layers"].items():
        try:
            layers[name] = _scheme(layer), tuple(layer["shape"])
            layers[name][0].scale_shape(layers[name][1])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise GridError(_impossible(name, error, where)) from error
    return layers


def _impossible(name: str, error: Exception, where: str) -> str:
    reason = str(error) or type(error).__name__
    return f"{where}: layer {name!r} in {RECORD} does not fit the model ({reason}); quantize again"


def _scheme(record: dict[str, Any]) -> Scheme:
    """The scheme in a layer's record, after checking the types of its values: integers must be
    `int`, not 4.0 or true.

    Raises:
        GridError: a value has the wrong type, or the scheme is invalid.
    """
    natural = (
        "bitwidth",
        *(key for key in ("axis", "block_size", "scale_bitwidth") if record.get(key) is not None),
    )
    flags = ("symmetric", *(key for key in ("float_offset",) if key in record))
    if wrong := [key for key in natural if type(record[key]) is not int] + [
        key for key in flags if type(record[key]) is not bool
    ]:
        raise GridError(f"{wrong[0]} is {record[wrong[0]]!r}")
    if not (
        isinstance(record["shape"], list)
        and all(type(length) is int and length > 0 for length in record["shape"])
    ):
        raise GridError(f"its shape is {record['shape']!r}")
    return Scheme.from_json(record)


def _place_packed_(
    model: PreTrainedModel, layers: Mapping[str, tuple[Scheme, tuple[int, ...]]], where: str
) -> None:
    """Insert empty packed layers as base.json says, and tie layers that share weights.

    Raises:
        GridError: the model has no such layer, or it has another shape.
    """
    for name, (scheme, shape) in layers.items():
        try:
            layer = place_empty_(model, name, scheme)
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise GridError(_impossible(name, error, where)) from error
        if layer.tensor.shape != shape:
            raise GridError(
                _impossible(
                    name,
                    GridError(f"its shape is {list(shape)}, not {list(layer.tensor.shape)}"),
                    where,
                )
            )
    tie_weights_(model)


def _check_headers(
    model: PreTrainedModel, files: SafetensorsFiles, places: Mapping[str, list[Place]], where: str
) -> None:
    """Compare names, shapes and types of all stored tensors with the model before any is read.

    Raises:
        SourceError: they differ; the message lists the first ones.
    """
    wrong = [f"{name} is missing" for name in sorted(places.keys() - set(files.names()))]
    wrong += [f"{name} is not in the model" for name in sorted(set(files.names()) - places.keys())]
    for name in places.keys() & set(files.names()):
        expected = tensor_at(model, places[name][0])
        assert expected is not None
        kinds = _FLOATS if expected.is_floating_point() else (_TYPES[expected.dtype],)
        if files.shape(name) != tuple(expected.shape) or files.dtype(name) not in kinds:
            found, wanted = (
                f"{list(shape)} of {kind}"
                for shape, kind in (
                    (files.shape(name), files.dtype(name)),
                    (expected.shape, " or ".join(kinds)),
                )
            )
            wrong.append(f"{name} is {found}, not {wanted}")
    if wrong:
        shown = "\n  ".join(lines(wrong))
        raise SourceError(
            f"{where}: its tensors do not match {RECORD} and config.json; quantize again\n  {shown}"
        )


def _read_(
    model: PreTrainedModel,
    files: SafetensorsFiles,
    places: Mapping[str, list[Place]],
    record: Mapping[str, Any],
    dtype: torch.dtype,
    where: str,
) -> dict[str, str]:
    """Map every tensor, check its digest and put it in its places.

    Returns:
        The digests of the tensors in the model; they differ from the saved ones if `dtype` does.

    Raises:
        FingerprintError: a tensor or config.json was changed after saving.
    """
    layouts = {name: layout for name, (layout, _) in base_tensors(model).items()}
    saved, now = {}, {}
    for name in files.names():
        tensor = files.read(name)
        saved[name] = now[name] = tensor_digest(name, layouts[name], tensor)
        if tensor.is_floating_point() and not layouts[name] and tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            now[name] = tensor_digest(name, layouts[name], tensor)
        put_(model, places[name], tensor)
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            layer.compute_dtype = dtype
    changed = [name for name, digest in saved.items() if record["tensors"].get(name) != digest]
    identity = combined_fingerprint(saved, config_numbers(model))
    if changed or identity != record["fingerprint"]:
        what = listed(changed) if changed else "config.json or its fingerprint"
        raise FingerprintError(
            f"{where} has fingerprint {identity}, but {RECORD} says {record['fingerprint']}: "
            f"{what} changed after saving. Copy it again, or quantize again"
        )
    return now


def _check_grids(model: PreTrainedModel, where: str) -> None:
    """Check that scales are positive and offsets in range; any packed codes are valid."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer) and is_packed(layer) and not layer.is_tied:
            try:
                _ = layer.encoding
            except GridError as error:
                raise GridError(f"{where}: layer {name}: {error}; quantize again") from error
