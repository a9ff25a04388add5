"""QAIRT's LoRA use cases as graphs with a key-value cache: what they compute, and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export.damage import edit_json, flip_bit, swap
from export.proofs import sqnr, verify_graphs
from qwlora import Rule, Scheme, quantize_
from qwlora.errors import VerificationError
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.npu.use_case_adapters import peft_names, share_unaffected, use_case_model
from qwlora.export.proof.checks import Limits
from qwlora.export.registry import TARGETS
from qwlora.export.target import ExportedGraph, ExportedUseCases
from qwlora.formats.card_mark import CARD_MARK
from qwlora.simulation.adapter_simulations import BASE, AdapterSimulations, simulate_adapters
from simulation.test_npu_graph import SCHEMES
from simulation.tiny_architectures import inputs, make

pytestmark = pytest.mark.slow

CASES = ["A", "B", "A+B", "none"]
GRAPHS, CONTEXT = {"prefill": 8, "decode": 1}, 32
IDS = torch.randint(3, 256, (1, 14), generator=torch.Generator().manual_seed(7))
QAIRT = TARGETS["qairt"].backend
V, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"


def adapter(model: Any, seed: int, rank: int, modules: list[str]) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {module: model.get_submodule(module).weight.shape for module in modules}
    factors = {
        module: (
            torch.randn(rank, shape[1], generator=generator) / 8,
            torch.randn(shape[0], rank, generator=generator) / 4,
        )
        for module, shape in shapes.items()
    }
    return CanonicalAdapter(factors, None)


@pytest.fixture(scope="module")
def simulations() -> AdapterSimulations:
    model = make("Llama")
    adapters = {"A": adapter(model, 1, 2, [V, DOWN]), "B": adapter(model, 2, 3, [V])}
    rules = [Rule("*embed_tokens", Scheme(8))]
    quantize_(model, "w4-channel", solver="rtn", rules=rules)
    cased = use_case_model(model, adapters, CASES)
    made = simulate_adapters(cased, inputs("Llama"), SCHEMES, "adapter_only")
    made.calibrate([{"input_ids": IDS}])
    share_unaffected(made)
    return made


@pytest.fixture(scope="module")
def folder(simulations: AdapterSimulations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

    def exported(name: str) -> ExportedGraph:
        return ExportedGraph(simulations[name], {}, sample, "1.0.0", GRAPHS, CONTEXT)

    path = tmp_path_factory.mktemp("qairt") / "files"
    cases = {case: exported(name) for case, name in peft_names(CASES).items()}
    QAIRT.write_cases(ExportedUseCases(exported(BASE), cases, "adapter_only"), path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_decode_is_the_simulation(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    simulation = simulations[peft_names(CASES)[case]]
    parity = verify_graphs(partial(QAIRT.open(folder, case).logits, steps=4), simulation, IDS)
    assert not parity.problems(Limits(perplexity_difference=0.02))
    logits = QAIRT.open(folder, case).logits(IDS)
    assert sqnr(logits, simulation.logits(IDS)) > 45
    own = (logits - simulation.logits(IDS)).abs().mean()
    for other in simulations.values():
        if other is not simulation and not (case == "none" and other is simulations[BASE]):
            assert (logits - other.logits(IDS)).abs().mean() > 10 * own


def test_weights_are_stored_once_and_a_cache_has_one_grid(folder: Path) -> None:
    used: list[set[str]] = []
    for name in ("prefill_model", "decode_model"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        stored = [t for t in model.graph.initializer if t.external_data]
        assert all(len(t.raw_data) < 512 for t in model.graph.initializer)
        used.append({e.value for t in stored for e in t.external_data if e.key == "location"})
    assert used == [{"model.data"}, {"model.data"}]
    assert [path.name for path in folder.glob("*.data")] == ["model.data"]
    base = entries(folder / "prefill_base.encodings")
    assert base["past_value_0_in"]["scale"] == base["past_value_0_out"]["scale"]
    branch = {f"{layer}.mul" for layer in (V, DOWN)} | {n for n in base if ".lora_" in n}
    for graph in GRAPHS:
        for case in CASES:
            own = entries(folder / f"{graph}_{case}.encodings")
            differing = {n for n, entry in own.items() if base.get(n, entry) != entry}
            assert differing <= branch
            assert bool(differing) is (case != "none")
            assert own["past_value_0_in"]["scale"] == base["past_value_0_in"]["scale"]
    assert sorted(p.name for p in (folder / "golden/A+B").iterdir()) == ["decode", "prefill"]
    own = {path.name for path in QAIRT.own_files(folder, "A")}
    assert own == {"A.safetensors", *(f"{graph}_A.encodings" for graph in GRAPHS)}


def entries(path: Path) -> dict[str, dict[str, Any]]:
    document = json.loads(path.read_text())
    return {e["name"]: e for e in document["activation_encodings"] + document["param_encodings"]}


def move_cache(*cases: str) -> Callable[[Path], None]:
    def edit(document: dict[str, Any]) -> None:
        (entry,) = (e for e in document["activation_encodings"] if e["name"] == "past_value_0_in")
        entry["scale"] = [0.5]

    def edit_all(folder: Path) -> None:
        for case in cases:
            edit_json(f"decode_{case}.encodings", edit)(folder)

    return edit_all


def shrink(folder: Path) -> None:
    weights = load_file(folder / "A.safetensors")
    weights[f"{V}.lora_A.weight"] = weights[f"{V}.lora_A.weight"][:, :4].copy()
    save_file(weights, folder / "A.safetensors")


def rename_tensor(folder: Path) -> None:
    weights = load_file(folder / "B.safetensors")
    weights["other"] = weights.pop(f"{V}.lora_A.weight")
    save_file(weights, folder / "B.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_bit("model.data"), r"prefill_model\.onnx: .*not on the grid"),
        (flip_bit("B.safetensors"), r"B\.safetensors: .*not on the grid"),
        (lambda f: (f / "decode_A.encodings").unlink(), r"decode_A\.encodings is missing"),
        (
            swap("decode_A.encodings", "decode_B.encodings"),
            r"A\.safetensors: .*not on the grid.*decode_A\.encodings",
        ),
        (
            swap("prefill_model.onnx", "decode_model.onnx"),
            r"prefill_model\.onnx: .*differ from inputs of prefill",
        ),
        (rename_tensor, r"B\.safetensors: .*other.* only there"),
        (shrink, r"A\.safetensors: .*\[64, 4\].*prefill_model\.onnx.*\[64, 5\].*rank"),
        (
            edit_json("decode_B.encodings", lambda d: d["activation_encodings"].pop()),
            r"decode_B\.encodings: .* only there or only in decode_base\.encodings",
        ),
        (
            move_cache("base", *CASES),
            r"decode_base\.encodings: past_value_0_in and past_value_0_out have different entries",
        ),
        (move_cache("B"), r"decode_B\.encodings: the entry of past_value_0_in differs from .*base"),
    ],
    ids=[
        *("bit-of-base", "bit-of-lora", "encodings-dropped", "encodings-swapped"),
        *("graphs-swapped", "tensor-renamed", "rank-changed"),
        *("entry-dropped", "cache-untied", "cache-of-a-use-case"),
    ],
)
def test_damaged_files_are_refused_by_name(
    damage: Callable[[Path], None], said: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(VerificationError, match=f"(?s){said}"):
        QAIRT.open(copied, "A")


def test_the_readme_is_replaced_unless_the_user_keeps_it(folder: Path) -> None:
    assert CARD_MARK in (folder / "README.md").read_text().splitlines()[-1]
