"""Write the folder of the `openvino` target; see `openvino_target.py`.

The captured graph with a key-value cache goes through ONNX into OpenVINO's IR, whatever the
architecture. Integers of the base stay constants of 4 or 8 bits:

    Constant -> Convert [-> Subtract zero point] -> Multiply scale [-> Add minimum] -> MatMul

Keys and values become state, in the order of beam_idx, as openvino-genai expects. Each MatMul has
the path of its module as its name, by which openvino-genai finds where an adapter belongs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.export.onnx.matmul_nbits import linear_modules, matrix_products, switchable_model
from qwlora.export.onnx.onnx_model import DATA_FILE, MODEL_FILE
from qwlora.export.weights.weights_folder import write_settings
from qwlora.graph.kv_cache_capture import IDS
from qwlora.system.optional_packages import require

IR, WEIGHTS = "openvino_model.xml", "openvino_model.bin"


def write_openvino(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model`.

    Raises:
        ExportError: an operator has no translation.
        CaptureError: the model has no graph with a cache.
        MissingExtraError: the `openvino` extra is not installed.
    """
    openvino = require("openvino", "openvino")
    made = switchable_model(model, branches=False)
    paths = set[str]()
    for node, path in list(matrix_products(made, linear_modules(model))):
        node.name = path
        paths.add(path)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, MODEL_FILE)
        require("onnx_ir", "onnx").save(made, file, external_data=DATA_FILE)
        read = openvino.Core().read_model(file)
        _name_products(read, paths)
        _keep_state(openvino, read)
        openvino.save_model(read, folder / IR, compress_to_fp16=False)
    model.config.save_pretrained(folder)
    write_settings(model, tokenizer, folder)
    if tokenizer is not None:
        convert = require("openvino_tokenizers", "openvino").convert_tokenizer
        parts = ("tokenizer", "detokenizer")
        for part, converted in zip(parts, convert(tokenizer, with_detokenizer=True), strict=True):
            openvino.save_model(converted, folder / f"openvino_{part}.xml")


def _name_products(model: Any, paths: set[str]) -> None:
    """Give the name of a module to its product where the bias that follows has got it (Gemm)."""
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name in paths and node.get_type_name() != "MatMul":
            node.set_friendly_name(f"{name}/bias")
    for node in model.get_ops():
        path = node.get_friendly_name().removesuffix("/WithoutBiases")  # OpenVINO's own word
        if path in paths:
            node.set_friendly_name(path)


def _keep_state(openvino: Any, model: Any) -> None:
    """Make keys and values state of the model, which begins empty."""
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    past = [i.any_name for i in model.inputs if i.any_name.startswith("past_key_values")]
    beam = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, "beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beam])
    for name in past:
        port = model.input(name)
        readers = port.get_target_inputs()
        chosen = op.gather(port, beam, op.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    pairs = {name: name.replace("past_key_values", "present") for name in past}
    apply_make_stateful_transformation(model, pairs)
    shape = op.shape_of(model.input(IDS), "i64")
    batch = op.gather(shape, op.constant(np.array([0])), op.constant(np.int64(0)))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            heads, width = (node.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
            sizes = op.concat([batch, op.constant(np.array([heads, 0, width]))], axis=0)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), sizes)])
    model.validate_nodes_and_infer_types()
