"""Write the files of a QWLoRA base (`base_folder.py`) tensor by tensor, and read them with all
checks.

Loading builds the model without data, inserts empty packed layers, checks all tensor names, shapes
and types against it, and maps the files into memory. Each tensor is read once to check its digest.
A float tensor is copied only if another dtype is requested.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import torch
import transformers
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from qwlora.errors import (
    FingerprintError,
    GridError,
    QwloraWarning,
    SourceError,
    described,
    foreign_as,
    is_out_of_memory,
    lines,
    listed,
    problem_text,
)
from qwlora.formats import manifest
from qwlora.formats.checkpoint import (
    Checkpoint,
    empty_model,
    put_,
    read_generation_config_,
    tensor_at,
    tensor_names,
)
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn import PackedLayer, is_packed, tie_weights_
from qwlora.nn.fingerprint import (
    base_modules,
    base_settings,
    base_tensors,
    combined_fingerprint,
    differences,
    flat,
    float_tensors,
    keep_fingerprint_,
    remember_base_,
    settings_text,
    tensor_digest,
)
from qwlora.nn.frozen import assert_frozen, check_finite, refuse_meta
from qwlora.nn.packed_layer import packed_layers, place_empty_
from qwlora.nn.packed_tensor import PackedTensor, Parts, narrowest
from qwlora.system import strict_json
from qwlora.system.atomic import files_in, replacing_files, write_text
from qwlora.system.parameter_names import parameter_name
from qwlora.system.regular_files import check_readable, is_inside
from qwlora.system.strict_json import read_object

STEM = "base"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 2**29
FORMAT = 4
RECORD = "base.json"
# who builds the model of a base
TRANSFORMERS, DIFFUSERS, BY_CALLER = "transformers", "diffusers", "caller"
WITHOUT_QWLORA = (
    "this model is a QWLoRA base; run `pip install qwlora`, and `import qwlora.hf` before you "
    "load it"
)


class BaseWriter:
    """Writes a base module by module; for a whole model, use `write_base`.

        base.safetensors                               all fits into `shard_bytes`
        base-00001.safetensors ... and an index file   otherwise

    At most one shard is in memory. A tensor larger than a shard gets its own file.

    Args:
        folder: an empty folder, see `replacing_base`.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.digests: dict[str, str] = {}
        self._layers: dict[str, Any] = {}
        self._device = "cpu"  # where the codes were; those of another device may differ
        self._waiting: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}  # of each tensor in a shard
        self._bytes = 0  # of the tensors in shards

    def add(self, module: nn.Module, path: str = "") -> None:
        """Add the tensors of the module at `path` in the model, except those without data.

        They must not be modified before `finish`.
        """
        for name, (layout, tensor) in base_tensors(module).items():
            if tensor.is_meta:
                continue
            full = f"{path}.{name}" if path else name
            self._device = tensor.device.type if layout else self._device
            is_buffer = not layout and not isinstance(tensor, nn.Parameter)
            check_finite(full, tensor, allow_infinity=is_buffer)
            self.digests[full] = tensor_digest(full, layout, tensor)
            # Digests are of float32 values, so a narrower type that holds them changes none.
            # float64 has digests of its own, and stays.
            stored = narrowest(tensor) if tensor.dtype == torch.float32 else tensor
            waiting = sum(other.nbytes for other in self._waiting.values())
            if self._waiting and waiting + stored.nbytes > self.shard_bytes:
                self._write_shard_()
            stored = stored.detach().cpu().contiguous()
            # safetensors refuses overlapping tensors, such as a head on the embedding's storage
            begin, end = stored.data_ptr(), stored.data_ptr() + stored.nbytes
            overlaps = any(
                begin < other.data_ptr() + other.nbytes and other.data_ptr() < end
                for other in self._waiting.values()
            )
            self._waiting[full] = stored.clone() if overlaps else stored
        for below, layer in base_modules(module):
            if _is_stored(layer):
                self._layers[".".join(filter(None, (path, below)))] = {
                    "shape": list(layer.tensor.shape),
                    **layer.scheme.to_json(),
                }

    def finish(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, source: str
    ) -> str:
        """Write the last shard, configuration, tokenizer and base.json. Returns the fingerprint."""
        weights = INDEX if self._file_of else WEIGHTS
        self._write_shard_(None if self._file_of else WEIGHTS)
        if weights == INDEX:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._file_of}
            write_text(self.folder / INDEX, strict_json.dumps(index, indent=1) + "\n")
        shards, (library, name) = files_in(self.folder), _class_of(model)
        if isinstance(model, PreTrainedModel):
            _write_config(model, self.folder, weights)
        elif library == DIFFUSERS:
            model.save_config(self.folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        # Each tensor has its own digest, so a reader can name the tensor that changed.
        files = set(files_in(self.folder)).difference(shards)
        settings, modules = base_settings(model), base_modules(model)
        identity = combined_fingerprint(self.digests, settings)
        record = {
            "format": FORMAT,
            "fingerprint": identity,
            "configuration": settings_text(settings),
            "source": source,
            "library": library,
            "class": name,
            "device": self._device,
            # A resumed run adds layers in another order, so they are sorted: layers as in the model
            # (PEFT names the factors of experts in that order), tensors by name.
            "layers": {path: self._layers[path] for path, _ in modules if path in self._layers},
            "tensors": dict(sorted(self.digests.items())),
        }
        config = getattr(model, "config", None)
        if any(_is_remote(type(part)) for part in (model, config, tokenizer)):
            record["trust_remote_code"] = True
        manifest.write(self.folder, RECORD, record, files)
        return identity

    def _write_shard_(self, name: str | None = None) -> None:
        name = name or f"{STEM}-{len({*self._file_of.values()}) + 1:05}.safetensors"
        save_file(self._waiting, self.folder / name, metadata={"format": "pt"})
        self._file_of |= dict.fromkeys(self._waiting, name)
        self._bytes += sum(tensor.nbytes for tensor in self._waiting.values())
        self._waiting = {}


def _write_config(model: PreTrainedModel, scratch: Path, weights: str) -> None:
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    config.quantization_config = {"quant_method": "qwlora", "weights": weights}
    # `save_pretrained` copies only the code of the configuration and the tokenizer.
    if _is_remote(type(model)):
        custom_object_save(model, scratch, config)
    config.save_pretrained(scratch)
    # Written after `save_pretrained`, which deletes this attribute (transformers 5.24). Without
    # qwlora, transformers takes the sentence for a file name, and its error shows it.
    config.transformers_weights = WITHOUT_QWLORA
    config.to_json_file(Path(scratch, "config.json"))
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(scratch)


@contextmanager
def replacing_base(folder: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[BaseWriter]:
    """Yield a writer. When the block ends, its files replace the base in `folder`, tokenizer
    included; if the block raises, the old base stays. See `replacing_files`."""
    replaced = set[str]()
    # Shards are not listed in the record, and a smaller base would leave old ones behind. The
    # record may be a stranger's: what it lists outside of the folder is not deleted.
    if (folder / RECORD).is_file():
        listed_files = manifest.listed_files(folder, RECORD)
        replaced = {name for name in listed_files if is_inside(folder, name)} | {WEIGHTS, INDEX}
        replaced |= {file.name for file in folder.glob(f"{STEM}-{'[0-9]' * 5}.safetensors")}
        replaced = {name for name in replaced if (folder / name).is_file()}
    with replacing_files(folder, RECORD, replaced) as scratch:
        yield BaseWriter(scratch, shard_bytes)


def write_base(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, source: str
) -> str:
    """Write a base; see `base_folder.save_base`."""
    assert_frozen(model)
    refuse_meta(model, SourceError)
    _, base = next(base_modules(model))
    with replacing_base(Path(folder)) as writer:
        writer.add(base)
        identity = writer.finish(base, tokenizer, source)
        _check_rebuilt(writer.folder, type(base).__name__)
    remember_base_(base, writer.digests)
    # Its floats may have been those of another base, whose fingerprint the model then kept.
    keep_fingerprint_(base, identity, identity)
    save_as_base_(base, source, folder)
    return identity


def _check_rebuilt(folder: Path, name: str) -> None:
    """Build the model of the base in `folder` as `load_base` does. If it has other tensors than
    those in the files, warn, and let the record say that the caller builds it."""
    record = read_record(folder)
    if record["library"] == BY_CALLER or "trust_remote_code" in record:
        return
    base = BaseCheckpoint(folder)
    try:
        base.place_packed_(base.skeleton())
    except (GridError, SourceError) as error:
        reason = str(error).partition("\n  ")[2] or str(error)
        warnings.warn(
            f"config.json does not describe this {name}, so load_base needs the float model "
            f"(model=), and from_pretrained cannot load the base:\n  {reason}",
            QwloraWarning,
            stacklevel=4,
        )
        write_text(folder / RECORD, manifest.text({**record, "library": BY_CALLER}, RECORD))


def _class_of(model: nn.Module) -> tuple[str, str | None]:
    """The library and the class that `load_base` will build. `BY_CALLER`: it cannot build it."""
    kinds = type(model).__mro__
    # Code of a model's own folder is found by the configuration (auto_map), not by a class name.
    if any(_is_remote(kind) for kind in kinds):
        return TRANSFORMERS, None
    if isinstance(model, PreTrainedModel):
        # A user's subclass is not in transformers; the class below it builds the same tensors, or
        # `_check_rebuilt` notices.
        public = (k.__name__ for k in kinds if getattr(transformers, k.__name__, None) is k)
        name = next(public, "PreTrainedModel")
        if not name.endswith("PreTrainedModel"):
            return TRANSFORMERS, name
    if kinds[0].__module__.startswith(f"{DIFFUSERS}.") and hasattr(model, "save_config"):
        return DIFFUSERS, kinds[0].__name__
    return BY_CALLER, kinds[0].__name__


def _is_remote(kind: type) -> bool:
    return kind.__module__.startswith("transformers_modules.")


class BaseCheckpoint(Checkpoint):
    """The base in `folder`: a `Checkpoint` whose integers another job can freeze again, and the
    loader of the base (`load_into_`; transformers calls its parts). When a tensor is read, it is
    compared with its digest in base.json.

    Args:
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
        manifest.check(self.path, RECORD, self.where, "quantize again")
        self.files = SafetensorsFiles(folder, STEM)
        self.layers: dict[str, tuple[Scheme, tuple[int, ...]]] = {}  # by module path
        for path, layer in self.record["layers"].items():
            with self._layer(path):
                shape = tuple(_Layer.model_validate(layer).shape)
                scheme = Scheme.from_json(layer)
                # Allocates nothing, and refuses blocks that do not divide the rows, before a tensor
                # is read.
                PackedTensor.empty(scheme, shape)
            self.layers[path] = scheme, shape
        self.library = self.record.get("library", TRANSFORMERS)
        if config is None and self.library == TRANSFORMERS:
            config = read_config(self.path, trust_remote_code)
        self.config = config  # type: ignore[assignment] # None: not of transformers
        self.digests: dict[str, str] = {}
        self.layouts: dict[str, str] = {}  # of all tensors; empty for floats
        self._path_of = {parameter_name(path): path for path in self.layers}
        parts = {
            f"{path}.{part}": name for name, path in self._path_of.items() for part in Parts._fields
        }
        self.stored: dict[str, list[str]] = {}
        for name in self.files.names():
            self.stored.setdefault(parts.get(name, name), []).append(name)

    def skeleton(self, trust_remote_code: bool = False) -> nn.Module:
        """The float model of the base, without data, if its class is one that is installed."""
        name = self.record.get("class")
        if self.library == TRANSFORMERS:
            return empty_model(self.config, trust_remote_code, name)
        if self.library != DIFFUSERS:
            raise SourceError(
                f"{self.where} is a {name} that cannot be built from its files: the class is not "
                "from transformers or diffusers, or the model was changed. Build the float model "
                "(the meta device is enough) and pass it: load_base(..., model=)"
            )
        what = f"{self.where} is a {name} from diffusers, which cannot be imported"
        with foreign_as(SourceError, what, "pip install diffusers"):
            kind: Any = getattr(importlib.import_module(DIFFUSERS), str(name), None)
            is_model = isinstance(kind, type) and issubclass(kind, nn.Module)
        if not is_model:
            raise SourceError(
                f"{self.where} is of class {name!r}, which the installed diffusers does not have. "
                "Install the version that the model was saved with"
            )
        what = f"{self.where}: diffusers cannot build a {name} from config.json"
        with foreign_as(SourceError, what), init_empty_weights(include_buffers=False):
            model: nn.Module = kind.from_config(kind.load_config(self.path))
        return model.requires_grad_(False).eval()

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
        with self._layer(path):
            return PackedTensor(scheme, shape[-1], Parts(**tensors)).quantized

    def _checked(self, name: str, layout: str) -> Tensor:
        tensor = self.files.read(name)
        self.digests[name] = tensor_digest(name, layout, tensor)
        if self.digests[name] != self.record["tensors"].get(name):
            raise FingerprintError(
                f"{self.where}: {name} changed after saving: its digest is not that in {RECORD}. "
                "Copy it again, or quantize again"
            )
        return tensor

    @contextmanager
    def _layer(self, layer: str) -> Iterator[None]:
        """Turn errors from a bad record or bad numbers into a GridError that names this layer."""
        try:
            yield
        except (AttributeError, ValueError, RuntimeError) as error:
            # torch raises RuntimeError for this too, and then quantizing again would not help.
            if is_out_of_memory(error):
                raise
            why = described(error)
            if isinstance(error, ValidationError):
                why = "; ".join(map(problem_text, error.errors()))
            what = f"{self.where}: layer {layer!r} of {RECORD}"
            raise GridError(f"{what}: {why}; quantize again") from error

    def load_into_(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Load all stored tensors into a model without data. Floats outside packed weights become
        `dtype`."""
        names = self.place_packed_(model)
        for name, tensor in self.verified(model, check_configuration=True):
            is_cast = tensor.is_floating_point() and not self.layouts[name]
            put_(model, names[name], tensor.to(dtype) if is_cast else tensor)
        if isinstance(model, PreTrainedModel):
            read_generation_config_(model, self.path)
        refuse_meta(model, SourceError)
        self.finish_(model, dtype)

    def place_packed_(self, model: nn.Module) -> dict[str, list[str]]:
        """Insert empty packed layers, and check names, shapes and types of all stored tensors.
        Returns all names of each stored tensor.

        Raises:
            SourceError: the tensors are not those of the model; the message lists them.
            GridError: a layer does not exist in the model, or has another shape.
        """
        for name, (scheme, shape) in self.layers.items():
            with self._layer(name):
                layer = place_empty_(model, name, scheme)
                if layer.tensor.shape != shape:
                    raise GridError(f"its shape is {list(shape)}, not {list(layer.tensor.shape)}")
        # Tied after packing: a head that shares the embedding's codes is in no file.
        if isinstance(model, PreTrainedModel):
            tie_weights_(model)
        names, stored = tensor_names(model), set(self.files.names())
        wrong = [f"{name} is missing" for name in sorted(names.keys() - stored)]
        wrong += [f"{name} is not in the model" for name in sorted(stored - names.keys())]
        for name in sorted(names.keys() & stored):
            have, want = (_kind(t) for t in (self.files.read(name), tensor_at(model, name)))
            if have != want:
                wrong.append(f"{name} is {have}, not {want}")
        if wrong:
            shown = "\n  ".join(lines(wrong))
            raise SourceError(
                f"{self.where}: its tensors do not match {RECORD} and config.json; quantize "
                f"again\n  {shown}"
            )
        self.layouts = {name: layout for name, (layout, _) in base_tensors(model).items()}
        return names

    def verified(
        self, model: nn.Module, check_configuration: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor (a view of the mapped file) of all stored tensors.

        Raises:
            FingerprintError: one differs from its digest; or, after the last one
                (`check_configuration`), the configuration is not the one that was saved.
        """
        for name in self.files.names():
            yield name, self._checked(name, self.layouts[name])
        identity, saved = self._identity(model), self.record["fingerprint"]
        if check_configuration and identity != saved:
            with foreign_as(SourceError, f"{self.where}: configuration in {RECORD} is not JSON"):
                saved_settings = flat(json.loads(str(self.record.get("configuration"))))
            changed = listed(differences(saved_settings, flat(base_settings(model))), 3)
            raise FingerprintError(
                f"{self.where} has fingerprint {identity}, but {RECORD} says {saved}. Settings "
                f"that changed after saving: {changed or 'none, only the fingerprint did'}. "
                + (
                    "Build the float model as it was when the base was saved"
                    if self.library == BY_CALLER
                    else "Copy the base again, or quantize again"
                )
            )

    def finish_(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Check the grids, and store on the model which base it is."""
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer):
                layer.compute_dtype = dtype
            if _is_stored(layer):
                # An encoding checks its numbers; codes need no check: any bits are valid ones.
                with self._layer(name):
                    _ = layer.encoding
        digests = dict(self.digests)
        for name, tensor in float_tensors(model).items():
            # Recorded digests are of float64 values if they are stored as such, else of float32.
            is_cast = tensor.dtype != torch.float32 or self.files.dtype(name) == "F64"
            if is_cast and not tensor.is_meta:
                digests[name] = tensor_digest(name, "", tensor)
        remember_base_(model, digests)
        current = combined_fingerprint(digests, base_settings(model))
        if current != self.record["fingerprint"] == self._identity(model):
            keep_fingerprint_(model, current, self.record["fingerprint"])
        save_as_base_(model, self.record["source"], self.path)

    def _identity(self, model: nn.Module) -> str:
        return combined_fingerprint(self.digests, base_settings(model))


def _kind(tensor: Tensor | None) -> str:
    assert tensor is not None
    # A float may be stored in a narrower type than that of the model (`narrowest`).
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def _is_stored(layer: nn.Module) -> TypeGuard[PackedLayer]:
    return is_packed(layer) and not layer.is_tied


def save_as_base_(model: nn.Module, source: str | None = None, folder: str | Path = "") -> None:
    """Let `model.save_pretrained` write a base while the model has packed layers.

    Args:
        source: recorded in base.json; default: `model.name_or_path`.
        folder: the base that the model is from, which PEFT writes into adapters.
    """
    if not hasattr(model, "save_pretrained"):
        return
    if isinstance(model, PreTrainedModel):
        source = model.name_or_path if source is None else source
        model.name_or_path = str(folder) or model.name_or_path
    # The method of transformers or diffusers would write codes and scales without saying what they
    # are, and load them as random weights. A partial is copied along with the model that it holds;
    # a closure of a copied model would still save the original.
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model, source or "")


def _save_pretrained(
    model: Any,
    source: str,
    save_directory: str | Path,
    is_main_process: bool = True,
    **settings: Any,
) -> None:
    has_adapter = isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded
    if has_adapter or not packed_layers(model):
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
    """Read `base.json`; a SourceError if it is missing, unreadable, or of another format."""
    check_readable(folder)
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
    # If not strict, pydantic takes 4.0 and true for integers.
    model_config = ConfigDict(strict=True)

    shape: list[Annotated[int, Field(gt=0, lt=2**31)]] = Field(min_length=1)
    bitwidth: int
    symmetric: bool
    axis: int | None
    block_size: int | None
    scale_bitwidth: int | None = None
    float_offset: bool = False
