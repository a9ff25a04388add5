"""The content of ONNX exports of language models, and the limits of their proof."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import tiny_model
from qwlora import PerChannel, Scheme, Schemes, Simulation, quantize_, simulate
from qwlora.data.sequences import Sequences
from qwlora.errors import ExportError
from qwlora.formats.aimet_encodings import LpbqEncoding, read_encodings
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of, write_graph_encodings
from qwlora.graph.quantized_graph import Kind
from qwlora.nn import packed_weights
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.reference import make_reference, simulated_logits
from targets.proofs import check_parity, measure_logits, verify_onnx, verify_onnx_outputs

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))


def made(
    scheme: str,
    folder: Path,
    schemes: Schemes | None = None,
    adapted_layers: str | list[str] = "all-linear",
) -> Simulation:
    """An exported simulation; translating its graph takes time in proportion to what is adapted."""
    model = tiny_model("llama", layers=1)
    quantize_(model, scheme, "rtn")
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=adapted_layers, init_lora_weights=False)
    ).eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    simulation = simulate(adapted, batch, schemes)
    simulation.calibrate([batch])
    export_onnx(simulation.graph(), folder, {"qwlora.note": "test"})
    return simulation


def initializer(folder: Path, name: str) -> np.ndarray:
    stored = onnx.load(folder / "model.onnx").graph.initializer
    return next(onnx.numpy_helper.to_array(i) for i in stored if i.name == name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Simulation]:
    folder = tmp_path_factory.mktemp("bundle")
    return folder, made("w4-block32", folder)


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
    file = onnx.load(tmp_path / "model.onnx")
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in file.graph.initializer}
    for name, weight in packed_weights(model).items():
        shift = weight.encoding.scheme.symmetric_offset * weight.encoding.scheme.symmetric
        stored = torch.from_numpy(arrays[f"{name}.codes"].astype(np.int32))
        in_out = stored.shape != weight.codes.shape  # no matrix here is square
        assert torch.equal(stored.T if in_out else stored, weight.codes.int() + shift)


def test_a_runtime_that_rounds_activations_on_its_own_fails_the_proof(
    bundle: tuple[Path, Simulation], monkeypatch: pytest.MonkeyPatch
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
    simulation = made("w4-block32", tmp_path, Schemes(activations=Scheme(8, symmetric=False)))
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), "a8")
    kinds = {
        i.data_type
        for i in onnx.load(tmp_path / "model.onnx").graph.initializer
        if i.name.endswith(".zero_point")
    }
    assert kinds == {onnx.TensorProto.UINT8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bitwidth", "symmetric", "container"),
    [(5, False, "uint8"), (12, True, "int16"), (12, False, "uint16")],
)
def test_adapter_weights_of_every_width(
    tmp_path: Path, bitwidth: int, symmetric: bool, container: str
) -> None:
    weights = Scheme(bitwidth, symmetric, PerChannel(0))
    simulation = made("w4-block32", tmp_path, Schemes(adapter_weights=weights))
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), "it")
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    stored = initializer(tmp_path, f"{name}.codes")
    assert stored.dtype == container
    codes = simulation.encodings[name].quantize(simulation.adapter_weights[name])
    np.testing.assert_array_equal(stored, (codes - symmetric * 2 ** (bitwidth - 1)).T.numpy())
    assert int(codes.max()) == 2**bitwidth - 1


def test_activation_bitwidths_without_an_onnx_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"6-bit.*use 8 or 16 bits"):
        made("w4-block32", tmp_path, Schemes(activations=Scheme(6, symmetric=False)))


def test_aimet_entries_describe_the_grids(bundle: tuple[Path, Simulation]) -> None:
    folder, simulation = bundle
    record = json.loads((folder / "model.encodings").read_text())
    parameters = {e["name"]: e for e in record["param_encodings"]}
    name = "model.layers.0.mlp.up_proj.weight"
    weight, scales = parameters[name], simulation.encodings[name].scale.T.flatten().numpy()
    assert (weight["enc_type"], weight["bw"], weight["block_size"]) == ("PER_BLOCK", 4, 32)
    assert (weight["is_sym"], set(weight["offset"])) == (True, {-8})
    np.testing.assert_array_equal(np.float32(weight["scale"]), scales)
    np.testing.assert_array_equal(initializer(folder, f"{name}.scale").flatten(), scales)
    lora = parameters["model.layers.0.mlp.up_proj.lora_A.weight"]
    assert (lora["enc_type"], lora["bw"], len(lora["scale"])) == ("PER_CHANNEL", 8, 4)
    assert set(lora["offset"]) == {-128}
    assert all(
        e["bw"] == 16 and e["enc_type"] == "PER_TENSOR" and not e["is_sym"]
        for e in record["activation_encodings"]
    )
    assert len(parameters) == sum(m.kind is not Kind.ACTIVATION for m in simulation.marks)


def test_lpbq_weights_are_exported_as_lpbq_and_read_back_as_the_same_grid(tmp_path: Path) -> None:
    simulation = made("w4-lpbq64", tmp_path, adapted_layers=["q_proj"])
    entries = json.loads((tmp_path / "model.encodings").read_text())["param_encodings"]
    by_type = {e["name"] for e in entries if e["enc_type"] == "LPBQ"}
    base = {m.name for m in simulation.marks if m.kind is Kind.BASE}
    assert base
    assert by_type == base
    file = read_encodings(tmp_path / "model.encodings")
    for name in base:
        encoding, entry = simulation.encodings[name], file.by_name[name]
        assert isinstance(entry, LpbqEncoding)
        assert (entry.bitwidth, entry.decompressed_bitwidth, entry.block_size) == (4, 8, 64)
        rows, blocks = encoding.scale.shape
        stored = TensorLayout((rows, blocks * 64), transposed=True, block_order="tensor")
        again = grid_of(entry, stored, file.version)
        assert again.scheme == encoding.scheme
        assert torch.equal(again.scale, encoding.scale)
        assert torch.equal(again.offset, encoding.offset)


@pytest.mark.parametrize(
    ("observer", "quant_scheme"),
    [
        ("min-max", "min_max"),
        ("sqnr", "post_training_tf_enhanced"),
        ("percentile", "post_training_percentile"),
        ("squared-error", "squared_error"),
    ],
)
def test_quant_scheme_names_the_observer_of_the_activations(
    bundle: tuple[Path, Simulation], tmp_path: Path, observer: str, quant_scheme: str
) -> None:
    graph = replace(bundle[1].graph(), observer=observer)
    write_graph_encodings(graph, tmp_path / "model.encodings")
    arguments = read_encodings(tmp_path / "model.encodings").quantizer_args
    assert arguments["quant_scheme"] == quant_scheme


def test_a_simulation_tells_the_writer_which_observer_ran(bundle: tuple[Path, Simulation]) -> None:
    simulation = bundle[1]
    schemes = replace(simulation.origin.schemes, observer="sqnr")
    other = copy.copy(simulation)
    other.origin = replace(simulation.origin, schemes=schemes)
    assert (simulation.graph().observer, other.graph().observer) == ("min-max", "sqnr")


def test_every_quantized_tensor_has_an_encoding_and_no_other(
    bundle: tuple[Path, Simulation],
) -> None:
    nodes = onnx.load(bundle[0] / "model.onnx", load_external_data=False).graph.node
    quantized = [node.output[0] for node in nodes if node.op_type == "DequantizeLinear"]
    names = {name.removesuffix(".dequantized") for name in quantized}
    assert read_encodings(bundle[0] / "model.encodings").by_name.keys() == names


def test_file_carries_its_metadata_and_axis_names(bundle: tuple[Path, Simulation]) -> None:
    model = onnx.load(bundle[0] / "model.onnx")
    assert {p.key: p.value for p in model.metadata_props}["qwlora.note"] == "test"
    assert [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input] == [
        ["batch", "tokens"]
    ] * 2
    assert {n.domain for n in model.graph.node} == {""}
