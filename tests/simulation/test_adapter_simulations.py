"""Several adapters on one base: each alone computes what PEFT computes, and what is shared is one and the same."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from conftest import tiny_model
from qwlora import PlacementRule, Scheme, Schemes, quantize_, simulate
from qwlora.adapter.adapter_folder import load_adapter, save_adapter
from qwlora.errors import CalibrationError, CaptureError, GridError
from qwlora.formats.aimet_encodings.grids import write_graph_encodings
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.graph_analysis import branch_nodes, lora_branch
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import encoding_from_range
from qwlora.grid.scheme import PerChannel
from qwlora.nn.fingerprint import adapter_fingerprint
from qwlora.simulation.adapter_simulations import (
    AdapterSimulations,
    BaseActivations,
    load_simulation,
    simulate_adapters,
)
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.simulation.saved_simulation import load_encodings
from qwlora.simulation.simulation import Simulation
from qwlora.system.parameter_names import is_adapter_name
from simulation.captured import batch as batch_of

pytestmark = pytest.mark.usefixtures("shared_captures")
MODES: tuple[BaseActivations, ...] = ("all", "adapter_only", "none")
EIGHT_BITS = Schemes(Scheme(8, symmetric=False))
inputs = partial(batch_of, tokens=12)


def shape(rank: int = 4, alpha: float = 8, **given: Any) -> LoraConfig:
    options = {"target_modules": "all-linear", "init_lora_weights": False, **given}
    return LoraConfig(r=rank, lora_alpha=alpha, **options)


def eager(architecture: str) -> PreTrainedModel:
    """A graph is captured with eager attention, whose bits are not those of another."""
    model = tiny_model(architecture, layers=1)
    model.set_attn_implementation("eager")
    return model


def adapted(architecture: str = "llama", **others: LoraConfig) -> PeftModel:
    """Adapters `first` and, ten times as strong, `second` of one structure; and `others`."""
    model = eager(architecture)
    quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(1)
    with_first = get_peft_model(model, shape(), adapter_name="first")
    for name, config in {"second": shape(), **others}.items():
        with_first.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in with_first.named_parameters():
            if "lora_B.second" in name:
                parameter.mul_(10)
    return with_first.eval()


def peft_logits(model: PeftModel, adapter: str, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), visible_implementations(model):  # the attention that is captured
        if adapter == "base":
            with model.disable_adapter():
                return model(**batch, use_cache=False).logits
        model.set_adapter(adapter)
        return model(**batch, use_cache=False).logits


def unquantized(simulation: Simulation, batch: dict[str, Tensor]) -> Tensor:
    with simulation.only():
        return simulation.outputs(batch)["logits"]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted(wide=shape(6), narrow=shape(target_modules=["v_proj"]), strong=shape(alpha=12))


@pytest.fixture(scope="module")
def calibrated(model: PeftModel) -> dict[str, AdapterSimulations]:
    found = {}
    for mode in MODES:
        found[mode] = simulate_adapters(model, inputs(), EIGHT_BITS, mode, ["first", "second"])
        found[mode].calibrate([inputs(seed=s) for s in range(3)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "adapters", "captures"),
    [
        ("llama", ["first", "second", "wide", "narrow", "strong"], 4),
        ("gpt2", ["first", "second"], 1),
    ],
)
def test_each_adapter_alone_computes_what_peft_computes(
    architecture: str, adapters: list[str], captures: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("model") if architecture == "llama" else adapted(architecture)
    simulations = simulate_adapters(model, inputs())
    assert list(simulations) == [*adapters, "base"]
    assert simulations.captures == captures  # second goes into the graph of first, and base too
    batch = inputs(3, tokens=20, seed=7)
    batch["attention_mask"][0, :8] = 0
    found = {name: unquantized(simulation, batch) for name, simulation in simulations.items()}
    for name, logits in found.items():
        assert torch.equal(logits, peft_logits(model, name, batch)), name
    assert not torch.equal(found["first"], found["second"])


def test_where_zeros_are_not_the_base_it_is_captured() -> None:
    config = shape(target_modules=["v_proj"], use_dora=True)
    model = get_peft_model(eager("llama"), config, adapter_name="first").eval()
    simulations = simulate_adapters(model, inputs())
    assert simulations.captures == 2
    assert not simulations["base"].adapter_weights
    batch = inputs(3, tokens=20, seed=7)
    for name in ("first", "base"):
        assert torch.equal(unquantized(simulations[name], batch), peft_logits(model, name, batch))


def test_an_inactive_adapter_is_in_no_graph(
    model: PeftModel, calibrated: dict[str, AdapterSimulations]
) -> None:
    for name, simulation in calibrated["all"].items():
        program = simulation.program
        used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
        addresses = {
            program.state_dict[s.target].data_ptr()
            for s in program.graph_signature.input_specs
            if s.arg.name in used and s.target in program.state_dict
        }
        factors = [(path, p) for path, p in model.named_parameters() if "lora_" in path]
        owners = {path.split(".")[-2]: p.data_ptr() in addresses for path, p in factors}
        assert owners == {other: other == name for other in model.peft_config}


def test_the_model_is_as_it_was(model: PeftModel) -> None:
    model.set_adapter("second")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    simulate_adapters(model, inputs(), adapters=["first"])
    assert model.active_adapters == ["second"]
    assert model.active_adapter == "second"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert any("second" in name for name in trainable)
    assert not any("first" in name for name in trainable)


DORA = [f"lora_{factor}.linear{n}" for factor in "AB" for n in ("", "_1")]
MAGNITUDES = ["mul", "add", "linalg_norm", "div", "sub", "mul_1", "mul_2", "mul_3", "add_1"]
DORA += [f"lora_magnitude_vector.{part}" for part in MAGNITUDES]


@pytest.mark.parametrize(
    ("architecture", "dora"),
    [
        ("llama", False),
        ("gpt2", False),
        pytest.param("opt", False, marks=pytest.mark.slow),
        pytest.param("qwen3", False, marks=pytest.mark.slow),
        ("llama", True),
    ],
)
def test_each_part_has_an_encoding(
    architecture: str, dora: bool, request: pytest.FixtureRequest
) -> None:
    if dora:  # on a float base
        config = shape(use_dora=True)
        model = get_peft_model(eager(architecture), config, adapter_name="first").eval()
    elif architecture == "llama":
        model = request.getfixturevalue("model")
    else:
        model = adapted(architecture)
    simulation = simulate_adapters(model, inputs(), adapters=["first"])["first"]
    simulation.calibrate([inputs()])
    branch, suffix = branch_nodes(simulation.program), ".lora_A.weight"
    layers = [n.removesuffix(suffix) for n in simulation.adapter_weights if n.endswith(suffix)]
    assert len(layers) == sum("lora_A.first.weight" in n for n, _ in model.named_parameters())
    parts = [*DORA, "add"] if dora else ["lora_A.linear", "lora_B.linear", "mul", "add"]
    names = {m.name for m in simulation.marks if m.node in branch}
    assert names == {f"{layer}.{part}" for layer in layers for part in parts}
    for layer in layers:
        own = [f"{layer}.{part}" for part in (*parts, "lora_A.weight", "lora_B.weight")]
        assert len({id(simulation.encodings[name]) for name in own}) == len(own)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_shared_is_byte_for_byte_one_on_disk(
    calibrated: dict[str, AdapterSimulations], mode: str, tmp_path: Path
) -> None:
    simulations, entries = calibrated[mode], []
    for name, simulation in simulations.items():
        simulation.save(tmp_path / name)
        write_graph_encodings(simulation.graph(), tmp_path / name / "model.encodings")
        written = json.loads((tmp_path / name / "model.encodings").read_text())
        encodings = load_encodings(tmp_path / name).items()
        saved = {n: (e.scale.numpy().tobytes(), e.offset.numpy().tobytes()) for n, e in encodings}
        parts = ("activation_encodings", "param_encodings")
        exported = {e["name"]: json.dumps(e) for part in parts for e in written[part]}
        entries.append((saved, exported))
    branch = lora_branch(simulations["first"].program)
    own = {m.name for m in simulations["first"].marks if m.node in branch}
    own |= set(simulations["first"].adapter_weights)
    kinds = (Kind.BASE, Kind.PARAMETER)
    fixed = {mark.name for mark in simulations["first"].marks if mark.kind in kinds}
    assert fixed < entries[0][1].keys()
    for first, second, base in zip(*entries, strict=True):
        assert first.keys() == second.keys()
        differ = {name for name, entry in first.items() if entry != second[name]}
        assert not differ & fixed
        assert all(base[name] == first[name] for name in fixed & first.keys())
        if mode == "none":
            assert not differ
        elif mode == "adapter_only":
            assert differ <= own
            assert {name.rpartition(".")[2] for name in differ} == {"linear", "mul", "weight"}
            assert all("lora_" in n or n.endswith("_proj.mul") for n in differ)
        else:
            assert differ - own
    whole = [(tmp_path / name / "model.encodings").read_bytes() for name in simulations]
    assert (whole[0] == whole[1] == whole[2]) is (mode == "none")


def test_shared_encodings_are_of_all_data(calibrated: dict[str, AdapterSimulations]) -> None:
    simulations, alone = calibrated["none"], calibrated["all"]
    shared = simulations.shared
    activations = [n for n in shared if not is_adapter_name(n) or n.endswith("linear")]
    assert set(activations) == set(simulations["first"].quantizers)
    for name in activations:
        seen = [alone[adapter].quantizers[name].observer for adapter in alone]
        low = torch.stack([o.low for o in seen]).amin(0)
        high = torch.stack([o.high for o in seen]).amax(0)
        expected = encoding_from_range(low, high, EIGHT_BITS.activations)
        assert shared[name].equals(expected)
    for name, weight in simulations["first"].adapter_weights.items():
        both = torch.cat([weight, simulations["second"].adapter_weights[name]], 1)
        # never above the joint range's own step
        scale = both.amax(1).maximum(-both.amin(1) * 127.5 / 128) / 127.5
        assert bool((simulations.shared[name].scale >= scale * 0.999).all())


def test_each_adapter_may_see_its_own_data(model: PeftModel) -> None:
    simulations = simulate_adapters(model, inputs(), EIGHT_BITS, "all", ["first", "second"])
    simulations.calibrate({n: [inputs(seed=i)] for i, n in enumerate(("base", "first", "second"))})
    alone = simulate_adapters(model, inputs(), EIGHT_BITS, "all", ["second"])
    alone.calibrate([inputs(seed=2)])
    for name, encoding in alone["second"].encodings.items():
        assert torch.equal(simulations["second"].encodings[name].scale, encoding.scale)
    with pytest.raises(CalibrationError, match="at least one batch"):
        simulations.observe({"first": [inputs()]})


def test_fixed_encodings_stay(model: PeftModel, calibrated: dict[str, AdapterSimulations]) -> None:
    fixed = calibrated["adapter_only"].shared
    later = simulate_adapters(model, inputs(), EIGHT_BITS, "adapter_only", ["second"])
    later.calibrate([inputs(seed=9)], shared=fixed)
    assert later.shared.keys() == fixed.keys()
    for name, encoding in fixed.items():
        assert later["second"].encodings[name] is encoding
    branch = "model.layers.0.self_attn.q_proj.lora_B.linear"
    own, before = (s["second"].encodings[branch] for s in (later, calibrated["adapter_only"]))
    assert not torch.equal(own.scale, before.scale)
    missing = {name: encoding for name, encoding in fixed.items() if "layers.0" not in name}
    with pytest.raises(CalibrationError, match=r"no encoding, model\.layers\.0.* every adapter"):
        later.freeze(shared=missing)


@pytest.mark.parametrize("mode", MODES)
def test_a_calibrated_base_keeps_its_activations(model: PeftModel, mode: BaseActivations) -> None:
    with model.disable_adapter():
        alone = simulate(model, inputs(), EIGHT_BITS)
    alone.calibrate([inputs(seed=3)])
    known = alone.activation_encodings
    names = ["first", "second"]
    later = simulate_adapters(model, inputs(), EIGHT_BITS, mode, names, activation_encodings=known)
    later.calibrate([inputs(seed=s) for s in range(3)])
    for simulation in later.values():
        own = simulation.activation_encodings
        assert all(own[name].equals(encoding) for name, encoding in known.items())
    first, second = (later[name].activation_encodings for name in ("first", "second"))
    added = {name for name in first if name not in known}
    assert {name.rpartition(".")[2] for name in added} == {"linear", "mul", "add"}
    equal = {name for name in added if first[name].equals(second[name])}
    sums = {name for name in added if name.endswith(("_proj.add", "lm_head.add"))}
    assert equal == {"all": set(), "none": added}.get(mode, sums)


def test_the_sum_of_a_newly_adapted_layer_has_its_own_range(model: PeftModel) -> None:
    narrow = simulate_adapters(model, inputs(), EIGHT_BITS, "adapter_only", ["narrow"])
    narrow.calibrate([inputs()])
    later = simulate_adapters(model, inputs(), EIGHT_BITS, "adapter_only", ["first"])
    later.calibrate([inputs()], shared=narrow.shared)
    encodings, layer = later["first"].encodings, "model.layers.0.self_attn"
    name = f"{layer}.v_proj.add"
    assert encodings[name] is narrow.shared[name]
    assert f"{layer}.q_proj.add" in encodings.keys() - narrow.shared.keys()
    later = simulate_adapters(model, inputs(), EIGHT_BITS, "none", ["first"])
    with pytest.raises(CalibrationError, match=r"no encoding, .*q_proj\."):
        later.calibrate([inputs()], shared=narrow.shared)


def test_a_head_that_is_trained_whole_keeps_its_bits_and_no_name_of_an_adapter() -> None:
    """PEFT puts the classifier into `modules_to_save` by itself; biases of lora_B are no factor either."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 260, "num_labels": 3}
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    bert = BertForSequenceClassification(config).eval()
    report = quantize_(bert, "w4-block32", "rtn")
    assert "bert.pooler.dense.weight" in report.layers
    assert "classifier.weight" not in report.layers
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", lora_bias=True)
    both = get_peft_model(bert, config, adapter_name="first")
    both.add_adapter("second", copy.deepcopy(config))
    schemes = Schemes(adapter_weights=Scheme(4, granularity=PerChannel(0)))
    names, prints = [], []
    for name in ("first", "second"):
        both.set_adapter(name)
        simulation = simulate(both.eval(), inputs(), schemes)
        bits = {n: frozen.encoding.scheme.bitwidth for n, frozen in simulation.weights.items()}
        assert {bits[f"classifier.modules_to_save.{key}"] for key in ("weight", "bias")} == {16}
        layer, factors = "bert.encoder.layer.0.attention.self.query", ("A.weight", "B.weight")
        assert {bits[f"{layer}.lora_{factor}"] for factor in factors} == {4}
        assert bits[f"{layer}.lora_B.bias"] == 16
        names.append([mark.name for mark in simulation.marks])
        prints.append(adapter_fingerprint(both))
    assert names[0] == names[1]
    assert prints[0] != prints[1]


def test_one_of_several_and_their_base_come_back_from_disk(
    model: PeftModel, calibrated: dict[str, AdapterSimulations], tmp_path: Path
) -> None:
    batch, simulation = inputs(seed=4), calibrated["none"]["second"]
    simulation.save(tmp_path / "second")
    model.set_adapter("second")
    again = load_simulation(tmp_path / "second", model)  # on grids that its own values do not give
    assert torch.equal(again.outputs(batch)["logits"], simulation.outputs(batch)["logits"])
    model.set_adapter("first")
    with pytest.raises(CalibrationError, match="was calibrated for the adapter with fingerprint"):
        load_simulation(tmp_path / "second", model)

    simulation = calibrated["none"]["base"]  # the adapter that adds zero
    simulation.save(tmp_path / "base")
    again = simulate_adapters(model, inputs(), EIGHT_BITS, adapters=["second"])["base"]
    again.restore_from(tmp_path / "base")
    assert torch.equal(again.outputs(batch)["logits"], simulation.outputs(batch)["logits"])
    assert again.encodings.keys() == simulation.encodings.keys()
    wide = simulate_adapters(model, inputs(), EIGHT_BITS, adapters=["wide"])["base"]
    with pytest.raises(GridError, match=r"shape \[6, 64\] needs scales of shape \[6\], not \[4\]"):
        wide.restore_from(tmp_path / "base")


def test_what_cannot_be_shared_is_refused(model: PeftModel) -> None:
    names = ["first", "second"]
    simulations = simulate_adapters(model, inputs(), base_activations="none", adapters=names)
    simulations["second"]._drop(["lm_head.linear"], "no data came by in calibration")
    message = r"1 values have an encoding .*, lm_head.linear first.*more data"
    with pytest.raises(CalibrationError, match=message):
        simulations.calibrate([inputs()])
    dora = adapted(dora=shape(target_modules=["v_proj"], use_dora=True))  # zeros do not pad it
    message = r"values have an encoding with one adapter and none .*the same target_modules"
    with pytest.raises(CalibrationError, match=message):
        simulate_adapters(dora, inputs(), None, "none", ["first", "dora"]).calibrate([inputs()])


def parameters(model: PeftModel) -> dict[str, Any]:
    return {name: (p, p.requires_grad) for name, p in model.named_parameters()}


def test_adapters_that_share_everything_are_padded_to_one_shape(tmp_path: Path) -> None:
    model = adapted(
        wide=shape(6, target_modules=["q_proj", "down_proj"]),
        narrow=shape(target_modules=["v_proj"]),
    )
    before, state = parameters(model), torch.get_rng_state()
    simulations = simulate_adapters(model, inputs(), EIGHT_BITS, "none", ["wide", "narrow"])
    assert torch.equal(torch.get_rng_state(), state)
    assert parameters(model) == before
    assert simulations.captures == 2  # different scalings
    simulations.calibrate([inputs()])
    wide, narrow, base = (simulations[name].adapter_weights for name in ("wide", "narrow", "base"))
    assert len(wide) == 6
    for name, weight in wide.items():
        assert weight.shape == narrow[name].shape == base[name].shape
        assert 6 in weight.shape
        grids = [s.encodings[name] for s in simulations.values()]
        assert grids[0].equals(grids[1])
        assert grids[0].equals(grids[2])
        assert bool(weight.any()) is ("v_proj" not in name)
        own = narrow[name][:4] if "lora_A" in name else narrow[name][:, :4]
        assert bool(own.any()) is ("v_proj" in name)
        assert narrow[name].count_nonzero() == own.count_nonzero()
    batch = inputs(3, tokens=20, seed=7)
    for name, simulation in simulations.items():
        torch.testing.assert_close(unquantized(simulation, batch), peft_logits(model, name, batch))
    before = parameters(model)
    captured = capture_with_cache(simulations["narrow"])
    assert parameters(model) == before

    # one of them comes back from disk with its adapter alone, in the shape that all have
    simulations["narrow"].save(tmp_path / "simulation")
    save_adapter(model, tmp_path / "adapter", adapter="narrow")
    base = eager("llama")
    quantize_(base, "w4-block32", "rtn")
    alone = load_adapter(base, tmp_path / "adapter").eval()
    before = parameters(alone)
    again = load_simulation(tmp_path / "simulation", alone)
    assert parameters(alone) == before
    batch = inputs(seed=4)
    expected = simulations["narrow"].outputs(batch)["logits"]
    assert torch.equal(again.outputs(batch)["logits"], expected)
    assert all(again.adapter_weights[name].shape == w.shape for name, w in narrow.items())
    graph = cached_graph(simulations["narrow"], captured)
    assert cached_graph(again, capture_with_cache(again)).encodings.keys() == graph.encodings.keys()


def test_names_that_cannot_be(model: PeftModel) -> None:
    with pytest.raises(CaptureError, match=r"no adapter third\. It has first, second, wide"):
        simulate_adapters(model, inputs(), adapters=["first", "third"])
    with pytest.raises(CaptureError, match="an adapter is called 'base'"):
        simulate_adapters(adapted(base=shape()), inputs())


def test_a_rule_may_be_about_the_values_of_one_adapter(tmp_path: Path) -> None:
    model = eager("llama")
    quantize_(model, "w4-block32", solver="rtn")
    with_first = get_peft_model(model, shape(target_modules=["q_proj"]), adapter_name="first")
    with_first.add_adapter("second", shape(target_modules=["up_proj"]))
    matches = [f"*.{layer}.lora_A.weight" for layer in ("q_proj", "up_proj")]
    rules = [PlacementRule(match, of="weights", bitwidth=4) for match in matches]
    simulations = simulate_adapters(with_first.eval(), inputs(), Schemes(rules=rules), "all")
    unused = [list(s.placement.unused_rules) for s in simulations.values()]
    assert unused == [[1], [0], [1]]
    for name, layer in (("first", "layers.0.self_attn.q_proj"), ("second", "layers.0.mlp.up_proj")):
        weight = f"model.{layer}.lora_A.weight"
        assert simulations[name].weights[weight].encoding.scheme.bitwidth == 4
    simulations.calibrate([inputs()])
    simulations["first"].save(tmp_path)
    with_first.set_adapter("first")
    assert load_simulation(tmp_path, with_first).placement.unused_rules.keys() == {1}
    rules.append(PlacementRule("*.k_proj.lora_A.weight", of="weights", bitwidth=4))
    rules.append(PlacementRule("*.up_proj.lora_B.weight", bitwidth=4))
    with pytest.raises(CalibrationError, match="2 placement rules") as caught:
        simulate_adapters(with_first, inputs(), Schemes(rules=rules))
    message = str(caught.value)
    assert "'*.k_proj.lora_A.weight' matches no value; did you mean " in message
    assert "matches model.layers.0.mlp.up_proj.lora_B.weight (a weight of " in message
