"""The `aimet` target: a `.aimet` folder for AI Hub and aimet-onnx, and files for it.

    prefill.aimet/, decode.aimet/    of a causal language model: graphs with a key-value cache
    model.aimet/                     of any other model
      model.onnx                     float model with fixed shapes, weights on their grids
      model.data                     its weights, the same bytes in all folders
      model.encodings                AIMET encodings, 1.0.0 or 2.0.0
    golden/                          inputs, and the outputs that were computed of them
    submit_aihub.py                  compiles and runs it on AI Hub, and compares; needs an account
    README.md                        the commands
    graphs.json, GRAPH_host.onnx     of graphs with a cache, see `float_graphs.py`

AI Hub refuses a `.aimet` folder that holds anything else, so the others are next to it.
"""

from __future__ import annotations

import filecmp
from importlib import resources
from pathlib import Path

from qwlora.errors import VerificationError
from qwlora.export.npu.aimet_encodings import write_float_encodings
from qwlora.export.npu.float_graphs import FloatGraphs, float_graphs, write_graph_golden
from qwlora.export.npu.float_onnx_runner import FloatOnnxModel
from qwlora.export.npu.golden import FOLDER as GOLDEN
from qwlora.export.npu.golden import write_golden
from qwlora.export.npu.kv_cache_graphs import has_graphs, read_graphs, write_graphs
from qwlora.export.proof.contents import GOLDEN_FILES, SIMULATED_ADAPTER, Contents
from qwlora.export.runtime import Runtime
from qwlora.export.target import Backend, ExportedGraph
from qwlora.formats.model_card import marked
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.system.optional_packages import require


class Aimet(Backend):
    """Float models with encodings; ONNX Runtime runs them with these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            "*.aimet/model.onnx",
            "*.aimet/model.data",
            "*.aimet/model.encodings",
            "*_host.onnx",
            "graphs.json",
            "submit_aihub.py",
            *GOLDEN_FILES,
            *SIMULATED_ADAPTER,
        ),
        scripts={"submit_aihub.py": "npu/aimet_templates/submit_aihub.py.template"},
    )

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        write_aimet(exported, folder)

    def open(self, folder: Path, case: str) -> Runtime:
        return open_aimet_graphs(folder) if has_graphs(folder) else open_aimet(folder)

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        if adapter is None:
            return ""
        return (
            f"Base and adapter are one model, `{adapter}/*.aimet`, for AI Hub and aimet-onnx. "
            f"`{adapter}/README.md` has the commands."
        )


MODEL_FILE, DATA_FILE, ENCODINGS_FILE = "model.onnx", "model.data", "model.encodings"
_FILES = {MODEL_FILE, DATA_FILE, ENCODINGS_FILE}
_SCRIPT = "submit_aihub.py"


def write_aimet(exported: ExportedGraph, folder: Path) -> None:
    """Write a `.aimet` folder for each of `exported.graphs`, or one for a model without a cache,
    and the files next to them."""
    npus, inner = {}, {}
    for name in exported.graphs or [""]:
        ((_, form),) = float_graphs({"": exported}, name)
        model = folder / f"{name or 'model'}.aimet"
        model.mkdir(parents=True)
        # every weight external: a stored model of more than 2 GB is no protobuf file
        require("onnx_ir", "onnx").save(
            form.made.model, model / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=64
        )
        version = exported.encodings_version
        write_float_encodings(form.graph, form.made.encodings, model / ENCODINGS_FILE, version)
        if form.npu is not None:
            npus[name], inner[name] = form.npu, form.inner
    if npus:
        write_graphs(folder, npus, {n: {"model": f"{n}.aimet"} for n in npus}, {"float": inner})
        write_graph_golden(_opened_graphs(folder), exported.sample["input_ids"], folder)
    else:
        simulation, sample = exported.simulation, exported.sample
        write_golden(folder / GOLDEN, simulation.bind(sample), simulation.outputs(sample))
    _write_script(form.graph, folder, "README.graphs.md" if npus else "README.md")


def _write_script(graph: QuantizedGraph, folder: Path, readme: str) -> None:
    activations = [
        graph.encodings[m.name].scheme.bitwidth for m in graph.marks if m.kind is Kind.ACTIVATION
    ]
    full_type = "w8a16" if max(activations, default=16) > 8 else "int8"
    templates = resources.files("qwlora.export.npu") / "aimet_templates"
    script = (templates / f"{_SCRIPT}.template").read_text()
    (folder / _SCRIPT).write_text(script.replace("@FULL_TYPE@", full_type))
    (folder / "README.md").write_text(marked((templates / f"{readme}.template").read_text()))


def open_aimet(folder: Path) -> FloatOnnxModel:
    """The files in ONNX Runtime, after every check that they allow.

    Raises:
        VerificationError: the `.aimet` folder lacks a file or holds another one, or see
            `FloatOnnxModel.check`.
    """
    _check_folders(folder, ["model.aimet"])
    opened = _opened(folder / "model.aimet")
    opened.check()
    return opened


def open_aimet_graphs(folder: Path) -> FloatGraphs:
    """The graphs with a cache in ONNX Runtime, after every check that they allow.

    Raises:
        VerificationError: a `.aimet` folder lacks a file or holds another one, or see
            `FloatGraphs.check`; or graphs have different weights.
    """
    folders = [graph["model"] for graph in read_graphs(folder)["graphs"].values()]
    _check_folders(folder, folders)
    first, *others = (folder / name / DATA_FILE for name in folders)
    if differing := [other for other in others if not filecmp.cmp(first, other, shallow=False)]:
        names = [str(path.relative_to(folder)) for path in (differing[0], first)]
        raise VerificationError(
            f"{folder}: the files contradict each other",
            [f"{names[0]} differs from {names[1]}, but all graphs must have the same weights"],
        )
    graphs = _opened_graphs(folder)
    graphs.check()
    return graphs


def _check_folders(folder: Path, names: list[str]) -> None:
    """Refuse folders that lack a file or hold another one."""
    for name in names:
        model = folder / name
        found = {path.name for path in model.iterdir()} if model.is_dir() else set()
        if problems := [f"{name} is missing" for name in sorted(_FILES - found)] + [
            f"{name} does not belong there: AI Hub refuses the folder" for name in found - _FILES
        ]:
            raise VerificationError(f"{model} is not a complete .aimet folder", problems)


def _opened(model: Path) -> FloatOnnxModel:
    return FloatOnnxModel(model / MODEL_FILE, model / ENCODINGS_FILE)


def _opened_graphs(folder: Path) -> FloatGraphs:
    graphs = read_graphs(folder)["graphs"]
    return FloatGraphs(folder, {name: _opened(folder / graphs[name]["model"]) for name in graphs})
