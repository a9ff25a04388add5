"""`.aimet` folders of graphs with a key-value cache: what they compute, and damaged files."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qwlora import Scheme, Schemes
from qwlora.formats.model_card import CARD_MARK
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.kv_cache_graphs import read_graphs
from qwlora.targets.proof.checks import Limits, Parity
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from targets.npu.conftest import IDS, SAMPLE
from targets.npu.test_npu_graph import simulated
from targets.proofs import sqnr, verify_graphs

pytestmark = pytest.mark.slow

SIZES = cache_sizes([8, 1], [32])
GRAPHS = PROMPT, TOKEN = "prompt_ar8_cl32", "token_ar1_cl32"
AIMET = TARGETS["aimet"].backend
FLOAT16 = ("FLOAT", 16, "PER_TENSOR")


def written(made: Simulation, folder: Path, version: str = "1.0.0", **more: Any) -> Path:
    exported = ExportedGraph(made, {}, SAMPLE, version, SIZES)
    AIMET.write_adapter(replace(exported, **more), folder, folder)
    return folder


def verified(folder: Path, made: Simulation) -> Parity:
    logits = partial(AIMET.open(folder, "").logits, steps=4)
    return verify_graphs(logits, made, IDS, Limits(perplexity_difference=0.02))


@pytest.fixture(scope="module")
def llama() -> Simulation:
    return simulated("Llama")


@pytest.fixture(scope="module")
def folder(llama: Simulation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(llama, tmp_path_factory.mktemp("aimet") / "a")


def test_prefill_and_decode_are_simulated(folder: Path, llama: Simulation) -> None:
    parity = verified(folder, llama)
    assert not parity.problems
    model, logits = llama.origin.model, AIMET.open(folder, "").logits(IDS)
    assert sqnr(logits, llama.logits(IDS)) > 45
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits
    of_adapter, of_base = ((logits - x).abs().mean() for x in (llama.logits(IDS), base))
    assert of_base > 10 * of_adapter


def entries_of(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "model.encodings").read_text())
    sections = ("param_encodings", "activation_encodings", "encodings")
    return {e["name"]: e for s in sections for e in document.get(s, [])}


def without_encoding(folder: Path) -> set[str]:
    """Names of the float tensors that have none; every entry is of a float tensor."""
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx"))
    typed = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    floats = {v.name for v in typed if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats |= {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    entries = entries_of(folder).keys()
    assert entries <= floats
    return floats - entries


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_every_float_tensor_has_an_encoding_and_names_are_tied(
    version: str, folder: Path, llama: Simulation, tmp_path: Path
) -> None:
    files = folder if version == "1.0.0" else written(llama, tmp_path, version)
    known: dict[str, Any] = {}
    for name in GRAPHS:
        entries = entries_of(files / f"{name}.aimet")
        assert without_encoding(files / f"{name}.aimet") == set()
        inputs = {i.name for i in onnx.load(files / f"{name}.aimet/model.onnx").graph.input}
        assert inputs >= {"attention_mask", "past_key_0_in"}
        assert "lora_alpha" not in inputs
        assert (entries["past_key_1_in"] | {"name": ""}) == entries["past_key_1_out"] | {"name": ""}
        for each in known.keys() & entries.keys():
            assert known[each] == entries[each]
        known |= entries
    data = [(files / f"{name}.aimet/model.data").read_bytes() for name in GRAPHS]
    assert data[0] == data[1]
    assert CARD_MARK in (folder / "README.md").read_text().splitlines()[-1]


@pytest.mark.parametrize("opset", [17, 21])
def test_an_older_opset_has_norms_of_primitive_operators_and_computes_the_same(
    opset: int, folder: Path, llama: Simulation, tmp_path: Path
) -> None:
    """Also in tools that pin an older onnx."""
    written(llama, tmp_path, opset=opset)
    for graph in GRAPHS:
        path = tmp_path / f"{graph}.aimet/model.onnx"
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)]
        operators = {node.op_type for node in model.graph.node}
        assert operators >= {"Pow", "ReduceMean", "Sqrt"}
        assert "RMSNormalization" not in operators
        own, newest = (entries_of(files / f"{graph}.aimet") for files in (tmp_path, folder))
        named = {name: entry for name, entry in newest.items() if "." in name}
        assert named.items() <= own.items()
    assert sqnr(AIMET.open(tmp_path, "").logits(IDS), AIMET.open(folder, "").logits(IDS)) > 60
    assert not verified(tmp_path, llama).problems


def test_without_grids_of_activations_all_values_are_float16(tmp_path: Path) -> None:
    """As Precision.w4 of Qualcomm's recipes has them."""
    made = simulated("Llama", Schemes(policy="weights-only", adapter_weights=Scheme(8)))
    files = written(made, tmp_path)
    for name in GRAPHS:
        entries = json.loads((files / f"{name}.aimet/model.encodings").read_text())
        activations, parameters = (entries[f"{kind}_encodings"] for kind in ("activation", "param"))
        assert {(e["dtype"], e["bw"], e["enc_type"]) for e in activations} == {FLOAT16}
        assert {e["dtype"] for e in parameters} == {"INT"}
        assert len(parameters) == 1 + 3 * 14  # embedding; base, lora_A and lora_B of each layer
        model = onnx.load(files / f"{name}.aimet/model.onnx", load_external_data=False)
        stored = {tensor.name for tensor in model.graph.initializer}
        assert without_encoding(files / f"{name}.aimet") <= stored
    assert sqnr(AIMET.open(files, "").logits(IDS), made.logits(IDS)) > 100
    assert {graph["mask_floor"] for graph in read_graphs(files)["graphs"].values()} == {-1000}


@pytest.mark.client
def test_ai_hubs_client_takes_the_folders(folder: Path) -> None:
    from qai_hub import client

    for name in GRAPHS:
        model = folder / f"{name}.aimet"
        assert client._determine_model_type(model).name == "AIMET_ONNX"


def test_the_script_links_both_graphs_and_compares_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a client that computes in place of a device what golden/ holds, once a little off."""
    client: Any = ModuleType("qai_hub")
    linked: list[Any] = []

    def compile_job(model: str, device: Any, name: str, options: str) -> Any:
        assert "--target_runtime qnn_dlc " in options
        assert "--output_names logits,past_key_0_out," in options
        assert options.endswith(f"context_enable_graphs={Path(model).stem}")
        return SimpleNamespace(get_target_model=lambda: Path(model).name)

    def link_job(models: list[str], device: Any, name: str) -> Any:
        linked.extend(models)
        return SimpleNamespace(get_target_model=lambda: "binary")

    def inference_job(model: str, device: Any, inputs: dict[str, Any], options: str) -> Any:
        graph = options.rpartition("=")[2]
        assert model == "binary"
        shapes = read_graphs(folder)["graphs"][graph]["inputs"]
        assert {name: list(array.shape) for name, (array,) in inputs.items()} == shapes
        outputs = folder / "golden" / graph
        items = json.loads((outputs / "golden.json").read_text())["outputs"]
        found = {e["name"]: [np.load(outputs / f"{e['name']}.npy")] for e in reversed(items)}
        if graph == TOKEN:
            found["logits"][0] = found["logits"][0] * 1.001
        return SimpleNamespace(download_output_data=lambda: found)

    client.Device, client.submit_compile_job = str, compile_job
    client.submit_link_job, client.submit_inference_job = link_job, inference_job
    monkeypatch.setitem(sys.modules, "qai_hub", client)
    monkeypatch.setattr(sys, "argv", ["submit_aihub.py"])
    runpy.run_path(str(folder / "submit_aihub.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert linked == [f"{graph}.aimet" for graph in GRAPHS]
    assert f"{TOKEN} logits: SQNR 60.0 dB, same largest entry 100.0%" in said
    assert f"{PROMPT} past_value_1_out: SQNR" in said


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 3", "Phi-3", "Qwen3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    made = simulated(name)
    parity = verified(written(made, tmp_path), made)
    assert not parity.problems
    inner = without_encoding(tmp_path / f"{TOKEN}.aimet")
    assert bool(inner) == (name == "GPT-2")  # its GELU is made of several operators
    assert not any("norm" in each or "ln_" in each for each in inner)
