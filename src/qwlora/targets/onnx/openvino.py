"""The `openvino` target: an IR with the base's integers and adapters for openvino-genai.

    base/openvino_model.xml, .bin    stateful; tokenizer; configuration
    NAME/adapter_model.safetensors   PEFT's names; the scale is in lora_B, since OpenVINO reads none

The captured graph with a key-value cache goes through ONNX into OpenVINO's IR, whatever the
architecture. Integers of the base stay constants of 4 or 8 bits:

    Constant -> Convert [-> Subtract zero point] -> Multiply scale [-> Add minimum] -> MatMul

Keys and values become state, in the order of beam_idx, as openvino-genai expects.

Logits are computed by OpenVINO, where factors are inputs of rank 0 without an adapter. `decode`
runs openvino-genai, one pipeline for all adapters, and must give their likeliest tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from qwlora.errors import ExportError, foreign_as
from qwlora.graph.capture import IDS
from qwlora.system.optional_packages import require
from qwlora.targets.adapter_branches import Arrays, factor_shapes, zero_adapter
from qwlora.targets.canonical_adapter import (
    PEFT_FILES,
    PEFT_FORM,
    PREFIX,
    CanonicalAdapter,
    write_peft,
)
from qwlora.targets.onnx.onnx_model import (
    MODEL_FILE,
    base_graph,
    linear_modules,
    matrix_products,
    save_graph,
    store_narrow,
)
from qwlora.targets.proof.contents import SETTINGS, TOKENIZER, Contents
from qwlora.targets.target import Backend, ExportedBase, Runtime
from qwlora.targets.weights.weights_folder import write_settings

IR, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
_TOKENIZERS = ("tokenizer", "detokenizer")
# By its own settings, OpenVINO may round activations to 8 bits on processors that multiply these
# faster, or compute in bfloat16.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class Openvino(Backend):
    """OpenVINO's IR; OpenVINO and openvino-genai run it."""

    contents = Contents(
        base=(
            *(f"openvino_{p}.{end}" for p in ("model", *_TOKENIZERS) for end in ("xml", "bin")),
            *SETTINGS,
            *TOKENIZER,
        ),
        adapter=PEFT_FILES,
        forms={"adapter_config.json": PEFT_FORM},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        openvino = require("openvino", "openvino")
        graph, paths = base_graph(exported.model), dict[str, str]()
        for node, path in matrix_products(graph, linear_modules(exported.model)):
            node.name = path
            paths |= {path: path, node.outputs[0].name: path}
        store_narrow(graph, exported.embedding_bits)
        with tempfile.TemporaryDirectory() as scratch:
            save_graph(graph, Path(scratch, MODEL_FILE))
            read = openvino.Core().read_model(Path(scratch, MODEL_FILE))
            _name_products(read, paths)
            _keep_state(openvino, read)
            # By default, OpenVINO stores floats as float16, and scales are among them.
            openvino.save_model(read, folder / IR, compress_to_fp16=False)
        write_settings(exported, exported.model.config, folder)
        if exported.tokenizer is not None:
            convert = require("openvino_tokenizers", "openvino").convert_tokenizer
            both = convert(exported.tokenizer, with_detokenizer=True)
            for part, converted in zip(_TOKENIZERS, both, strict=True):
                openvino.save_model(converted, folder / f"openvino_{part}.xml")

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        write_peft(exported, folder)

    def open(self, folder: Path, case: str) -> OpenvinoRuntime:
        return OpenvinoRuntime(folder, EXACT, self.open_shipped(folder, case))

    def open_shipped(self, folder: Path, case: str) -> OpenvinoRuntime:
        return OpenvinoRuntime(folder, {})


def _name_products(model: Any, paths: dict[str, str]) -> None:
    """Give products the paths of their modules, by the names of products and outputs."""
    # openvino-genai finds by these names where an adapter belongs. OpenVINO turns a Gemm with a
    # bias into a product and a sum. The sum keeps the Gemm's name, and the product's name gets a
    # suffix. The model's output takes the name of the last product.
    for node in model.get_ops():
        name = node.get_friendly_name().removesuffix("/WithoutBiases")
        if (path := paths.get(name)) is not None:
            is_product = node.get_type_name() == "MatMul"
            node.set_friendly_name(path if is_product else f"{path}/bias")


def _keep_state(openvino: Any, model: Any) -> None:
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    past = [i.any_name for i in model.inputs if i.any_name.startswith("past_key_values")]
    beam = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, "beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beam])
    for name in past:
        # Readers are listed before the new node reads, too, or that would read itself.
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
    # The state begins without tokens, and with as many rows as the first call has.
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            heads, width = (node.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
            sizes = op.concat([batch, op.constant(np.array([heads, 0, width]))], axis=0)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), sizes)])
    model.validate_nodes_and_infer_types()


class OpenvinoRuntime(Runtime):
    """The folder in OpenVINO, on the CPU, compiled with these `settings`."""

    switches = True

    def __init__(
        self, folder: Path, settings: dict[str, str], shipped: OpenvinoRuntime | None = None
    ):
        import openvino

        self.shipped, self._folder, self._settings = shipped, folder, settings
        self._openvino: Any = openvino
        core = openvino.Core()
        with foreign_as(ExportError, f"OpenVINO cannot load {str(folder)!r}"):
            model = core.read_model(folder / IR)
            self._none = _add_factors(model)
            self._compiled = core.compile_model(model, "CPU", settings)
        self._factors: dict[Path, dict[str, Any]] = {}
        self._adapters: dict[Path, Any] = {}  # the same of openvino-genai
        self._pipeline: Any = None
        self._active: Path | None = None

    def switch_to(self, adapter: Path | None) -> None:
        import openvino_genai as genai

        if adapter is not None and adapter not in self._factors:
            file = adapter / "adapter_model.safetensors"
            with foreign_as(ExportError, f"openvino-genai cannot load {str(file)!r}"):
                tensors = load_file(file)
                loaded = genai.Adapter(str(file))
            factors = {
                n.removeprefix(PREFIX).removesuffix(".weight"): np.ascontiguousarray(t.T)
                for n, t in tensors.items()
            }
            if unknown := sorted(set(factors) - set(self._none)):
                module = unknown[0].rpartition(".")[0]
                raise ExportError(
                    f"the model multiplies by no weight of {module}, which the adapter in "
                    f"{str(adapter)!r} changes"
                )
            self._factors[adapter], self._adapters[adapter] = factors, loaded
            # openvino-genai takes adapters only when a pipeline is opened.
            self._pipeline = None
        self._active = adapter
        if self.shipped is not None:
            self.shipped.switch_to(adapter)

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        # openvino-genai returns no logits. OpenVINO computes them from the same IR, in a request of
        # its own, whose state is the cache.
        request, before = past or (self._compiled.create_infer_request(), 0)
        rows, tokens = len(ids), before + ids.shape[1]
        factors = {} if self._active is None else self._factors[self._active]
        outputs = request.infer(
            {
                "input_ids": ids.numpy(),
                "attention_mask": np.ones((rows, tokens), np.int64),
                "position_ids": np.arange(before, tokens)[None].repeat(rows, 0),
                "beam_idx": np.arange(rows, dtype=np.int32),
                **self._none,
                **factors,
            }
        )
        return torch.from_numpy(outputs["logits"].copy()), (request, tokens)

    def decode(self, ids: Tensor, count: int) -> list[int]:
        import openvino_genai as genai

        if self._pipeline is None:
            known = list(self._adapters.values())
            adapters = {"adapters": genai.AdapterConfig(known)} if known else {}
            # openvino-genai loads every tokenizer that is next to the model, and a damaged one can
            # kill the process. Token ids need none.
            with (
                tempfile.TemporaryDirectory() as folder,
                foreign_as(ExportError, f"openvino-genai cannot load {str(self._folder)!r}"),
            ):
                for name in (IR, WEIGHTS, *SETTINGS):
                    Path(folder, name).symlink_to((self._folder / name).absolute())
                # It applies adapters to a captured graph with this backend only.
                self._pipeline = genai.LLMPipeline(
                    folder, "CPU", ATTENTION_BACKEND="SDPA", **adapters, **self._settings
                )
        options = genai.GenerationConfig()
        options.max_new_tokens, options.do_sample, options.ignore_eos = count, False, True
        active = [] if self._active is None else [self._adapters[self._active]]
        chosen = {"adapters": genai.AdapterConfig(active)} if self._adapters else {}
        results = self._pipeline.generate(self._openvino.Tensor(ids.numpy()), options, **chosen)
        return [int(token) for token in results.tokens[0][-count:]]


def _add_factors(model: Any) -> Arrays:
    """Add an adapter's factors as inputs to the products with weights, as openvino-genai adds them.

    Returns:
        the zero adapter.
    """
    from openvino import PartialShape, Type
    from openvino import opset13 as op

    none: Arrays = {}
    for node in [n for n in model.get_ops() if n.get_type_name() == "MatMul"]:
        shape = node.input_value(1).get_partial_shape()
        if len(shape) != 2 or shape.is_dynamic:  # no weight
            continue
        columns, rows = shape.to_shape()
        if node.get_attributes()["transpose_b"]:
            rows, columns = columns, rows
        module, readers = node.get_friendly_name(), node.output(0).get_target_inputs()
        shapes, inputs = factor_shapes(module, columns, rows), []
        for name, (first, second) in shapes.items():
            # Without a length, an axis has any.
            sizes = PartialShape([first or -1, second or -1])
            inputs.append(op.parameter(sizes, Type.f32, name))
            inputs[-1].output(0).get_tensor().add_names({name})
        none |= zero_adapter(shapes)
        model.add_parameters(inputs)
        inner = op.matmul(node.input_value(0), inputs[0], False, False)
        total = op.add(node.output(0), op.matmul(inner, inputs[1], False, False))
        for reader in readers:
            reader.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()
    return none
