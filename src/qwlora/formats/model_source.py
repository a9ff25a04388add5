"""Where a float model comes from.

    ./a/folder                 a Hugging Face checkpoint
    ./a/model.gguf             a GGUF file (dequantized while loading)
    package:NAME/PATH          a file or folder inside an installed Python package, found without importing the package
    A+B+C                      parts of one .gguf file in their order, each as one of the above; joined once, in the user's cache
    owner/name                 a Hugging Face hub id; owner/name/FILE.gguf a file of it. `fetch` has the hub's client download it
    ./a/base                   a base that was frozen before, whose integers can be kept, and nothing else be done to them

`locate` and `fetch` are free of torch, and `locate` of the network: it is how a recipe learns early that its model is not there.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import MissingExtraError, SourceError, foreign_as
from qwlora.formats.hub import downloaded
from qwlora.formats.joined_files import join_parts
from qwlora.formats.user_path import user_path
from qwlora.messages import listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Location:
    """Arguments for `from_pretrained`: a folder or hub id, and the GGUF file inside it if it is one; no files on the hub before `fetch`."""

    pretrained: str
    gguf_file: str | None
    files: tuple[Path, ...]

    def arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""
        return Path(self.pretrained) / self.gguf_file if self.gguf_file else Path(self.pretrained)

    @property
    def holds_floats(self) -> bool:
        """Whether transformers alone makes a float model of it: a GGUF file (dequantized), or a folder that no quantizer wrote, ours included."""
        if self.gguf_file:
            return True
        names = {file.name for file in self.files}
        if "base.json" in names:
            return False
        config = (self.path / "config.json").read_text(errors="replace")
        return not names & {"quantize_config.json", "quant_config.json"} and not re.search(
            r'"(quantization|compression)_config"\s*:\s*\{', config
        )


def locate(source: str) -> Location:
    """Find `source` without loading it.

    Raises:
        SourceError: nothing is there, or what is there is not a model.
    """
    if "+" in source and not user_path(source).exists():
        parts = [
            _inside_package(part) if part.startswith("package:") else user_path(part)
            for part in source.split("+")
        ]
        path = join_parts(parts)
        return Location(str(path.parent), path.name, tuple(parts))
    if source.startswith("package:"):
        path = _inside_package(source)
    else:
        path = user_path(source)
        on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+\.gguf))?", source)
        if on_hub and not path.exists():
            return Location(on_hub[1], on_hub[2], ())
    if not path.exists():
        raise SourceError(
            f"model {source!r} does not exist. Give a folder with config.json, a .gguf file, package:NAME/PATH for a file inside an installed package, "
            "or a hub id like owner/name"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            held = sorted(p.name for p in path.glob("*.gguf"))
            remedy = (
                f"give one of its files: {listed(held)}"
                if held
                else "give the folder of a Hugging Face checkpoint, or a .gguf file"
            )
            raise SourceError(f"model folder {source!r} has no config.json; {remedy}")
        return Location(str(path), None, tuple(sorted(p for p in path.iterdir() if p.is_file())))
    if path.suffix != ".gguf":
        raise SourceError(
            f"model file {source!r} is not a .gguf file; for a Hugging Face checkpoint give its folder"
        )
    return Location(str(path.parent), path.name, (path,))


def fetch(source: str) -> Location:
    """`locate`; what is on the hub is downloaded into its client's cache, and found there.

    Raises:
        SourceError: as `locate`; or the hub has no such model, or cannot be reached.
    """
    location = locate(source)
    if location.files:
        return location
    folder = _downloaded(
        location.pretrained, *([location.gguf_file] if location.gguf_file else _HUB_FILES)
    )
    if not location.gguf_file and not any(folder.glob("*.safetensors")):
        folder = _downloaded(location.pretrained, *_HUB_FILES, "*.bin")
    return locate(str(folder / location.gguf_file if location.gguf_file else folder))


@cache
def _downloaded(repository: str, *files: str) -> Path:
    return downloaded(
        "model", repository, files, None if any("/" in file for file in files) else ["*/*"]
    )  # other formats of the same weights


def _inside_package(source: str) -> Path:
    package, _, rest = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if re.fullmatch(r"\w+", package) else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"model {source!r}: the Python package {package!r} is not installed; install it (pip install {package.replace('_', '-')})"
        )
    return Path(next(iter(spec.submodule_search_locations))) / rest


def _readable(source: str) -> Location:
    """`fetch`, and see that what reads it is installed and that `check_counts_of` has nothing against it."""
    location = fetch(source)
    if location.gguf_file and importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            f"gguf is needed to read {source!r} and is not installed: pip install 'qwlora[gguf]'"
        )
    check_counts_of(location)
    return location


def check_counts_of(location: Location) -> None:
    """Refuse files whose configuration would fill memory while transformers reads it.

    Raises:
        SourceError: they count more layers than a model has, or cannot be read.
    """
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_file import GgufFile

        GgufFile(location.path)
    else:
        from qwlora.formats.model_config import check_folder

        check_folder(location.path)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Raise whatever transformers raises as a SourceError about `what`; one about code of the
    model's own names the key that permits it.
    """
    with foreign_as(SourceError, f"{what} cannot be loaded"):
        try:
            yield
        except ValueError as error:
            refuse_code(what, error)
            raise


def refuse_code(what: str, error: Exception) -> None:
    """Raise a SourceError if transformers failed since it may not run code of the model's own."""
    if "trust_remote_code" in str(error):
        raise SourceError(
            f"{what} needs Python code that its own files bring along (auto_map in config.json or "
            "tokenizer_config.json), and QWLoRA does not run that. Read the code; if you trust it, "
            "set model.trust_remote_code: true in the recipe"
        ) from error


def load_model(source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The float32 model.

    Args:
        trust_remote_code: run Python code from the model's folder, if it names some.

    Raises:
        SourceError: `transformers` cannot load it (its own message is kept), its files hold integers, or their
            tensors are not exactly the model's parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM

    location = _readable(source)
    if not location.holds_floats:
        raise SourceError(
            f"model {source!r} holds integers; they can be kept (base.solver: keep), but there is no float model to load"
        )
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        GgufCheckpoint.check_names(location.path)
    elif location.path.is_dir():
        from qwlora.formats.safetensors_files import check_shards_are_inside

        check_shards_are_inside(location.path)
    with _loading(f"model {source!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location.pretrained,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **location.arguments(),
        )
    model: PreTrainedModel = loaded[0]
    _refuse_other_tensors(source, type(model).__name__, loaded[1])
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_file import GgufFile
        from qwlora.formats.gguf.rope_config import warn_of_positions

        warn_of_positions(GgufFile(location.path), model.config)
        forget_gguf_(model)
    return model.eval()


def _refuse_other_tensors(source: str, model: str, found: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's, from what transformers reports.

    transformers would fill missing tensors with random numbers and leave out what the model has no place
    for: with one layer of two in config.json, half of the checkpoint. What its model classes declare
    ignorable (old buffers, layers for multi-token prediction) is not in the report.
    """
    wrong = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    unknown = sorted(found["unexpected_keys"])
    if wrong:
        also = f"; the files hold {listed(unknown)}, which it does not have" if unknown else ""
        raise SourceError(
            f"model {source!r}: its files do not hold, or hold in another shape, {listed(wrong)} of "
            f"{model}{also}. Download it again, or give a checkpoint of the whole language model"
        )
    if unknown:
        raise SourceError(
            f"model {source!r}: its files hold {listed(unknown)}, which {model} as config.json describes "
            f"it does not have ({len(unknown)} tensors would be left out). Compare config.json "
            "(num_hidden_layers and the like) with the checkpoint's original, or download it again"
        )


def forget_gguf_(model: PreTrainedModel) -> None:
    """Let a model whose GGUF file was dequantized while loading be the plain float model that it is: transformers would refuse to train it."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.__dict__["is_quantized"] = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_config(source: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; see `load_model`.

    Raises:
        SourceError: `transformers` cannot read it, or it counts more layers than a model has.
    """
    from transformers import AutoConfig

    location = _readable(source)
    with _loading(f"model {source!r}"):
        return AutoConfig.from_pretrained(
            location.pretrained, trust_remote_code=trust_remote_code, **location.arguments()
        )


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; see `load_model`.

    Raises:
        SourceError: there is none, or `transformers` cannot load it.
    """
    from transformers import AutoTokenizer

    location = _readable(source)
    without = f"model {source!r} has no tokenizer: its files (tokenizer.json and the like) belong beside the weights"
    if not location.gguf_file and not any(
        re.match("(tokenizer|vocab|spiece|sentencepiece)", file.name) for file in location.files
    ):
        raise SourceError(without)
    with _loading(f"the tokenizer of model {source!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            location.pretrained, trust_remote_code=trust_remote_code, **location.arguments()
        )
    if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
        raise SourceError(without)
    return tokenizer
