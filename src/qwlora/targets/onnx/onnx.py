"""The `onnx` target: a QDQ model for ONNX Runtime with all adapters, and AIMET encodings. The
`onnx_each` target: a whole model for each adapter, for adapters that cannot be switched.

    base/model.onnx, model.onnx.data    the base
    base/session_options.json           options without which results differ
    base/model.encodings
    NAME/adapter.onnx_adapter           what the adapter changes; a run applies it
    NAME/model.encodings                of activations and factors; the base's weights have one grid

    NAME/model.onnx, model.onnx.data, session_options.json, model.encodings    of `onnx_each`

What depends on the adapter is an input with a default, so that a session without an adapter
computes the base:

    FACTOR.codes, .scale, .zero_point    integers and grid of lora_A and lora_B; of rank 0
    FACTOR                               the same where factors are float (policy weights-only)
    VALUE.scale, VALUE.zero_point        grid of an activation; that of the base
    LAYER.scaling                        alpha / rank

The model is that of a zero adapter on every layer that any adapter changes. The file of an adapter
(`write_adapter_file`) has its values of these inputs. A layer that it does not change keeps rank 0.

The model has a key-value cache: without past tokens it computes the full sequence, as the
simulation does. If the model has none that can be inputs, the graph of full sequences is written.

    input_ids, attention_mask, position_ids, past_key_values.N.key, .value, ...
        -> logits, present.N.key, .value, ...
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qwlora.errors import CaptureError, ExportError, listed
from qwlora.formats.aimet_encodings.grids import write_graph_encodings
from qwlora.graph.graph_analysis import branch_nodes, lora_branch
from qwlora.graph.nodes import operation, parameter_names
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.scheme import Blocks, PerChannel
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.system.optional_packages import require
from qwlora.system.parameter_names import canonical_name, is_factor_name, is_first_factor
from qwlora.targets.onnx.onnx_model import (
    DATA_FILE,
    MODEL_FILE,
    activation_arrays,
    add_input,
    build_model,
    load_graph,
    numbers,
    save_graph,
    store_narrow,
    weight_arrays,
    write_adapter_file,
)
from qwlora.targets.onnx.onnx_runtime import (
    EMBEDDINGS_FILE,
    OPTIONS_FILE,
    OPTIONS_FORM,
    OnnxModel,
    write_embeddings,
    write_session_options,
)
from qwlora.targets.proof.contents import ADAPTER_FILE, SIMULATED_ADAPTER, TOKENIZER, Contents
from qwlora.targets.proof.reference import Reference
from qwlora.targets.target import Backend, ExportedGraph

ENCODINGS_FILE = "model.encodings"
_GRID = (".scale", ".zero_point")
_SCALING = ".scaling"
_TRANSPOSED = "qwlora.transposed"  # of the model's metadata: weights that are stored [in, out]
_REMEDY = (
    "If another adapter changes this layer, give all adapters the same target_modules and layers, "
    "or use target onnx_each, which writes a model for each adapter; else calibrate on more data"
)
Arrays = dict[str, np.ndarray[Any, Any]]


def export_onnx(
    graph: QuantizedGraph,
    folder: str | Path,
    metadata: Mapping[str, str] | None = None,
    embedding_bits: int = 16,
) -> None:
    """Write everything that ONNX Runtime and AIMET's tools need into `folder`: what `onnx_each` has
    for an adapter. `embedding_bits` is for `store_narrow`.

    Raises:
        ExportError: see `build_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, transposed = build_model(graph, metadata or {})
    store_narrow(model, embedding_bits)
    save_graph(model, folder / MODEL_FILE)
    write_graph_encodings(graph, folder / ENCODINGS_FILE, transposed)
    write_session_options(graph, folder)


class Onnx(Backend):
    """One model for the base and all adapters; ONNX Runtime runs it."""

    contents = Contents(
        base=(MODEL_FILE, DATA_FILE, ENCODINGS_FILE, OPTIONS_FILE, EMBEDDINGS_FILE, *TOKENIZER),
        adapter=(ADAPTER_FILE, ENCODINGS_FILE),
        forms={OPTIONS_FILE: OPTIONS_FORM},
    )

    def write_base(self, exported: ExportedGraph, folder: Path) -> str | None:
        try:
            captured, reason = capture_with_cache(exported.simulation), None
            # Past keys and values come from an earlier call, which returned them on their grids.
            graph = cached_graph(exported.simulation, captured, quantize_past=False)
        except CaptureError as error:
            graph, reason = exported.simulation.graph(), str(error)
        base_activations, bits = exported.updatable == "all", exported.embedding_bits
        transposed = write_switchable(graph, folder, exported.metadata, base_activations, bits)
        write_graph_encodings(graph, folder / ENCODINGS_FILE, transposed)
        write_session_options(graph, folder)
        write_embeddings(exported.simulation, folder)
        return reason

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        graph = exported.simulation.graph()
        # The base's weights have one grid, in its own file: copies of it were 8.8 of the 9.3 MB of
        # an adapter of SmolLM2 (docs/log/runtimes.md).
        transposed, kinds = write_adapter(graph, base, folder), (Kind.ACTIVATION, Kind.ADAPTER)
        write_graph_encodings(graph, folder / ENCODINGS_FILE, transposed, kinds=kinds)

    def open(self, folder: Path, case: str) -> OnnxModel:
        runtime = OnnxModel(folder, switches=True)
        _ = runtime.session  # loaded here, so that it is refused here
        return runtime


class OnnxEach(Backend):
    """A model for each adapter; ONNX Runtime runs it."""

    contents = replace(Onnx.contents, adapter=(*Onnx.contents.base, *SIMULATED_ADAPTER))

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        # Without a key-value cache, for which each adapter's graph would be captured once more.
        export_onnx(exported.simulation.graph(), folder, exported.metadata, exported.embedding_bits)
        write_embeddings(exported.simulation, folder)

    def open(self, folder: Path, case: str) -> OnnxModel:
        return OnnxModel(folder)


def write_switchable(
    graph: QuantizedGraph,
    folder: Path,
    metadata: Mapping[str, str],
    base_activations: bool,
    embedding_bits: int = 16,
) -> set[str]:
    """Write the model of a zero adapter.

    Args:
        base_activations: the grids of activations that the base computes depend on the adapter.

    Returns:
        names of the weights that are stored [in, out].
    """
    model, transposed = build_model(graph, metadata)
    known = {
        name
        if name.endswith((".codes", *_GRID))
        else canonical_name(name.removeprefix("model.")): value
        for name, value in model.graph.initializers.items()
    }
    branch, fixed = branch_nodes(graph.program), set[str]()
    for mark in graph.marks:
        if mark.kind is Kind.ACTIVATION and mark.node not in branch and not base_activations:
            fixed |= {f"{mark.name}{part}" for part in _GRID}
    values = _values(graph, transposed)
    for layer in [n.removesuffix(_SCALING) for n in values if n.endswith(_SCALING)]:
        factors = (f"{layer}.lora_B.weight", f"{layer}.lora_embedding_B")
        stored = (known[n] for f in factors for n in (f"{f}.codes", f) if n in known)
        # In the graph, alpha / rank is a constant without a name: the product after lora_B.
        known[f"{layer}{_SCALING}"] = _scaling(next(stored))
    for name, array in values.items():
        if name not in known or name in fixed:
            continue
        shape = list[int | str](array.shape)
        if (rank := _rank(name, graph, transposed)) is not None:
            axis, shape[rank[0]] = rank
            # ONNX Runtime 1.32 runs MatMul, and Q/DQ per channel, of rank 0 (docs/log/runtimes.md).
            array = np.take(array, [], axis)
        add_input(model, name, array, shape, known[name])
    model.metadata_props[_TRANSPOSED] = json.dumps(sorted(transposed))
    store_narrow(model, embedding_bits)
    save_graph(model, folder / MODEL_FILE)
    return transposed


def write_adapter(graph: QuantizedGraph, base: Path, folder: Path) -> set[str]:
    """Write what the simulation of an adapter has for the inputs of the model in `base`. Returns
    names of the weights that are stored [in, out].

    Raises:
        ExportError: the model has no place for one of the values, or has another base.
    """
    model = load_graph(base / MODEL_FILE)
    shared, transposed = model.graph, set(json.loads(model.metadata_props[_TRANSPOSED]))
    values = _values(graph, transposed)
    defaults = {value.name for value in shared.inputs if value.const_value is not None}
    fixed = values.keys() - defaults
    if unknown := sorted({n.rpartition(".")[0] for n in fixed if n not in shared.initializers}):
        raise ExportError(
            f"the adapter's simulation quantizes {listed(unknown, 3)}, the exported base does not. "
            f"{_REMEDY}"
        )
    for name in fixed:
        of_base = numbers(shared.initializers[name])
        if not np.array_equal(of_base.reshape(-1), values[name].reshape(-1)):
            raise ExportError(f"{name} of the adapter is not that of the base; export both again")
    for node in shared:
        if node.op_type == "QuantizeLinear" and node.inputs[1].name in defaults - values.keys():
            values |= _unchanged(node, values)
    changed = {name: array for name, array in values.items() if name in defaults}
    write_adapter_file(changed, folder / ADAPTER_FILE)
    return transposed


def _values(graph: QuantizedGraph, transposed: Collection[str]) -> Arrays:
    """What `graph` has for the inputs of the base's model, and for its fixed grids, by name."""
    # It is read from the graph of the program: a translation to ONNX takes longer than everything
    # else of an adapter's export.
    program, marked = graph.program, {mark.node for mark in graph.marks}
    nodes = {node.name: node for node in program.graph.nodes}
    weights = {
        spec.arg.name: program.state_dict[spec.target].detach()
        for spec in program.graph_signature.input_specs
        if spec.target in program.state_dict
    }
    values: Arrays = {}
    for mark in graph.marks:
        encoding, arrays = graph.encodings[mark.name], dict[str, Any]()
        if mark.kind is Kind.ACTIVATION:
            arrays = activation_arrays(mark.name, encoding)
        elif mark.kind is Kind.ADAPTER:
            codes = encoding.quantize(weights[mark.node])
            arrays = weight_arrays(codes, encoding, mark.name in transposed)
        for part, array in arrays.items():
            # ONNX Runtime 1.32 refuses codes of 4 bits, and scalars, in adapter files.
            kind = array.dtype.name
            stored = array.astype(kind.replace("4", "8")) if kind in ("int4", "uint4") else array
            values[f"{mark.name}.{part}"] = stored.reshape(stored.shape or (1,))
    for placeholder, name in parameter_names(program).items():
        node, path = nodes[placeholder], canonical_name(name)
        if not (node.users and is_factor_name(path)):
            continue
        if placeholder not in marked:
            values[path] = weights[placeholder].cpu().numpy()
        if not is_first_factor(path):
            while not (operation(node) == "mul" and isinstance(node.args[1], int | float)):
                node = next(iter(node.users))  # every call of the layer has the same scaling
            factor = np.array([node.args[1]], np.float32)
            values[f"{path.partition('.lora_')[0]}{_SCALING}"] = factor
    return values


def _unchanged(node: Any, values: Arrays) -> Arrays:
    """Grid of a value that the model quantizes in `node` and the adapter's simulation does not."""
    name, source = node.inputs[1].name.removesuffix(".scale"), node.inputs[0].producer()
    read = [] if source is None else [value.name for value in source.inputs if value is not None]
    if ".lora_" in name or any(value.endswith(_SCALING) for value in read):
        return {}  # zero, on any grid
    # The sum with a branch of rank 0 is the base layer's output, already rounded: once more on the
    # same grid changes nothing.
    for value in read:
        if source.op_type == "Add" and f"{value}.scale" in values:
            return {f"{name}{part}": values[f"{value}{part}"] for part in _GRID}
    raise ExportError(
        f"the exported base quantizes {name}, the adapter's simulation does not. {_REMEDY}"
    )


def _scaling(factor: Any) -> Any:
    """A value in place of the constant that the output of lora_B, `factor`, is multiplied with."""
    value, pending = require("onnx_ir", "onnx").val("scaling"), [*factor.consumers()]
    while pending:  # a layer that is called twice has two products
        node = pending.pop()
        if node.op_type == "Mul":
            node.replace_input_with(1, value)
        else:
            pending += node.outputs[0].consumers()
    return value


def _rank(name: str, graph: QuantizedGraph, transposed: Collection[str]) -> tuple[int, str] | None:
    """Axis of an input that has the adapter's rank, and the axis's name; None if none has."""
    factor, _, part = name.rpartition(".")
    if is_factor_name(name):  # a float one
        factor, part = name, "weight"
    if not is_factor_name(factor):
        return None
    axis, rank = 0 if is_first_factor(factor) else 1, f"rank:{factor.partition('.lora_')[0]}"
    stored_axis = 1 - axis if factor in transposed else axis
    if part in ("codes", "weight"):
        return stored_axis, rank
    match graph.encodings[factor].scheme.granularity:
        case PerChannel(channel):
            return (0, rank) if channel == axis else None
        case Blocks():  # blocks of [out, rank] are along the rank
            return stored_axis, rank if axis == 0 else f"blocks:{rank}"
    return None


class ZeroAdapter:
    """The simulation of a zero adapter, to compare the model with when no adapter is active."""

    def __init__(self, simulation: Reference):
        self.outputs = simulation.outputs
        self.perturbed_outputs = simulation.perturbed_outputs
        self.values = simulation.values
        self.bind = simulation.bind
        self._graph = simulation.graph

    def graph(self) -> QuantizedGraph:
        # Values inside the branch have the simulation's rank here and rank 0 in the model, so they
        # cannot be compared. The sum with the layer's own output can.
        graph = self._graph()
        inside = lora_branch(graph.program)
        return replace(graph, marks=tuple(m for m in graph.marks if m.node not in inside))
