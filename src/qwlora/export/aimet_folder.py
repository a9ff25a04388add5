"""What the `aimet` target writes: a `.aimet` folder for AI Hub and aimet-onnx, and files for it.

    model.aimet/model.onnx         float model with fixed shapes, weights on their grids
    model.aimet/model.data         its weights
    model.aimet/model.encodings    AIMET encodings, 1.0.0 or 2.0.0
    golden/                        inputs, and the outputs that the simulation computes of them
    submit_aihub.py                compiles and runs it on AI Hub, and compares; needs an account
    README.md                      the commands

AI Hub refuses a `.aimet` folder that holds anything else, so the others are next to it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from qwlora.errors import VerificationError
from qwlora.export.aimet_encodings import write_float_encodings
from qwlora.export.float_onnx import to_float_onnx
from qwlora.export.float_runtime import FloatOnnxModel
from qwlora.export.golden import write_golden
from qwlora.export.target import ExportedGraph
from qwlora.graph.quantized_graph import Kind
from qwlora.system.optional_packages import require

FOLDER = "model.aimet"
MODEL_FILE, DATA_FILE, ENCODINGS_FILE = "model.onnx", "model.data", "model.encodings"
SCRIPT_FILE, README_FILE = "submit_aihub.py", "README.md"
_FILES = {MODEL_FILE, DATA_FILE, ENCODINGS_FILE}


def write_aimet(exported: ExportedGraph, folder: Path) -> None:
    """Write the folder and the files next to it.

    Raises:
        ExportError: see `to_float_onnx`.
        MissingExtraError: the `onnx` extra is not installed.
    """
    graph = exported.simulation.graph()
    made = to_float_onnx(graph, exported.simulation.bind(exported.sample))
    made.model.metadata_props.update(exported.metadata)
    model = folder / FOLDER
    model.mkdir(parents=True)
    # every weight external: a stored model of more than 2 GB is no protobuf file
    require("onnx_ir", "onnx").save(
        made.model, model / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=64
    )
    write_float_encodings(graph, made.encodings, model / ENCODINGS_FILE, exported.encodings_version)
    write_golden(exported, folder)
    activations = [
        graph.encodings[m.name].scheme.bitwidth for m in graph.marks if m.kind is Kind.ACTIVATION
    ]
    full_type = "w8a16" if max(activations, default=16) > 8 else "int8"
    templates = resources.files("qwlora.export") / "aimet_templates"
    for name in (SCRIPT_FILE, README_FILE):
        text = (templates / f"{name}.template").read_text()
        (folder / name).write_text(text.replace("@FULL_TYPE@", full_type))


def open_aimet(folder: Path) -> FloatOnnxModel:
    """The files in ONNX Runtime, after every check that they allow.

    Raises:
        VerificationError: the `.aimet` folder lacks a file or holds another one, or see
            `FloatOnnxModel.check`.
    """
    model = folder / FOLDER
    found = {path.name for path in model.iterdir()} if model.is_dir() else set()
    if problems := [f"{name} is missing" for name in sorted(_FILES - found)] + [
        f"{name} does not belong there: AI Hub refuses the folder" for name in found - _FILES
    ]:
        raise VerificationError(f"{model} is not a complete .aimet folder", problems)
    opened = FloatOnnxModel(model / MODEL_FILE, model / ENCODINGS_FILE)
    opened.check()
    return opened
