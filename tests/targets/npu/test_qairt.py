"""QAIRT's LoRA use cases as graphs with a key-value cache: what they compute, and damaged files."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from qwlora import LayerRule, Scheme, Schemes, quantize_
from qwlora.errors import ExportError, VerificationError
from qwlora.formats.model_card import CARD_MARK
from qwlora.simulation.adapter_simulations import (
    AdapterSimulations,
    BaseActivations,
    simulate_adapters,
)
from qwlora.simulation.kv_cache_graph import CacheSizes, cache_sizes
from qwlora.system.parameter_names import BASE
from qwlora.targets.canonical_adapter import (
    CanonicalAdapter,
    peft_names,
    share_unaffected,
    use_case_model,
)
from qwlora.targets.npu import float_targets
from qwlora.targets.npu.float_onnx import float_graphs
from qwlora.targets.npu.kv_cache_graphs import CachedGraphs
from qwlora.targets.proof.checks import Limits
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from simulation.test_npu_graph import SCHEMES
from simulation.tiny_architectures import inputs, make
from targets.damage import edit_json, flip_bit, swap
from targets.proofs import sqnr, verify_graphs, with_strength

CASES = ["A", "B", "A+B", "none"]
SIZES = cache_sizes([8, 1], [32])
GRAPHS = PROMPT, TOKEN = "prompt_ar8_cl32", "token_ar1_cl32"
IDS = torch.randint(3, 256, (1, 14), generator=torch.Generator().manual_seed(7))
QAIRT = TARGETS["qairt"].backend
V, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"


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


ADAPTERS = {
    "A": adapter(make("Llama"), 1, 2, [V, DOWN]),
    "B": adapter(make("Llama"), 2, 3, [V]),
}


def simulated(mode: BaseActivations, schemes: Schemes = SCHEMES) -> AdapterSimulations:
    model = make("Llama", layers=1)
    quantize_(model, "w4-channel", solver="rtn", rules=[LayerRule("*embed_tokens", Scheme(8))])
    cased = use_case_model(model, ADAPTERS, CASES)
    made = simulate_adapters(cased, inputs("Llama"), schemes, mode)
    made.calibrate([{"input_ids": IDS}])
    share_unaffected(made)
    return made


def written(
    made: AdapterSimulations,
    path: Path,
    mode: BaseActivations,
    sizes: tuple[CacheSizes, ...] = SIZES,
    names: Sequence[str] = CASES,
    opset: int | None = None,
) -> Path:
    sample = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

    def exported(name: str) -> ExportedGraph:
        return ExportedGraph(made[name], {}, sample, "1.0.0", sizes, opset)

    cases = {case: exported(name) for case, name in peft_names(CASES).items() if case in names}
    QAIRT.write_cases(replace(exported(BASE), updatable=mode), cases, path)
    return path


@pytest.fixture(scope="module")
def simulations() -> AdapterSimulations:
    return simulated("adapter_only")


@pytest.fixture(scope="module")
def folder(simulations: AdapterSimulations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(simulations, tmp_path_factory.mktemp("qairt") / "files", "adapter_only")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_decode_is_the_simulation(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    simulation = simulations[peft_names(CASES)[case]]
    logits, limits = (
        partial(QAIRT.open(folder, case).logits, steps=4),
        Limits(perplexity_difference=0.02),
    )
    assert not verify_graphs(logits, simulation, IDS, limits).problems
    logits = QAIRT.open(folder, case).logits(IDS)
    assert sqnr(logits, simulation.logits(IDS)) > 45
    own = (logits - simulation.logits(IDS)).abs().mean()
    for other in simulations.values():
        if other is not simulation and not (case == "none" and other is simulations[BASE]):
            assert (logits - other.logits(IDS)).abs().mean() > 10 * own


def test_two_adapters_at_once_are_their_sum(folder: Path) -> None:
    a, b, both = (load_file(folder / f"{case}.safetensors") for case in ("A", "B", "A+B"))
    products = {
        name: [w[f"{name}.lora_A.weight"] @ w[f"{name}.lora_B.weight"] for w in (a, b, both)]
        for name in (V, DOWN)
    }
    for name, (of_a, of_b, of_both) in products.items():
        assert a[f"{name}.lora_A.weight"].shape[1] == 6  # A+B has two places of rank 3
        tolerance = 0.03 * np.abs(of_both).max()  # each on 8-bit grids of its own
        np.testing.assert_allclose(of_both, of_a + of_b, atol=tolerance)
    expected = (ADAPTERS["A"].factors[V][1] @ ADAPTERS["A"].factors[V][0]).T.numpy()
    np.testing.assert_allclose(products[V][0], expected, atol=0.03 * np.abs(expected).max())
    assert not any(w.any() for w in load_file(folder / "none.safetensors").values())


def test_alpha_is_the_strength_of_each_adapter_of_a_use_case(folder: Path) -> None:
    def logits(case: str, *strengths: float) -> torch.Tensor:
        runtime = QAIRT.open(folder, case)
        assert isinstance(runtime, CachedGraphs)
        assert runtime.fixed["lora_alpha"].tolist() == [1, 1]
        runtime.fixed["lora_alpha"] = torch.tensor(strengths, dtype=torch.float32)
        return runtime.logits(IDS)

    none, a, b = logits("none", 1, 1), logits("A", 1, 1), logits("B", 1, 1)
    assert torch.equal(logits("A", 0, 1), none)
    assert torch.equal(logits("A", 1, 0), a)
    assert torch.equal(logits("A+B", 0, 0), none)
    assert sqnr(logits("A+B", 1, 0) - none, a - none) > 15  # the factors have other grids in A+B
    assert sqnr(logits("A+B", 0, 1) - none, b - none) > 15


@pytest.mark.slow
def test_graphs_of_every_size_are_the_simulation_with_the_weights_once(
    simulations: AdapterSimulations, tmp_path: Path
) -> None:
    sizes = cache_sizes([8, 4, 1], [16, 32])
    folder = written(simulations, tmp_path, "adapter_only", sizes, ["A", "none"])
    names = {each.name for each in sizes}
    runtime = QAIRT.open(folder, "A")
    assert isinstance(runtime, CachedGraphs)
    assert {*runtime.names} == names
    expected = simulations[peft_names(CASES)["A"]].logits(IDS)
    for name in runtime.names:
        alone = QAIRT.open(folder, "A")
        assert isinstance(alone, CachedGraphs)
        alone.names = [name]
        assert sqnr(alone.logits(IDS), expected) > 45, name
    assert sqnr(runtime.logits(IDS, steps=4), expected) > 45
    assert [path.name for path in folder.glob("*.data")] == ["model.data"]
    grids: dict[str, Any] = {}
    for name in names:
        own = entries(folder / f"{name}_A.encodings")
        assert all(grids.setdefault(tensor, entry) == entry for tensor, entry in own.items())
    assert {path.parent.name for path in folder.glob("golden/A/*/logits.npy")} == names


@pytest.mark.parametrize("case", ["A", "A+B"])
def test_at_half_strength_it_is_the_simulation_at_half_its_scaling(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    runtime = QAIRT.open(folder, case)
    assert isinstance(runtime, CachedGraphs)
    found = {}
    for strength in (0.0, 0.5, 1.0):
        runtime.fixed["lora_alpha"] = torch.full((2,), strength)
        found[strength] = runtime.logits(IDS)
    expected = with_strength(simulations[peft_names(CASES)[case]], 0.5)(IDS)
    assert sqnr(found[0.5], expected) > 45
    error = (found[0.5] - expected).abs().mean()
    assert min((found[other] - expected).abs().mean() for other in (0.0, 1.0)) > 10 * error


@pytest.mark.slow
@pytest.mark.parametrize("opset", [None, 17])
def test_without_grids_of_activations_the_strength_is_a_float16(
    opset: int | None, tmp_path: Path
) -> None:
    made = simulated("adapter_only", Schemes(policy="weights-only", adapter_weights=Scheme(8)))
    folder = written(made, tmp_path, "adapter_only", SIZES, ["A", "A+B"], opset)
    for case in ("A", "A+B"):
        runtime = QAIRT.open(folder, case)
        assert isinstance(runtime, CachedGraphs)
        runtime.fixed["lora_alpha"] = torch.full((2,), 0.5)
        expected = with_strength(made[peft_names(CASES)[case]], 0.5)(IDS)
        assert sqnr(runtime.logits(IDS), expected) > 100
        for graph in GRAPHS:
            assert entries(folder / f"{graph}_{case}.encodings")["lora_alpha"]["dtype"] == "FLOAT"


def test_the_lists_name_the_files(folder: Path) -> None:
    names = (folder / "lora_weight_list.txt").read_text().split()
    assert names == [f"{m}.lora_{half}.weight" for m in (DOWN, V) for half in "AB"]
    v2 = yaml.safe_load((folder / f"{TOKEN}_lora_config.yaml").read_text())["use_case"]
    assert [case["name"] for case in v2] == CASES
    assert v2[2] == {
        "name": "A+B",
        "model_name": f"{TOKEN}_model.onnx",
        "lora_weights": "A+B.safetensors",
        "quant_overrides": f"{TOKEN}_A+B.encodings",
        "output_path": f"./output/{TOKEN}/A+B",
    }
    own = {path.name for path in QAIRT.own_files(folder, "A")}
    assert own == {"A.safetensors", *(f"{graph}_A.encodings" for graph in GRAPHS)}
    assert sorted(p.name for p in (folder / "golden/A+B").iterdir()) == [*GRAPHS]
    assert (folder / "golden/A+B" / TOKEN / "logits.npy").exists()
    assert CARD_MARK in (folder / "README.md").read_text().splitlines()[-1]


def test_weights_are_stored_once_and_a_cache_has_one_grid(folder: Path) -> None:
    used: list[set[str]] = []
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}_model.onnx", load_external_data=False)
        stored = [t for t in model.graph.initializer if t.external_data]
        assert all(len(t.raw_data) < 512 for t in model.graph.initializer)
        used.append({e.value for t in stored for e in t.external_data if e.key == "location"})
    assert used == [{"model.data"}, {"model.data"}]
    assert [path.name for path in folder.glob("*.data")] == ["model.data"]
    base = entries(folder / f"{PROMPT}_base.encodings")
    assert base["past_value_0_in"]["scale"] == base["past_value_0_out"]["scale"]
    for graph in GRAPHS:
        for case in CASES:
            own = entries(folder / f"{graph}_{case}.encodings")
            differing = {n for n, entry in own.items() if base.get(n, entry) != entry}
            assert all(is_of_branch(name) for name in differing)
            assert bool(differing) is (case != "none")
            assert own["past_value_0_in"]["scale"] == base["past_value_0_in"]["scale"]


def entries(path: Path) -> dict[str, dict[str, Any]]:
    document = json.loads(path.read_text())
    return {e["name"]: e for e in document["activation_encodings"] + document["param_encodings"]}


def is_of_branch(name: str) -> bool:
    """What QAIRT's importer may replace in mode adapter_only."""
    return ".lora_" in name or any(name == f"{module}.mul" for module in (V, DOWN))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "none"])
def test_only_what_the_mode_updates_differs_between_use_cases(
    mode: BaseActivations, tmp_path: Path
) -> None:
    folder = written(simulated(mode), tmp_path, mode)
    QAIRT.open(folder, "A")
    a, b = (entries(folder / f"{PROMPT}_{case}.encodings") for case in ("A", "B"))
    assert a.keys() == b.keys()
    differing = {name for name in a if a[name] != b[name]}
    lora = {name for name in a if is_of_branch(name)}
    if mode == "none":
        assert not differing
    else:
        assert lora & differing
        assert {"model.norm.mul", "lm_head.linear"} <= differing
    assert not {n for n in differing if n.endswith(".weight")} - lora


@pytest.mark.parametrize("case", CASES)
def test_a_use_case_runs_with_the_bases_encodings_outside_its_branches(
    case: str, copied: Path
) -> None:
    """As an importer in mode adapter_only loads it: nothing is clipped."""
    expected = QAIRT.open(copied, case).logits(IDS)
    for graph in GRAPHS:
        path = copied / f"{graph}_{case}.encodings"
        merged, base = (
            json.loads(file.read_text()) for file in (path, copied / f"{graph}_base.encodings")
        )
        for section in ("activation_encodings", "param_encodings"):
            own = {entry["name"]: entry for entry in merged[section]}
            merged[section] = [
                own[entry["name"]] if is_of_branch(entry["name"]) else entry
                for entry in base[section]
            ]
        path.write_text(json.dumps(merged))
    assert torch.equal(QAIRT.open(copied, case).logits(IDS), expected)


def edit_weights(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return edit


def rename(weights: dict[str, Any]) -> None:
    weights["other"] = weights.pop(f"{V}.lora_A.weight")


def shrink(weights: dict[str, Any]) -> None:
    weights[f"{V}.lora_A.weight"] = weights[f"{V}.lora_A.weight"][:, :4].copy()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-of-lora": (flip_bit("B.safetensors"), r"B\.safetensors: .*not on the grid"),
    "bit-of-base": (flip_bit("model.data"), rf"{PROMPT}_model\.onnx: .*not on the grid"),
    "encodings-swapped": (
        swap(f"{TOKEN}_A.encodings", f"{TOKEN}_B.encodings"),
        rf"B\.safetensors: .*not on the grid.*{TOKEN}_B\.encodings",
    ),
    "weights-swapped": (
        swap("A.safetensors", "B.safetensors"),
        r"B\.safetensors: .*not on the grid",
    ),
    "tensor-renamed": (
        edit_weights("B.safetensors", rename),
        rf"B\.safetensors: other .* is not a weight of {PROMPT}_model\.onnx",
    ),
    "rank-changed": (
        edit_weights("B.safetensors", shrink),
        rf"B\.safetensors: .*\[64, 4\] is not a weight of {PROMPT}_model\.onnx",
    ),
    "weights-cut": (
        lambda f: (f / "B.safetensors").write_bytes(b"x"),
        r"B\.safetensors' cannot be read",
    ),
    "entry-renamed": (
        edit_json(f"{TOKEN}_B.encodings", lambda d: d["param_encodings"][0].update(name="x")),
        rf"{TOKEN}_B\.encodings: .*x.*not the name of a tensor",
    ),
    "list-changed": (
        lambda f: (f / "lora_weight_list.txt").write_text("x\n"),
        r"lora_weight_list\.txt does not list what is in the folder",
    ),
    "list-dropped": (
        lambda f: (f / f"{TOKEN}_lora_config.yaml").unlink(),
        rf"{TOKEN}_lora_config\.yaml does not list",
    ),
    "use-case-dropped": (
        edit_json("graphs.json", lambda record: record.update(use_cases=["A"])),
        rf"{PROMPT}_lora_config\.yaml does not list",
    ),
    "use-cases-are-a-number": (
        edit_json("graphs.json", lambda record: record.update(use_cases=3)),
        rf"{PROMPT}_lora_adaptor_list\.yaml does not list",
    ),
    "version-dropped": (
        edit_json(f"{TOKEN}_B.encodings", lambda d: d.pop("version")),
        rf"{TOKEN}_B\.encodings: .*version",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_name(kind: str, copied: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(copied)
    with pytest.raises((VerificationError, ExportError), match=f"(?s){message}"):
        QAIRT.open(copied, "B")


@pytest.mark.parametrize(
    ("mode", "tensor", "is_refused"),
    [
        ("adapter_only", "model.norm.mul", True),
        ("adapter_only", f"{V}.lora_A.linear", False),
        ("all", "model.norm.mul", False),
        ("all", "model.norm.weight", True),
        ("none", f"{V}.lora_A.linear", True),
    ],
)
def test_use_cases_that_differ_in_more_than_the_mode_updates_are_not_written(
    mode: BaseActivations,
    tensor: str,
    is_refused: bool,
    simulations: AdapterSimulations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def graphs(cases: Any, name: str) -> Any:
        """Both cases are the base, but for one encoding of the second."""
        (made,) = float_graphs({"base": cases["base"]}, name)
        yield made
        grid = made[1].encodings[tensor]
        changed = replace(grid, scale=grid.scale * 2)
        yield "A", replace(made[1], encodings={**made[1].encodings, tensor: changed}), made[2]

    monkeypatch.setattr(float_targets, "float_graphs", graphs)
    sample = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    base = ExportedGraph(simulations[BASE], {}, sample, "1.0.0", SIZES[1:], updatable=mode)
    if is_refused:
        with pytest.raises(ExportError, match=rf"^{tensor}.* of {TOKEN}_A differ from {TOKEN}_mod"):
            QAIRT.write_cases(base, {"A": base}, tmp_path)
    else:
        QAIRT.write_cases(base, {"A": base}, tmp_path)
