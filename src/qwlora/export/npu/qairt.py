"""The `qairt` target: one base, and weights and encodings of every LoRA use case, for the converter
and importer of Qualcomm's QAIRT.

    GRAPH_model.onnx, model.data    float model with LoRA branches, weights on their grids; LoRA
                                    weights are zeros, so by itself it computes the base
    GRAPH_base.encodings            its encodings
    lora_weight_list.txt            names of the updatable initializers, one a line
    CASE.safetensors                LoRA weights of a use case, by name of the initializer
    GRAPH_CASE.encodings            encodings of the whole graph for it
    GRAPH_lora_config.yaml          LoRA v2: use cases on one graph, switched one at a time
    GRAPH_lora_adaptor_list.yaml    the same files by use case
    golden/CASE/                    inputs, and the outputs that were computed of them

The graphs `prefill` and `decode` have a key-value cache and share model.data, CASE.safetensors and
lora_weight_list.txt; `float_graphs.py` lists the files next to them.

`none` is the zero adapter. Ranks are padded to the largest, the scale is folded into lora_B
(`use_case_adapters.py`), so QAIRT's lora_alpha stays 1.

Every promise of the files is checked without the simulation:

lists        every file that a YAML file names is there; every name in lora_weight_list.txt is
             an initializer of model.onnx
weights      every CASE.safetensors has exactly these names, with the shapes of model.onnx, so
             ranks are alike
encodings    every encodings file states its version, names tensors of its graph only, and has
             the entries of base.encodings; what quant_updatable_mode does not update is equal
             in all, with adapter_only everything but the LoRA branches
grids        every encoded weight lies on its grid, LoRA weights on that of their own use case
graphs       tensors of one name have one encoding in all graphs (`float_graphs.py`)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwlora.errors import EncodingsFileError, ExportError, VerificationError, foreign_as, listed
from qwlora.export.npu.aimet_encodings import write_float_encodings
from qwlora.export.npu.float_graphs import (
    FloatGraphs,
    float_graphs,
    write_graph_golden,
)
from qwlora.export.npu.float_onnx_runner import FloatOnnxModel
from qwlora.export.npu.kv_cache_graphs import (
    CachedGraphs,
    read_graphs,
    share_weights,
    write_graphs,
)
from qwlora.export.proof.contents import GOLDEN_FILES, Contents
from qwlora.export.target import PROOF, Backend, ExportedUseCases
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.formats.aimet_encodings.compare import encoding_differences
from qwlora.formats.aimet_encodings.model import EncodingsFile
from qwlora.formats.model_card import marked
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.npu_graph import NpuGraph
from qwlora.system.atomic import files_in
from qwlora.system.file_stamps import Stamps, file_stamps
from qwlora.system.optional_packages import require


class Qairt(Backend):
    """Float models with encodings and LoRA files for each use case; ONNX Runtime runs them with
    these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            "*model.onnx",
            "*_host.onnx",
            "model.data",
            "*.encodings",
            "*.safetensors",
            "*.yaml",
            "*lora_weight_list.txt",
            "graphs.json",
            *GOLDEN_FILES,
        )
    )

    def write_cases(self, exported: ExportedUseCases, folder: Path) -> None:
        write_qairt(exported, folder)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        encodings = [f"{graph}_{case}.encodings" for graph in _graphs(folder)]
        return [folder / name for name in (f"{case}.safetensors", *encodings)]

    def open(self, folder: Path, case: str) -> CachedGraphs:
        return open_qairt(folder, case)

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        return (
            f"`{base}` holds base and adapters together, as use cases, for Qualcomm's converter "
            "and LoRA importer."
        )


BASE, DATA_FILE, LIST_FILE = "base", "model.data", "lora_weight_list.txt"
UPDATABLE = "qwlora.quant_updatable_mode"  # in the metadata of the models


def write_qairt(exported: ExportedUseCases, folder: Path) -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    npus, inner, files = {}, {}, {}
    for graph in exported.base.graphs:
        npus[graph], inner[graph] = _write_graph(exported, graph, folder)
        # each use case has grids of its own
        files[graph] = {"model": f"{graph}_model.onnx", "encodings": {}}
    write_graphs(folder, npus, files, {"float": inner})
    for case, own in exported.cases.items():
        write_graph_golden(_opened(folder, case), own.sample["input_ids"], folder, case)
    template = resources.files("qwlora.export.npu") / "qairt_templates" / "README.md.template"
    text = template.read_text().replace("@UPDATABLE@", exported.updatable)
    (folder / "README.md").write_text(marked(text))


def _write_graph(
    exported: ExportedUseCases, graph: str, folder: Path
) -> tuple[NpuGraph, list[str]]:
    """Write the files of one graph.

    Returns:
        the graph with the zero adapter, and the names of its float tensors without an encoding.
    """
    ir, file = require("onnx_ir", "onnx"), f"{graph}_model.onnx"
    first = f"{next(iter(exported.base.graphs))}_model.onnx"
    base, names, digests = None, list[str](), dict[str, str]()
    for case, form in float_graphs({BASE: exported.base, **exported.cases}, graph):
        path, version = folder / f"{graph}_{case}.encodings", exported.base.encodings_version
        write_float_encodings(form.graph, form.made.encodings, path, version)
        model = form.made.model
        if base is None:
            base, names = form, [m.name for m in form.graph.marks if m.kind is Kind.ADAPTER]
            digests = _digests(model, names)
            (folder / LIST_FILE).write_text("".join(f"{name}\n" for name in names))
            model.metadata_props[UPDATABLE] = exported.updatable
            if file == first:
                ir.save(model, folder / file, external_data=DATA_FILE, size_threshold_bytes=64)
            elif differing := share_weights(model, folder / first):
                raise ExportError(f"{file}: {differing[0]} differs from that of {first}")
            else:
                ir.save(model, folder / file)
            continue
        own = _digests(model, names)
        if differing := sorted(name for name in own if digests.get(name) != own[name]):
            names_of_base = listed(differing, 3)
            raise ExportError(f"{case}: base tensors differ from the base's: {names_of_base}")
        weights = {name: np.array(model.graph.initializers[name].const_value) for name in names}
        save_file(weights, folder / f"{case}.safetensors", {"format": "np"})
    for list_file, content in use_case_lists(list(exported.cases), graph).items():
        (folder / list_file).write_text(yaml.safe_dump(content, sort_keys=False))
    assert base is not None
    assert base.npu is not None
    return base.npu, base.inner


def _graphs(folder: Path) -> list[str]:
    return list(read_graphs(folder)["graphs"])


def _opened(folder: Path, case: str) -> FloatGraphs:
    """The graphs of a use case, unchecked; "base" is the model as it is stored."""
    return FloatGraphs(folder, {name: _model(folder, name, case) for name in _graphs(folder)})


def _model(folder: Path, graph: str, case: str) -> FloatOnnxModel:
    """A use case of one graph; "base" has the weights of the model itself."""
    weights = None if case == BASE else folder / f"{case}.safetensors"
    encodings = folder / f"{graph}_{case}.encodings"
    return FloatOnnxModel(folder / f"{graph}_model.onnx", encodings, weights)


def branch_values(graph: Any, names: Iterable[str]) -> set[str]:
    """Names of the LoRA branches: the initializers `names` and what they compute, without the sums
    with a value of the base."""
    branch = {graph.initializers[name] for name in names}
    for node in graph:
        inside = [value for value in node.inputs if value in branch]
        if inside and not (node.op_type == "Add" and len(inside) == 1):
            branch.update(node.outputs)
    return {value.name for value in branch}


def _digests(model: Any, adapter: list[str]) -> dict[str, str]:
    """SHA-256 of every initializer of the base."""
    return {
        name: hashlib.sha256(value.const_value.tobytes()).hexdigest()
        for name, value in model.graph.initializers.items()
        if name not in adapter
    }


def use_case_lists(cases: list[str], graph: str) -> Mapping[str, Any]:
    """What the YAML files of a graph hold, by name of the file."""
    use_cases, adaptors = [], []
    for case in cases:
        weights, encodings = f"{case}.safetensors", f"{graph}_{case}.encodings"
        use_case = {"name": case, "model_name": f"{graph}_model.onnx", "lora_weights": weights}
        use_cases.append({**use_case, "quant_overrides": encodings, "output_path": "./output"})
        adaptors.append({"name": case, "encodings_path": encodings, "safetensor_path": weights})
    return {
        f"{graph}_lora_config.yaml": {"use_case": use_cases},
        f"{graph}_lora_adaptor_list.yaml": adaptors,
    }


_USE_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
_checked: dict[Path, dict[str, Stamps]] = {}  # folders without a problem, with their files


def open_qairt(folder: Path, case: str) -> FloatGraphs:
    """A use case in ONNX Runtime, after all checks of the folder.

    A folder is checked once per process, and again after a file has changed.

    Raises:
        VerificationError: files contradict each other. All problems are listed, each with the name
            of its file.
    """
    own = [name for name in files_in(folder) if not name.startswith(f"{PROOF}/")]
    files = {name: file_stamps((folder / name).stat()) for name in own}
    if _checked.get(folder.resolve()) != files:
        graphs = _graphs(folder)
        problems = [problem for graph in graphs for problem in _problems(folder, graph)]
        for stored in () if problems else (BASE, *_cases(folder, graphs[0])):
            problems += _opened(folder, stored).problems()
        if problems:
            raise _contradiction(folder, *problems)
        _checked[folder.resolve()] = files
    return _opened(folder, case)


def _contradiction(folder: Path, *problems: str) -> VerificationError:
    return VerificationError(f"{folder}: the files contradict each other", list(problems))


def _problems(folder: Path, graph: str) -> list[str]:
    """Problems of the files of one graph: those of the first kind of check that fails."""
    if problems := list(_list_problems(folder, graph)):
        return problems
    model_file, base_file = f"{graph}_model.onnx", f"{graph}_{BASE}.encodings"
    cases, names = _cases(folder, graph), (folder / LIST_FILE).read_text().splitlines()
    with foreign_as(VerificationError, f"{folder / model_file} is not an ONNX model"):
        model = require("onnx_ir", "onnx").load(folder / model_file)
    known = model.graph.initializers
    shapes = {name: tuple(known[name].shape) for name in names if name in known}
    problems = [
        f"{LIST_FILE}: {name} is not an initializer of {model_file}"
        for name in names
        if name not in known
    ]
    for case in cases:
        problems += _weight_problems(folder / f"{case}.safetensors", shapes, model_file)
    if problems:
        return problems
    for case in (BASE, *cases):
        problems += _value_problems(_model(folder, graph, case))
    if not problems:
        base = read_encodings(folder / base_file)
        fixed = _fixed(model, base, names)
        for case in cases:
            own = read_encodings(folder / (file := f"{graph}_{case}.encodings"))
            problems += _entry_problems(base, base_file, own, file, fixed)
    return problems


def _value_problems(model: FloatOnnxModel) -> list[str]:
    """Problems of one model. Its weights are in memory only here: one model at a time."""
    try:
        model.check()
    except VerificationError as error:
        return list(error.problems)
    except (EncodingsFileError, ExportError) as error:
        return [f"{model.encodings.name}: {error}"]
    return []


def _list_problems(folder: Path, graph: str) -> Iterator[str]:
    """Files that are missing, and YAML files that do not say what was written."""
    lists, base = use_case_lists([], graph), (f"{graph}_model.onnx", f"{graph}_{BASE}.encodings")
    files = (DATA_FILE, LIST_FILE, *base, *lists)
    if missing := [name for name in files if not (folder / name).is_file()]:
        yield from (f"{name} is missing" for name in missing)
        return
    cases, (_, adaptors) = _cases(folder, graph), lists
    for name, expected in use_case_lists(cases, graph).items():
        items = _items(_yaml(folder / name))
        if [item.get("name") for item in items] != cases:
            yield f"{name}: use cases are not {', '.join(cases)}, those of {adaptors}"
            continue
        for item, values in zip(items, _items(expected), strict=True):
            for key, value in values.items():
                if item.get(key) != value:
                    yield f"{name}: {key} of {item['name']} is {item.get(key)}, not {value}"
    for case in cases:
        for file in (f"{case}.safetensors", f"{graph}_{case}.encodings"):
            if not (folder / file).is_file():
                yield f"{file} is missing, but {adaptors} names it"


def _items(content: Any) -> list[dict[str, Any]]:
    """The use cases in a YAML file; empty if it does not list any."""
    items = content.get("use_case") if isinstance(content, dict) else content
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return items
    return []


def _cases(folder: Path, graph: str) -> list[str]:
    """Names of the use cases. Files are named by them."""
    file = f"{graph}_lora_adaptor_list.yaml"
    names = [item.get("name") for item in _items(_yaml(folder / file))]
    for name in names:
        if not isinstance(name, str) or not _USE_CASE.fullmatch(name):
            problem = f"{file}: {name!r} is not the name of a use case. Copy the folder again"
            raise _contradiction(folder, problem)
    return names  # type: ignore[return-value]


def _weight_problems(
    path: Path, shapes: dict[str, tuple[int, ...]], model_file: str
) -> Iterator[str]:
    try:
        with safe_open(path, "np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise _contradiction(path.parent, f"{path.name} is no YAML: {error}") from error
