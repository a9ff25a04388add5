"""What may be in a folder of exported files, checked before any runtime sees it.

A bundle comes from anybody, and runtimes trust their files: a configuration can name a library, a
Python file, a hub repository or a file elsewhere. So files, and the keys and values of
configurations, are compared with what the target's own writer writes:

    files     glob patterns, relative to the folder of a base or an adapter
    forms     by file name: what its JSON may hold, see `misfits`
    ONNX      no tensor data outside the file next to it, no compiled context of an accelerator
    lists     of graphs and shards name files of the folder itself

Digests do not help, since whoever changes a file can also change its digest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from qwlora.errors import SourceError, foreign_as, listed
from qwlora.system.optional_packages import require
from qwlora.system.strict_json import distinct_keys

Form = Any  # see `misfits`
NUMBER = (int, float)
PLAIN = re.compile(r"[\w.-]+")  # a form: text that is neither a regular expression nor a path
OTHER_KEYS = "*"  # a key of a form: for all keys that it does not list
CANARY = "canary.json"  # what it answers, to compare a running server with
ADAPTER_FILE = "adapter.onnx_adapter"
RECORD = "qwlora.json"  # of a base or an adapter: the base's fingerprint, and digests of the files
STAGE = "stage.json"  # the job's record of a folder, which no runtime reads
TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",  # of SentencePiece
    "tekken.json",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # keys are any tokens
SETTINGS = ("config.json", "generation_config.json")
MODEL_FILES = (*SETTINGS, "model*.safetensors", "model.safetensors.index.json")
# An adapter as it was calibrated, next to the graph of its simulation.
_ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors", "qwlora.json", "README.md"
SIMULATED_ADAPTER = tuple(f"adapter/{name}" for name in _ADAPTER_FILES)
# Each depth by itself, since `PurePath.match` takes `**` for `*`.
GOLDEN_FILES = tuple(
    f"golden/{folder}{name}" for folder in ("", "*/", "*/*/") for name in ("*.npy", "golden.json")
)
# Keys by which some library loads code, wherever they are.
CODE_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "auto_map",
        "custom_ops_library",
        "experts_implementation",
        "model_file",
    }
)
_AGAIN = "Export again, or get a new copy. Nothing in it was run"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a target writes.

    Args:
        base, adapter: glob patterns of files; `*` does not match `/`. Files that hold base and
            adapter together are those of `adapter`.
        forms: of JSON files, by name.
        compiled: folders of compiled files for an accelerator; nothing here opens them.
        settings: forms of keys that this target adds to config.json.
        scripts: files that a user runs, and the template of each in `qwlora/targets`. A word in
            `@...@` stands for one word of letters, digits and hyphens.
    """

    base: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()
    settings: Mapping[str, Form] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)


def check_contents(contents: Contents, folder: Path, files: Sequence[str], is_base: bool) -> None:
    """Compare the `files` in the folder of a base or an adapter with what the target writes.

    Raises:
        SourceError: a file, or a key or value in one, is none that the target writes.
    """
    written = contents.base if is_base else contents.adapter
    patterns = (*written, RECORD, "README.md", CANARY)
    files = sorted(file for file in files if file != STAGE)
    # Absolute paths, since a relative pattern matches the end of any path.
    paths = {file: PurePosixPath("/", file) for file in files}
    if unknown := [f for f in files if not any(paths[f].match(f"/{p}") for p in patterns)]:
        raise SourceError(
            f"{str(folder)!r} holds {listed(unknown)}, which are not exported files. Remove them "
            f"if you added them. {_AGAIN}"
        )
    for file in files:
        path = folder / file
        problems = list[str]()
        if path.suffix == ".json" and path.name not in VOCABULARIES:
            problems = list(_json_problems(contents, path))
        elif (template := contents.scripts.get(file)) is not None:
            text = resources.files("qwlora.targets").joinpath(template).read_text(encoding="utf-8")
            pattern = re.sub("@[A-Z_]+@", "[a-z0-9-]+", re.escape(text))
            if not re.fullmatch(pattern, path.read_text(encoding="utf-8", errors="replace")):
                problems = ["it is not the script that an export writes"]
        elif path.suffix == ".onnx" and not file.startswith(contents.compiled):
            problems = list(onnx_problems(path))
        if problems:
            raise SourceError(f"{str(path)!r}: {listed(problems)}. {_AGAIN}")


def _json_problems(contents: Contents, path: Path) -> Iterator[str]:
    with foreign_as(SourceError, f"{str(path)!r} cannot be read"):
        # Of a key that is there twice, one reader takes the first value, another the last.
        content = json.loads(path.read_text(), object_pairs_hook=distinct_keys)
    values = list(_values(content))
    for key, value in values:
        if key in CODE_KEYS and value is not None:
            yield f"{key} {_short(value)} names code to load"
    if (form := contents.forms.get(path.name)) is not None:
        yield from misfits(content, form)
    elif path.name == "graphs.json":
        names = [value for key, value in values if key != "compiled" and isinstance(value, str)]
        match content:
            case {"graphs": dict(graphs)}:
                names += graphs  # files are named after them
        for name in names:
            if "/" in name or name.startswith("."):  # hidden files are not checked
                yield f"{_short(name)} is not a file of the folder"
    # transformers joins the names of shards to the folder: `../` and absolute paths would work.
    elif path.name.endswith(".index.json"):
        shards = frozenset(p.name for p in path.parent.glob("*.safetensors"))
        yield from misfits(content, {"metadata": object, "weight_map": {OTHER_KEYS: shards}})
    elif path.name in SETTINGS:
        yield from _unknown_text(content, contents.settings)


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)


def misfits(value: Any, form: Form, key: str = "the content") -> Iterator[str]:
    """A phrase for each part of a JSON value that is not of its form.

    A form is one of these: a dict of forms by key, all optional; a list with the form of its
    elements, or an empty list; one type or several. It can also be a frozenset of values, a regular
    expression, or the value itself.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        for name, inner in value.items():
            if name in form or OTHER_KEYS in form:
                yield from misfits(inner, form.get(name, form.get(OTHER_KEYS)), name)
            else:
                yield f"key {name!r} is unknown"
    elif isinstance(form, list) and isinstance(value, list) and form:
        for inner in value:
            yield from misfits(inner, form[0], key)
    elif not _is_of(value, form):
        yield f"{key} is {_short(value)}"


def _is_of(value: Any, form: Form) -> bool:
    if isinstance(form, frozenset):
        return any(_is_of(value, choice) for choice in form)
    if isinstance(form, type | tuple):
        if form is object:
            return True
        # In Python, True is an int; in JSON, true is no number.
        return isinstance(value, form) and not (isinstance(value, bool) and form is not bool)
    if isinstance(form, re.Pattern):  # compressed-tensors takes `re:...` for a regular expression
        return isinstance(value, str) and form.fullmatch(value) is not None
    return type(value) is type(form) and bool(value == form)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


def known_settings(settings: Mapping[str, Any], added: Iterable[str] = ()) -> dict[str, Any]:
    """A config.json or generation_config.json without text under keys that its class lacks, but for
    those that are `added`."""
    # Each architecture has other keys, so no form lists them. Numbers name no file and no code.
    from transformers import CONFIG_MAPPING, GenerationConfig

    known, model_type = {*added, "model_type"}, str(settings.get("model_type", ""))
    if not model_type:
        known |= GenerationConfig().to_dict().keys()
    elif model_type in CONFIG_MAPPING:
        known |= CONFIG_MAPPING[model_type]().to_dict().keys()
    return {
        key: value
        for key, value in settings.items()
        if key in known or not any(isinstance(inner, str) for _, inner in _values(value))
    }


def _unknown_text(content: Any, added: Mapping[str, Form]) -> Iterator[str]:
    if not isinstance(content, dict):
        yield "the content is not a JSON object"
        return
    known = known_settings(content, added)
    yield from (f"{key} {_short(content[key])} is unknown" for key in content if key not in known)
    for key, value in content.items():
        if key in added:
            yield from misfits(value, added[key], key)
        elif isinstance(value, dict) and "model_type" in value:  # of a part of the model
            yield from _unknown_text(value, {})


def onnx_problems(path: Path) -> Iterator[str]:
    """A phrase for each part of an ONNX file that is not in it or in a file next to it."""
    with foreign_as(SourceError, f"{str(path)!r} is not an ONNX model"):
        model = require("onnx", "onnx").load(path, load_external_data=False)
    # Tensors are also in attributes of nodes, in functions and in subgraphs: all messages are read.
    waiting: list[Any] = [model]
    while waiting:
        message = waiting.pop()
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                waiting += value if isinstance(value, Sequence) else [value]
        kind = type(message).__name__
        if kind == "TensorProto":
            for entry in message.external_data:
                # Not `exists`: a path that leaves the folder exists, too.
                if entry.key == "location" and entry.value not in os.listdir(path.parent):
                    yield f"tensor {message.name!r} is stored in {entry.value!r}"
        elif kind == "NodeProto" and message.op_type == "EPContext":
            yield f"node {message.name!r} is compiled code of an accelerator"
