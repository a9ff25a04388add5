"""QAIRT's LoRA use cases as graphs with a key-value cache: what they compute, and damaged files."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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

from conftest import flip_bit
from qwlora import LayerRule, Scheme, Schemes, quantize_
from qwlora.errors import ExportError, VerificationError
from qwlora.formats.model_card import CARD_MARK
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.system import strict_json
from qwlora.system.parameter_names import BASE
from qwlora.targets.canonical_adapter import (
    CanonicalAdapter,
    peft_names,
    share_unaffected,
    use_case_model,
)
from qwlora.targets.npu import float_targets
from qwlora.targets.npu.float_onnx import float_graphs
from qwlora.targets.npu.kv_cache_graphs import CachedGraphs, most_tokens
from qwlora.targets.proof.checks import Limits
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from simulation.tiny_architectures import inputs, make
from targets.damage import edit_json, swap
from targets.npu.conftest import IDS, SAMPLE
from targets.npu.test_npu_graph import SCHEMES
from targets.proofs import sqnr, verify_graphs, with_strength

CASES = ["A", "B", "A+B", "none"]
SIZES = cache_sizes([8, 1], [32])
GRAPHS = PROMPT, TOKEN = "prompt_ar8_cl32", "token_ar1_cl32"
QAIRT = TARGETS["qairt"].backend
V, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"


def adapter(seed: int, rank: int, modules: list[str]) -> CanonicalAdapter:
    generator, factors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        rows, columns = make("Llama").get_submodule(module).weight.shape
        a = torch.randn(rank, columns, generator=generator) / 8
        factors[module] = (a, torch.randn(rows, rank, generator=generator) / 4)
    return CanonicalAdapter(factors, None)


ADAPTERS = {"A": adapter(1, 2, [V, DOWN]), "B": adapter(2, 3, [V])}


def simulated(schemes: Schemes = SCHEMES) -> AdapterSimulations:
    model = make("Llama", layers=1)
    quantize_(model, "w4-channel", solver="rtn", rules=[LayerRule("*embed_tokens", Scheme(8))])
    cased = use_case_model(model, ADAPTERS, CASES)
    made = simulate_adapters(cased, inputs("Llama"), schemes, "adapter_only")
    made.calibrate([{"input_ids": IDS}])
    share_unaffected(made)
    return made


def written(
    made: AdapterSimulations, path: Path, names: Sequence[str] = CASES, opset: int | None = None
) -> Path:
    def exported(name: str) -> ExportedGraph:
        return ExportedGraph(made[name], {}, SAMPLE, "1.0.0", SIZES, opset)

    cases = {case: exported(name) for case, name in peft_names(CASES).items() if case in names}
    QAIRT.write_cases(replace(exported(BASE), updatable="adapter_only"), cases, path)
    return path


@pytest.fixture(scope="module")
def simulations() -> AdapterSimulations:
    return simulated()


@pytest.fixture(scope="module")
def folder(simulations: AdapterSimulations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(simulations, tmp_path_factory.mktemp("qairt") / "files")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_are_simulated(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    simulation = simulations[peft_names(CASES)[case]]
    decoded = partial(QAIRT.open(folder, case).logits, steps=4)
    limits = Limits(perplexity_difference=0.02)
    assert not verify_graphs(decoded, simulation, IDS, limits).problems
    logits = QAIRT.open(folder, case).logits(IDS)
    assert sqnr(logits, simulation.logits(IDS)) > 45
    own = (logits - simulation.logits(IDS)).abs().mean()
    for other in simulations.values():
        if other is not simulation and not (case == "none" and other is simulations[BASE]):
            assert (logits - other.logits(IDS)).abs().mean() > 10 * own


def test_files_hold_the_factors_of_their_use_cases(folder: Path) -> None:
    a, b, both = (
        {n: w[f"{n}.lora_A.weight"] @ w[f"{n}.lora_B.weight"] for n in (V, DOWN)}
        for w in (load_file(folder / f"{case}.safetensors") for case in ("A", "B", "A+B"))
    )
    expected = (ADAPTERS["A"].factors[V][1] @ ADAPTERS["A"].factors[V][0]).T.numpy()
    pairs = [(a[V], expected), *((a[name] + b[name], both[name]) for name in (V, DOWN))]
    for found, product in pairs:  # on 8-bit grids of their own
        np.testing.assert_allclose(found, product, atol=0.03 * np.abs(product).max())
    assert not any(w.any() for w in load_file(folder / "none.safetensors").values())


def with_alpha(folder: Path, case: str, *strengths: float) -> torch.Tensor:
    """Logits of a use case at these strengths of its two places."""
    runtime = QAIRT.open(folder, case)
    assert isinstance(runtime, CachedGraphs)
    assert runtime.fixed["lora_alpha"].tolist() == [1, 1]
    runtime.fixed["lora_alpha"] = torch.tensor(strengths)
    return runtime.logits(IDS)


def test_alpha_is_the_strength_of_each_adapter_of_a_use_case(folder: Path) -> None:
    none, a, b = (with_alpha(folder, case, 1.0, 1.0) for case in ("none", "A", "B"))
    assert torch.equal(with_alpha(folder, "A", 0.0, 1.0), none)
    assert torch.equal(with_alpha(folder, "A", 1.0, 0.0), a)
    assert torch.equal(with_alpha(folder, "A+B", 0.0, 0.0), none)
    # the factors have other grids in A+B
    assert sqnr(with_alpha(folder, "A+B", 1.0, 0.0) - none, a - none) > 15
    assert sqnr(with_alpha(folder, "A+B", 0.0, 1.0) - none, b - none) > 15


@pytest.mark.parametrize("case", ["A", "A+B"])
def test_at_half_strength_it_is_the_simulation_at_half_its_scaling(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    none, half, whole = (with_alpha(folder, case, x, x) for x in (0.0, 0.5, 1.0))
    expected = with_strength(simulations[peft_names(CASES)[case]], 0.5)(IDS)
    assert sqnr(half, expected) > 45
    error = (half - expected).abs().mean()
    assert min((other - expected).abs().mean() for other in (none, whole)) > 10 * error


@pytest.mark.slow
@pytest.mark.parametrize("opset", [None, 17])
def test_without_grids_of_activations_strengths_are_float16(
    opset: int | None, tmp_path: Path
) -> None:
    made = simulated(Schemes(policy="weights-only", adapter_weights=Scheme(8)))
    folder = written(made, tmp_path, names=["A", "A+B"], opset=opset)
    for case in ("A", "A+B"):
        expected = with_strength(made[peft_names(CASES)[case]], 0.5)(IDS)
        assert sqnr(with_alpha(folder, case, 0.5, 0.5), expected) > 100
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
    base, grids = entries(folder / f"{PROMPT}_base.encodings"), dict[Any, Any]()
    assert base["past_value_0_in"]["scale"] == base["past_value_0_out"]["scale"]
    for graph in GRAPHS:
        for case in CASES:
            own = entries(folder / f"{graph}_{case}.encodings")
            differing = {n for n, entry in own.items() if base.get(n, entry) != entry}
            assert all(is_of_branch(name) for name in differing)
            assert bool(differing) is (case != "none")
            assert own["past_value_0_in"]["scale"] == base["past_value_0_in"]["scale"]
            assert all(grids.setdefault((case, n), entry) == entry for n, entry in own.items())


def entries(path: Path) -> dict[str, dict[str, Any]]:
    document = json.loads(path.read_text())
    return {e["name"]: e for e in document["activation_encodings"] + document["param_encodings"]}


def is_of_branch(name: str) -> bool:
    """What QAIRT's importer may replace in mode adapter_only."""
    return ".lora_" in name or any(name == f"{module}.mul" for module in (V, DOWN))


def change_lora(name: str, rows: int) -> Callable[[Path], None]:
    """Rename one weight of use case B, and keep so many of its rows."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "B.safetensors")
        tensor = weights.pop(f"{V}.lora_A.weight")
        save_file({**weights, name: tensor[:, :rows].copy()}, folder / "B.safetensors")

    return edit


def write_text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


LIST = f"{TOKEN}_lora_config.yaml"
LISTS = [f"{PROMPT}_lora_{name}.yaml does not list" for name in ("config", "adaptor_list")]
OF_B, NO_GRID, NO_WEIGHT = f"{TOKEN}_B.encodings", "not on the grid", "is not a weight of"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "bit-of-lora": (lambda f: flip_bit(f / "B.safetensors", -2), ["B.safetensors: ", NO_GRID]),
    "bit-of-base": (lambda f: flip_bit(f / "model.data", -2), [f"{PROMPT}_model.onnx: ", NO_GRID]),
    "encodings-swapped": (swap(f"{TOKEN}_A.encodings", OF_B), ["B.safetensors: ", NO_GRID, OF_B]),
    "weights-swapped": (swap("A.safetensors", "B.safetensors"), ["B.safetensors: ", NO_GRID]),
    "tensor-renamed": (
        change_lora("other", 6),
        ["B.safetensors: other", f"[64, 6] {NO_WEIGHT} {PROMPT}_model"],
    ),
    "rank-changed": (change_lora(f"{V}.lora_A.weight", 4), [f"[64, 4] {NO_WEIGHT} {PROMPT}_model"]),
    "weights-cut": (write_text("B.safetensors", "x"), ["B.safetensors' cannot be read"]),
    "entry-renamed": (
        edit_json(OF_B, lambda d: d["param_encodings"][0].update(name="x")),
        [f"{OF_B}: ", "x", "not the name of a tensor"],
    ),
    "list-changed": (write_text("lora_weight_list.txt", "x\n"), ["lora_weight_list.txt does not"]),
    "list-dropped": (lambda f: (f / LIST).unlink(), [f"{LIST} does not list"]),
    "use-case-dropped": (edit_json("graphs.json", lambda r: r.update(use_cases=["A"])), LISTS[:1]),
    "use-cases-a-number": (edit_json("graphs.json", lambda r: r.update(use_cases=3)), LISTS[1:]),
    "version-dropped": (edit_json(OF_B, lambda d: d.pop("version")), [f"{OF_B}: ", "version"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_name(kind: str, copied: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(copied)
    message = ".*".join(map(re.escape, words))
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
    mode: Any, tensor: str, is_refused: bool, simulations: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def graphs(cases: Any, name: str) -> Any:
        """Both cases are the base, but for one encoding of the second."""
        (made,) = float_graphs({"base": cases["base"]}, name)
        yield made
        grid = made[1].encodings[tensor]
        changed = replace(grid, scale=grid.scale * 2)
        yield "A", replace(made[1], encodings={**made[1].encodings, tensor: changed}), made[2]

    monkeypatch.setattr(float_targets, "float_graphs", graphs)
    base = ExportedGraph(simulations[BASE], {}, SAMPLE, "1.0.0", SIZES[1:], updatable=mode)
    problem = rf"^{tensor}.* of {TOKEN}_A differ from {TOKEN}_mod"
    with pytest.raises(ExportError, match=problem) if is_refused else nullcontext():
        QAIRT.write_cases(base, {"A": base}, tmp_path)


def cached_graphs(folder: Path, tokens: list[int], contexts: list[int]) -> CachedGraphs:
    record: dict[str, Any] = {}
    for sizes in cache_sizes(tokens, contexts):
        inputs = {"past_key_0_in": [1, 2, sizes.past, 4]}
        numbers = {"tokens": sizes.tokens, "context": sizes.context}
        record[sizes.name] = {**numbers, "inputs": inputs, "host": None}
    (folder / "graphs.json").write_text(strict_json.dumps({"graphs": record}))
    return CachedGraphs(folder, {})


def calls(runtime: CachedGraphs, count: int, steps: int, monkeypatch: Any) -> list[tuple[str, int]]:
    """The graphs that run `count` tokens, each with how many of them."""
    made: list[tuple[str, int]] = []

    def call(name: str, ids: Any, past: int, cache: Any) -> Any:
        assert past == sum(number for _, number in made)
        assert past + runtime.tokens[name] <= runtime.contexts[name]
        made.append((name.removeprefix("prompt_").removeprefix("token_"), ids.shape[1]))
        return {}, {"logits": ids[..., None]}

    monkeypatch.setattr(runtime, "call", call)
    ids = torch.arange(count)[None]
    assert torch.equal(runtime.logits(ids, steps)[..., 0], ids)
    return made


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (14, 0, "ar8_cl16 8, ar8_cl16 6"),
        (20, 0, "ar8_cl16 8, ar8_cl16 8, ar4_cl32 4"),
        (3, 0, "ar4_cl16 3"),
        (6, 2, "ar8_cl16 1, ar4_cl16 1, ar1_cl16 1, ar8_cl32 1"),
        (30, 2, "ar8_cl16 6, ar4_cl16 4, ar1_cl16 1, ar8_cl32 8, ar4_cl32 4, ar8_cl32 5, ar1_cl"),
    ],
)
def test_short_contexts_first_and_each_graph_is_proven(
    count: int, steps: int, expected: str, tmp_path: Path, monkeypatch: Any
) -> None:
    runtime = cached_graphs(tmp_path, [1, 4, 8], [32, 16])
    assert (runtime.context, most_tokens(tmp_path)) == (32, 32)
    assert runtime.empty_cache()["past_key_0_in"].shape == (1, 2, 32, 4)
    made = calls(runtime, count, steps, monkeypatch)
    assert ", ".join(f"{name} {tokens}" for name, tokens in made).startswith(expected)
    last = made[-steps:] if steps else []
    assert [number for _, number in last] == [1] * steps
    assert {name for name, _ in last} <= {"ar1_cl16", "ar1_cl32"}


def test_what_no_context_holds_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    runtime = cached_graphs(tmp_path, [8, 1], [16, 20])
    assert calls(runtime, 20, 0, monkeypatch)[2:] == [("ar1_cl20", 1)] * 4
    with pytest.raises(ExportError, match=r"21 tokens.*context of 20; give at most 20"):
        calls(runtime, 21, 0, monkeypatch)
    runtime = cached_graphs(tmp_path, [8, 4], [16])  # the padding of the last call needs room too
    assert most_tokens(tmp_path) == 13
    assert calls(runtime, 13, 2, monkeypatch) == [("ar8_cl16", 8), ("ar8_cl16", 3), ("ar4_cl16", 2)]
