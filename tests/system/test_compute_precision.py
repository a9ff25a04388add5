"""What `compute: auto` stands for, and the warning where bfloat16 is emulated."""

from __future__ import annotations

import copy
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import tiny_model
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.pipeline.running.run_job import run
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.tune_scales import TuningSettings, tune_
from qwlora.recipe import Recipe, load_recipe
from qwlora.system import machine
from qwlora.system.machine import (
    SlowComputeWarning,
    auto_compute,
    has_bfloat16,
    training_device,
)

X86 = "processor\t: 0\nflags\t\t: fpu sse avx2 avx512f{}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd{} sve\nCPU part\t: 0xd40\n"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found out about this machine, before and after."""
    cached = (has_bfloat16, training_device, machine._nvidia_major)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda: has)
    monkeypatch.setattr("qwlora.pipeline.plan.plan.training_device", lambda: "cpu")
    monkeypatch.setattr("qwlora.pipeline.plan.preflight.training_device", lambda: "cpu")
    machine.has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (X86.format(""), "float32"),
        (X86.format(" avx512_bf16"), "bfloat16"),
        (X86.format(" amx_bf16 amx_tile"), "bfloat16"),
        (ARM.format(""), "float32"),
        (ARM.format(" bf16"), "bfloat16"),
        (ARM.format(" ebf16x"), "float32"),
    ],
)
def test_auto_follows_the_instructions_of_the_processor(
    cpuinfo: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: cpuinfo)
    assert auto_compute("cpu") == expected


def test_the_processor_is_judged_as_torch_judges_it() -> None:
    found = torch.cpu.get_capabilities()
    assert has_bfloat16("cpu") == bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class Driver:
    """NVIDIA's, with GPUs of one compute capability."""

    def __init__(self, count: int, major: int):
        self.count, self.major = count, major

    def cuInit(self, flags: int) -> int:  # noqa: N802 (the driver's names)
        return 0 if self.count else 100

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.major if which == 75 else -1
        return 0


@pytest.mark.parametrize(
    ("library", "count", "major", "device", "expected"),
    [
        ("torch_cuda", 1, 9, "cuda", True),
        ("torch_cuda", 2, 8, "cuda", True),
        ("torch_cuda", 1, 7, "cuda", False),
        ("torch_cuda", 0, 9, "cpu", None),
        ("torch_cpu", 1, 9, "cpu", None),
    ],
)
def test_an_nvidia_gpu_is_asked_through_its_driver(
    library: str,
    count: int,
    major: int,
    device: str,
    expected: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(count, major))
    monkeypatch.setattr(machine, "_has_library", lambda name: name == library)
    monkeypatch.setattr(sys, "platform", "linux")
    assert training_device() == device
    if expected is not None:
        assert has_bfloat16("cuda") is expected


def keys(recipe: Recipe) -> dict[str, str]:
    resolved = resolve_compute(recipe)
    return {stage.name: stage.key for stage in make_plan(resolved, JobTexts(resolved))}


def precisions(recipe: Recipe) -> tuple[str, ...]:
    resolved = resolve_compute(recipe)
    return resolved.base.tuning.compute, *(adapter.compute for adapter in resolved.adapters)


ASKED = ("base.tuning.compute={0}", "adapters.0.compute={0}")


@pytest.mark.parametrize("has", [False, True])
def test_a_key_holds_what_auto_stands_for(
    has: bool, recipe_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, has)
    path = recipe_for()
    tuned = "base.tuning.steps=4"
    auto, single, half = (
        keys(load_recipe(path, (tuned, *(change.format(asked) for change in ASKED))))
        for asked in ("auto", "float32", "bfloat16")
    )
    assert keys(load_recipe(path, (tuned,))) == auto == (half if has else single)
    for stage in ("quantize", "train/first"):
        assert single[stage] != half[stage]


def test_auto_is_float32_where_nothing_else_computes(
    recipe_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, True)
    adapters = [
        {"name": "first", "steps": 6},
        {"name": "same", "continue_from": "first", "steps": 0},
        {"name": "asked", "steps": 6, "compute": "float32"},
    ]
    path = recipe_for(adapters=adapters)
    assert precisions(load_recipe(path)) == ("auto", "bfloat16", "float32", "float32")
    through = load_recipe(path, ("workflow=qwa-lora", "adapters=[{name: first}]"))
    assert precisions(through) == ("auto", "float32")


def test_a_forced_slow_precision_is_said(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwlora.pipeline.stages.RUN",
        {verb: lambda *_: {} for verb in ("quantize", "train")},
    )

    def said(*changes: str) -> list[str]:
        lines: list[str] = []
        run(
            load_recipe(recipe_for(), ("base.tuning.steps=2", *changes)),
            tmp_path / "out",
            ("quantize", "train"),
            say=lines.append,
            replace=True,
        )
        return [line for line in lines if "bfloat16" in line]

    pretend(monkeypatch, False)
    assert said("base.solver=rtn") == []
    warned = said(*(change.format("bfloat16") for change in ASKED))
    assert [line.split(": ")[:2] for line in warned] == [
        ["warning", "base.tuning"],
        ["warning", "adapter first"],
    ]
    assert all("several times" in line and "float32" in line for line in warned)
    pretend(monkeypatch, True)
    assert said(*(change.format("bfloat16") for change in ASKED), "seed=1") == []


def test_a_directory_keeps_the_precision_it_was_made_with(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, True)
    run(load_recipe(recipe_for()), tmp_path / "out", ("quantize", "train"))
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["adapters"][0]["compute"] == "bfloat16"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["train"]["first"]["compute"] == "bfloat16"


def test_tuning_in_python_resolves_auto_and_warns_when_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = tiny_model("llama")
    solved = copy.deepcopy(reference)
    quantize_(solved, "w3-block32")
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))

    def tuned(asked: str) -> float:
        settings = TuningSettings(steps=3, learning_rate=1e-2, compute=asked)
        return tune_(copy.deepcopy(solved), reference, ids, settings).after

    pretend(monkeypatch, True)
    half = tuned("bfloat16")
    assert tuned("auto") == half
    pretend(monkeypatch, False)
    single = tuned("float32")
    assert tuned("auto") == single != half
    with pytest.warns(SlowComputeWarning, match="several times"):
        assert tuned("bfloat16") == half


def test_deciding_imports_no_torch() -> None:
    script = (
        "import sys\n"
        "from qwlora.system.machine import auto_compute, training_device\n"
        "auto_compute('cpu'), training_device()\n"
        "assert 'torch' not in sys.modules\n"
    )
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-c", script], check=True)
