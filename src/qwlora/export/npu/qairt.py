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
lora_weight_list.txt; `kv_cache_graphs.py` lists the files next to them.

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
graphs       tensors of one name have one encoding in all graphs (`FloatGraphs`)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from qwlora.errors import ExportError, VerificationError, foreign_as, listed
from qwlora.export.npu.aimet_encodings import write_float_encodings
from qwlora.export.npu.float_onnx import float_graphs
from qwlora.export.npu.float_onnx_runner import FloatGraphs, FloatOnnxModel
from qwlora.export.npu.kv_cache_graphs import read_graphs, share_weights, write_graphs
from qwlora.export.onnx.onnx_edits import load_graph, numbers, save_graph
from qwlora.export.proof.contents import GOLDEN_FILES, Contents
from qwlora.export.target import PROOF, Backend, ExportedGraph
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.formats.aimet_encodings.convert import encoding_differences
from qwlora.formats.aimet_encodings.model import EncodingsFile
from qwlora.formats.model_card import marked
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.kv_cache_graph import NpuGraph
from qwlora.system.atomic import files_in
from qwlora.system.file_stamps import Stamps, file_stamps

BASE, DATA_FILE, LIST_FILE = "base", "model.data", "lora_weight_list.txt"
UPDATABLE = "qwlora.quant_updatable_mode"  # in the metadata of the models
_USE_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
_checked: dict[Path, dict[str, Stamps]] = {}  # folders without a problem, with their files


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

    def write_cases(
        self, base: ExportedGraph, cases: Mapping[str, ExportedGraph], folder: Path
    ) -> None:
        write_qairt(base, cases, folder)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        encodings = [f"{graph}_{case}.encodings" for graph in read_graphs(folder)["graphs"]]
        return [folder / name for name in (f"{case}.safetensors", *encodings)]

    def open(self, folder: Path, case: str) -> FloatGraphs:
        return open_qairt(folder, case)


def write_qairt(base: ExportedGraph, cases: Mapping[str, ExportedGraph], folder: Path) -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    npus, inner, files = {}, {}, {}
    for graph in base.graphs:
        npus[graph], inner[graph] = _write_graph(base, cases, graph, folder)
        # each use case has grids of its own
        files[graph] = {"model": f"{graph}_model.onnx", "encodings": {}}
    write_graphs(folder, npus, files, {"float": inner, "use_cases": list(cases)})
    for case in cases:
        _opened(folder, case).write_golden(cases[case].sample["input_ids"], case)
    template = resources.files("qwlora.export.npu") / "qairt_templates" / "README.md.template"
    text = template.read_text().replace("@UPDATABLE@", base.updatable)
    (folder / "README.md").write_text(marked(text))


def _write_graph(
    base: ExportedGraph, cases: Mapping[str, ExportedGraph], graph: str, folder: Path
) -> tuple[NpuGraph, list[str]]:
    """Write the files of one graph.

    Returns:
        the graph with the zero adapter, and the names of its float tensors without an encoding.
    """
    file, version = folder / f"{graph}_model.onnx", base.encodings_version
    first = folder / f"{next(iter(base.graphs))}_model.onnx"
    bases, names = [], list[str]()
    for case, float_onnx, npu in float_graphs({BASE: base, **cases}, graph):
        write_float_encodings(float_onnx, folder / f"{graph}_{case}.encodings", version)
        model, stored = float_onnx.model, first if case == BASE else file
        differing = set(share_weights(model, stored)) - set(names) if stored.exists() else None
        if differing:
            names_of_base = listed(sorted(differing), 3)
            raise ExportError(f"{names_of_base} of {graph}_{case} differ from {stored.name}")
        if case == BASE:
            marks = float_onnx.graph.marks
            names = [mark.name for mark in marks if mark.kind is Kind.ADAPTER]
            (folder / LIST_FILE).write_text("".join(f"{name}\n" for name in names))
            model.metadata_props[UPDATABLE] = base.updatable
            save_graph(model, file, DATA_FILE if file == first else None, smallest=64)
            bases.append((npu, float_onnx.inner))
        else:
            weights = {name: numbers(model.graph.initializers[name]) for name in names}
            save_file(weights, folder / f"{case}.safetensors", {"format": "np"})
    for list_file, content in use_case_lists(list(cases), graph).items():
        (folder / list_file).write_text(yaml.safe_dump(content, sort_keys=False))
    return bases[0]


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


def open_qairt(folder: Path, case: str) -> FloatGraphs:
    """A use case in ONNX Runtime, after all checks of the folder.

    A folder is checked once per process, and again after a file has changed.

    Raises:
        VerificationError: files contradict each other. All problems are listed, each with the name
            of its file.
    """
    names = [name for name in files_in(folder) if not name.startswith(f"{PROOF}/")]
    stamps = {name: file_stamps((folder / name).stat()) for name in names}
    if _checked.get(folder.resolve()) != stamps:
        if problems := _problems(folder):
            raise VerificationError(f"{folder}: the files contradict each other", problems)
        _checked[folder.resolve()] = stamps
    return _opened(folder, case)


def _opened(folder: Path, case: str) -> FloatGraphs:
    """The graphs of a use case, unchecked; "base" is the model with weights of zero."""
    weights = None if case == BASE else folder / f"{case}.safetensors"
    return FloatGraphs(
        folder,
        {
            graph: FloatOnnxModel(
                folder / f"{graph}_model.onnx", folder / f"{graph}_{case}.encodings", weights
            )
            for graph in read_graphs(folder)["graphs"]
        },
    )


def _problems(folder: Path) -> list[str]:
    """Problems of the first kind of check that fails."""
    record = read_graphs(folder)
    cases, graphs = record.get("use_cases", []), list(record["graphs"])
    for case in cases:
        if not isinstance(case, str) or not _USE_CASE.fullmatch(case):
            return [f"graphs.json: {case!r} is not the name of a use case. Copy the folder again"]
    if problems := [p for graph in graphs for p in _list_problems(folder, graph, cases)]:
        return problems
    names = (folder / LIST_FILE).read_text().splitlines()
    models = {graph: load_graph(folder / f"{graph}_model.onnx") for graph in graphs}
    for graph, model in models.items():
        problems += _weight_problems(folder, graph, model, names, cases)
    for case in () if problems else (BASE, *cases):
        problems += _opened(folder, case).problems()
    for graph, model in {} if problems else models.items():
        base = read_encodings(folder / f"{graph}_{BASE}.encodings")
        fixed = _fixed(model, base, names)
        for case in cases:
            problems += _entry_problems(base, folder / f"{graph}_{case}.encodings", fixed)
    return problems


def _list_problems(folder: Path, graph: str, cases: list[str]) -> Iterator[str]:
    """Files that are missing, and YAML files that do not hold what was written."""
    lists = use_case_lists(cases, graph)
    encodings = (f"{graph}_{case}.encodings" for case in (BASE, *cases))
    weights = (f"{case}.safetensors" for case in cases)
    for name in (DATA_FILE, LIST_FILE, f"{graph}_model.onnx", *encodings, *weights, *lists):
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif name in lists:
            with foreign_as(VerificationError, f"{name} is no YAML"):
                content = yaml.safe_load((folder / name).read_text())
            if content != lists[name]:
                yield f"{name}: does not list the files of use cases {', '.join(cases)}"


def _weight_problems(
    folder: Path, graph: str, model: Any, names: list[str], cases: list[str]
) -> Iterator[str]:
    """LoRA weights that are not those of the model."""
    known, file = model.graph.initializers, f"{graph}_model.onnx"
    shapes = {name: tuple(known[name].shape) for name in names if name in known}
    if unknown := [name for name in names if name not in known]:
        yield f"{LIST_FILE}: {listed(unknown, 3)} is not an initializer of {file}"
    for path in (folder / f"{case}.safetensors" for case in cases):
        with foreign_as(VerificationError, f"{path.name} cannot be read"):
            stored = {name: array.shape for name, array in load_file(path).items()}
        for name in sorted({**stored, **shapes}):
            if stored.get(name) != shapes.get(name):
                yield (
                    f"{path.name}: {name} has shape {stored.get(name)}, but in {file} "
                    f"{shapes.get(name)}; ranks must be padded alike"
                )


def _fixed(model: Any, base: EncodingsFile, names: list[str]) -> set[str]:
    """Names of the tensors whose encodings no use case changes."""
    mode, everything = model.metadata_props.get(UPDATABLE), set(base.by_name)
    if mode == "none":
        return everything
    if mode == "all":
        return everything.intersection(model.graph.initializers).difference(names)
    return everything - branch_values(model.graph, names)


def branch_values(graph: Any, names: Iterable[str]) -> set[str]:
    """Names of the LoRA branches: the initializers `names` and what they compute, without the sums
    with a value of the base."""
    branch = {graph.initializers[name] for name in names}
    for node in graph:
        inside = [value for value in node.inputs if value in branch]
        if inside and not (node.op_type == "Add" and len(inside) == 1):
            branch.update(node.outputs)
    return {value.name for value in branch}


def _entry_problems(base: EncodingsFile, path: Path, fixed: set[str]) -> Iterator[str]:
    """What differs from the base's encodings, where it must not."""
    case = read_encodings(path)
    if base.version != case.version:
        yield f"{path.name}: version {case.version}, but that of the base is {base.version}"
        return
    for name in sorted(fixed & case.by_name.keys()):
        if encoding_differences(base.by_name[name], case.by_name[name]):
            yield f"{path.name}: the entry of {name} differs from the base's"
