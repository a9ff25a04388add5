"""The `.aimet` folder: what AI Hub and aimet-onnx take, and what its files promise."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from qwlora import Schemes, Simulation, quantize_, simulate
from qwlora.errors import ExportError, VerificationError
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_layer import PackedLayer
from qwlora.targets.npu.float_onnx import FloatOnnxModel, to_float_onnx
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from targets.damage import flip_bit
from targets.proofs import verify_simulation

pytestmark = pytest.mark.usefixtures("shared_captures")

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
AIMET = TARGETS["aimet"].backend
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SAMPLE = {name: tensor[:1] for name, tensor in BATCH.items()}


def simulation(scheme: str, architecture: str = "llama") -> Simulation:
    model = tiny_model(architecture, layers=1)
    quantize_(model, scheme, solver="rtn")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    schemes = Schemes(adapter_activation_bitwidth=8)
    made = simulate(get_peft_model(model, config).eval(), BATCH, schemes)
    made.calibrate([BATCH])
    return made


def written(made: Simulation, folder: Path, version: str = "1.0.0") -> Path:
    exported = ExportedGraph(made, {"qwlora.adapter": "a"}, SAMPLE, version)
    AIMET.write_adapter(exported, folder, folder)
    return folder


@pytest.fixture(scope="module")
def lpbq(shared_captures: None) -> Simulation:
    return simulation("w4-lpbq32")


@pytest.fixture(scope="module")
def folder(lpbq: Simulation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(lpbq, tmp_path_factory.mktemp("aimet") / "a")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def test_the_files_compute_what_was_simulated(folder: Path, lpbq: Simulation) -> None:
    parity = verify_simulation(AIMET.open(folder, ""), lpbq, IDS, IDS.shape[1])
    assert parity.figures["layers"] > 30
    assert parity.figures["worst_layer_steps"] < 1.01
    assert parity.problems == []


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize(
    "scheme",
    [
        "w4-lpbq32",
        "w4-signed32",
        pytest.param("w4-block32-asymmetric", marks=pytest.mark.slow),
        pytest.param("w3-channel", marks=pytest.mark.slow),
    ],
)
def test_stored_weights_give_the_codes_of_the_base_again(
    scheme: str, version: str, lpbq: Simulation, tmp_path: Path
) -> None:
    made = lpbq if scheme == "w4-lpbq32" else simulation(scheme)
    model: Any = AIMET.open(written(made, tmp_path, version), "")
    stored = model.parameters()
    layers = {
        path.removeprefix("base_model.model.").replace(".base_layer", ""): layer
        for path, layer in made.origin.model.named_modules()
        if isinstance(layer, PackedLayer)
    }
    assert len(layers) == 7
    for path, layer in layers.items():
        name = f"{path}.weight"
        grid, values = model.grid(name, stored[name])
        codes = grid.quantize(values)
        assert torch.equal(grid.dequantize(codes), layer.tensor.dequantize()), path
        if scheme != "w4-signed32":  # whose blocks with negative scales are turned around
            assert torch.equal(codes, layer.tensor.codes), path


def move(record: Any, source: str, target: str) -> None:
    record[target].append(record[source].pop(0))


def of_lora(record: Any) -> Any:
    return next(e for e in record[PARAMETERS] if e["name"].endswith("lora_A.weight"))


def stretch(entry: Any) -> None:
    entry["scale"] = [1.1 * scale for scale in entry["scale"]]


def shorten(entry: Any) -> None:
    entry |= {key: entry[key][:-1] for key in ("scale", "offset")}


PARAMETERS, ACTIVATIONS = "param_encodings", "activation_encodings"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r[PARAMETERS][0].update(name="w"), "w is not the name of a tensor in model."),
        (lambda r: r[ACTIVATIONS][0].update(name="x"), "x is not the name of a tensor in model."),
        (lambda r: move(r, PARAMETERS, ACTIVATIONS), "as an activation, but is a parameter"),
        (lambda r: move(r, ACTIVATIONS, PARAMETERS), "as a parameter, but is an activation"),
        (lambda r: r[ACTIVATIONS][0].update(bw=0), "bitwidth is 0"),
        (lambda r: stretch(of_lora(r)), "lora_A.weight is not on the grid of its entry"),
        (lambda r: shorten(of_lora(r)), "has 3 scales, but axis 0 of [4, "),
    ],
)
def test_an_entry_that_does_not_fit_the_model_is_a_problem(
    change: Callable[[Any], None], problem: str, copied: Path
) -> None:
    path = copied / "model.aimet" / "model.encodings"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    problems = FloatOnnxModel(path.with_name("model.onnx"), path).problems()
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_every_entry_names_a_tensor_and_blocks_are_in_aimets_order(
    version: str, lpbq: Simulation, tmp_path: Path
) -> None:
    files = written(lpbq, tmp_path, version) / "model.aimet"
    document = json.loads((files / "model.encodings").read_text())
    assert FloatOnnxModel(files / "model.onnx", files / "model.encodings").problems() == []
    graph = onnx.load(files / "model.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    name, scales = "model.layers.0.mlp.up_proj.weight", 64 // 32
    layer = dict(lpbq.origin.model.named_modules())["base_model.model.model.layers.0.mlp.up_proj"]
    scale = layer.tensor.encoding.scale
    if version == "1.0.0":
        assert {e["name"] for e in document["param_encodings"]} <= stored
        assert not {e["name"] for e in document["activation_encodings"]} & stored
        entry = next(e for e in document["param_encodings"] if e["name"] == name)
        blocks = np.reshape(entry["per_block_int_scale"], (128, scales))  # [out][block]
        found = blocks * np.reshape(entry["scale"], (128, 1))
    else:
        entry = next(e for e in document["encodings"] if e["name"] == name)
        assert (entry["axis"], entry["block_size"]) == (0, 32)  # stored [in, out]
        blocks = np.array(entry["per_block_int_scale"])
        found = (blocks * np.array(entry["per_channel_float_scale"])).T
    np.testing.assert_allclose(found, scale.numpy(), rtol=1e-6)
    entries = document.get("encodings") or document["activation_encodings"]
    bits = {
        e["name"]: e.get("bw") or int(e["output_dtype"].removeprefix("uint"))
        for e in entries
        if e["name"].startswith("model.layers.0.self_attn.q_proj.") and "weight" not in e["name"]
    }
    own = {n.rpartition("q_proj.")[2]: b for n, b in bits.items()}
    moved = {n: own.pop(n) for n in list(own) if n.startswith("add.")}
    assert own == {"linear": 16, "lora_A.linear": 8, "lora_B.linear": 8, "mul": 8, "add": 16}
    assert moved["add.reshape.transpose"] == 16  # named after what it moves


def test_the_graph_has_fixed_shapes_and_nothing_of_this_machine(folder: Path) -> None:
    path = folder / "model.aimet" / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Shape", "Range", "Cos", "Sin", "QuantizeLinear", "DequantizeLinear"}
    assert b"site-packages" not in path.read_bytes()


def test_inputs_of_another_size_are_refused(folder: Path) -> None:
    shorter = {name: tensor[:, :7] for name, tensor in SAMPLE.items()}
    with pytest.raises(ExportError, match=r"input_ids[\s\S]*7 Expected: 12"):
        AIMET.open(folder, "").run(shorter)


def test_golden_files_hold_the_sample_and_its_simulated_outputs(
    folder: Path, lpbq: Simulation
) -> None:
    record = json.loads((folder / "golden" / "golden.json").read_text())
    ids = np.load(folder / "golden" / "input_ids.npy")
    logits = np.load(folder / "golden" / "logits.npy")
    assert [item["name"] for item in record["inputs"]] == ["input_ids", "attention_mask"]
    assert np.array_equal(ids, SAMPLE["input_ids"].numpy())
    assert np.array_equal(logits, lpbq.outputs(SAMPLE)["logits"].numpy())


def edit_entry(field: str, change: Callable[[object], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.aimet" / "model.encodings"
        document = json.loads(path.read_text())
        entry = document["param_encodings"][0]
        entry[field] = change(entry[field])
        path.write_text(json.dumps(document))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit_entry("name", lambda name: f"{name}2"), r"model\.encodings: .*2.*not the name"),
        (edit_entry("scale", lambda s: [x * 1.01 for x in s]), r"model\.onnx.*not on the grid"),  # type: ignore[attr-defined]
        (flip_bit("model.aimet/model.data"), r"model\.onnx: .* not on the grid"),
    ],
    ids=["tensor-renamed", "scale-changed", "bit-flipped"],
)
def test_damaged_files_are_refused_by_name(
    damage: Callable[[Path], None], said: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(VerificationError, match=f"(?s){said}"):
        AIMET.open(copied, "")


def test_a_base_that_no_encodings_file_can_hold_is_refused(lpbq: Simulation) -> None:
    graph, scheme = lpbq.graph(), Scheme(4, symmetric=False, float_offset=True)
    name = next(mark.name for mark in graph.marks if mark.kind.value == "base")
    encodings = {**graph.encodings, name: measure(torch.randn(64, 64), scheme)}
    with pytest.raises(ExportError, match=rf"{re.escape(name)}: .*no float offsets.*w4-block32"):
        to_float_onnx(replace(graph, encodings=encodings), {})
