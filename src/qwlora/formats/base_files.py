"""The files of a QWLoRA base: what `base_folder.py` describes, written tensor by tensor and read
with every check.

Loading builds the model without data, inserts empty packed layers, checks all tensor names, shapes
and types against it, and maps the files into memory. Each tensor is read once to check its digest.
A float tensor is copied only if another dtype is requested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from qwlora.errors import FingerprintError, GridError, SourceError, lines, listed
from qwlora.formats import manifest
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.meta_model import tensor_at, tensor_names
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn import PackedLayer, is_packed, tie_weights_
from qwlora.nn.fingerprint import (
    base_tensors,
    combined_fingerprint,
    config_numbers,
    keep_fingerprint_,
    remember_floats_,
    tensor_digest,
)
from qwlora.nn.frozen import assert_frozen, check_finite, refuse_meta
from qwlora.nn.packed_layer import packed_layers
from qwlora.nn.packed_tensor import PackedTensor, Parts, narrowest
from qwlora.nn.replace import place_empty_
from qwlora.system import strict_json
from qwlora.system.atomic import files_in, move_into_place, replacing_files, write_text
from qwlora.system.parameter_names import canonical_name, parameter_name
from qwlora.system.strict_json import read_object

STEM = "base"
INDEX = "base.safetensors.index.json"
SHARD_BYTES = 2**29
FORMAT = 4
RECORD = "base.json"
WITHOUT_QWLORA = (
    "this model is a QWLoRA base; run `pip install qwlora`, and `import qwlora.hf` before you "
    "load it"
)
_FLOATS = ("F32", "BF16", "F16")
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float64: "F64",
}
_UNUSABLE = (KeyError, TypeError, ValueError, OverflowError)  # what a bad record raises


class BaseWriter:
    """Writes a base module by module; for a whole model, use `write_base`.

        base.safetensors                                        all fits into `shard_bytes`
        base-00001-of-00003.safetensors ... and an index file   otherwise, as in Hugging Face
                                                                folders

    At most one shard is in memory; a larger tensor gets its own file. Shards have temporary names
    until `finish` renames them. Creating a `BaseWriter` deletes an earlier base from the folder.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.digests: dict[str, str] = {}
        self._layers: dict[str, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[dict[str, int]] = []  # bytes of the tensors of each shard
        shards = f"{STEM}-*-of-*.safetensors"
        for name in (RECORD, f"{STEM}.safetensors", shards, INDEX, ".shard-*.part"):
            for file in folder.glob(name):
                file.unlink()

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
            stored = narrowest(tensor) if tensor.dtype == torch.float32 else tensor
            waiting = sum(other.nbytes for other in self._waiting.values())
            if self._waiting and waiting + stored.nbytes > self.shard_bytes:
                self._write_shard()
            self._waiting[full] = stored.detach().cpu().contiguous()
        for below, layer in module.named_modules(prefix=path):
            if _is_stored(layer) and not layer.tensor.parts.packed.is_meta:
                self._layers[canonical_name(below)] = {
                    "shape": list(layer.tensor.shape),
                    **layer.scheme.to_json(),
                }

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: str
    ) -> str:
        """Write the last shard, configuration, tokenizer and base.json. Returns the fingerprint."""
        self._write_shard()
        config: Any = copy.deepcopy(model.config)
        config.dtype, config.architectures = model.dtype, [type(model).__name__]
        config.quantization_config = {"quant_method": "qwlora", "weights": self._name_shards()}
        with replacing_files(self.folder) as scratch:
            if _is_remote(type(model)):  # save_pretrained copies only config's and tokenizer's code
                custom_object_save(model, scratch, config)
            config.save_pretrained(scratch)
            config.transformers_weights = WITHOUT_QWLORA  # save_pretrained would leave it out
            config.to_json_file(Path(scratch, "config.json"))
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(scratch)
            files = files_in(scratch)
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

    def _write_shard(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append({name: tensor.nbytes for name, tensor in self._waiting.items()})
        self._waiting = {}

    def _name_shards(self) -> str:
        """Rename the shards, and write an index if there are several. Returns the file's name, or
        the index's."""
        count, total, weight_map = len(self._shards), 0, dict[str, str]()
        for i, tensors in enumerate(self._shards):
            name = f"{STEM}-{i + 1:05}-of-{count:05}.safetensors"
            name = name if count > 1 else f"{STEM}.safetensors"
            # safetensors creates files that only their owner can read
            self._part(i).chmod(self.folder.stat().st_mode & 0o666)
            move_into_place(self._part(i), self.folder / name)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensors.values())
        if count == 1:
            return name
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / INDEX, strict_json.dumps(index, indent=1) + "\n")
        return INDEX

    def _part(self, index: int) -> Path:
        return self.folder / f".shard-{index:05}.part"


def write_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    source: str,
) -> str:
    """Write a base; see `base_folder.save_base`."""
    assert_frozen(model)
    refuse_meta(model, SourceError)
    _class_name(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = BaseWriter(Path(folder))
    writer.add(model)
    identity = writer.finish(model, tokenizer, source)
    remember_floats_(model, writer.digests)
    _belongs_to_(model, Path(folder), source)
    return identity


def _class_name(model: PreTrainedModel) -> str | None:
    """The class of transformers that `load_base` will build; None if the model has its own code."""
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
    """Whether the class is from Python code in a model's folder."""
    return kind.__module__.startswith("transformers_modules.")


class BaseCheckpoint(Checkpoint):
    """The base in `folder`.

    As a `Checkpoint`, so that another job can freeze the same integers again. Or to load it into a
    model that was built without data: `place_packed_`, then all tensors of `verified`, then
    `finish_`. Each tensor is compared with its digest in base.json when it is read.

    Args:
        folder: the base's folder.
        config: the configuration; default: that of the folder.
        trust_remote_code: run Python code from the folder to read it.

    Raises:
        SourceError: the folder is not a base, has another format version, or cannot be read; a part
            of a layer is missing or has the wrong shape.
        GridError: base.json describes an invalid layer; scales or offsets are invalid.
        FingerprintError: the configuration, the tokenizer or a tensor was changed after saving.
    """

    def __init__(
        self,
        folder: str | Path,
        config: PretrainedConfig | None = None,
        trust_remote_code: bool = False,
    ):
        self.path = Path(folder)
        self.where = f"base {str(folder)!r}"
        self.record = read_record(self.path)
        # weights are not listed there: each tensor has its own digest
        manifest.check(self.path, RECORD, self.where, "quantize again")
        self.files = SafetensorsFiles(folder, STEM)
        self.layers = _read_layers(self.record, self.where)
        self.config = config or read_config(self.path, trust_remote_code)
        self.digests: dict[str, str] = {}
        self.packed: frozenset[str] = frozenset()
        self._path_of = {parameter_name(path): path for path in self.layers}
        parts = {
            f"{path}.{part}": name for name, path in self._path_of.items() for part in Parts._fields
        }
        self.stored: dict[str, list[str]] = {}
        for name in self.files.names():
            self.stored.setdefault(parts.get(name, name), []).append(name)

    def names(self) -> list[str]:
        return list(self.stored)

    def schemes(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        """Scheme and shape of each packed parameter."""
        return {name: self.layers[path] for name, path in self._path_of.items()}

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name not in self.stored:
            raise SourceError(f"{self.where}: there is no tensor {name!r}")
        if name not in self._path_of:
            return self._checked(name, "")
        path = self._path_of[name]
        scheme, shape = self.layers[path]
        tensors = {
            stored.rpartition(".")[2]: self._checked(stored, scheme.to_text())
            for stored in self.stored[name]
        }
        expected = PackedTensor.empty(scheme, shape).parts
        for part, tensor in zip(Parts._fields, expected, strict=True):
            have, want = (None if t is None else list(t.shape) for t in (tensors.get(part), tensor))
            if have != want:
                raise SourceError(
                    f"{self.where}: {path}.{part} is {have or 'missing'}, but {scheme} needs "
                    f"{want or 'none'}; quantize again"
                )
        with self._naming(path):
            return PackedTensor(scheme, shape[-1], Parts(**tensors)).quantized

    def _checked(self, name: str, layout: str) -> Tensor:
        tensor = self.files.read(name)
        if tensor_digest(name, layout, tensor) != self.record["tensors"].get(name):
            raise FingerprintError(
                f"{self.where}: {name} changed after saving. Copy it again, or quantize again"
            )
        return tensor

    @contextmanager
    def _naming(self, layer: str) -> Iterator[None]:
        """Put the base and a layer on a GridError about its numbers."""
        try:
            yield
        except GridError as error:
            raise GridError(f"{self.where}: layer {layer}: {error}; quantize again") from error

    def place_packed_(self, model: PreTrainedModel) -> dict[str, list[str]]:
        """Insert empty packed layers, and check names, shapes and types of all stored tensors.

        Returns:
            All names of each stored tensor.

        Raises:
            SourceError: the tensors are not those of the model; the message lists them.
            GridError: a layer does not exist in the model, or has another shape.
        """
        for name, (scheme, shape) in self.layers.items():
            try:
                layer = place_empty_(model, name, scheme)
                if layer.tensor.shape != shape:
                    raise GridError(f"its shape is {list(shape)}, not {list(layer.tensor.shape)}")
            except (AttributeError, *_UNUSABLE, RuntimeError) as error:
                raise _misfit(name, error, self.where) from error
        tie_weights_(model)
        names, stored = tensor_names(model), set(self.files.names())
        wrong = [f"{name} is missing" for name in sorted(names.keys() - stored)]
        wrong += [f"{name} is not in the model" for name in sorted(stored - names.keys())]
        for name in sorted(names.keys() & stored):
            expected = tensor_at(model, name)
            assert expected is not None
            dtypes = _FLOATS if expected.is_floating_point() else (_DTYPES[expected.dtype],)
            shape, dtype = self.files.shape(name), self.files.dtype(name)
            if shape != tuple(expected.shape) or dtype not in dtypes:
                wrong.append(
                    f"{name} is {list(shape)} of {dtype}, not {list(expected.shape)} of "
                    f"{' or '.join(dtypes)}"
                )
        if wrong:
            shown = "\n  ".join(lines(wrong))
            raise SourceError(
                f"{self.where}: its tensors do not match {RECORD} and config.json; quantize "
                f"again\n  {shown}"
            )
        self.packed = frozenset(name for name, (layout, _) in base_tensors(model).items() if layout)
        return names

    def verified(
        self, model: PreTrainedModel, check_configuration: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, as a view of the mapped file, of everything stored.

        Raises:
            FingerprintError: after the last one, if any differs from its digest, or
                (`check_configuration`) the configuration is not the one that was saved.
        """
        layouts = {name: layout for name, (layout, _) in base_tensors(model).items()}
        for name in self.files.names():
            tensor = self.files.read(name)
            self.digests[name] = tensor_digest(name, layouts[name], tensor)
            yield name, tensor
        saved, identity = self.record["tensors"], self._identity(model)
        changed = [name for name, digest in self.digests.items() if saved.get(name) != digest]
        if not changed and check_configuration and identity != self.record["fingerprint"]:
            changed = ["config.json or its fingerprint"]
        if changed:
            raise FingerprintError(
                f"{self.where} has fingerprint {identity}, but {RECORD} says "
                f"{self.record['fingerprint']}: {listed(changed)} changed after saving. Copy it "
                "again, or quantize again"
            )

    def finish_(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Check the grids, and note on the model which base it is.

        Raises:
            GridError: a layer has an invalid scale or offset.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer):
                layer.compute_dtype = dtype
            if _is_stored(layer):
                with self._naming(name):
                    _ = layer.encoding  # checks its numbers; any packed codes are valid
        digests = dict(self.digests)
        for name, (layout, tensor) in base_tensors(model).items():
            # stored floats are float32 or narrower, and digests are of their float32 values
            is_cast = tensor.is_floating_point() and tensor.dtype != torch.float32
            if is_cast and not layout and not tensor.is_meta:
                digests[name] = tensor_digest(name, layout, tensor)
        remember_floats_(model, digests)
        now = combined_fingerprint(digests, config_numbers(model))
        if now != self.record["fingerprint"] == self._identity(model):
            keep_fingerprint_(model, now, self.record["fingerprint"])
        _belongs_to_(model, self.path, self.record["source"])

    def _identity(self, model: PreTrainedModel) -> str:
        return combined_fingerprint(self.digests, config_numbers(model))


def _is_stored(layer: nn.Module) -> TypeGuard[PackedLayer]:
    """Whether a module is a packed layer with codes of its own."""
    return isinstance(layer, PackedLayer) and is_packed(layer) and not layer.is_tied


def _belongs_to_(model: PreTrainedModel, folder: Path, source: str) -> None:
    """Note the base's folder, which PEFT writes into adapters, and what `save_pretrained` needs."""
    model.name_or_path = str(folder)
    save_as_base_(model, source)


def save_as_base_(model: PreTrainedModel, source: str | None = None) -> None:
    """Let `model.save_pretrained(folder)` write a base while the model has packed layers.

    transformers' own method would write codes and scales without saying what they are, and then
    load them as random weights. `source` is recorded in base.json; default: `model.name_or_path`.
    """
    source = (model.name_or_path or "") if source is None else source
    # a partial is copied along with the model that it holds
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model, source)


def _save_pretrained(
    model: PreTrainedModel,
    source: str,
    save_directory: str | Path,
    is_main_process: bool = True,
    **settings: Any,
) -> None:
    if not packed_layers(model) or getattr(model, "_hf_peft_config_loaded", False):
        method = type(model).save_pretrained  # floats, or the adapter of model.add_adapter
        method(model, save_directory, is_main_process=is_main_process, **settings)
        return
    unknown = ("state_dict", "variant", "push_to_hub", "distributed_checkpoint")
    if refused := [name for name in unknown if settings.get(name)]:
        raise SourceError(
            f"save_pretrained: a QWLoRA base cannot be saved with {listed(refused)}. Leave it "
            "out; to upload the base, call model.push_to_hub"
        )
    if is_main_process:
        write_base(model, None, save_directory, source)


def read_record(folder: Path) -> dict[str, Any]:
    """Read `base.json`.

    Raises:
        SourceError: it is missing, unreadable, or has another format version.
    """
    if not (folder / RECORD).is_file():
        raise SourceError(f"{str(folder)!r} is not a QWLoRA base: it has no {RECORD}")
    record = read_object(folder / RECORD)
    if (stated := record.get("format")) != FORMAT:
        raise SourceError(
            f"base {str(folder)!r} has format {stated!r}, but this version reads {FORMAT}; "
            "quantize again, with the same version of qwlora"
        )
    kinds = {"fingerprint": str, "source": str, "layers": dict, "tensors": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
        raise SourceError(
            f"base {str(folder)!r}: missing or malformed in {RECORD}: {' and '.join(wrong)}; "
            "quantize again"
        )
    return record


class _Layer(BaseModel):
    """The record of one packed layer: integers must be `int`, not 4.0 or true."""

    model_config = ConfigDict(strict=True)

    shape: list[PositiveInt]
    bitwidth: int
    symmetric: bool
    axis: int | None
    block_size: int | None
    scale_bitwidth: int | None = None
    float_offset: bool = False


def _read_layers(
    record: Mapping[str, Any], where: str
) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
    """Scheme and shape of each packed layer in a `base.json`, by module path."""
    layers = {}
    for name, layer in record["layers"].items():
        try:
            shape = tuple(_Layer.model_validate(layer).shape)
            scheme = Scheme.from_json(layer)
            scheme.scale_shape(shape)
        except _UNUSABLE as error:
            raise _misfit(name, error, where) from error
        layers[name] = scheme, shape
    return layers


def _misfit(name: str, error: Exception, where: str) -> GridError:
    reason = str(error) or type(error).__name__
    if isinstance(error, ValidationError):
        reason = "; ".join(f"{e['loc']}: {e['msg']}" for e in error.errors(include_url=False))
    return GridError(
        f"{where}: layer {name!r} in {RECORD} does not fit the model ({reason}); quantize again"
    )
