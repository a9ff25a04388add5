"""The content of ONNX exports of language models, and the limits of their proof."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import packed_model, tiny_model
from formats.packing import packed_and_twin
from qwlora import PerChannel, Scheme, Schemes, Simulation, quantize_, simulate
from qwlora.data.sequences import Sequences
from qwlora.errors import ExportError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.formats.aimet_encodings.grids import write_graph_encodings
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.scheme import PerBlock, PerTensor, parse_scheme
from qwlora.nn import packed_weights
from qwlora.targets.onnx import onnx_model
from qwlora.targets.onnx.genai import container_bits, operands
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.reference import make_reference, simulated_logits
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS
from targets.proofs import check_parity, measure_logits, verify_onnx, verify_onnx_outputs
from targets.weights.test_weights_targets import base

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
Bundle = tuple[Path, Simulation]
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def made(folder: Path, schemes: Schemes | None = None) -> Simulation:
    """An exported simulation."""
    model = packed_model("llama", layers=1)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    simulation = simulate(adapted, BATCH, schemes)
    simulation.calibrate([BATCH])
    export_onnx(simulation.graph(), folder, {"qwlora.note": "test"})
    return simulation


def initializers(folder: Path) -> dict[str, np.ndarray]:
    stored = onnx.load(folder / "model.onnx").graph.initializer
    return {i.name: onnx.numpy_helper.to_array(i) for i in stored}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    return folder, made(folder)


@pytest.mark.parametrize(
    "scheme",
    ["w3-channel", "w2-block32-asymmetric", "w8-tensor", "w6-block16-asymmetric", "w4-signed32"],
)
def test_every_grid_is_exported_exactly(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    report = quantize_(model, scheme, "rtn")
    assert set(report.layers) == {"0.weight", "2.weight"}
    batches = [{"input": torch.randn(8, 64)} for _ in range(3)]
    simulation = simulate(model, batches[0])
    simulation.calibrate(batches)
    export_onnx(simulation.graph(), tmp_path)
    parity = verify_onnx_outputs(tmp_path, simulation, batches)
    check_parity(parity, scheme)
    assert parity.figures["sqnr"]["output"] > 60
    arrays = initializers(tmp_path)
    for name, weight in packed_weights(model).items():
        shift = weight.encoding.scheme.symmetric_offset * weight.encoding.scheme.symmetric
        stored = torch.from_numpy(arrays[f"{name}.codes"].astype(np.int32))
        in_out = stored.shape != weight.codes.shape  # no matrix here is square
        assert torch.equal(stored.T if in_out else stored, weight.codes.int() + shift)


def test_a_runtime_that_rounds_activations_fails_the_proof(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session options say so; layers are not compared in a proof."""
    folder, simulation = bundle
    perturbed = {"adapter": simulated_logits(simulation)[1]}
    text = Sequences(IDS, IDS)
    reference = make_reference({"adapter": simulation.logits}, text, perturbed)

    def problems() -> list[str]:
        return measure_logits(OnnxModel(folder).logits, reference).problems

    assert not problems()
    options = {"session.qdq_matmulnbits_accuracy_level": "4"}
    monkeypatch.setattr("qwlora.targets.onnx.onnx_runtime.read_session_options", lambda _: options)
    assert any("root mean square" in problem for problem in problems())


def test_eight_bit_activations(tmp_path: Path) -> None:
    simulation = made(tmp_path, Schemes(activations=Scheme(8, symmetric=False)))
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), "a8")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    kinds = {i.data_type for i in stored if i.name.endswith(".zero_point")}
    assert kinds == {onnx.TensorProto.UINT8}
    with pytest.raises(ExportError, match=r"6-bit.*use 8 or 16 bits"):
        made(tmp_path, Schemes(activations=Scheme(6, symmetric=False)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bitwidth", "symmetric", "container"),
    [(5, False, "uint8"), (12, True, "int16"), (12, False, "uint16")],
)
def test_every_width_of_adapters(
    bitwidth: int, symmetric: bool, container: str, tmp_path: Path
) -> None:
    weights = Scheme(bitwidth, symmetric, PerChannel(0))
    simulation = made(tmp_path, Schemes(adapter_weights=weights))
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), "it")
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    stored = initializers(tmp_path)[f"{name}.codes"]
    assert stored.dtype == container
    codes = simulation.encodings[name].quantize(simulation.adapter_weights[name])
    np.testing.assert_array_equal(stored, (codes - symmetric * 2 ** (bitwidth - 1)).T.numpy())
    assert int(codes.max()) == 2**bitwidth - 1


def test_aimet_entries_describe_the_grids(bundle: Bundle) -> None:
    folder, simulation = bundle
    record = json.loads((folder / "model.encodings").read_text())
    parameters = {e["name"]: e for e in record["param_encodings"]}
    name = "model.layers.0.mlp.up_proj.weight"
    weight, scales = parameters[name], simulation.encodings[name].scale.T.flatten().numpy()
    assert (weight["enc_type"], weight["bw"], weight["block_size"]) == ("PER_BLOCK", 4, 32)
    assert (weight["is_sym"], set(weight["offset"])) == (True, {-8})
    np.testing.assert_array_equal(np.float32(weight["scale"]), scales)
    np.testing.assert_array_equal(initializers(folder)[f"{name}.scale"].flatten(), scales)
    lora = parameters["model.layers.0.mlp.up_proj.lora_A.weight"]
    assert (lora["enc_type"], lora["bw"], len(lora["scale"])) == ("PER_CHANNEL", 8, 4)
    assert set(lora["offset"]) == {-128}
    assert all(
        e["bw"] == 16 and e["enc_type"] == "PER_TENSOR" and not e["is_sym"]
        for e in record["activation_encodings"]
    )
    assert len(parameters) == sum(m.kind is not Kind.ACTIVATION for m in simulation.marks)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    outputs = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    names = {name.removesuffix(".dequantized") for name in outputs}
    assert read_encodings(folder / "model.encodings").by_name.keys() == names
    assert {p.key: p.value for p in model.metadata_props}["qwlora.note"] == "test"
    sizes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    assert sizes == [["batch", "tokens"]] * 2
    assert {n.domain for n in model.graph.node} == {""}


OBSERVERS = {
    "min-max": "min_max",
    "sqnr": "post_training_tf_enhanced",
    "percentile": "post_training_percentile",
    "squared-error": "squared_error",
}


def test_quant_scheme_names_the_observer_that_ran(bundle: Bundle, tmp_path: Path) -> None:
    simulation, other = bundle[1], copy.copy(bundle[1])
    for observer, quant_scheme in OBSERVERS.items():
        schemes = replace(simulation.origin.schemes, observer=observer)
        other.origin = replace(simulation.origin, schemes=schemes)
        write_graph_encodings(other.graph(), tmp_path / "model.encodings")
        arguments = read_encodings(tmp_path / "model.encodings").quantizer_args
        assert arguments["quant_scheme"] == quant_scheme


FLOAT_BLOCKS = Scheme(4, False, PerBlock(16), float_offset=True)
SLOW = [Scheme(3, False, PerTensor(), float_offset=True)]
SLOW += map(parse_scheme, ("w4-lpbq16", "w3-signed16"))
SCHEMES = [FLOAT_BLOCKS, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SLOW)]


def exported(scheme: Scheme, folder: Path) -> tuple[torch.nn.Module, Simulation]:
    """A llama whose embedding, head and layers are all packed."""
    model, _ = packed_and_twin(tiny_model("llama", layers=1), scheme)
    torch.manual_seed(1)
    shape: Any = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=4, **shape)).eval()
    simulation = simulate(adapted, BATCH)
    simulation.calibrate([BATCH])
    export_onnx(simulation.graph(), folder)
    return adapted, simulation


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_file_computes_what_was_simulated(tmp_path: Path, scheme: Scheme) -> None:
    model, simulation = exported(scheme, tmp_path)
    weights = packed_weights(model)
    assert {mark.name for mark in simulation.marks if mark.kind is Kind.BASE} == set(weights)
    assert weights["lm_head.weight"].is_tied
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), str(scheme))
    file = onnx.load(tmp_path / "model.onnx")
    arrays = {i.name: i for i in file.graph.initializer}
    types = {i.data_type for name, i in arrays.items() if name.endswith((".scale", ".minimum"))}
    assert types == {onnx.TensorProto.FLOAT}
    assert all(f"{name}.codes" in arrays for name in weights)
    assert not any(
        np.prod(i.dims) == 260 * 64 and i.data_type == onnx.TensorProto.FLOAT
        for i in arrays.values()
    )  # no float copy of the embedding
    entries = json.loads((tmp_path / "model.encodings").read_text())
    named = {entry["name"] for entry in entries["param_encodings"]}
    is_left_out = scheme.float_offset  # AIMET has no such grids
    left_out = {name.removesuffix(".weight") for name in weights} if is_left_out else set()
    assert set(entries["excluded_layers"]) == left_out
    assert (set(weights) <= named) is not is_left_out


OF_OPERATOR = [
    parse_scheme(f"w{bits}-{kind}{offset}")
    for bits in (2, 3, 4, 5, 8)
    for offset in ("", "-asymmetric")
    for kind in ("tensor", "channel", "block16", "block32", "block64")
]
OF_OPERATOR += [Scheme(bits, False, PerBlock(32), float_offset=True) for bits in (2, 4)]
OF_OPERATOR += [parse_scheme(f"w{bits}-signed32") for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize("scheme", OF_OPERATOR, ids=str)
def test_matmul_nbits_multiplies_with_the_base_s_weights(scheme: Scheme) -> None:
    """ONNX Runtime's operator on the identity gives the weight."""
    assert not refusals(TARGETS["genai"], Subject(weights={"all": Weight(scheme)}))
    for name, layer in list(packed_weights(base(scheme)).items())[-3:]:
        arrays, block = operands(layer)
        rows, columns = layer.tensor.shape
        settings: dict[str, Any] = {"domain": "com.microsoft", "accuracy_level": 1}
        settings |= {"bits": container_bits(scheme.bitwidth), "block_size": block}
        settings |= {"K": columns, "N": rows}
        node = helper.make_node("MatMulNBits", ["x", *arrays], ["y"], **settings)
        kinds = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w])
            for n, w in (("x", columns), ("y", rows))
        ]
        held = [numpy_helper.from_array(array, part) for part, array in arrays.items()]
        graph = helper.make_graph([node], "g", kinds[:1], kinds[1:], held)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (found,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
        expected = layer.tensor.dequantize().numpy().T
        if scheme.float_offset:
            assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max(), name
        else:
            assert np.array_equal(found, expected), name


INPUTS = {"input": torch.randn(8, 32, generator=torch.Generator().manual_seed(3))}


def of_structure(seed: int, width: int = 32, activations: int = 16) -> Simulation:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)).eval()
    quantize_(model, "w4-block32", solver="rtn")
    made = simulate(model, INPUTS, Schemes(Scheme(activations, symmetric=False)))
    made.calibrate([INPUTS])
    return made


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_model_of_a_structure_is_not_translated_and_gets_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, object] = {}
    monkeypatch.setattr(onnx_model, "_translations_by_structure", kept)
    first, second = of_structure(0), of_structure(1, activations=8)
    with mock.patch("torch.onnx.export", side_effect=torch.onnx.export) as translations:
        export_onnx(first.graph(), tmp_path / "first")
        export_onnx(second.graph(), tmp_path / "second")
        assert translations.call_count == 1
        kept.clear()
        export_onnx(second.graph(), tmp_path / "again")
        assert translations.call_count == 2
    assert contents_of(tmp_path / "second") == contents_of(tmp_path / "again")
    assert contents_of(tmp_path / "second") != contents_of(tmp_path / "first")
    for name, content in contents_of(tmp_path / "first").items():
        # torch.onnx gives every node the stack trace of its call
        assert b"stack_trace" not in content, name
        assert str(Path(onnx_model.__file__).parents[3]).encode() not in content, name


def test_the_oldest_translation_of_another_structure_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "_translations_by_structure", {})
    monkeypatch.setattr(onnx_model, "TRANSLATIONS_KEPT", 1)
    first, wider = of_structure(0).graph(), of_structure(0, width=64).graph()
    with mock.patch("torch.onnx.export", side_effect=torch.onnx.export) as translations:
        for graph in (first, wider, first):
            export_onnx(graph, tmp_path)
    assert translations.call_count == 3
