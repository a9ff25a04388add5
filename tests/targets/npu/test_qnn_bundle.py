"""Bundles for Qualcomm's HTP: what they compute on CPU and emulator, and damaged files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwlora import LayerRule, Scheme, Schemes, export, quantize_
from qwlora.errors import ExportError
from qwlora.grid.scheme import parse_scheme
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.placement_rules import PlacementRule
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import read_tensors
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.reference import GRAPHS_NOISE, compare_first
from qwlora.targets.refusals import Subject, Weight, nearest, refusals
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import LayerKind
from qwlora.targets.weights.gguf import LlamaRuntime
from simulation.tiny_architectures import inputs, make
from targets.proofs import reference_of, sqnr

IDS = torch.randint(3, 256, (1, 14), generator=torch.Generator().manual_seed(7))
CONTEXT, GENERATED = 96, 64
GRAPHS = PROMPT, TOKEN = "prompt_ar8_cl96", "token_ar1_cl96"
# what is computed without the HTP's emulator, too
EMULATED = pytest.mark.parametrize(
    "is_emulated", [False, pytest.param(True, marks=pytest.mark.client)]
)
SCHEMES = Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=Scheme(8),
)


def problems(name: str, bits: int = 16, kind: LayerKind = LayerKind.LINEAR) -> str:
    subject = Subject(weights={"x": Weight(parse_scheme(name), kind=kind)}, input_bits=bits)
    return "; ".join(refusals(TARGETS["qnn"], subject))


@pytest.mark.parametrize(
    "name", ["w4-channel", "w8-tensor", "w4-block16", "w2-block16", "w16-channel"]
)
def test_weights_that_the_htp_computes(name: str) -> None:
    assert not problems(name)


@pytest.mark.parametrize(
    ("name", "why", "best"),
    [
        ("w2-channel", "4, 8, 16 bits with scales per channel", "w2-block32"),
        ("w2-tensor", "4, 8, 16 bits with scales per tensor", "w2-block32"),
        ("w4-channel-asymmetric", "no integer zero points", "w4-channel"),
        ("w16-block16", "2, 4, 8 bits with blocks", "w8-block16"),
        ("w3-channel", "2, 4, 8, 16 bits", "w4-channel"),
        ("w4-signed32", "no signed scales", "w4-block32"),
    ],
)
def test_weights_that_it_refuses_or_computes_wrongly(name: str, why: str, best: str) -> None:
    assert why in problems(name)
    assert nearest(parse_scheme(name), [TARGETS["qnn"]]) == parse_scheme(best)


@pytest.mark.parametrize("name", ["w8-block16", "w4-lpbq16", "w16-channel"])
def test_weights_that_it_does_not_multiply_with_inputs_of_8_bits(name: str) -> None:
    assert not problems(name)
    assert "give the layer's input 16 bits" in problems(name, 8)


def test_tables_and_inputs_have_one_scale() -> None:
    assert not problems("w8-tensor", kind=LayerKind.EMBEDDING)
    for name in ("w4-channel", "w4-tensor", "w8-channel", "w8-block32"):
        assert "weights: w8-tensor" in problems(name, kind=LayerKind.EMBEDDING)


def simulated(embeddings: Scheme, schemes: Schemes = SCHEMES) -> AdapterSimulations:
    """Adapters of two ranks and scalings, on layers of which one is in both, on one set of
    encodings."""
    model = make("Llama")
    quantize_(model, "w4-channel", solver="rtn", rules=[LayerRule("*embed_tokens", embeddings)])

    def config(rank: int, alpha: int, *layers: str) -> LoraConfig:
        shape = {"r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
        return LoraConfig(**shape, init_lora_weights=False)  # type: ignore[arg-type]

    first = config(4, 8, "q_proj", "down_proj")
    second = config(16, 16, "v_proj", "down_proj")
    adapted = get_peft_model(model, first, adapter_name="first")
    adapted.add_adapter("second", second)
    simulations = simulate_adapters(adapted.eval(), inputs("Llama"), schemes, "none")
    simulations.calibrate([{"input_ids": IDS}])
    return simulations


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Simulation], Path]:
    simulations, folder = simulated(Scheme(8)), tmp_path_factory.mktemp("qnn") / "bundle"
    export(simulations, "qnn", folder, graphs=[8, 1], context=[CONTEXT])
    return simulations, folder


@pytest.mark.slow
@EMULATED
@pytest.mark.parametrize("name", ["first", "second", "zero"])
def test_every_adapter_computes_its_simulation(
    name: str, is_emulated: bool, bundle: tuple[Mapping[str, Simulation], Path]
) -> None:
    simulations, folder = bundle
    simulation = simulations["base" if name == "zero" else name]
    limits = Limits(perplexity_difference=0.02)
    model, reference = (
        TARGETS["qnn"].open(folder, name),
        reference_of(simulation, IDS, GRAPHS_NOISE),
    )
    parity = model.parity(partial(compare_first, reference), limits)
    assert parity is not None
    assert parity.problems == []
    assert parity.figures["cpu"]["top1_agreement"] > 0.9
    others = [simulations[other] for other in simulations if simulations[other] is not simulation]
    logits = QnnModel(folder / "base", folder / name, htp=False).logits(IDS)
    assert sqnr(logits, simulation.logits(IDS)) > 45
    for other in others:  # of these it is not the simulation
        assert float((logits - other.logits(IDS)).abs().mean()) > 10 * float(
            (logits - simulation.logits(IDS)).abs().mean()
        )
    if is_emulated:
        on_htp = QnnModel(folder / "base", folder / name, htp=True).logits(IDS)
        assert sqnr(on_htp, logits) > 35
        assert parity.figures["htp"].keys() == parity.figures["cpu"].keys()
        assert parity.figures["placement"].keys() == {*GRAPHS}
    else:
        assert "qwlora[qnn]" in parity.figures["not_run"]


@pytest.mark.slow
@EMULATED
def test_activations_of_8_bits(is_emulated: bool, tmp_path: Path) -> None:
    schemes = replace(SCHEMES, activations=Scheme(8, symmetric=False))
    with pytest.raises(ExportError) as refused:
        export(simulated(Scheme(8), schemes), "qnn", tmp_path, graphs=[8, 1], context=[CONTEXT])
    assert "input_layernorm.weight" in str(refused.value)
    assert "lm_head.weight: int16 symmetric per channel: the HTP, with inputs of 8" in str(
        refused.value
    )
    norms = PlacementRule("*norm", of="weights", bitwidth=8, symmetric=False)
    head = PlacementRule("lm_head", of="weights", bitwidth=8)
    simulations = simulated(Scheme(8), replace(schemes, rules=[norms, head]))
    export(simulations, "qnn", tmp_path, graphs=[8, 1], context=[CONTEXT])
    model = QnnModel(tmp_path / "base", tmp_path / "first", htp=is_emulated, profiles=tmp_path)
    expected, other = (simulations[name].logits(IDS) for name in ("first", "second"))
    assert sqnr(model.logits(IDS), expected) > 20 > 4 * sqnr(other, expected)
    for place in model.placement().values() if is_emulated else ():
        assert (place["partitions"], place["cpu_nodes"]) == (1, 0), place


@pytest.mark.slow
@EMULATED
def test_graphs_of_every_size_compute_the_simulation(is_emulated: bool, tmp_path: Path) -> None:
    simulations, sizes = simulated(Scheme(8)), cache_sizes([8, 4, 1], [16, 32])
    export(simulations, "qnn", tmp_path, graphs=[8, 4, 1], context=[16, 32])
    model = QnnModel(tmp_path / "base", tmp_path / "first", htp=is_emulated)
    assert {*model.names} == {each.name for each in sizes}
    expected = simulations["first"].logits(IDS)
    for name in list(model.names):
        model.names = [name]
        assert sqnr(model.logits(IDS), expected) > (35 if is_emulated else 45), name
    assert [path.name for path in (tmp_path / "base").glob("*.data")] == ["weights.data"]
    if is_emulated:
        assert len(list((tmp_path / "base/device").glob("*_ctx.onnx"))) == len(sizes)
        assert len(list((tmp_path / "base/device").glob("*.bin"))) == 1  # all graphs share it


def generated(model: QnnModel, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """(ids, logits) of a prompt and `count` greedy tokens after it: prefill, then decode."""
    cache, ids, found = model.empty_cache(), prompt, []

    def run(graph: str, tokens: torch.Tensor, past: int) -> None:
        logits = model.call(graph, tokens, past, cache)[1]["logits"]
        found.append(logits[:, : tokens.shape[1]])

    for first in range(0, prompt.shape[1], 8):
        run(PROMPT, prompt[:, first : first + 8], first)
    for _ in range(count):
        token = found[-1][:, -1:].argmax(-1)
        run(TOKEN, token, ids.shape[1])
        ids = torch.cat([ids, token], 1)
    return ids, torch.cat(found, 1)


@pytest.mark.slow
def test_generated_tokens_are_those_of_the_whole_sequence(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    """The prompt is longer than a piece of prefill, and its last piece is not full."""
    simulations, folder = bundle
    simulation = simulations["first"]
    model = QnnModel(folder / "base", folder / "first", htp=False)
    ids, logits = generated(model, IDS, GENERATED)
    expected, perturbed = (
        simulation.logits(ids),
        simulation.perturbed_outputs({"input_ids": ids})["logits"],
    )
    # the graphs also round cosines, sines and masked scores, which the simulation does not
    limits = Limits()
    assert sqnr(logits, expected) >= min(limits.sqnr, sqnr(perturbed, expected) - 6)
    floor = (perturbed - expected).abs().max()
    assert float((logits - expected).abs().max()) < 4 * floor
    likeliest = expected.topk(2).values
    clear = likeliest[..., 0] - likeliest[..., 1] > 2 * floor
    assert float(clear.float().mean()) > 0.9
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
    # so each generated token is the simulation's
    assert torch.equal(ids[:, IDS.shape[1] :], logits.argmax(-1)[:, IDS.shape[1] - 1 : -1])


@pytest.mark.slow
def test_graphs_share_one_weight_file(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    base = bundle[1] / "base"
    places: list[set[tuple[str, int, int]]] = []
    for graph in GRAPHS:
        model = onnx.load(base / f"{graph}.onnx", load_external_data=False)
        of = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer]
        places.append({(e["location"], int(e["offset"]), int(e["length"])) for e in of if e})
    assert places[0] == places[1]
    assert [path.name for path in base.glob("*.data")] == ["weights.data"]
    bytes_stored = sum(length for _, _, length in places[0])
    assert 60_000 < bytes_stored <= (base / "weights.data").stat().st_size < 1.2 * bytes_stored


@pytest.mark.slow
@pytest.mark.client
def test_adapters_switched_in_loaded_graphs_equal_separate_runs(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    _, folder = bundle
    switched = QnnModel(folder / "base", folder / "first", htp=True, profiles=tmp_path / "profiles")
    found = {"before": switched.logits(IDS, steps=4)}
    for name in ("zero", "second", "first"):
        switched.use(folder / name)
        found[name] = switched.logits(IDS, steps=4)
        alone = QnnModel(folder / "base", folder / name, htp=True)
        assert torch.equal(found[name], alone.logits(IDS, steps=4))
    assert torch.equal(found["before"], found["first"])
    assert not torch.equal(found["zero"], found["first"])
    record = json.loads((folder / "base" / "graphs.json").read_text())
    assert record["compiler"]["soc_model"] == "57"
    compiled = {graph["compiled"] for graph in record["graphs"].values()}
    assert compiled == {f"device/{graph}_ctx.onnx" for graph in GRAPHS}
    assert not list((folder / "base").glob("*_ctx.onnx"))  # where the emulator would crash on it
    binaries = list((folder / "base" / "device").glob("*.bin"))
    assert len(binaries) == 1  # both graphs share it


@pytest.mark.slow
def test_an_adapter_is_zero_where_only_the_other_has_layers_and_ranks(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    first, second = (
        read_tensors(bundle[1] / name / "adapter.safetensors")[0] for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert {(first[n].shape, first[n].dtype) for n in first if "lora_A" in n} == {
        ((64, 16), torch.int8),
        ((128, 16), torch.int8),
    }
    for name in first.keys() - {"lora_alpha"}:
        has_second, has_first = "q_proj" not in name, "v_proj" not in name
        own = first[name][:, :4] if "lora_A" in name else first[name][:4]
        assert bool(own.any()) is has_first
        assert int(first[name].count_nonzero()) == int(own.count_nonzero())
        assert bool(second[name].any()) is has_second
    assert (float(first["lora_alpha"]), float(second["lora_alpha"])) == (2, 1)


@pytest.mark.slow
@pytest.mark.client
def test_llama_cpp_runs_in_the_process_of_the_emulator(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    _, folder = bundle
    QnnModel(folder / "base", folder / "first", htp=True).logits(IDS)
    with pytest.raises(ExportError, match=r"nothing\.gguf.*failed to load model"):
        LlamaRuntime(tmp_path / "nothing.gguf")


@pytest.mark.slow
def test_a_base_that_the_htp_does_not_take_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    simulations = simulated(parse_scheme("w4-channel"))
    with pytest.raises(ExportError, match=r"embed_tokens.weight: .*weights: w8-tensor"):
        export(simulations, "qnn", tmp_path, graphs=[1], context=[8])
    assert not list(tmp_path.iterdir())
