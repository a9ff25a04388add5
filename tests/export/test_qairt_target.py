"""The files of QAIRT's LoRA use cases: what they compute, and damaged ones are refused by name."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from conftest import tiny_model
from export.damage import edit_json, flip_bit, swap
from qwlora import quantize_
from qwlora.errors import VerificationError
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.npu.float_onnx_runner import FloatOnnxModel
from qwlora.export.npu.qairt import open_qairt
from qwlora.export.npu.use_case_adapters import peft_names, share_unaffected, use_case_model
from qwlora.export.proof.compare import verify_language_model
from qwlora.export.registry import TARGETS
from qwlora.export.target import ExportedGraph, ExportedUseCases
from qwlora.formats.card_mark import CARD_MARK
from qwlora.simulation.adapter_simulations import (
    BASE,
    AdapterSimulations,
    BaseActivations,
    simulate_adapters,
)

pytestmark = pytest.mark.usefixtures("shared_captures")

CASES = ["A", "B", "A+B", "none"]
Q, OUT, DOWN = (
    f"model.layers.0.{m}" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SAMPLE = {name: tensor[:1] for name, tensor in BATCH.items()}


def adapter(seed: int, rank: int, modules: dict[str, int]) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed)
    return CanonicalAdapter(
        {
            module: (
                torch.randn(rank, inputs, generator=generator) / 8,
                torch.randn(64, rank, generator=generator) / 4,
            )
            for module, inputs in modules.items()
        },
        None,
    )


ADAPTERS = {"A": adapter(1, 2, {Q: 64, DOWN: 128}), "B": adapter(2, 3, {Q: 64, OUT: 64})}


def simulated(mode: BaseActivations) -> AdapterSimulations:
    model = tiny_model("llama", layers=1)
    quantize_(model, "w4-block32", solver="rtn")
    made = simulate_adapters(use_case_model(model, ADAPTERS, CASES), BATCH, base_activations=mode)
    made.calibrate([BATCH])
    share_unaffected(made)
    return made


def written(made: AdapterSimulations, folder: Path, mode: BaseActivations) -> Path:
    graphs = {
        case: ExportedGraph(made[name], {}, SAMPLE) for case, name in peft_names(CASES).items()
    }
    exported = ExportedUseCases(ExportedGraph(made[BASE], {}, SAMPLE), graphs, mode)
    TARGETS["qairt"].backend.write_cases(exported, folder)
    return folder


@pytest.fixture(scope="module")
def simulations(shared_captures: None) -> AdapterSimulations:
    return simulated("adapter_only")


@pytest.fixture(scope="module")
def folder(simulations: AdapterSimulations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(simulations, tmp_path_factory.mktemp("qairt") / "files", "adapter_only")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.mark.parametrize("case", CASES)
def test_every_use_case_computes_what_was_simulated(
    case: str, folder: Path, simulations: AdapterSimulations
) -> None:
    simulation = simulations[peft_names(CASES)[case]]
    parity = verify_language_model(open_qairt(folder, case), simulation, IDS, IDS.shape[1])
    assert parity.figures["worst_layer_steps"] < 1.01
    assert parity.figures["worst_layer_mean_steps"] < 0.05
    assert parity.figures["top1_agreement"] == 1


def test_two_adapters_at_once_are_their_sum(folder: Path) -> None:
    a, b, both = (load_file(folder / f"{case}.safetensors") for case in ("A", "B", "A+B"))
    product = {
        name: [
            weights[f"{name}.lora_A.weight"] @ weights[f"{name}.lora_B.weight"]
            for weights in (a, b, both)
        ]
        for name in (Q, OUT, DOWN)
    }
    for name, (of_a, of_b, of_both) in product.items():
        assert a[f"{name}.lora_A.weight"].shape[1] == 5  # padded to the rank of A+B
        tolerance = 0.03 * np.abs(of_both).max()  # each on 8-bit grids of its own
        np.testing.assert_allclose(of_both, of_a + of_b, atol=tolerance)
    expected = (ADAPTERS["A"].factors[Q][1] @ ADAPTERS["A"].factors[Q][0]).T.numpy()
    np.testing.assert_allclose(product[Q][0], expected, atol=0.03 * np.abs(expected).max())
    assert not any(w.any() for w in load_file(folder / "none.safetensors").values())


def test_the_lists_name_the_files(folder: Path) -> None:
    names = (folder / "lora_weight_list.txt").read_text().split()
    assert names == [f"{m}.lora_{half}.weight" for m in (Q, OUT, DOWN) for half in "AB"]
    v2 = yaml.safe_load((folder / "lora_config.yaml").read_text())["use_case"]
    assert [case["name"] for case in v2] == CASES
    assert v2[2] == {
        "name": "A+B",
        "model_name": "model.onnx",
        "lora_weights": "A+B.safetensors",
        "quant_overrides": "A+B.encodings",
        "output_path": "./output",
    }
    assert (folder / "golden" / "A+B" / "logits.npy").exists()


def entries(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    return {e["name"]: e for e in document["param_encodings"] + document["activation_encodings"]}


@pytest.mark.parametrize("mode", ["all", "adapter_only", "none"])
def test_only_what_the_mode_updates_differs_between_use_cases(
    mode: BaseActivations, folder: Path, tmp_path: Path
) -> None:
    if mode != "adapter_only":
        folder = written(simulated(mode), tmp_path, mode)
        open_qairt(folder, "A")
    a, b = (entries(folder / f"{case}.encodings") for case in ("A", "B"))
    assert a.keys() == b.keys()
    differing = {name for name in a if a[name] != b[name]}
    lora = {name for name in a if is_of_branch(name)}
    last = {"model.norm.mul", "lm_head.linear"}
    if mode == "none":
        assert not differing
    elif mode == "adapter_only":
        assert differing
        assert differing <= lora
    else:
        assert lora & differing
        assert last <= differing
    assert not {n for n in differing if n.endswith(".weight")} - lora


def is_of_branch(name: str) -> bool:
    """What QAIRT's importer may replace in mode adapter_only."""
    return ".lora_" in name or any(name == f"{module}.mul" for module in (Q, OUT, DOWN))


@pytest.mark.parametrize("case", CASES)
def test_a_use_case_runs_with_the_bases_encodings_outside_its_branches(
    case: str, copied: Path, simulations: AdapterSimulations
) -> None:
    """As an importer in mode adapter_only loads it: nothing is clipped."""
    expected = open_qairt(copied, case).logits(IDS[:1])
    path = copied / f"{case}.encodings"
    merged, base = (json.loads(file.read_text()) for file in (path, copied / "base.encodings"))
    for section in ("activation_encodings", "param_encodings"):
        own = {entry["name"]: entry for entry in merged[section]}
        merged[section] = [
            own[entry["name"]] if is_of_branch(entry["name"]) else entry for entry in base[section]
        ]
    path.write_text(json.dumps(merged))
    assert torch.equal(open_qairt(copied, case).logits(IDS[:1]), expected)
    low, high = grid_range(base["activation_encodings"], f"{Q}.add")
    values = simulations[peft_names(CASES)[case]].values(BATCH)[f"{Q}.add"]
    assert low <= float(values.min())
    assert float(values.max()) <= high


def grid_range(entries: list[dict[str, Any]], name: str) -> tuple[float, float]:
    (entry,) = (e for e in entries if e["name"] == name)
    scale, offset = entry["scale"][0], entry["offset"][0]
    return offset * scale * 1.0001, (offset + 2 ** entry["bw"] - 1) * scale * 1.0001


def edit_weights(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return edit


def rename_case(name: str) -> Callable[[Path], object]:
    """Give use case B another name in the list of adapters."""

    def edit(folder: Path) -> None:
        path = folder / "lora_adaptor_list.yaml"
        path.write_text(path.read_text().replace("name: B\n", f"name: {name}\n"))

    return edit


def rename(weights: dict[str, Any]) -> None:
    weights["other"] = weights.pop(f"{Q}.lora_A.weight")


def shrink(weights: dict[str, Any]) -> None:
    weights[f"{Q}.lora_A.weight"] = weights[f"{Q}.lora_A.weight"][:, :4].copy()


def move(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        (entry,) = (e for e in document["activation_encodings"] if e["name"] == name)
        entry["offset"] = [entry["offset"][0] + 1]

    return edit


def test_a_folder_is_checked_once_and_one_model_at_a_time(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[FloatOnnxModel] = weakref.WeakSet()
    most, checked = 0, FloatOnnxModel.check

    def check(model: FloatOnnxModel) -> None:
        nonlocal most
        gc.collect()
        alive.add(model)
        checked(model)
        most = max(most, sum("_initializers" in vars(model) for model in alive))
        calls.append(model.encodings.name)

    calls: list[str] = []
    monkeypatch.setattr(FloatOnnxModel, "check", check)
    for case in CASES:
        open_qairt(copied, case)
    expected = ["base", *CASES]
    assert calls == [f"{name}.encodings" for name in expected]
    assert most == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_bit("B.safetensors"), r"B\.safetensors: .*not on the grid"),
        (flip_bit("model.data"), r"model\.onnx: .*not on the grid"),
        (lambda f: (f / "A+B.encodings").unlink(), r"A\+B\.encodings is missing"),
        (lambda f: (f / "model.data").unlink(), r"model\.data is missing"),
        (swap("A.encodings", "B.encodings"), r"A\.safetensors: .*not on the grid.*A\.encodings"),
        (swap("A.safetensors", "B.safetensors"), r"A\.safetensors: .*not on the grid"),
        (edit_weights("A.safetensors", rename), r"A\.safetensors: .*other.* only there"),
        (edit_weights("A.safetensors", shrink), r"A\.safetensors: .*\[64, 4\].*\[64, 5\].*rank"),
        (
            edit_json("B.encodings", lambda d: d["activation_encodings"].pop()),
            r"B\.encodings: .* only there or only in base\.encodings",
        ),
        (
            edit_json("B.encodings", lambda d: d["param_encodings"][0].update(name="x")),
            r"B\.encodings: .*x.*not the name of a tensor",
        ),
        (
            edit_json("B.encodings", move("model.norm.mul")),
            r"B\.encodings: the entry of model\.norm\.mul",
        ),
        (
            edit_json("A.encodings", move(f"{OUT}.add")),
            r"A\.encodings: the entry of .*o_proj\.add differs from base\.encodings",
        ),
        (edit_json("B.encodings", lambda d: d.pop("version")), r"B\.encodings: .*version"),
        (
            lambda f: (f / "lora_weight_list.txt").write_text("x\n"),
            r"lora_weight_list\.txt: x is not an initializer",
        ),
        (
            lambda f: (f / "lora_config.yaml").write_text(
                (f / "lora_config.yaml").read_text().replace(": B.safetensors", ": A.safetensors")
            ),
            r"lora_config\.yaml: lora_weights of B is A\.safetensors",
        ),
        (rename_case("../B"), r"lora_adaptor_list\.yaml: '\.\./B' is not the name of a use case"),
        (rename_case("[]"), r"lora_adaptor_list\.yaml: \[\] is not the name of a use case"),
        (rename_case("{"), r"lora_adaptor_list\.yaml is no YAML"),
        (rename_case("C"), r"lora_config\.yaml: use cases are not A, C, A\+B, none"),
        (
            lambda f: (f / "lora_config.yaml").write_text("use_case: 3"),
            r"lora_config\.yaml: use cases are not A, B, A\+B, none",
        ),
    ],
    ids=[
        "bit-of-lora",
        "bit-of-base",
        "encodings-dropped",
        "data-dropped",
        "encodings-swapped",
        "weights-swapped",
        "tensor-renamed",
        "rank-changed",
        "entry-dropped",
        "entry-renamed",
        "base-entry-changed",
        "sum-entry-changed",
        "version-dropped",
        "list-changed",
        "config-changed",
        *("name-leads-out", "name-is-a-list", "no-yaml", "name-changed", "no-use-cases"),
    ],
)
def test_damaged_files_are_refused_by_name(
    damage: Callable[[Path], None], said: str, copied: Path
) -> None:
    open_qairt(copied, "A")  # unchanged files are not checked again
    damage(copied)
    with pytest.raises(VerificationError, match=f"(?s){said}"):
        open_qairt(copied, "A")


def test_the_readme_is_replaced_unless_the_user_keeps_it(folder: Path) -> None:
    assert CARD_MARK in (folder / "README.md").read_text().splitlines()[-1]
