"""The `genai` target: a folder and adapters for onnxruntime-genai, on the CPU.

    base/model.onnx, model.onnx.data    the base with a key-value cache, and places for an adapter
    base/genai_config.json              from the model's configuration, for any architecture
    base/tokenizer.json, ...
    base/none.onnx_adapter              ranks of 0, to switch a running generation back to the base
    NAME/adapter.onnx_adapter

The folder also runs in ONNX Runtime alone, where `RunOptions.add_active_adapter` switches.

    y = MatMul(x, W)  becomes  y = MatMul(x, W) + MatMul(MatMul(x, M.lora_A), M.lora_B)

for every linear layer M. M.lora_A [in, r] and M.lora_B [r, out] are inputs with a default of rank
0, so that a session without an adapter computes the base. Ranks may differ between layers and
adapters. An adapter is a `.onnx_adapter` file with its factors under these names; lora_A is
transposed, and the scale is in lora_B.

Weights are the base's integers, as operands of ONNX Runtime's MatMulNBits, which has 2, 4 and 8
bits; others are stored in the next wider ones, with their own zero point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.errors import ExportError, foreign_as
from qwlora.grid.encoding import spread
from qwlora.grid.packing import pack_words
from qwlora.nn.packed_layer import PackedLayer, PackedLinear
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.onnx_model import (
    DATA_FILE,
    MODEL_FILE,
    add_input,
    base_graph,
    constants,
    linear_modules,
    load_graph,
    matrix_products,
    new_node,
    numbers,
    remove_unused,
    replace_value,
    save_graph,
    store_narrow,
    write_adapter_file,
)
from qwlora.targets.proof.contents import ADAPTER_FILE, SETTINGS, TOKENIZER, Contents
from qwlora.targets.registry import NBITS
from qwlora.targets.target import Backend, ExportedBase, Runtime
from qwlora.targets.weights.weights_folder import check_layers, write_settings

# MatMulNBits' accuracy level: float32, so the file computes what was trained. Level 4, the default
# of onnxruntime-genai's own builder, rounds activations to 8 bits.
EXACT = 1
_DOMAIN = "com.microsoft"
CONFIG_FILE = "genai_config.json"
NO_ADAPTER = "none.onnx_adapter"  # switches a running generation back to the base
_ID = (int, type(None))
_FIXED = {  # what genai_config.json says of every model's decoder
    "filename": MODEL_FILE,
    "session_options": {"provider_options": list[Any]()},
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_size",
)
# The captured graph appends to the cache, so what it returns is longer than its input.
_SEARCH = {"do_sample": False, "past_present_share_buffer": False}
_FORM = {
    "model": {
        # onnxruntime-genai chooses by it how it feeds a model. All captured graphs are fed alike,
        # whatever the architecture: tokens, mask, positions, keys and values.
        "type": "llama",
        "context_length": int,
        "vocab_size": int,
        "bos_token_id": _ID,
        "eos_token_id": (int, list),
        "pad_token_id": _ID,
        "decoder": {**_FIXED, **dict.fromkeys(_SIZES, int)},
    },
    "search": {**_SEARCH, "max_length": int},
}


class Genai(Backend):
    """MatMulNBits; onnxruntime-genai runs it."""

    contents = Contents(
        base=(MODEL_FILE, DATA_FILE, NO_ADAPTER, CONFIG_FILE, *SETTINGS, *TOKENIZER),
        adapter=(ADAPTER_FILE,),
        forms={CONFIG_FILE: _FORM},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        graph = switchable_graph(exported)
        save_graph(graph, folder / MODEL_FILE)
        write_adapter_file(defaults(graph), folder / NO_ADAPTER)
        config = _config(exported, {value.name: value.shape for value in graph.graph.inputs})
        write_text(folder / CONFIG_FILE, strict_json.dumps(config, indent=2) + "\n")
        write_settings(exported, exported.model.config.get_text_config(), folder)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        # Every file has all layers: onnxruntime-genai 0.18 keeps the factors of an earlier adapter
        # where the next one of a generation has none.
        inputs = exported.inputs(defaults(load_graph(base / MODEL_FILE)))
        write_adapter_file(inputs, folder / ADAPTER_FILE)

    def open(self, folder: Path, case: str) -> GenaiRuntime:
        return GenaiRuntime(folder)


def _config(exported: ExportedBase, shapes: dict[str, Any]) -> dict[str, Any]:
    """genai_config.json, from the shapes of the graph's inputs by name. The token that ends a text
    also begins or pads one, if no other does."""
    text: Any = exported.model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        raise ExportError(
            f"genai needs a longest sequence, but the configuration of {text.model_type} has no "
            "max_position_embeddings. Set it in config.json, or remove genai from export.targets"
        )
    keys, layers = shapes["past_key_values.0.key"], sum(n.endswith(".key") for n in shapes)
    sizes = (layers, text.num_attention_heads, keys[1], text.hidden_size, keys[3])
    tokenizer, settings = exported.tokenizer, exported.model.generation_config

    def token(key: str) -> Any:
        chosen = getattr(settings, key, None)
        return getattr(text, key, None) if chosen is None else chosen

    end = token("eos_token_id")
    if end is None:
        end = 0 if tokenizer is None else tokenizer.eos_token_id or 0
    first = end[0] if isinstance(end, list) else end
    begin, pad = token("bos_token_id"), token("pad_token_id")
    return {
        "model": {
            "type": "llama",
            "context_length": positions,
            "vocab_size": text.vocab_size,
            "bos_token_id": first if begin is None else begin,
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "decoder": {**_FIXED, **dict(zip(_SIZES, sizes, strict=True))},
        },
        "search": {**_SEARCH, "max_length": positions},
    }


def switchable_graph(exported: ExportedBase) -> Any:
    """The graph of a base, with MatMulNBits and places for adapters; see the module."""
    graph = base_graph(exported.model)
    # First: `matrix_products` does not find MatMulNBits nodes.
    add_branches_(graph, exported.model)
    matmul_nbits_(graph, exported.model)
    store_narrow(graph, exported.embedding_bits)
    return graph


def add_branches_(graph: Any, model: PreTrainedModel) -> None:
    """Add the places for adapters to the graph of a base; see the module."""
    linears = linear_modules(model)
    for node, path in list(matrix_products(graph, linears)):
        # A name of its own for each rank: layers of an adapter may have different ones.
        layer, rank = linears[path], f"rank:{path}"
        if isinstance(layer, nn.Linear):
            rows, columns = layer.out_features, layer.in_features
        else:  # transformers' Conv1D, whose weight is [in, out]
            columns, rows = layer.get_parameter("weight").shape
        none_a, none_b = np.zeros((columns, 0), np.float32), np.zeros((0, rows), np.float32)
        a = add_input(graph, f"{path}.lora_A", none_a, (columns, rank))
        b = add_input(graph, f"{path}.lora_B", none_b, (rank, rows))
        inner = new_node("MatMul", [node.inputs[0], a], f"{path}.inner")
        outer = new_node("MatMul", [inner.outputs[0], b], f"{path}.update")
        total = new_node("Add", [node.outputs[0], outer.outputs[0]], f"{path}.adapted")
        replace_value(node.outputs[0], total.outputs[0])
        total.replace_input_with(0, node.outputs[0])
        graph.graph.insert_after(node, [inner, outer, total])


def matmul_nbits_(graph: Any, model: PreTrainedModel) -> None:
    """Make the packed linear layers of a base's graph MatMulNBits nodes."""
    layers = {p: module for p, module in model.named_modules() if isinstance(module, PackedLinear)}
    products = list(matrix_products(graph, layers))
    check_layers("genai", {path: layers[path] for _, path in products})
    for node, path in products:
        layer = layers[path]
        arrays, block = operands(layer)
        rows, columns = layer.tensor.shape
        attributes = {
            "K": columns,
            "N": rows,
            "bits": container_bits(layer.scheme.bitwidth),
            "block_size": block,
            "accuracy_level": EXACT,
        }
        inputs = [node.inputs[0], *constants(graph, path, arrays)]
        nodes = [new_node("MatMulNBits", inputs, f"{path}.output", attributes, _DOMAIN)]
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            nodes.append(new_node("Add", [nodes[0].outputs[0], node.inputs[2]], f"{path}.sum"))
        replace_value(node.outputs[0], nodes[-1].outputs[0])
        graph.graph.insert_before(node, nodes)
    graph.graph.opset_imports[_DOMAIN] = 1
    remove_unused(graph)


def defaults(graph: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The adapter inputs of a base's graph, of rank 0."""
    inputs = [value for value in graph.graph.inputs if value.const_value is not None]
    return {value.name: numbers(value) for value in inputs}


def container_bits(bitwidth: int) -> int:
    """Bits of a stored integer."""
    return next(bits for bits in (2, 4, 8) if bits >= bitwidth)


def operands(layer: PackedLayer) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Codes, scales and zero points of MatMulNBits, and its block size."""
    rows, columns = layer.tensor.shape
    block = NBITS.stored_block(layer.scheme, columns)
    assert block is not None
    encoding, scheme, bits = layer.encoding, layer.scheme, container_bits(layer.scheme.bitwidth)
    width = block * bits // 8
    packed = pack_words(layer.codes, bits).view(torch.uint8)[:, : columns * bits // 8]

    def by_block(number: torch.Tensor) -> torch.Tensor:
        return spread(number, scheme.granularity, (rows, columns), block).contiguous()

    arrays = {
        "codes": packed.reshape(rows, columns // block, width).numpy(),
        "scale": by_block(encoding.scale).float().flatten().numpy(),
    }
    if scheme.float_offset:
        zeros = by_block(-encoding.minimum / encoding.scale)
        arrays["zero_point"] = zeros.float().flatten().numpy()
    # Without one, the zero point is the middle of the stored bits, not of a narrower grid.
    elif not scheme.symmetric or bits != scheme.bitwidth:
        zeros = by_block(-encoding.offset).to(torch.uint8)
        stored = pack_words(zeros, bits).view(torch.uint8)
        arrays["zero_point"] = stored[:, : -(-zeros.shape[1] * bits // 8)].flatten().numpy()
    return arrays, block


class GenaiRuntime(Runtime):
    """The folder in onnxruntime-genai."""

    switches = True

    def __init__(self, folder: Path):
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(folder)!r}"):
            self._model = self._genai.Model(str(folder))
            self._adapters = self._genai.Adapters(self._model)
        self._known: dict[Path, str] = {}
        self._active: Path | None = None

    def switch_to(self, adapter: Path | None) -> None:
        if adapter is not None and adapter not in self._known:
            name = f"{len(self._known)}"
            with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(adapter)!r}"):
                self._adapters.load(str(adapter / ADAPTER_FILE), name)
            self._known[adapter] = name
        self._active = adapter

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        generator = past or self._generator()
        with foreign_as(ExportError, "onnxruntime-genai cannot run the model"):
            generator.append_tokens(ids[0].numpy().astype(np.int32))
        logits = torch.from_numpy(np.array(generator.get_output("logits"), np.float32))
        return logits.view(1, ids.shape[1], -1), generator

    def decode(self, ids: Tensor, count: int) -> list[int]:
        # With a least length, a token that ends a text does not end the decoding.
        length = ids.shape[1] + count
        generator = self._generator(max_length=length, min_length=length)
        self.extend(ids, generator)
        while len(generator.get_sequence(0)) < length:
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[ids.shape[1] :]]

    def _generator(self, **lengths: int) -> Any:
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(**lengths, do_sample=False, batch_size=1)
        generator = self._genai.Generator(self._model, options)
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._known[self._active])
        return generator
