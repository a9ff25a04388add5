"""Locating and loading the float model that a recipe names.

    ./a/folder                 a Hugging Face checkpoint
    ./a/model.gguf             a GGUF file, dequantized when it is loaded
    package:NAME/PATH          a file or folder in an installed Python package (it is not imported),
                               by the name of the package or of its distribution
    owner/name                 a Hugging Face hub id; owner/name/FILE.gguf is one file of it.
                               `fetch` downloads it
    ./a/base                   a frozen base: its integers can be kept, but it has no float model

`locate` and `fetch` do not import torch, and `locate` does not use the network. This way a recipe
can report a missing model before anything else is loaded.
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
from qwlora.formats.user_path import does_not_exist, source_path
from qwlora.messages import listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


CARD = "README.md"  # says where a model is from and its license; no part of what it computes
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CARD)


@dataclass(frozen=True)
class Location:
    """A located model.

    Args:
        pretrained: the folder or hub id, as `from_pretrained` takes it.
        gguf_file: the name of the GGUF file in it, or None.
        files: the model's local files, without its card; empty for a hub id that `fetch` has not
            downloaded.
    """

    pretrained: str
    gguf_file: str | None
    files: tuple[Path, ...]

    def arguments(self) -> dict[str, Any]:
        """Further keyword arguments for `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""
        return Path(self.pretrained) / self.gguf_file if self.gguf_file else Path(self.pretrained)

    @property
    def holds_floats(self) -> bool:
        """Whether transformers can load it as a float model: a GGUF file, which it dequantizes, or
        a folder that is neither a quantized checkpoint nor a QWLoRA base."""
        if self.gguf_file:
            return True
        names = {file.name for file in self.files}
        if "base.json" in names:
            return False
        config = (self.path / "config.json").read_text(errors="replace")
        return not names & {"quantize_config.json", "quant_config.json"} and not re.search(
            r'"(quantization|quantization_config|compression_config)"\s*:\s*\{', config
        )


def locate(source: str) -> Location:
    """Find the files of `source` without loading them.

    Raises:
        SourceError: the path does not exist or is not a model.
    """
    path = source_path(source)
    on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+\.gguf))?", source)
    if on_hub and not path.exists():
        return Location(on_hub[1], on_hub[2], ())
    if not path.exists():
        raise SourceError(
            f"model {source!r} {does_not_exist(source, path)}. Give a folder with config.json, a "
            ".gguf file, package:NAME/PATH for a file inside an installed package, or a "
            "hub id like owner/name"
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
        files = (p for p in path.iterdir() if p.is_file() and p.name != CARD)
        return Location(str(path), None, tuple(sorted(files)))
    if path.suffix != ".gguf":
        raise SourceError(
            f"model file {source!r} is not a .gguf file. "
            "For a Hugging Face checkpoint, give its folder"
        )
    return Location(str(path.parent), path.name, (path,))


def fetch(source: str) -> Location:
    """As `locate`, but a model on the hub is downloaded into the Hugging Face cache first.

    Raises:
        SourceError: see `locate`; also if the hub has no such model or cannot be reached.
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
    # subfolders of a repository usually hold the same weights in other formats
    ignored = None if any("/" in file for file in files) else ["*/*"]
    return downloaded("model", repository, files, ignored)


def _readable(source: str) -> Location:
    """As `fetch`; also check that the gguf package is installed if needed, and the layer counts."""
    location = fetch(source)
    if location.gguf_file and importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            f"gguf is needed to read {source!r} and is not installed: pip install 'qwlora[gguf]'"
        )
    check_counts_of(location)
    return location


def check_counts_of(location: Location) -> None:
    """Check that transformers can read the configuration without filling the memory.

    Raises:
        SourceError: it has an impossible number of layers, or it cannot be read.
    """
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_file import GgufFile

        GgufFile(location.path)
    else:
        from qwlora.formats.huggingface.model_config import check_folder

        check_folder(location.path)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn any exception of transformers into a SourceError about `what`."""
    with foreign_as(SourceError, f"{what} cannot be loaded"):
        try:
            yield
        except ValueError as error:
            from qwlora.formats.huggingface.model_config import refuse_remote_code

            refuse_remote_code(what, error)
            raise
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):  # transformers prints a table of them
                raise SourceError(
                    f"{what}: its files hold tensors of other shapes than config.json describes. "
                    "Compare hidden_size, intermediate_size, vocab_size and the numbers of heads "
                    "in config.json with the original, or download the model again"
                ) from error
            raise


def load_model(source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the float model in float32.

    Args:
        trust_remote_code: run Python code from the model's folder if its config.json refers to any.

    Raises:
        SourceError: the checkpoint is quantized, its tensors are not exactly the model's
            parameters, or `transformers` cannot load it (the message includes its error).
    """
    import torch
    from transformers import AutoModelForCausalLM

    location = _readable(source)
    if not location.holds_floats:
        raise SourceError(
            f"model {source!r} holds integers, so there is no float model to load. "
            "Keep the integers as they are (base.solver: keep), or give the float model"
        )
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        GgufCheckpoint.check_names(location.path)
    elif location.path.is_dir():
        from qwlora.formats.huggingface.safetensors_files import check_shards_are_inside

        check_shards_are_inside(location.path)
    with _loading(f"model {source!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location.pretrained,
            config=None if location.gguf_file else load_config(source, trust_remote_code),
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
    """Check, from the loading report of transformers, that the checkpoint has exactly the model's
    tensors.

    transformers fills missing tensors with random numbers and silently skips unknown ones. For
    example, it skips half of the checkpoint if config.json says one layer instead of two. Tensors
    that its model classes declare ignorable (old buffers, layers for multi-token prediction) are
    not in the report.
    """
    wrong = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    unknown = sorted(found["unexpected_keys"])
    if wrong:
        also = f"; the files also hold {listed(unknown)}, which it does not have" if unknown else ""
        raise SourceError(
            f"model {source!r}: missing from its files, or stored in another shape: "
            f"{listed(wrong)} of {model}{also}. Download it again, or give a checkpoint of the "
            "whole language model"
        )
    if unknown:
        raise SourceError(
            f"model {source!r}: its files hold {listed(unknown)}, which {model} built from "
            f"config.json does not have ({len(unknown)} tensors would be skipped). Compare "
            "config.json (for example num_hidden_layers) with the original, or download it again"
        )


def forget_gguf_(model: PreTrainedModel) -> None:
    """Remove the quantization marks that transformers leaves on a model loaded from a GGUF file.

    The weights were dequantized, so it is a plain float model, but transformers would refuse to
    train it.
    """
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.__dict__["is_quantized"] = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_config(source: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the model's configuration; see `load_model`.

    Raises:
        SourceError: `transformers` cannot read it, or it has an impossible number of layers.
    """
    from transformers import AutoConfig

    from qwlora.formats.huggingface.model_config import use_default_implementations_

    location = _readable(source)
    with _loading(f"model {source!r}"):
        config = AutoConfig.from_pretrained(
            location.pretrained, trust_remote_code=trust_remote_code, **location.arguments()
        )
    use_default_implementations_(config)
    return config


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; see `load_model`.

    Raises:
        SourceError: the model has no tokenizer, or `transformers` cannot load it.
    """
    from transformers import AutoTokenizer

    location = _readable(source)
    missing = SourceError(
        f"model {source!r} has no tokenizer. Put its files (tokenizer.json and "
        "tokenizer_config.json) in the folder of the weights"
    )
    if not location.gguf_file and not any(
        re.match("(tokenizer|vocab|spiece|sentencepiece)", file.name) for file in location.files
    ):
        raise missing
    with _loading(f"the tokenizer of model {source!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            location.pretrained, trust_remote_code=trust_remote_code, **location.arguments()
        )
    if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
        raise missing
    return tokenizer
