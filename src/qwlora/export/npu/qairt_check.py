"""Every promise that the files of the `qairt` target make, checked without the simulation.

lists        every file that a YAML file names is there; every name in lora_weight_list.txt is
             an initializer of model.onnx
weights      every CASE.safetensors has exactly these names, with the shapes of model.onnx, so
             ranks are alike
encodings    every encodings file states its version, names tensors of its graph only, and has
             the entries of base.encodings; what quant_updatable_mode does not update is equal
             in all, with adapter_only everything but the LoRA branches
grids        every encoded weight lies on its grid, LoRA weights on that of their own use case
graphs       with a key-value cache: all of this holds for each of them, and tensors of one name
             have one encoding in all (`float_graphs.py`)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from qwlora import encodings
from qwlora.atomic import files_in
from qwlora.encodings.compare import encoding_differences
from qwlora.encodings.model import EncodingsFile
from qwlora.errors import EncodingsFileError, ExportError, VerificationError
from qwlora.export.npu.float_graphs import FloatGraphs
from qwlora.export.npu.float_onnx_runner import FloatOnnxModel
from qwlora.export.npu.kv_cache_graphs import has_graphs
from qwlora.export.npu.qairt_folder import (
    ADAPTORS_FILE,
    BASE_ENCODINGS,
    DATA_FILE,
    LIST_FILE,
    MODEL_FILE,
    UPDATABLE,
    branch_values,
    prefixes,
    use_case_graphs,
    use_case_lists,
    use_case_model,
)
from qwlora.export.target import PROOF
from qwlora.messages import listed
from qwlora.system.file_stamps import Stamps, file_stamps
from qwlora.system.optional_packages import require


def open_qairt(folder: Path, case: str) -> FloatOnnxModel:
    """A use case in ONNX Runtime, after all checks of the folder.

    A folder is checked once per process, and again after a file has changed.

    Raises:
        VerificationError: files contradict each other. All problems are listed, each with the name
            of its file.
    """
    _check(folder)
    return use_case_model(folder, case, "")


def open_qairt_graphs(folder: Path, case: str) -> FloatGraphs:
    """`open_qairt` of graphs with a key-value cache."""
    _check(folder)
    return use_case_graphs(folder, case)


def _check(folder: Path) -> None:
    own = [name for name in files_in(folder) if not name.startswith(f"{PROOF}/")]
    files = {name: file_stamps((folder / name).stat()) for name in own}
    if _checked.get(folder.resolve()) != files:
        if problems := list(find_problems(folder)):
            raise VerificationError(f"{folder}: the files contradict each other", problems)
        _checked[folder.resolve()] = files


_USE_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
_checked: dict[Path, dict[str, Stamps]] = {}  # folders without a problem, with their files


def find_problems(folder: Path) -> Iterator[str]:
    """Problems of the files in `folder`, most basic first; see the module."""
    found = [problem for prefix in prefixes(folder) for problem in _problems(folder, prefix)]
    yield from found
    if not found and has_graphs(folder):
        for case in ("base", *_cases(folder, prefixes(folder)[0])):
            yield from use_case_graphs(folder, case).problems()


def _problems(folder: Path, prefix: str) -> Iterator[str]:
    """Problems of the files of one graph."""
    found = list(_list_problems(folder, prefix))
    if found:
        yield from found
        return
    model_file, cases = f"{prefix}{MODEL_FILE}", _cases(folder, prefix)
    names = (folder / LIST_FILE).read_text().splitlines()
    model = _load(folder / model_file)
    known = model.graph.initializers
    found = [
        f"{LIST_FILE}: {name} is not an initializer of {model_file}"
        for name in names
        if name not in known
    ]
    shapes = {name: tuple(known[name].shape) for name in names if name in known}
    for case in cases:
        found += _weight_problems(folder / f"{case}.safetensors", shapes, model_file)
    if not found:
        for case in ("base", *cases):
            found += _value_problems(use_case_model(folder, case, prefix))
    yield from found
    if not found:
        base_file = f"{prefix}{BASE_ENCODINGS}"
        base = encodings.read_encodings(folder / base_file)
        fixed = _fixed(model, base, names)
        for case in cases:
            file = f"{prefix}{case}.encodings"
            yield from _entry_problems(
                base, base_file, encodings.read_encodings(folder / file), file, fixed
            )


def _value_problems(model: FloatOnnxModel) -> list[str]:
    """Problems of one model. Its weights are in memory only here: one model at a time."""
    try:
        model.check()
    except VerificationError as error:
        return list(error.problems)
    except (EncodingsFileError, ExportError) as error:
        return [f"{model.encodings.name}: {error}"]
    return []


def _list_problems(folder: Path, prefix: str) -> Iterator[str]:
    """Files that are missing, and YAML files that do not say what was written."""
    lists = use_case_lists([], prefix)
    files = (DATA_FILE, LIST_FILE, f"{prefix}{MODEL_FILE}", f"{prefix}{BASE_ENCODINGS}", *lists)
    missing = [name for name in files if not (folder / name).is_file()]
    yield from (f"{name} is missing" for name in missing)
    if missing:
        return
    cases = _cases(folder, prefix)
    for name, expected in use_case_lists(cases, prefix).items():
        found, wanted = _items(_yaml(folder / name)), _items(expected)
        if [item.get("name") for item in found] != cases:
            yield f"{name}: use cases are not {', '.join(cases)}, those of {prefix}{ADAPTORS_FILE}"
            continue
        for item, values in zip(found, wanted, strict=True):
            for key, value in values.items():
                if item.get(key) != value:
                    yield f"{name}: {key} of {item['name']} is {item.get(key)}, not {value}"
    for case in cases:
        for file in (f"{case}.safetensors", f"{prefix}{case}.encodings"):
            if not (folder / file).is_file():
                yield f"{file} is missing, but {prefix}{ADAPTORS_FILE} names it"


def _items(content: Any) -> list[dict[str, Any]]:
    """The use cases in a YAML file; empty if it does not list any."""
    items = content.get("use_case") if isinstance(content, dict) else content
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return items
    return []


def _cases(folder: Path, prefix: str) -> list[str]:
    """Names of the use cases. Files are named by them.

    Raises:
        VerificationError: a name is no name of a file in `folder`.
    """
    file = f"{prefix}{ADAPTORS_FILE}"
    names = list[str]()
    for item in _items(_yaml(folder / file)):
        name = item.get("name")
        if not isinstance(name, str) or not _USE_CASE.fullmatch(name):
            problem = f"{file}: {name!r} is not the name of a use case. Copy the folder again"
            raise VerificationError(f"{folder}: the files contradict each other", [problem])
        names.append(name)
    return names


def _weight_problems(
    path: Path, shapes: dict[str, tuple[int, ...]], model_file: str
) -> Iterator[str]:
    try:
        with safe_open(path, "np") as file:
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        yield f"{path.name}: cannot be read ({error})"
        return
    if differing := sorted(found.keys() ^ shapes.keys()):
        yield f"{path.name}: {listed(differing, 3)} only there or only in {LIST_FILE}"
    for name in sorted(found.keys() & shapes.keys()):
        if found[name] != shapes[name]:
            yield (
                f"{path.name}: {name} has shape {list(found[name])}, but {model_file} "
                f"{list(shapes[name])}; ranks must be padded alike"
            )


def _fixed(model: Any, base: EncodingsFile, names: list[str]) -> set[str]:
    """Names of the tensors whose encodings no use case changes."""
    mode, everything = model.metadata_props.get(UPDATABLE), set(base.by_name)
    if mode == "none":
        return everything
    if mode == "all":
        return everything.intersection(model.graph.initializers).difference(names)
    return everything - branch_values(model.graph, names)


def _entry_problems(
    base: EncodingsFile, base_file: str, own: EncodingsFile, file: str, fixed: set[str]
) -> Iterator[str]:
    """What differs from the base's encodings, where it must not."""
    if base.version != own.version:
        yield f"{file}: version {own.version}, but {base_file} has {base.version}"
        return
    if differing := sorted(base.by_name.keys() ^ own.by_name.keys()):
        yield f"{file}: {listed(differing, 3)} only there or only in {base_file}"
    for name in sorted(fixed & own.by_name.keys()):
        if encoding_differences(base.by_name[name], own.by_name[name]):
            yield f"{file}: the entry of {name} differs from {base_file}"


def _load(path: Path) -> Any:
    try:
        return require("onnx_ir", "onnx").load(path)
    except Exception as error:  # protobuf's and the operating system's
        raise VerificationError(
            f"{path.parent}: the files contradict each other",
            [f"{path.name} is not an ONNX model: {error}"],
        ) from error


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise VerificationError(
            f"{path.parent}: the files contradict each other", [f"{path.name} is no YAML: {error}"]
        ) from error
