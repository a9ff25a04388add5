"""The content of ONNX exports, of language models and others, and the limits of their proof."""

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
from peft import get_peft_model
from torch import Tensor, nn

from conftest import tiny_model
from formats.packing import packed_and_twin
from qwlora import PerChannel, Scheme, Schemes, Simulation, export, quantize_, simulate, verify
from qwlora.data.sequences import Sequences
from qwlora.errors import ExportError, VerificationError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.formats.aimet_encodings.grids import write_graph_encodings
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.scheme import PerBlock, PerTensor, parse_scheme
from qwlora.nn import packed_weights
from qwlora.targets.onnx import onnx_model
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.onnx.onnx_runtime import OnnxModel, read_session_options
from qwlora.targets.onnx.switchable_graph import container_bits, operands
from qwlora.targets.proof.reference import make_reference, simulated_logits
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS
from simulation.captured import adapted_layer
from simulation.tiny_architectures import inputs, make
from targets.proofs import measure_logits, verify_onnx, verify_onnx_outputs
from targets.weights.test_weights_targets import base

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
Bundle = tuple[Path, Simulation]
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def made(folder: Path, schemes: Schemes | None = None, grid: Scheme | None = None) -> Simulation:
    """An exported simulation. With a `grid` of all weights, embedding and head are packed, too."""
    adapted = adapted_layer()
    if grid is not None:
        model, _ = packed_and_twin(tiny_model("llama", layers=1), grid)
        adapted = get_peft_model(model, adapted.peft_config["default"]).eval()
    simulation = simulate(adapted, BATCH, schemes)
    simulation.calibrate([BATCH])
    export_onnx(simulation.graph(), folder, {"qwlora.note": "test"})
    return simulation


def shape_of(value: Any) -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


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
    quantize_(model, scheme, "rtn")
    batches = [{"input": torch.randn(8, 64)} for _ in range(3)]
    simulation = simulate(model, batches[0])
    simulation.calibrate(batches)
    export_onnx(simulation.graph(), tmp_path)
    parity = verify_onnx_outputs(tmp_path, simulation, batches)
    assert parity.figures["sqnr"]["output"] > 60
    arrays = initializers(tmp_path)
    assert packed_weights(model).keys() == {"0.weight", "2.weight"}
    for name, weight in packed_weights(model).items():
        shift = weight.encoding.scheme.symmetric_offset * weight.encoding.scheme.symmetric
        stored = torch.from_numpy(arrays[f"{name}.codes"].astype(np.int32))
        in_out = stored.shape != weight.codes.shape  # no matrix here is square
        assert torch.equal(stored.T if in_out else stored, weight.codes.int() + shift)


def test_a_runtime_that_rounds_activations_fails_the_proof(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    verify_onnx(tmp_path, simulation, IDS, layer_tokens=16)
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
    verify_onnx(tmp_path, simulation, IDS, layer_tokens=16)
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
    assert [shape_of(value) for value in model.graph.input] == [["batch", "tokens"]] * 2
    assert [shape_of(value) for value in model.graph.output] == [["batch", "tokens", 260]]
    assert {n.domain for n in model.graph.node} == {""}


OBSERVERS = {"min-max": "min_max", "squared-error": "squared_error"}
OBSERVERS |= {"sqnr": "post_training_tf_enhanced", "percentile": "post_training_percentile"}


@pytest.mark.parametrize(("observer", "quant_scheme"), OBSERVERS.items())
def test_quant_scheme_names_the_observer_that_ran(
    observer: Any, quant_scheme: str, bundle: Bundle, tmp_path: Path
) -> None:
    simulation = copy.copy(bundle[1])
    schemes = replace(simulation.origin.schemes, observer=observer)
    simulation.origin = replace(simulation.origin, schemes=schemes)
    write_graph_encodings(simulation.graph(), tmp_path / "model.encodings")
    arguments = read_encodings(tmp_path / "model.encodings").quantizer_args
    assert arguments["quant_scheme"] == quant_scheme


FLOAT_BLOCKS = Scheme(4, False, PerBlock(16), float_offset=True)
SLOW = [Scheme(3, False, PerTensor(), float_offset=True)]
SLOW += map(parse_scheme, ("w4-lpbq16", "w3-signed16"))
SCHEMES = [FLOAT_BLOCKS, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SLOW)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_file_computes_what_was_simulated(tmp_path: Path, scheme: Scheme) -> None:
    simulation = made(tmp_path, grid=scheme)
    weights = packed_weights(simulation.origin.model)
    assert {mark.name for mark in simulation.marks if mark.kind is Kind.BASE} == set(weights)
    assert weights["lm_head.weight"].is_tied
    verify_onnx(tmp_path, simulation, IDS, layer_tokens=16)
    file = onnx.load(tmp_path / "model.onnx")
    arrays = {i.name: i for i in file.graph.initializer}
    types = {i.data_type for name, i in arrays.items() if name.endswith((".scale", ".minimum"))}
    assert types == {onnx.TensorProto.FLOAT}
    assert all(f"{name}.codes" in arrays for name in weights)
    copies = [i.data_type for i in arrays.values() if np.prod(i.dims) == 260 * 64]
    assert onnx.TensorProto.FLOAT not in copies  # of the embedding
    encodings = read_encodings(tmp_path / "model.encodings")
    is_left_out = scheme.float_offset  # AIMET has no such grids
    left_out = {name.removesuffix(".weight") for name in weights} if is_left_out else set()
    assert set(encodings.excluded_layers) == left_out
    assert (weights.keys() <= encodings.by_name.keys()) is not is_left_out


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
        arrays, bits = operands(layer), container_bits(scheme.bitwidth)
        rows, columns = layer.tensor.shape
        settings: dict[str, Any] = {"domain": "com.microsoft", "accuracy_level": 1}
        settings |= {"bits": bits, "block_size": 8 * arrays["codes"].shape[2] // bits}
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


def of_structure(seed: int, width: int = 32, activations: int = 16) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)).eval()
    quantize_(model, "w4-block32", solver="rtn")
    made = simulate(model, INPUTS, Schemes(Scheme(activations, symmetric=False)))
    made.calibrate([INPUTS])
    return made.graph()


def test_models_of_one_structure_are_translated_once_and_get_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, object] = {}
    monkeypatch.setattr(onnx_model, "_translations_by_structure", kept)
    monkeypatch.setattr(onnx_model, "TRANSLATIONS_KEPT", 1)
    first, second, wider = of_structure(0), of_structure(1, activations=8), of_structure(0, 64)

    def files(graph: Any) -> dict[str, bytes]:
        export_onnx(graph, tmp_path)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with mock.patch("torch.onnx.export", side_effect=torch.onnx.export) as translations:
        of_first, of_second = files(first), files(second)
        assert translations.call_count == 1
        files(wider)  # the oldest translation is dropped
        assert len(kept) == 1
        assert files(second) == of_second != of_first
        assert translations.call_count == 3
    for name, content in of_first.items():
        # torch.onnx gives every node the stack trace of its call
        assert b"stack_trace" not in content, name
        assert str(Path(onnx_model.__file__).parents[3]).encode() not in content, name


def test_an_exported_image_model_computes_what_was_simulated(tmp_path: Path) -> None:
    model = make("ViT, classification")
    quantize_(model, "w4-block32", "rtn")
    batches = [inputs("ViT, classification", seed) for seed in range(2)]
    simulation = simulate(model, batches[0], Schemes(Scheme(8, symmetric=False)))
    simulation.calibrate(batches)
    export(simulation, "onnx_each", tmp_path)
    parity = verify_onnx_outputs(tmp_path, simulation, batches)
    assert parity.figures["sqnr"]["logits"] > 60
    assert parity.figures["layers"] == sum(m.kind == "activation" for m in simulation.marks)
    rows = verify(tmp_path, simulation, batches)
    assert rows == list(parity.checks)
    assert {row.what for row in rows} >= {"signal to noise of output logits"}
    assert read_session_options(tmp_path)["session.disable_quant_qdq"] == "1"  # no integer kernels
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    shapes = {value.name: shape_of(value) for value in [*graph.input, *graph.output]}
    assert shapes == {"pixel_values": ["batch", 3, 16, 16], "logits": ["batch", 5]}
    with pytest.raises(VerificationError, match="at least one batch"):
        verify(tmp_path, simulation, [])
    with pytest.raises(ExportError, match="pixel_values was not given"):
        OnnxModel(tmp_path).run({})


class Outputs(nn.Module):
    """Outputs: an input, a parameter, one tensor twice, one named `mean`; values set in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(8, 8), nn.Parameter(torch.tensor([2.0]))

    def forward(self, add: Tensor, ids: Tensor, unused: Tensor) -> dict[str, Tensor]:
        y = self.first(add + 1)
        both = torch.zeros(*y.shape[:-1], 16)
        both[..., ::2], both[..., 1::2] = y, 2 * y
        scaled = y * self.scale.exp()
        result = {"mean": scaled.mean(1), "y": y, "same": y, "both": both, "ids": ids}
        return {**result, "scale": self.scale}


@pytest.mark.parametrize("target", ["onnx_each", "aimet"])
def test_every_output_is_in_the_files_under_its_name(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Outputs().eval().requires_grad_(False)
    quantize_(model, "w8-channel", "rtn")
    floats = {"add": torch.randn(2, 4, 8), "unused": torch.randn(2, 4)}
    batch = {**floats, "ids": torch.randint(0, 9, (2, 4))}
    simulation = simulate(model, batch)
    assert "unused" not in {value.name for value in simulation.placement.values}
    simulation.calibrate([batch])
    if target == "aimet":
        with pytest.raises(ExportError, match="Give `sample`"):
            export(simulation, target, tmp_path)
    export(simulation, target, tmp_path, sample=batch)
    rows = verify(tmp_path, simulation, [batch])
    assert all(row.passed for row in rows)
    outputs = [row.what.rpartition(" ")[2] for row in rows if "of output" in row.what]
    assert outputs == ["mean", "y", "same", "both", "out_ids", "out_scale"]
    (path,) = tmp_path.rglob("model.onnx")
    graph = onnx.load(path).graph
    names = {output for node in graph.node for output in node.output}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    assert read_encodings(path.with_name("model.encodings")).by_name.keys() <= names
