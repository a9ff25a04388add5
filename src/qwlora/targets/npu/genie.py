"""Files for Qualcomm's Genie, which runs graphs of `layout: genie`. In a `qnn` bundle:

    genie_config.json              sizes, positions, binaries and adapters
    htp_backend_ext_config.json    the chip that the graphs were compiled for
    tokenizer.json
    base/device/*.bin              the compiled graphs
    first/INPUT.raw                float32 values of an adapter's inputs, of LoRA version 1

QAIRT's tools make the graphs and the sections of the binary by use case (LoRA version 2) from
target `qairt`. The configuration names them.

`genie_layout` gives a graph of `npu_form` the layout in which Genie passes positions and cache:

    position_ids_cos, position_ids_sin    [1, 1, tokens, width / 2]; in the graph, both halves of
                                          the rotated width are these numbers
    past_key_0_in                         [heads, 1, width, past]; past_key_0_out with the new ones
    past_value_0_in                       [heads, 1, past, width]; past_value_0_out with the new
    lora_alpha                            1 is the adapter as it was trained

Values are only moved, and codes stay, so the graph computes what it did, bit for bit.

Source: `qai_hub_models/models/_shared/llm/model.py` of Qualcomm's ai-hub-models 0.47, and what
libGenie.so of QNN 2.51 accepts: keys, and the shapes that its HTP engine checks when it loads a
binary.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qwlora.errors import CaptureError, ExportError, listed
from qwlora.formats.model_card import marked
from qwlora.graph.capture import IDS, MASK
from qwlora.graph.nodes import origin
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, with_graph
from qwlora.grid.encoding import Encoding
from qwlora.simulation.kv_cache_graph import encoding_before, in_graph_order
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.optional_packages import require
from qwlora.targets.npu.device_graph import ALPHA, COS, SIN, run_host
from qwlora.targets.npu.htp_limits import CHIP
from qwlora.targets.npu.npu_graph import NpuGraph, host_arguments
from qwlora.targets.onnx.onnx_model import constant, numbers, remove_unused
from qwlora.targets.proof.contents import NUMBER, OTHER_KEYS, PLAIN
from qwlora.targets.refusals import genie_tokens
from qwlora.targets.target import ExportedGraph

GENIE = "genie"
_CONFIG, _CHIP, TOKENIZER = "genie_config.json", "htp_backend_ext_config.json", "tokenizer.json"
_TEMPLATES = resources.files("qwlora.targets.npu") / "genie_templates"
QAIRT_README = _TEMPLATES / "README.qairt.md.template"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def quantize_edges_(model: Any) -> dict[str, dict[str, Any]]:
    """Make codes of the float inputs and outputs of a model of `npu_onnx`, and unsigned codes of
    signed ones; returns the grid of each, by name."""
    # The context binary has names and grids of inputs and outputs only if they are codes in the
    # ONNX file. Genie refuses signed ones (libGenie of QNN 2.51).
    ir, grids = require("onnx_ir", "onnx"), dict[str, dict[str, Any]]()

    def take_grid(value: Any, scale: Any, zero_point: Any) -> None:
        zero, value.type = numbers(zero_point), ir.TensorType(zero_point.dtype)
        grid = {"bitwidth": 8 * zero.itemsize, "scale": float(numbers(scale)), "offset": -int(zero)}
        grids[value.name] = grid

    for value in model.graph.inputs:
        for reader in [user for user, _ in value.uses()]:
            if reader.op_type == "QuantizeLinear":
                reader.outputs[0].replace_all_uses_with(value)
                take_grid(value, *reader.inputs[1:])
                model.graph.remove(reader, safe=True)
            elif reader.op_type == "DequantizeLinear":
                bits = 8 * numbers(reader.inputs[2]).itemsize
                middle = np.array(2 ** (bits - 1), f"uint{bits}")
                reader.replace_input_with(2, constant(model, f"{value.name}.zero_point", middle))
                take_grid(value, *reader.inputs[1:])
    for index, value in enumerate(model.graph.outputs):
        source = value.producer()
        while source.op_type != "QuantizeLinear":
            source = source.inputs[0].producer()
        codes = model.graph.outputs[index] = source.outputs[0]
        codes.name, value.name, codes.shape = value.name, f"{value.name}.float", value.shape
        take_grid(codes, *source.inputs[1:])
    remove_unused(model)
    return grids


def to_codes(value: Tensor, grid: Mapping[str, Any]) -> Tensor:
    """Float values as codes of a grid of graphs.json."""
    codes = (value / grid["scale"]).round() - grid["offset"]
    kind = torch.uint8 if grid["bitwidth"] == 8 else torch.uint16
    return codes.clamp(0, 2 ** grid["bitwidth"] - 1).to(torch.int32).to(kind)


def to_values(codes: Tensor, grid: Mapping[str, Any]) -> Tensor:
    """Codes of a grid of graphs.json as float values."""
    return (codes.to(torch.int32) + grid["offset"]).float() * grid["scale"]


def read_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Values of an adapter's inputs, by name; a file of another size is refused."""
    weights = {}
    for name, shape in shapes.items():
        path, size = folder / f"{name}.raw", 4 * math.prod(shape)
        content = path.read_bytes() if path.is_file() else b""
        if len(content) != size:
            raise ExportError(f"{str(path)!r} has {len(content)}, not {size} bytes. Export again")
        weights[name] = torch.from_numpy(np.frombuffer(content, "<f4").reshape(shape).copy())
    return weights


def write_weights(
    folder: Path, codes: Mapping[str, Tensor], grids: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write signed codes of an adapter's inputs as Genie reads them: float32 values."""
    for name, array in codes.items():
        # Genie rounds down when it applies an adapter. A quarter of a step more keeps float32's own
        # error from costing a whole step.
        raised = array.numpy().astype(np.float32) + np.float32(0.25)
        values = raised * np.float32(grids[name]["scale"])
        (folder / f"{name}.raw").write_bytes(values.astype("<f4").tobytes())


def common_scaling(scalings: Mapping[str, float]) -> float | None:
    """The alpha / rank of all adapters, but those without any factor; None: no one has any."""
    different = {scaling for scaling in scalings.values() if scaling}
    if len(different) > 1:
        values = listed([f"{name} {scaling:g}" for name, scaling in scalings.items()])
        raise ExportError(
            f"adapters have different alpha / rank ({values}), but Genie has one lora_alpha for "
            "all. Train them with equal values, or export without layout: genie"
        )
    return next(iter(different), None)


def write_files(folder: Path, npu: NpuGraph, base: ExportedGraph, binary: dict[str, Any]) -> None:
    """Write what Genie needs besides graphs and adapters. `npu` has the largest context; `binary`
    has the compiled graphs as `binaries`, and as `lora` keys about adapters."""
    config, shapes = _config(base), npu.device.interface.shapes
    context = genie_tokens(config, base.tokenizer)
    context |= {"size": npu.sizes.context, "n-vocab": int(shapes["logits"][-1])}
    width, positions = int(shapes["past_key_0_out"][2]), _positions(config, shapes[COS][-1])
    for name, content in _configurations(context, width, positions, **binary).items():
        write_text(folder / name, strict_json.dumps(content, indent=1) + "\n")
    tokenizer: Any = base.tokenizer
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))


def write_bundle(folder: Path, npu: NpuGraph, base: ExportedGraph, adapters: Sequence[str]) -> None:
    """`write_files` of a `qnn` bundle, and its README.md."""
    binaries = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.bin"))
    listing = [{"version": 1, "name": name, "path": name} for name in adapters]
    binary = {"binaries": binaries, "lora": {"lora-version": 1, "adapters": listing}}
    write_files(folder, npu, base, binary)
    text = (_TEMPLATES / "README.md.template").read_text().replace("@ADAPTER@", adapters[0])
    write_text(folder / "README.md", marked(text))


def sections(cases: Iterable[str]) -> dict[str, Any]:
    """`binary` of `write_files` if QAIRT's tools make sections of it, see README.qairt.md."""
    listing = [{"version": 1, "name": case, "bin-sections": [f"{case}.bin"]} for case in cases]
    return {"binaries": ["model.bin"], "lora": {"lora-version": 2, "adapters": listing}}


def _configurations(
    context: Mapping[str, Any], width: Any, positions: Any, binaries: Any, lora: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON files by name, or their forms; `width` is that of a head."""
    content, extensions = (
        json.loads((_TEMPLATES / f"{name}.template").read_text()) for name in (_CONFIG, _CHIP)
    )
    dialog = content["dialog"]
    dialog["context"] |= context
    dialog["engine"]["backend"]["QnnHtp"]["kv-dim"] = width
    model = dialog["engine"]["model"]
    model["positional-encoding"] = positions
    model["binary"]["ctx-bins"] = binaries
    model["binary"]["lora"] |= {"alpha-tensor-name": ALPHA, **lora}
    extensions["devices"][0]["soc_model"] = int(CHIP["soc_model"])
    extensions["devices"][0]["dsp_arch"] = f"v{CHIP['htp_arch']}"
    return {_CONFIG: content, _CHIP: extensions}


def _config(base: ExportedGraph) -> Any:
    model: Any = base.simulation.origin.model
    return model.config.get_text_config()


def _positions(config: Any, width: Any) -> dict[str, Any]:
    """The `positional-encoding` of a configuration of transformers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", 10000.0)
    rope = {"type": "rope", "rope-dim": int(width), "rope-theta": theta}
    if parameters.get("rope_type") == "llama3":
        scaling = {key.replace("_", "-"): parameters[key] for key in _LLAMA3}
        rope["rope-scaling"] = {"rope-type": "llama3", **scaling}
    return rope


_SCALING = {"rope-type": "llama3", OTHER_KEYS: NUMBER}
# The same files for QAIRT, with types for values: they are checked before anything reads them.
FORMS = _configurations(
    {"size": int, "n-vocab": int, "bos-token": int, "eos-token": (int, list)},
    int,
    {"type": "rope", "rope-dim": int, "rope-theta": NUMBER, "rope-scaling": _SCALING},
    [PLAIN],
    {"lora-version": 2, "adapters": [{"version": 1, "name": PLAIN, "bin-sections": [PLAIN]}]},
)


def angles(positions: Mapping[str, Any], context: int) -> Tensor:
    """The angle [context, rope-dim] by which Genie rotates at each position."""
    width = positions["rope-dim"]
    frequencies = positions["rope-theta"] ** -(torch.arange(width, dtype=torch.float64) / width)
    if scaling := positions.get("rope-scaling"):
        factor, low, high, length = (scaling[key.replace("_", "-")] for key in _LLAMA3)
        # a share of 1: short waves stay as they are; of 0: long ones are stretched by `factor`
        share = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - share) * frequencies / factor + share * frequencies
    return torch.arange(context, dtype=torch.float64)[:, None] * frequencies


def refuse_other_positions(npu: NpuGraph, base: ExportedGraph) -> None:
    """Refuse cosines and sines that Genie would compute otherwise."""
    # Genie has no input for them: it computes them from theta and Llama 3's scaling alone.
    positions = _positions(_config(base), npu.device.interface.shapes[COS][-1])
    sizes, turned = npu.sizes, angles(positions, npu.sizes.context)
    for past in range(0, sizes.past + 1, sizes.tokens):
        values = run_host(npu.host, *host_arguments(sizes, past, sizes.tokens))
        rows = turned[past : past + sizes.tokens].repeat(1, 2)
        for name, expected in ((COS, rows.cos()), (SIN, rows.sin())):
            difference = (values[name].reshape(expected.shape) - expected).abs().max()
            grid = npu.device.encodings.get(name)
            # 2^-15 is a step of 16 bits from -1 to 1. The model computes angles in float32, which
            # is off by 2^-24 of the position (measured: 30 steps at 16,384).
            step = 2.0**-15 if grid is None else grid.scale
            if difference > 16 * step + sizes.context * 2.0**-23:
                raise ExportError(
                    f"{name} of the model at position {past} is not what Genie computes from a "
                    f"base of {positions['rope-theta']:g}: the model scales its angles, or pairs "
                    "its widths, in a way that Genie has no key for. Export without layout: genie"
                )


_KEY, _VALUE = (1, 0, 3, 2), (1, 0, 2, 3)  # how keys and values are permuted, there and back


def genie_layout(npu: NpuGraph, scaling: float | None) -> NpuGraph:
    """A graph of `npu_graph` with Genie's inputs and outputs. `scaling` is the alpha / rank that
    all of its adapters have. Inputs that Genie does not compute are refused."""
    device, graph = npu.device, copy.deepcopy(npu.device.program.graph)
    interface, shapes = device.interface, dict(device.interface.shapes)
    names = dict(zip(device.program.graph_signature.user_inputs, interface.inputs, strict=True))
    needed, taken = {IDS, MASK, COS, SIN}, {*names.values()} - interface.cached - {ALPHA}
    if taken != needed:
        parts = {"also takes": taken - needed, "does not take": needed - taken}
        problem = " and ".join(f"{verb} {listed(sorted(n))}" for verb, n in parts.items() if n)
        raise CaptureError(
            f"Genie passes {listed(sorted(needed))} to every model, but this graph {problem}. "
            "Export without layout: genie"
        )
    marks = {mark.node: mark for mark in device.marks}
    encodings = dict(device.encodings)

    def mark_moved(node: Node, source: Node, name: str) -> None:
        encoding = encoding_before(source, marks, encodings)
        if encoding is not None:  # else all activations are float
            marks[node.name] = GraphValue(node.name, name, Kind.ACTIVATION)
            encodings[name] = encoding

    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [n for n in graph.nodes if names.get(n.name) in {COS, SIN, *interface.cached}]:
        name, value, users = names[node.name], node.meta["val"], list(node.users)
        with graph.inserting_before(first):
            if name in interface.cached:
                order = _KEY if "_key_" in name else _VALUE
                node.meta["val"] = value.permute(order).contiguous()
                moved = whole = _call(graph, "permute", node, order)
            else:
                # Both halves of a head's rotated width have the same cosines: Genie passes one.
                node.meta["val"] = value.new_empty(1, 1, value.shape[-2], value.shape[-1] // 2)
                moved = _call(graph, "cat", [node, node], -1)
                whole = _call(graph, "reshape", moved, list(value.shape))
        for user in users:
            user.replace_input_with(node, whole)
        mark_moved(moved, node, f"{name}.moved")
        shapes[name] = tuple(node.meta["val"].shape)
    output = graph.output_node()
    results: list[Any] = list(output.args[0])
    for index, name in enumerate(interface.outputs):
        if name.startswith("past_"):
            source = results[index]
            with graph.inserting_before(output):
                order = _KEY if "_key_" in name else _VALUE
                results[index] = _call(graph, "permute", source, order)
            mark_moved(results[index], source, f"{name}.moved")
            shapes[name] = tuple(results[index].meta["val"].shape)
    output.args = (tuple(results),)
    if scaling:
        _make_relative_(graph, names, marks, encodings, scaling)
    program, interface = with_graph(device.program, graph), replace(interface, shapes=shapes)
    ordered = in_graph_order(program, marks)
    moved_device = QuantizedGraph(program, interface, ordered, encodings, device.observer)
    return replace(npu, device=moved_device)


def _make_relative_(
    graph: Graph,
    names: Mapping[str, str],
    marks: Mapping[str, GraphValue],
    encodings: dict[str, Encoding],
    scaling: float,
) -> None:
    """Move `scaling` from the grid of lora_alpha to those of lora_B and of what it computes."""
    # In Genie, lora_alpha is 1 for an adapter as it was trained. Only grids change, so all codes
    # stay as they were.
    (alpha,) = (node for node in graph.nodes if names.get(node.name) == ALPHA)
    changed = {ALPHA: 1 / scaling}
    for user in alpha.users:
        product: Any = origin(next(read for read in user.all_input_nodes if read is not alpha))
        for read in (product, *map(origin, product.all_input_nodes)):
            mark = marks.get(read.name)
            if mark is not None and (read is product or mark.kind is Kind.ADAPTER):
                changed[mark.name] = scaling
    for name, factor in changed.items():
        encodings[name] = replace(encodings[name], scale=encodings[name].scale * factor)


def _call(graph: Graph, name: str, *arguments: Any) -> Node:
    target = getattr(torch.ops.aten, name).default
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*map_arg(arguments, lambda read: read.meta["val"]))
    return node
