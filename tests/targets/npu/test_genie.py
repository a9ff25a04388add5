"""Bundles for Qualcomm's Genie: in Genie itself, in a runner that does what it does, and what is
refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qwlora import LayerRule, Scheme, export, quantize_
from qwlora.errors import CaptureError, ExportError
from qwlora.graph.graph_analysis import factor_nodes
from qwlora.graph.nodes import operation
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.genie import angles
from qwlora.targets.npu.qnn import QnnModel, open_graph
from qwlora.targets.registry import TARGETS
from simulation.tiny_architectures import inputs, make

from . import genie_program
from .test_qnn_bundle import IDS, SCHEMES

CONTEXT, PIECE, COUNT, BOS = 96, 8, 24, 1
PROMPT = torch.cat([torch.tensor([[BOS]]), IDS], 1)  # Genie begins a text with BOS
NAMES = {1: f"token_ar1_cl{CONTEXT}_1_of_1", PIECE: f"prompt_ar{PIECE}_cl{CONTEXT}_1_of_1"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(256)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))


def simulated(ranks: Mapping[str, tuple[int, int]], kind: str = "Llama") -> AdapterSimulations:
    """Adapters by name, of these ranks and alphas."""
    torch.manual_seed(3)
    model = make(kind)
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
    simulations = simulate_adapters(adapted.eval(), inputs(kind), SCHEMES, "none")
    simulations.calibrate([{"input_ids": IDS}])
    return simulations


def write(simulations: AdapterSimulations, folder: Path, **more: Any) -> None:
    arguments = {"tokenizer": tokenizer(), "layout": "genie", **more}
    export(
        simulations,
        "qnn",
        folder,
        graphs={"prefill": PIECE, "decode": 1},
        context=CONTEXT,
        **arguments,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Simulation], Path]:
    simulations = simulated({"first": (2, 4), "second": (4, 8)})
    folder = tmp_path_factory.mktemp("genie") / "bundle"
    write(simulations, folder)
    return simulations, folder


def with_strength(simulation: Simulation, alpha: float) -> Any:
    """The simulation's logits with its scaling times alpha."""
    branch = factor_nodes(simulation.program)
    computed = [n for n in simulation.graph_module.graph.nodes if n.name in branch]
    nodes = [n for n in computed if operation(n) == "mul" and n.args[1:] == (2.0,)]
    assert len(nodes) == 4

    def logits(ids: torch.Tensor) -> torch.Tensor:
        for value in (2.0 * alpha, 2.0):
            for node in nodes:
                node.args = (node.args[0], value)
            simulation.graph_module.recompile()
            if value == 2.0 * alpha:
                found = simulation.logits(ids)
        return found

    return logits


def greedy(logits: Any) -> list[int]:
    ids = PROMPT
    for _ in range(COUNT):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, PROMPT.shape[1] :].tolist()


class Runner:
    """What Genie's HTP engine does with a bundle, from its configuration and files alone.

    The cache is filled from the left. Cosines and sines are rounded down to codes; in the mask, 0
    is masked and the largest code is not. Weights of adapters are rounded down, too.
    """

    def __init__(self, folder: Path, htp: bool):
        self.folder = folder
        dialog = json.loads((folder / "genie_config.json").read_text())["dialog"]
        self.model = dialog["engine"]["model"]
        self.context = dialog["context"]["size"]
        graphs = json.loads((folder / "base" / "graphs.json").read_text())["graphs"]
        self.grids = {graph["tokens"]: graph["encodings"] for graph in graphs.values()}
        self.sessions = {
            graph["tokens"]: open_graph(folder / "base" / f"{name}.onnx", htp)
            for name, graph in graphs.items()
        }
        self.turned = angles(self.model["positional-encoding"], self.context).numpy()
        self.weights: dict[str, Any] = {}

    def apply(self, name: str, alpha: float) -> None:
        lora = self.model["binary"]["lora"]
        (path,) = (a["path"] for a in lora["adapters"] if a["name"] == name)
        for value in self.sessions[1].get_inputs():
            if "lora" in value.name:
                array = np.array([alpha], np.float32)
                if value.name != lora["alpha-tensor-name"]:
                    file = self.folder / path / f"{value.name}.raw"
                    array = np.fromfile(file, np.float32).reshape(value.shape)
                self.weights[value.name] = self.codes(value.name, array)

    def codes(self, name: str, array: Any) -> Any:
        grid = self.grids[1][name]
        codes = np.floor(np.float64(array) / grid["scale"] - grid["offset"])
        return codes.clip(0, 2 ** grid["bitwidth"] - 1).astype(f"uint{grid['bitwidth']}")

    def generate(self, ids: list[int], count: int) -> list[int]:
        cache = {}
        for value in self.sessions[1].get_inputs():
            if value.name.startswith("past_"):
                axis = 3 if "_key_" in value.name else 2
                shape = [self.context if i == axis else n for i, n in enumerate(value.shape)]
                cache[value.name] = axis, np.zeros(shape, np.uint8)
        past, tokens, waiting = 0, list[int](), ids
        while len(tokens) < count:
            size = max(self.sessions) if len(waiting) > 1 else 1
            now, waiting = waiting[:size], waiting[size:]
            logits = self._call(size, now, past, cache)
            past += len(now)
            if not waiting:
                tokens.append(int(logits[0, len(now) - 1].argmax()))
                waiting = tokens[-1:]
        return tokens

    def _call(self, size: int, ids: list[int], past: int, cache: dict[str, Any]) -> Any:
        session, room = self.sessions[size], self.context - size
        mask = np.zeros((1, 1, size, self.context), np.uint16)
        rows = np.zeros((1, 1, size, self.turned.shape[1]))
        for row in range(len(ids)):
            mask[0, 0, row, :past] = mask[0, 0, row, room : room + row + 1] = 65535
            rows[0, 0, row] = self.turned[past + row]
        feed = {
            "input_ids": np.array([ids + [0] * (size - len(ids))], np.int32),
            "attention_mask": mask,
            "position_ids_cos": self.codes("position_ids_cos", np.cos(rows)),
            "position_ids_sin": self.codes("position_ids_sin", np.sin(rows)),
            **{name: array.take(range(room), axis) for name, (axis, array) in cache.items()},
            **self.weights,
        }
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        for name, (axis, array) in cache.items():
            new = outputs[name.replace("_in", "_out")].take(range(len(ids)), axis)
            np.moveaxis(array, axis, 0)[past : past + len(ids)] = np.moveaxis(new, axis, 0)
        return outputs["logits"]


def in_genie(config: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    program = [sys.executable, genie_program.__file__, str(config)]
    text = json.dumps(request)
    done = subprocess.run(program, input=text, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_runner_like_genie_generates_the_simulations_tokens(
    bundle: tuple[Mapping[str, Simulation], Path],
) -> None:
    """The prompt is longer than a piece of prefill, and its last piece is not full."""
    simulations, folder = bundle
    runner, expected = Runner(folder, htp=False), dict[tuple[str, float], list[int]]()
    for name, alpha in (("first", 1.0), ("second", 1.0), ("first", 0.5), ("first", 0.0)):
        expected[name, alpha] = greedy(with_strength(simulations[name], alpha))
        runner.apply(name, alpha)
        assert runner.generate(PROMPT[0].tolist(), COUNT) == expected[name, alpha]
    runner.apply("zero", 1.0)
    assert runner.generate(PROMPT[0].tolist(), COUNT) == greedy(simulations["base"].logits)
    assert expected["first", 0.0] == greedy(simulations["base"].logits)
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
def test_every_file_is_explained(bundle: tuple[Mapping[str, Simulation], Path]) -> None:
    _, folder = bundle
    text = (folder / "README.md").read_text()
    known = ["prompt_arN_clM_1_of_1.onnx", "token_ar1_clM_1_of_1.onnx", "NAME/*.raw", "zero/*.raw"]
    assert all(name in text for name in known)
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
    runner, binaries = Runner(folder, htp=True), []
    for name in NAMES.values():
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(tmp_path / f"{name}_ctx.onnx"),
        }
        open_graph(folder / "base" / f"{name}.onnx", True, None, entries)
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
def test_genie_reads_the_configuration(
    bundle: tuple[Mapping[str, Simulation], Path], tmp_path: Path
) -> None:
    """Genie refuses unknown keys and missing ones."""
    text = (bundle[1] / "genie_config.json").read_text()
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
    same["first"].origin.model.config.rope_parameters["rope_theta"] = 5000.0
    with pytest.raises(ExportError, match="Genie computes from a base of 5000"):
        write(same, tmp_path / "c")


@pytest.mark.slow
def test_a_second_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"attention_mask_1.*layout: genie"):
        write(simulated({"first": (2, 4)}, "Gemma 3"), tmp_path / "a")


@pytest.mark.parametrize(("target", "layout"), [("qnn", "other"), ("aimet", "genie")])
def test_no_other_layout(target: str, layout: str, tmp_path: Path) -> None:
    assert target in TARGETS
    with pytest.raises(ExportError, match="layout"):
        export(torch.nn.Linear(2, 2), target, tmp_path / "a", layout=layout)  # type: ignore[arg-type]
