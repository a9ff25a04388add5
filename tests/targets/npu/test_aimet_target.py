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

from conftest import flip_bit
from qwlora import Schemes, Simulation, simulate
from qwlora.errors import ExportError, VerificationError
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import Scheme
from qwlora.nn import packed_weights
from qwlora.targets.npu.float_onnx import FloatOnnxModel, to_float_onnx
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from simulation.captured import adapted_layer
from targets.damage import edit_json
from targets.proofs import verify_simulation

pytestmark = pytest.mark.usefixtures("shared_captures")

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
AIMET = TARGETS["aimet"].backend
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SAMPLE = {name: tensor[:1] for name, tensor in BATCH.items()}
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("w4-block32-asymmetric", "w3-channel")]


def simulation(scheme: str) -> Simulation:
    model = adapted_layer("llama", scheme, target_modules=["q_proj", "down_proj"])
    made = simulate(model, BATCH, Schemes(adapter_activation_bitwidth=8))
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


def test_the_files_compute_what_was_simulated(folder: Path, lpbq: Simulation) -> None:
    parity = verify_simulation(AIMET.open(folder, ""), lpbq, IDS, IDS.shape[1])
    assert parity.figures["layers"] > 30
    assert parity.figures["worst_layer_steps"] < 1.01
    assert parity.problems == []


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("scheme", ["w4-lpbq32", "w4-signed32", *SLOW])
def test_stored_weights_give_the_codes_of_the_base_again(
    scheme: str, version: str, lpbq: Simulation, tmp_path: Path
) -> None:
    made = lpbq if scheme == "w4-lpbq32" else simulation(scheme)
    model: Any = AIMET.open(written(made, tmp_path, version), "")
    stored = model.parameters()
    layers = packed_weights(made.origin.model)
    assert len(layers) == 7
    for name, layer in layers.items():
        grid, values = model.grid(name, stored[name])
        codes = grid.quantize(values)
        assert torch.equal(grid.dequantize(codes), layer.tensor.dequantize()), name
        if scheme != "w4-signed32":  # whose blocks with negative scales are turned around
            assert torch.equal(codes, layer.tensor.codes), name


def change(section: str, edit: Callable[[Any], object], name: str = "") -> Callable[[Path], None]:
    """Change the first entry of a section whose name ends so."""

    def damage(record: Any) -> None:
        edit(next(e for e in record[f"{section}_encodings"] if e["name"].endswith(name)))

    return edit_json(FILE, damage)


def move(source: str, target: str) -> Callable[[Path], None]:
    sections = f"{source}_encodings", f"{target}_encodings"
    return edit_json(FILE, lambda record: record[sections[1]].append(record[sections[0]].pop(0)))


def scaled(entry: Any, factor: float) -> None:
    entry["scale"] = [factor * scale for scale in entry["scale"]]


FILE, LORA = "model.aimet/model.encodings", "lora_A.weight"
NO_GRID = r"model\.onnx: .* not on the grid"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change("param", lambda e: e.update(name="w2")), r"model\.encodings: .*w2 is not the name"),
        (change("activation", lambda e: e.update(name="x")), "x is not the name of a tensor"),
        (move("param", "activation"), "as an activation, but is a parameter"),
        (move("activation", "param"), "as a parameter, but is an activation"),
        (change("activation", lambda e: e.update(bw=0)), "bitwidth is 0"),
        (change("param", lambda e: scaled(e, 1.01)), NO_GRID),
        (change("param", lambda e: scaled(e, 1.1), LORA), f"{LORA} is not on the grid"),
        (
            change("param", lambda e: e.update(scale=e["scale"][1:], offset=e["offset"][1:]), LORA),
            r"has 3 scales, but axis 0 of \[4, ",
        ),
        (lambda f: flip_bit(f / "model.aimet/model.data", -2), NO_GRID),
    ],
)
def test_damaged_files_are_refused_by_name(
    damage: Callable[[Path], None], problem: str, folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    damage(copied)
    with pytest.raises(VerificationError, match=f"(?s){problem}"):
        AIMET.open(copied, "")


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_every_entry_names_a_tensor_and_blocks_are_in_aimets_order(
    version: str, lpbq: Simulation, tmp_path: Path
) -> None:
    files = written(lpbq, tmp_path, version) / "model.aimet"
    document = json.loads((files / "model.encodings").read_text())
    assert FloatOnnxModel(files / "model.onnx", files / "model.encodings").problems() == []
    name, scales = "model.layers.0.mlp.up_proj", 64 // 32
    layer: Any = lpbq.origin.model.get_submodule(f"base_model.model.{name}")
    sections = ("encodings", "param_encodings", "activation_encodings")
    entries: list[Any] = [e for section in sections for e in document.get(section, [])]
    (entry,) = (e for e in entries if e["name"] == f"{name}.weight")
    if version == "1.0.0":
        blocks = np.reshape(entry["per_block_int_scale"], (128, scales))  # [out][block]
        found = blocks * np.reshape(entry["scale"], (128, 1))
    else:
        assert (entry["axis"], entry["block_size"]) == (0, 32)  # stored [in, out]
        blocks = np.array(entry["per_block_int_scale"])
        found = (blocks * np.array(entry["per_channel_float_scale"])).T
    np.testing.assert_allclose(found, layer.tensor.encoding.scale.numpy(), rtol=1e-6)
    q = "model.layers.0.self_attn.q_proj."
    bits = {
        e["name"].removeprefix(q): e.get("bw") or int(e["output_dtype"].removeprefix("uint"))
        for e in entries
        if e["name"].startswith(q) and "weight" not in e["name"]
    }
    assert bits["add.reshape.transpose"] == 16  # named after what it moves
    own = {n: b for n, b in bits.items() if not n.startswith("add.")}
    assert own == {"linear": 16, "lora_A.linear": 8, "lora_B.linear": 8, "mul": 8, "add": 16}


def test_the_graph_has_fixed_shapes_and_nothing_of_this_machine(folder: Path) -> None:
    path = folder / "model.aimet" / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Shape", "Range", "Cos", "Sin", "QuantizeLinear", "DequantizeLinear"}
    assert b"site-packages" not in path.read_bytes()


def test_golden_files_hold_the_sample_and_its_outputs(folder: Path, lpbq: Simulation) -> None:
    record = json.loads((folder / "golden" / "golden.json").read_text())
    assert [item["name"] for item in record["inputs"]] == [*SAMPLE]
    for name, tensor in {**SAMPLE, "logits": lpbq.outputs(SAMPLE)["logits"]}.items():
        assert np.array_equal(np.load(folder / "golden" / f"{name}.npy"), tensor.numpy())
    shorter = {name: tensor[:, :7] for name, tensor in SAMPLE.items()}
    with pytest.raises(ExportError, match=r"input_ids[\s\S]*7 Expected: 12"):
        AIMET.open(folder, "").run(shorter)


def test_a_base_that_no_encodings_file_can_hold_is_refused(lpbq: Simulation) -> None:
    graph, scheme = lpbq.graph(), Scheme(4, symmetric=False, float_offset=True)
    name = next(mark.name for mark in graph.marks if mark.kind.value == "base")
    encodings = {**graph.encodings, name: measure(torch.randn(64, 64), scheme)}
    with pytest.raises(ExportError, match=rf"{re.escape(name)}: .*no float offsets.*w4-block32"):
        to_float_onnx(replace(graph, encodings=encodings), {})
