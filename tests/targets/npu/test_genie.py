"""Bundles for Qualcomm's Genie: in Genie itself, in a runner that does what it does, and what is
refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qwlora import LayerRule, Scheme, Schemes, export, quantize_
from qwlora.errors import CaptureError, ExportError, SourceError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.genie import angles
from qwlora.targets.npu.qnn import QnnModel, open_graph
from qwlora.targets.proof.contents import check_contents
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from simulation.tiny_architectures import inputs, make
from targets.proofs import sqnr, with_strength

from .genie_runner import Runner, compile_separately, greedy, in_genie
from .test_qnn_bundle import IDS, SCHEMES

CONTEXT, PIECE, COUNT, BOS = 96, 8, 24, 1
PROMPT = torch.cat([torch.tensor([[BOS]]), IDS], 1)  # Genie begins a text with BOS
QAIRT = TARGETS["qairt"].backend
CASES = [("_first.", "_CASE."), ("_second.", "_CASE."), ("_none.", "_CASE."), ("first.", "CASE.")]
CASES += [("second.", "CASE."), ("none.", "CASE.")]
NAMES = {1: f"token_ar1_cl{CONTEXT}_1_of_1", PIECE: f"prompt_ar{PIECE}_cl{CONTEXT}_1_of_1"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(256)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))


def simulated(
    ranks: Mapping[str, tuple[int, int]],
    kind: str = "Llama",
    schemes: Schemes = SCHEMES,
    rope_theta: float | None = None,
) -> AdapterSimulations:
    """Adapters by name, of these ranks and alphas."""
    torch.manual_seed(3)
    model = make(kind)
    if rope_theta is not None:
        model.config.rope_parameters["rope_theta"] = rope_theta
    quantize_(model, "w4-channel", solver="rtn", rules=[LayerRule("*embed_tokens", Scheme(8))])
    adapted: Any = None
    for name, (rank, alpha) in ranks.items():
        layers = ["q_proj", "down_proj"]
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=False
        )
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    simulations = simulate_adapters(adapted.eval(), inputs(kind), schemes, "none")
    simulations.calibrate([{"input_ids": IDS}])
    return simulations


def write(simulations: AdapterSimulations, folder: Path, target: str = "qnn", **more: Any) -> None:
    arguments = {"tokenizer": tokenizer(), "layout": "genie", "context": [CONTEXT], **more}
    sample = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    export(simulations, target, folder, sample=sample, graphs=[PIECE, 1], **arguments)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Simulation], Path]:
    simulations = simulated({"first": (2, 4), "second": (4, 8)})
    folder = tmp_path_factory.mktemp("genie") / "bundle"
    write(simulations, folder)
    return simulations, folder


@pytest.fixture(scope="module")
def sections(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same for QAIRT's tools."""
    folder = tmp_path_factory.mktemp("genie") / "sections"
    write(bundle[0], folder, "qairt")  # type: ignore[arg-type]
    return folder


@pytest.mark.slow
def test_a_runner_like_genie_generates_the_simulations_tokens(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    """The prompt is longer than a piece of prefill, and its last piece is not full."""
    simulations, folder = bundle
    runner, expected = Runner(folder), dict[tuple[str, float], list[int]]()
    for name, alpha in (("first", 1.0), ("second", 1.0), ("first", 0.5), ("first", 0.0)):
        expected[name, alpha] = greedy(with_strength(simulations[name], alpha), PROMPT, COUNT)
        runner.apply(name, alpha)
        assert runner.generate(PROMPT[0].tolist(), COUNT) == expected[name, alpha]
    runner.apply("zero", 1.0)
    assert runner.generate(PROMPT[0].tolist(), COUNT) == greedy(
        simulations["base"].logits, PROMPT, COUNT
    )
    assert expected["first", 0.0] == greedy(simulations["base"].logits, PROMPT, COUNT)
    assert len({str(tokens) for tokens in expected.values()}) == len(expected)


@pytest.mark.slow
def test_the_layout_computes_what_qnn_does(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    simulations, folder = bundle
    write(simulations, tmp_path / "plain", layout=None)
    plain = QnnModel(tmp_path / "plain" / "base", tmp_path / "plain" / "first", htp=False)
    model = QnnModel(folder / "base", folder / "first", htp=False)
    difference = (plain.logits(IDS, steps=4) - model.logits(IDS, steps=4)).abs().max()
    assert float(difference) < model.graphs[NAMES[1]]["encodings"]["logits"]["scale"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second", "none"])
def test_use_cases_for_qairt_compute_their_simulation(
    name: str, bundle: tuple[Mapping[str, Simulation], Path], sections: Path
) -> None:
    """Greedy tokens after a prompt of two pieces, then decoded one by one."""
    simulation, runtime = bundle[0]["base" if name == "none" else name], QAIRT.open(sections, name)
    tokens = torch.tensor([greedy(simulation.logits, PROMPT, COUNT)])
    whole = torch.cat([PROMPT, tokens], 1)
    logits = runtime.logits(whole, steps=COUNT)
    assert torch.equal(logits[:, -COUNT - 1 : -1].argmax(-1), tokens)
    assert sqnr(logits, simulation.logits(whole)) > 35  # measured: 57, 39, 62


@pytest.mark.slow
def test_activations_may_be_float16(tmp_path: Path) -> None:
    schemes = Schemes(policy="weights-only", adapter_weights=Scheme(8))
    simulations = simulated({"first": (2, 4)}, schemes=schemes)
    write(simulations, tmp_path, "qairt")
    for name, simulation in {"first": simulations["first"], "none": simulations["base"]}.items():
        assert sqnr(QAIRT.open(tmp_path, name).logits(IDS), simulation.logits(IDS)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("target", ["qnn", "qairt"])
def test_graphs_of_every_context_compute_the_simulation(
    target: str, bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    """The configuration has the largest context, in which positions were compared."""
    write(bundle[0], tmp_path, target, context=[32, CONTEXT])  # type: ignore[arg-type]
    config = json.loads((tmp_path / "genie_config.json").read_text())
    assert config["dialog"]["context"]["size"] == CONTEXT
    folders = (tmp_path / "base", tmp_path / "first")
    model: Any = QnnModel(*folders, htp=False) if target == "qnn" else QAIRT.open(tmp_path, "first")
    short = {name.replace(str(CONTEXT), "32") for name in NAMES.values()}
    assert {*model.names} == {*NAMES.values(), *short}
    expected = bundle[0]["first"].logits(IDS)
    for name in list(model.names):
        model.names = [name]
        assert sqnr(model.logits(IDS), expected) > 35, name


@pytest.mark.slow
@pytest.mark.client
def test_genie_goes_on_in_a_larger_context(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    """The prompt fits into the small one, the text after it does not."""
    folder, compiled = tmp_path / "bundle", tmp_path / "compiled"
    compiled.mkdir()
    write(bundle[0], folder, context=[32, CONTEXT])  # type: ignore[arg-type]
    compile_separately(folder, compiled)
    config = folder / "genie_config.json"
    content = json.loads(config.read_text())
    binaries = sorted(str(path) for path in compiled.glob("*.bin"))
    assert len(binaries) == 4
    content["dialog"]["engine"]["model"]["binary"]["ctx-bins"] = binaries
    config.write_text(json.dumps(content))
    request = {"ids": IDS[0].tolist(), "count": COUNT, "runs": [("first", 1.0)]}
    (tokens,) = in_genie(config, request)["tokens"]
    assert tokens == greedy(bundle[0]["first"].logits, PROMPT, COUNT)


@pytest.mark.slow
def test_graphs_for_qairt_have_genies_layout(sections: Path) -> None:
    for tokens, name in NAMES.items():
        graph = onnx.load(sections / f"{name}_model.onnx", load_external_data=False).graph
        shapes = {
            value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        past, entries = CONTEXT - tokens, read_encodings(sections / f"{name}_first.encodings")
        assert shapes["attention_mask"] == [1, 1, tokens, CONTEXT]
        assert shapes["position_ids_cos"] == [1, 1, tokens, 8]
        assert shapes["past_key_0_in"] == [2, 1, 16, past]
        assert shapes["past_value_1_in"] == [2, 1, past, 16]
        assert shapes["past_key_1_out"] == [2, 1, 16, tokens]
        assert shapes["lora_alpha"] == [1]
        grids = {e.name: (e.scale, e.offset) for e in entries.encodings if "past_" in e.name}
        assert {*grids} >= {n for n in shapes if n.startswith("past_")}
        assert all(grids[n] == grids[n.replace("_in", "_out")] for n in grids)
        unknown = [n for n in shapes if n != "input_ids" and n not in entries.by_name]
        assert unknown == []


@pytest.mark.slow
def test_a_use_case_of_several_adapters_is_refused(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    sizes: Any = {"graphs": cache_sizes([PIECE, 1], [CONTEXT])}
    layout: Any = {"layout": "genie", "tokenizer": tokenizer()}
    exported = ExportedGraph(bundle[0]["base"], {}, {}, **sizes, **layout)
    with pytest.raises(ExportError, match="several"):
        QAIRT.write_cases(exported, {"first+second": exported}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_an_added_library_is_refused(sections: Path, tmp_path: Path) -> None:
    contents = TARGETS["qairt"].backend.contents
    names = [str(path.relative_to(sections)) for path in sections.rglob("*") if path.is_file()]
    names = [name for name in names if name not in ("tokenizer_config.json",)]
    check_contents(contents, sections, names, is_base=False)
    config = json.loads((sections / "genie_config.json").read_text())
    config["dialog"]["engine"]["model"]["library"] = {"version": 1, "model-bin": "x.so"}
    (tmp_path / "genie_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="library"):
        check_contents(contents, tmp_path, ["genie_config.json"], is_base=False)


@pytest.mark.slow
def test_inputs_are_those_that_genie_checks(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    _, folder = bundle
    for tokens, name in NAMES.items():
        session = open_graph(folder / "base" / f"{name}.onnx", False)
        inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
        outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
        past = CONTEXT - tokens
        assert inputs["input_ids"] == ("tensor(int32)", [1, tokens])
        assert inputs["attention_mask"] == ("tensor(uint16)", [1, 1, tokens, CONTEXT])
        assert inputs["position_ids_cos"] == ("tensor(uint16)", [1, 1, tokens, 8])
        assert inputs["past_key_0_in"] == ("tensor(uint8)", [2, 1, 16, past])
        assert inputs["past_value_1_in"] == ("tensor(uint8)", [2, 1, past, 16])
        assert outputs["past_key_1_out"] == ("tensor(uint8)", [2, 1, 16, tokens])
        grids = json.loads((folder / "base" / "graphs.json").read_text())["graphs"][name]
        for key in inputs:
            if key.startswith("past_"):
                own = grids["encodings"]
                assert own[key] == own[key.replace("_in", "_out")]
        assert grids["encodings"]["attention_mask"]["offset"] == -65535  # 0 is its largest code
        assert grids["encodings"]["lora_alpha"]["scale"] == pytest.approx(1 / 65535)


@pytest.mark.slow
def test_every_file_is_explained(
    bundle: tuple[Mapping[str, Simulation], Path], sections: Path
) -> None:
    _, folder = bundle
    text = (folder / "README.md").read_text()
    known = ["prompt_arN_clM_1_of_1.onnx", "token_ar1_clM_1_of_1.onnx", "NAME/*.raw", "zero/*.raw"]
    assert all(name in text for name in known)
    of_qairt = (sections / "README.md").read_text()
    for path in (path for path in sections.iterdir() if path.is_file()):
        name = path.name
        for word, stands_for in [*((n, "GRAPH") for n in NAMES.values()), *CASES]:
            name = name.replace(word, stands_for)
        assert name in of_qairt or path.name == "README.md", path
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".raw", ".bin"):
            name = path.name.replace(f"_ar{PIECE}_", "_arN_").replace(f"_cl{CONTEXT}_", "_clM_")
            stem = "_host.onnx" if name.endswith("_host.onnx") else name
            stem = "_ctx.onnx" if name.endswith("_ctx.onnx") else stem
            assert stem in text or path.name == "README.md", path


@pytest.mark.slow
@pytest.mark.client
def test_genie_itself_generates_what_the_emulator_does(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    """Graphs are compiled one by one: the emulator cannot load a binary that graphs share."""
    _, folder = bundle
    runner = Runner(folder, compile_separately(folder, tmp_path))
    binaries = sorted(str(path) for path in tmp_path.glob("*.bin"))
    content = json.loads((folder / "genie_config.json").read_text())
    binary = content["dialog"]["engine"]["model"]["binary"]
    assert [(folder / path).is_file() for path in binary["ctx-bins"]] == [True]
    binary["ctx-bins"] = binaries
    config = folder / "separate.json"
    config.write_text(json.dumps(content))
    runs = [("first", 1.0), ("first", 0.0), ("second", 1.0), ("first", 0.5), ("first", 1.0)]
    found = in_genie(config, {"ids": IDS[0].tolist(), "count": COUNT, "runs": runs})
    config.unlink()
    assert (found["config"], found["create"]) == (0, 0)
    for (name, alpha), tokens in zip(runs, found["tokens"], strict=True):
        runner.apply(name, alpha)
        assert tokens == runner.generate(PROMPT[0].tolist(), COUNT), (name, alpha)
    assert len({str(tokens) for tokens in found["tokens"]}) == 4


@pytest.mark.slow
@pytest.mark.client
@pytest.mark.parametrize("target", ["qnn", "qairt"])
def test_genie_reads_the_configuration(
    target: str, bundle: tuple[Mapping[str, Simulation], Path], sections: Path, tmp_path: Path
) -> None:
    """Genie refuses unknown keys and missing ones."""
    folder = bundle[1] if target == "qnn" else sections
    text = (folder / "genie_config.json").read_text()
    for old, new, is_accepted in (("", "", True), ("rope-dim", "rope-dims", False)):
        (tmp_path / "config.json").write_text(text.replace(old, new) if old else text)
        assert (in_genie(tmp_path / "config.json", {})["config"] == 0) is is_accepted


def test_angles_of_llama3_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=dict(rope)
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    keys = {key.replace("_", "-"): value for key, value in rope.items() if key != "rope_theta"}
    turned = angles({"rope-dim": 16, "rope-theta": 500000.0, "rope-scaling": keys}, 512)
    torch.testing.assert_close(turned.cos().float(), cos[0, :, :16], atol=1e-4, rtol=0)
    torch.testing.assert_close(turned.sin().float(), sin[0, :, :16], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_what_genie_cannot_run_is_refused(tmp_path: Path) -> None:
    different = simulated({"first": (2, 4), "second": (4, 4)})
    with pytest.raises(ExportError, match=r"first 2.*second 1.*alpha / rank|alpha / rank.*first 2"):
        write(different, tmp_path / "a")
    same = simulated({"first": (2, 4)})
    with pytest.raises(ExportError, match="tokenizer"):
        write(same, tmp_path / "b", tokenizer=None)
    with pytest.raises(ExportError, match="Genie computes from a base of 5000"):
        write(simulated({"first": (2, 4)}, rope_theta=5000.0), tmp_path / "c")


@pytest.mark.slow
def test_a_second_mask_is_refused(tmp_path: Path) -> None:
    message = r"also takes attention_mask_1\b.*layout: genie"
    with pytest.raises(CaptureError, match=message):
        write(simulated({"first": (2, 4)}, "Gemma 3"), tmp_path / "a")


@pytest.mark.parametrize(("target", "layout"), [("qnn", "other"), ("aimet", "genie")])
def test_no_other_layout(target: str, layout: str, tmp_path: Path) -> None:
    assert target in TARGETS
    with pytest.raises(ExportError, match="layout"):
        export(torch.nn.Linear(2, 2), target, tmp_path / "a", layout=layout)  # type: ignore[arg-type]
