"""aimet-onnx reads what target `aimet` writes and means the same integers.

Runs in an environment of its own (`make test-aimet`); collected elsewhere, it is skipped.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

aimet_onnx = pytest.importorskip("aimet_onnx")
client = pytest.importorskip("qai_hub.client")

from aimet_onnx.quantsim import (  # noqa: E402 (after the imports that may skip)
    QSpec,
    QuantizationSimModel,
    load_encodings_to_sim,
    qtype,
)

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
logging.disable(logging.CRITICAL)

ROOT = Path(__file__).parent
GRIDS = [
    *(f"w{bits}-channel" for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    *("w4-tensor", "w8-tensor-asymmetric", "w4-channel-asymmetric"),
    *("w4-block32", "w4-block32-asymmetric", "w8-block32", "w4-lpbq32"),
]
CASES = [(grid, version) for grid in GRIDS for version in ("1.0.0", "2.0.0")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, table: dict[Any, dict[str, str]]) -> Any:
    """(folder, model, encodings, integers, row of the table, grid, version)."""
    files = request.config.getoption("--files")
    if files is None:
        pytest.skip("needs --files, which write_files.py writes")
    grid, version = request.param
    folder = files / f"{grid}-{version}"
    encodings = json.loads((folder / "model.aimet" / "model.encodings").read_text())
    model = onnx.load(folder / "model.aimet" / "model.onnx")
    codes = dict(np.load(folder / "codes.npz"))
    return folder, model, encodings, codes, table.setdefault((grid, version), {}), grid, version


def test_ai_hubs_client_takes_the_folder(case: Any) -> None:
    folder, *_, row, _, _ = case
    assert client._determine_model_type(folder / "model.aimet").name == "AIMET_ONNX"
    row["hub"] = "yes"


def refusal(grid: str, version: str) -> str | None:
    """What aimet-onnx 2.42 says instead of converting, whoever wrote the file."""
    bits = int(grid.split("-")[0][1:])
    if bits not in (4, 8, 16):  # onnx has no such type in opset 21
        return f"Unsupported dtype int{bits}"
    if version == "1.0.0" and "block" in grid:
        return "axis='auto' cannot be exported"
    if version == "1.0.0" and "lpbq" in grid:
        return "unsupported operand type"
    return None


def test_prequantized_constants_are_our_integers(case: Any) -> None:
    _, model, encodings, codes, row, grid, version = case
    expected = refusal(grid, version)
    if expected is not None:
        with pytest.raises((RuntimeError, TypeError), match=expected):
            aimet_onnx.encodings_to_onnx_qdq(model, encodings, prequantize_constants=True)
        row["qdq"] = f"refused: {expected}"
        return
    assert len(codes) >= 12
    assert_same_integers(model, encodings, codes)
    row["qdq"] = f"equal ({sum(c.size for c in codes.values()):,} integers)"


def test_a_sim_loads_every_encoding_and_rounds_no_weight(case: Any) -> None:
    _, model, encodings, codes, row, *_ = case
    inputs = {name: ones for name, _, ones in given(model)}
    sim = loaded(model, encodings)
    quantizers = sim.qc_quantize_op_dict
    assert all(quantizers[name].enabled for name in codes)
    assert rounded(sim, codes, inputs, True) == rounded(sim, codes, inputs, False)
    moved = copy.deepcopy(encodings)  # the comparison can fail
    entry = entries(moved)["model.layers.0.self_attn.q_proj.lora_A.weight"]
    key = "scale" if "scale" in entry else "y_scale"
    entry[key] = [1.01 * scale for scale in entry[key]]
    other = loaded(model, moved)
    assert rounded(other, codes, inputs, True) != rounded(other, codes, inputs, False)
    row["sim"] = f"{len(codes)} parameters, unchanged"


def test_a_sim_with_these_settings_loads_strictly(case: Any) -> None:
    """Strict loading takes a sim whose quantizers are set as the file says, and no entry without a
    quantizer: AIMET has none where values are only moved, and 1.0.0 gives it no way to drop them.
    """
    _, model, encodings, _, row, _, version = case
    sim = configured(model, encodings)
    quantizers, own = sim.qc_quantize_op_dict, entries(encodings)
    moved = own.keys() - quantizers.keys()
    movers = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Transpose"}
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert {makers[name] for name in moved} <= movers | {"Squeeze", "Unsqueeze"}
    if version == "1.0.0":
        with pytest.raises((AssertionError, RuntimeError)):
            load_encodings_to_sim(sim, encodings, strict=True, allow_overwrite=False)
        encodings = copy.deepcopy(encodings)
        encodings["activation_encodings"] = [
            e for e in encodings["activation_encodings"] if e["name"] not in moved
        ]
        sim = configured(model, encodings)
    assert load_encodings_to_sim(sim, encodings, strict=True, allow_overwrite=False) == []
    row["strict"] = f"yes, without {len(moved)} moved tensors" if version == "1.0.0" else "yes"
    other = QuantizationSimModel(copy.deepcopy(model), param_type="int4", activation_type="int16")
    with pytest.raises((AssertionError, RuntimeError)):  # the settings matter
        load_encodings_to_sim(other, encodings, strict=True, allow_overwrite=False)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("graph", ["prompt_ar8_cl32", "token_ar1_cl32"])
def test_graphs_with_a_cache_load_strictly_and_keep_the_integers(
    graph: str, version: str, request: pytest.FixtureRequest
) -> None:
    files = request.config.getoption("--files")
    if files is None:
        pytest.skip("needs --files, which write_files.py writes")
    folder = files / f"graphs-{version}" / f"{graph}.aimet"
    assert client._determine_model_type(folder).name == "AIMET_ONNX"
    encodings = json.loads((folder / "model.encodings").read_text())
    model = onnx.load(folder / "model.onnx")
    codes = dict(np.load(folder.parent / "codes.npz"))
    assert len(codes) == 7
    assert_same_integers(model, encodings, codes)
    sim = configured(model, encodings)
    own, quantizers = entries(encodings), sim.qc_quantize_op_dict
    assert quantizers.keys() <= own.keys()  # every value that AIMET quantizes has an entry
    moved = own.keys() - quantizers.keys()
    for section in ("param_encodings", "activation_encodings"):
        if section in encodings:
            encodings[section] = [e for e in encodings[section] if e["name"] not in moved]
    assert load_encodings_to_sim(sim, encodings, strict=True, allow_overwrite=False) == []
    kinds = {onnx.TensorProto.INT32: np.int32}
    inputs = {name: ones.astype(kinds.get(kind, np.float32)) for name, kind, ones in given(model)}
    logits, *cache = sim.session.run(None, inputs)
    assert logits.shape[2] == 260
    assert len(cache) == 2


def given(model: Any) -> Any:
    """Name, type and ones of each input."""
    for value in model.graph.input:
        kind = value.type.tensor_type
        yield value.name, kind.elem_type, np.ones([d.dim_value for d in kind.shape.dim], np.int64)


def assert_same_integers(model: Any, encodings: Any, codes: dict[str, Any]) -> None:
    made = aimet_onnx.encodings_to_onnx_qdq(model, encodings, prequantize_constants=True)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    for name, integers in codes.items():
        assert np.array_equal(found[f"{name}_q"].astype(np.int64), integers), name


def entries(encodings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All entries by name, of either version."""
    found = encodings.get("encodings") or [
        *encodings["param_encodings"],
        *encodings["activation_encodings"],
    ]
    return {entry["name"]: entry for entry in found}


def configured(model: Any, encodings: dict[str, Any]) -> Any:
    """A sim whose quantizers have the settings of the entries; those without one are off."""
    sim, own = QuantizationSimModel(copy.deepcopy(model)), entries(encodings)
    for name, quantizer in sim.qc_quantize_op_dict.items():
        quantizer.enabled = name in own
        if name in own:
            quantizer.set_qspec(qspec(own[name]))
    return sim


def qspec(entry: dict[str, Any]) -> Any:
    """The settings of an entry, in AIMET's words."""
    kind = entry.get("output_dtype")
    bits = int(kind.removeprefix("u").removeprefix("int")) if kind else entry["bw"]
    scale = entry.get("scale", entry.get("y_scale"))
    if "per_block_int_scale" in entry:
        return QSpec.lpbq(qtype.int(entry.get("compressed_bw", bits)), entry["block_size"])
    symmetric = entry["is_sym"] if kind is None else not kind.startswith("u")
    if entry.get("block_size"):
        return QSpec.blockwise(qtype.int(bits), entry["block_size"], symmetric=symmetric)
    channels = isinstance(scale, list) and (kind is not None or len(scale) > 1)
    make = QSpec.per_channel if channels else QSpec.per_tensor
    return make(qtype.int(bits), symmetric=symmetric)


def loaded(model: Any, encodings: dict[str, Any]) -> Any:
    sim = QuantizationSimModel(copy.deepcopy(model), param_type="int4", activation_type="int16")
    load_encodings_to_sim(sim, encodings, strict=False, allow_overwrite=False)
    return sim


def rounded(sim: Any, parameters: Any, inputs: dict[str, Any], enabled: bool) -> bytes:
    """The sim's output with float activations, its weights rounded or as they are."""
    for name, quantizer in sim.qc_quantize_op_dict.items():
        quantizer.enabled = enabled and name in parameters
    return bytes(np.asarray(sim.session.run(None, inputs)[0]).tobytes())
