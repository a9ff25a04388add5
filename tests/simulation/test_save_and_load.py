"""A simulation comes back from disk with the same bits, and only on the base and adapter that it was made from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conftest import ARCHITECTURES, packed_model, reseal
from qwlora import PerChannel, Scheme, Schemes, load_simulation, simulate
from qwlora.errors import CalibrationError, CaptureError, FingerprintError
from qwlora.formats.aimet_encodings import IntegerEncoding, read_encodings
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.scheme import Blocks, Granularity, Lpbq, PerTensor, RangeEstimator
from qwlora.simulation.placement_rules import POLICIES, PlacementRule, Policy
from qwlora.simulation.saved_simulation import load_activations
from qwlora.simulation.simulation import Simulation
from simulation.captured import adapted_layer as adapted
from simulation.captured import batch, calibrated

pytestmark = pytest.mark.usefixtures("shared_captures")


def assert_equal_logits(one: Simulation, other: Simulation, seed: int = 9) -> None:
    given = batch(seed=seed)
    assert torch.equal(one.outputs(given)["logits"], other.outputs(given)["logits"])


NARROW = Schemes(
    Scheme(8, symmetric=True),
    Scheme(4, symmetric=False, granularity=PerChannel(0)),
    quantize_residual_adds=True,
)
GRANULARITIES = [
    *(PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1)),
    *(kind(4) for kind in Blocks.KINDS.values()),
    Lpbq(4, 2),
]


def of_everything(granularity: Granularity) -> Schemes:
    """Schemes in which no field has its default."""
    grid = Scheme(6, granularity=granularity)
    only_symmetric = isinstance(granularity, Blocks) and granularity.is_only_symmetric
    return Schemes(
        adapter_weights=grid,
        parameters=replace(grid, bitwidth=8, symmetric=only_symmetric),
        rules=[
            PlacementRule("*embed_tokens*", bitwidth=5, of="weights"),
            PlacementRule("*.self_attn.softmax", bitwidth=8, minimum=0.0, maximum=1.0),
            PlacementRule("*.down_proj", keep="float"),
        ],
        observer=RangeEstimator("percentile", 99.5),
        symmetric_matmul_second_input=True,
        policy=Policy("mine", POLICIES["npu"].rules),
    )


@pytest.mark.parametrize(
    ("architecture", "schemes"),
    [
        *(pytest.param("llama", of_everything(kind), id=repr(kind)) for kind in GRANULARITIES),
        *(
            pytest.param(name, schemes, marks=pytest.mark.slow)
            for name in ARCHITECTURES
            for schemes in (None, NARROW)
        ),
    ],
)
def test_it_comes_back_with_the_same_bits(tmp_path: Path, architecture: str, schemes: Any) -> None:
    simulation = calibrated(adapted(architecture), schemes)
    simulation.save(tmp_path / "new" / "folder")
    again = load_simulation(tmp_path / "new" / "folder", adapted(architecture))
    assert_equal_logits(again, simulation)
    assert again.origin.schemes == simulation.origin.schemes
    assert repr(again.origin.schemes) == repr(simulation.origin.schemes)
    assert list(again.encodings) == list(simulation.encodings)
    for name, encoding in simulation.encodings.items():
        assert again.encodings[name].scheme == encoding.scheme
        assert again.encodings[name].equals(encoding)
    assert again.placement.values == simulation.placement.values


def test_its_encodings_are_a_valid_2_1_0_file_keyed_by_module_path(tmp_path: Path) -> None:
    simulation = calibrated(adapted())
    simulation.save(tmp_path)
    file = read_encodings(tmp_path / "simulation.encodings")
    assert file.version == "2.1.0"
    names = {m.name for m in simulation.marks if m.kind is not Kind.BASE}
    assert set(file.by_name) == names
    entry = file.by_name["model.layers.0.mlp.up_proj.lora_A.weight"]
    assert isinstance(entry, IntegerEncoding)
    assert (entry.bitwidth, entry.signed, entry.axis) == (8, True, 0)
    softmax = file.by_name["model.layers.0.self_attn.softmax"]
    assert isinstance(softmax, IntegerEncoding)
    grid = (softmax.bitwidth, softmax.signed, softmax.axis, int(softmax.offset))
    assert grid == (16, False, None, 0)
    activations = {m.name for m in simulation.marks if m.kind is Kind.ACTIVATION}
    assert load_activations(tmp_path).keys() == activations
    assert not list(tmp_path.glob("*.p*"))


def test_keys_and_values_of_earlier_tokens_are_example_inputs_too(tmp_path: Path) -> None:
    model = adapted()
    ids = batch()["input_ids"]
    with torch.no_grad():
        past = model(ids[:, :8], use_cache=True).past_key_values
    given = {
        "input_ids": ids[:, 8:],
        "attention_mask": torch.ones_like(ids),
        "past_key_values": [(layer.keys, layer.values) for layer in past.layers],
    }
    simulation = simulate(model, given)
    simulation.calibrate([given])
    simulation.save(tmp_path)
    again = load_simulation(tmp_path, adapted())
    assert again.captured.interface == simulation.captured.interface
    assert torch.equal(again.outputs(given)["logits"], simulation.outputs(given)["logits"])
    log = again.explain()
    keys = next(value for value in log.values if value.name == "past_key_values.0.key")
    assert (keys.decision, keys.grid) == ("share", "")
    assert keys.reason == "comes from the cache, on the grid of the output that filled it"
    with pytest.raises(CaptureError, match="captured with a cache of 1 layers, not of 0"):
        simulation.as_model()(ids)


def test_what_a_folder_held_stays_until_all_is_written(tmp_path: Path) -> None:
    simulation = calibrated(adapted())
    simulation.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    own, odd = simulation.origin, {**batch(), "device": torch.device("cpu")}
    simulation.origin = replace(own, example_inputs=odd)
    with pytest.raises(CalibrationError, match="example input device holds a device, which JSON"):
        simulation.save(tmp_path)
    simulation.origin = own
    full = mock.patch("qwlora.simulation.saved_simulation.save_file", side_effect=OSError("full"))
    with full, pytest.raises(OSError, match="full"):
        simulation.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    never = tmp_path / "never"
    simulation.quantizers["lm_head.linear"].encoding = None
    with pytest.raises(CalibrationError, match="has no encoding yet"):
        simulation.save(never)
    assert not never.exists()


def test_two_arguments_may_be_one_tensor(tmp_path: Path) -> None:
    model = adapted()
    one = torch.ones(2, 16, dtype=torch.long)
    given = {"input_ids": one, "attention_mask": one}
    simulation = simulate(model, given)
    simulation.calibrate([batch()])
    simulation.save(tmp_path)
    assert_equal_logits(load_simulation(tmp_path, model), simulation)
    distinct = calibrated(adapted())
    with simulation.only(), distinct.only():
        assert_equal_logits(simulation, distinct)


def test_only_what_calibration_left_float_comes_back_without_an_encoding(tmp_path: Path) -> None:
    simulation = calibrated(adapted())
    simulation._drop(["model.layers.0.self_attn.softmax"], "no calibration data reached it")
    simulation.save(tmp_path)
    record = json.loads((tmp_path / "simulation.json").read_text())
    assert record["dropped"] == ["model.layers.0.self_attn.softmax"]
    again = load_simulation(tmp_path, adapted())
    assert again.dropped == {"model.layers.0.self_attn.softmax"}
    assert_equal_logits(again, simulation)
    (tmp_path / "simulation.json").write_text(json.dumps({**record, "dropped": []}))
    reseal(tmp_path, "simulation.json")
    message = r"1 activations have no encoding, .*0.self_attn.softmax first: .* another placement"
    with pytest.raises(CalibrationError, match=message):
        load_simulation(tmp_path, adapted())


def test_another_base_or_adapter_is_refused(tmp_path: Path) -> None:
    calibrated(adapted()).save(tmp_path)
    message = r"for the base with fingerprint \w{64}, but this model has \w{64}.* original model"
    with pytest.raises(CalibrationError, match=message):
        load_simulation(tmp_path, adapted(scheme="w8-channel"))
    for other in (adapted(seed=2), adapted(lora_alpha=99), adapted(r=2)):
        with pytest.raises(CalibrationError, match="for the adapter with fingerprint"):
            load_simulation(tmp_path, other)
    base = packed_model("llama", layers=1)
    with pytest.raises(CalibrationError, match=r"this model has \(none\)"):
        load_simulation(tmp_path, base)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    def refused(file: str, content: str | bytes, message: str) -> None:
        path = tmp_path / file
        whole = path.read_bytes()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        reseal(tmp_path, "simulation.json")
        with pytest.raises(CalibrationError, match=message):
            load_simulation(tmp_path, adapted())
        path.write_bytes(whole)

    unreadable = "holds no readable simulation"
    with pytest.raises(CalibrationError, match=unreadable):
        load_simulation(tmp_path, adapted())
    calibrated(adapted()).save(tmp_path)
    softmax = "model.layers.0.self_attn.softmax"
    text = (tmp_path / "simulation.encodings").read_text()
    document = json.loads(text)
    document["encodings"] = [e for e in document["encodings"] if e["name"] != softmax]
    without = f"1 activations have no encoding, {softmax} first"
    (tmp_path / "simulation.encodings").write_text(text.replace('"y_scale": ', '"y_scale":  '))
    for load in (load_activations, lambda folder: load_simulation(folder, adapted())):
        with pytest.raises(FingerprintError, match=r"n.encodings changed .* calibrate again"):
            load(tmp_path)
    refused("simulation.encodings", json.dumps(document), without)
    refused("simulation.encodings", text[:-20], "cannot be read: ")
    refused("simulation.encodings", text.replace('"uint16"', '"float8e5m2"'), unreadable)
    record = (tmp_path / "simulation.json").read_text()
    for damaged in (
        "{}",
        record.replace('"format": 4', '"format": 3'),
        record.replace('"schemes"', '"plans"'),
        record.replace('"bitwidth": 16', '"bitwidth": 17'),
        record.replace('"block_size"', '"size"'),
        record.replace('"block_size": null', '"block_size": 4, "kind": "hexagon"'),
    ):
        refused("simulation.json", damaged, unreadable)
    refused("example_inputs.safetensors", b"0", unreadable)
