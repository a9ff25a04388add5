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
v3           base tensors of every graph are the bytes of model.data, LoRA tensors those of
             CASE.safetensors; base.onnx is model.onnx without the branches
"""

from __future__ import annotations

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
from qwlora.export.cached_graphs import has_graphs, read_graphs
from qwlora.export.float_graphs import FloatGraphs
from qwlora.export.float_runtime import FloatOnnxModel
from qwlora.export.qairt_folder import (
    ADAPTORS_FILE,
    BASE_ENCODINGS,
    CONFIG_FILE,
    DATA_FILE,
    LIST_FILE,
    MODEL_FILE,
    UPDATABLE,
    V3_CONFIG_FILE,
    V3_ENCODINGS,
    V3_FILE,
    branch_values,
    safetensors_places,
    use_case_graphs,
    use_case_model,
)
from qwlora.export.target import PROOF
from qwlora.export.use_cases import NONE
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


_checked: dict[Path, dict[str, Stamps]] = {}  # folders without a problem, with their files


def prefixes(folder: Path) -> list[str]:
    """Of the names of the files of each graph."""
    return [f"{graph}_" for graph in read_graphs(folder)["graphs"]] if has_graphs(folder) else [""]


def find_problems(folder: Path) -> Iterator[str]:
    """Problems of the files in `folder`, most basic first; see the module."""
    found = [problem for prefix in prefixes(folder) for problem in _problems(folder, prefix)]
    yield from found
    if not found and has_graphs(folder):
        first = prefixes(folder)[0]
        for case in ("base", *(item["name"] for item in _yaml(folder / f"{first}{ADAPTORS_FILE}"))):
            yield from use_case_graphs(folder, case).problems()


def _problems(folder: Path, prefix: str) -> Iterator[str]:
    """Problems of the files of one graph."""
    found = list(_missing_files(folder, prefix))
    if found:
        yield from found
        return
    model_file = f"{prefix}{MODEL_FILE}"
    cases = [item["name"] for item in _yaml(folder / f"{prefix}{ADAPTORS_FILE}")]
    names = (folder / LIST_FILE).read_text().splitlines()
    graph = _load(folder / model_file).graph
    found = [
        f"{LIST_FILE}: {name} is not an initializer of {model_file}"
        for name in names
        if name not in graph.initializers
    ]
    shapes = {n: tuple(graph.initializers[n].shape) for n in names if n in graph.initializers}
    for case in cases:
        found += _weight_problems(folder / f"{case}.safetensors", shapes, model_file)
    found += list(_config_problems(folder, cases, prefix))
    if found:
        yield from found
        return
    for case in ("base", *cases):
        found += _value_problems(use_case_model(folder, case, prefix))
    v3 = FloatOnnxModel(folder / f"{prefix}{V3_FILE}", folder / f"{prefix}{V3_ENCODINGS}")
    found += _value_problems(v3)
    yield from found
    if not found:
        base_file = f"{prefix}{BASE_ENCODINGS}"
        base = encodings.read(folder / base_file)
        fixed = _fixed(folder / model_file, base, names)
        for case in cases:
            file = f"{prefix}{case}.encodings"
            yield from _entry_problems(base, base_file, encodings.read(folder / file), file, fixed)
        yield from _graph_problems(folder, cases, set(names), prefix)


def _value_problems(model: FloatOnnxModel) -> list[str]:
    """Problems of one model. Its weights are in memory only here: one model at a time."""
    try:
        model.check()
    except VerificationError as error:
        return list(error.problems)
    except (EncodingsFileError, ExportError) as error:
        return [f"{model.encodings.name}: {error}"]
    return []


def _missing_files(folder: Path, prefix: str) -> Iterator[str]:
    lists = [f"{prefix}{name}" for name in (CONFIG_FILE, V3_CONFIG_FILE, ADAPTORS_FILE)]
    own = [f"{prefix}{name}" for name in (MODEL_FILE, BASE_ENCODINGS, V3_FILE, V3_ENCODINGS)]
    for name in (DATA_FILE, LIST_FILE, *own, *lists):
        if not (folder / name).is_file():
            yield f"{name} is missing"
    for name in lists:
        if (folder / name).is_file():
            for file in sorted(_files_named(_yaml(folder / name))):
                if not (folder / file).is_file():
                    yield f"{file} is missing, but {name} names it"


def _files_named(content: Any) -> set[str]:
    items = content["use_case"] if isinstance(content, dict) else content
    return {
        value for item in items for key, value in item.items() if key not in ("name", "output_path")
    }


def _config_problems(folder: Path, cases: list[str], prefix: str) -> Iterator[str]:
    adaptors = f"{prefix}{ADAPTORS_FILE}"
    for item in _yaml(folder / adaptors):
        expected = {
            "encodings_path": f"{prefix}{item['name']}.encodings",
            "safetensor_path": f"{item['name']}.safetensors",
        }
        yield from _wrong_values(adaptors, item, expected)
    v3 = ["base", *(case for case in cases if case != NONE)]
    for config, names in ((CONFIG_FILE, cases), (V3_CONFIG_FILE, v3)):
        file = f"{prefix}{config}"
        items = _yaml(folder / file)["use_case"]
        if [item["name"] for item in items] != names:
            yield f"{file}: use cases are not {', '.join(names)}, those of {adaptors}"
        for item in items:
            name, is_v3 = item["name"], config == V3_CONFIG_FILE
            own = V3_ENCODINGS if is_v3 and name == "base" else f"{name}.encodings"
            expected = {
                "model_name": f"{prefix}{name}.onnx" if is_v3 else f"{prefix}{MODEL_FILE}",
                "quant_overrides": f"{prefix}{own}",
            }
            if not (is_v3 and name == "base"):
                expected["lora_weights"] = f"{name}.safetensors"
            yield from _wrong_values(file, item, expected)


def _wrong_values(file: str, item: dict[str, Any], expected: dict[str, str]) -> Iterator[str]:
    for key, value in expected.items():
        if item.get(key) != value:
            yield f"{file}: {key} of {item['name']} is {item.get(key)}, not {value}"


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


def _fixed(path: Path, base: EncodingsFile, names: list[str]) -> set[str]:
    """Names of the tensors whose encodings no use case changes."""
    model = _load(path)
    mode, graph = model.metadata_props.get(UPDATABLE), model.graph
    everything = set(base.by_name)
    if mode == "none":
        return everything
    if mode == "all":
        return everything.intersection(graph.initializers).difference(names)
    branch, _ = branch_values(graph, names)
    return everything - {value.name for value in branch}


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


def _graph_problems(
    folder: Path, cases: list[str], adapter: set[str], prefix: str
) -> Iterator[str]:
    """v3: where tensors are stored, and whether the base branch is the same in all graphs."""
    model_file, v3_file = f"{prefix}{MODEL_FILE}", f"{prefix}{V3_FILE}"
    model = _load(folder / model_file).graph
    nodes, places = _nodes(model), _places(model)
    for case in cases:
        if case == NONE:
            continue
        file = f"{prefix}{case}.onnx"
        graph = _load(folder / file).graph
        own = safetensors_places(folder / f"{case}.safetensors")
        if _nodes(graph) != nodes:
            yield f"{file}: its nodes are not those of {model_file}"
        for name, place in _places(graph).items():
            expected = (f"{case}.safetensors", *own[name]) if name in adapter else places.get(name)
            if place != expected:
                yield f"{file}: {name} is stored at {place}, not at {expected}"
    base = _load(folder / v3_file).graph
    for name, place in _places(base).items():
        if place != places.get(name):
            yield f"{v3_file}: {name} is stored at {place}, not at {places.get(name)}"
    operators = {node.outputs[0].name: node.op_type for node in model}
    for node in base:
        if operators.get(node.outputs[0].name) != node.op_type:
            yield f"{v3_file}: node of {node.outputs[0].name} is not in {model_file}"


def _nodes(graph: Any) -> list[Any]:
    return [
        (
            node.op_type,
            [value.name if value is not None else None for value in node.inputs],
            [value.name for value in node.outputs],
            sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()),
        )
        for node in graph
    ]


def _places(graph: Any) -> dict[str, Any]:
    """Where each initializer is stored: (file, first byte, bytes), or its own bytes."""
    ir = require("onnx_ir", "onnx")
    return {
        name: (str(value.const_value.location), value.const_value.offset, value.const_value.length)
        if isinstance(value.const_value, ir.ExternalTensor)
        else value.const_value.tobytes()
        for name, value in graph.initializers.items()
    }


def _load(path: Path) -> Any:
    try:
        return require("onnx_ir", "onnx").load(path)
    except Exception as error:  # protobuf's and the operating system's
        raise VerificationError(
            f"{path.parent}: the files contradict each other",
            [f"{path.name} is not an ONNX model: {error}"],
        ) from error


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())
