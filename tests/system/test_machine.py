"""What `compute: auto` stands for and where bfloat16 is emulated; how threads wait and how many there
are; and that what malloc keeps is given back when it is asked."""

from __future__ import annotations

import copy
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.sources import Sources
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.tune_scales import TuningSettings, tune_
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.implied import resolve_compute
from qwlora.system import machine
from qwlora.system.machine import (
    SlowComputeWarning,
    auto_compute,
    configure_threads,
    peak_rss_bytes,
    reset_peak_rss,
    return_freed_memory,
    usable_cores,
)


def pretend(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: has)
    monkeypatch.setattr(machine, "accelerator", lambda: "cpu")


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16", ""])
def test_auto_follows_instructions(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"avx512_f": True, "avx512_bf16": False, feature: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    machine.has_bfloat16.cache_clear()
    expected = "bfloat16" if feature else "float32"
    try:
        assert auto_compute("cpu") == expected
    finally:
        machine.has_bfloat16.cache_clear()


def precisions(recipe: Recipe) -> tuple[str, ...]:
    resolved = resolve_compute(recipe)
    return resolved.base.tuning.compute, *(adapter.compute for adapter in resolved.adapters)


ASKED = ("base.tuning.compute={0}", "adapters.0.compute={0}")


def test_the_plan_keeps_auto(recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(asked: str, has: bool) -> dict[str, Any]:
        pretend(monkeypatch, has)
        changes = ("base.tuning.steps=4", *(change.format(asked) for change in ASKED))
        recipe = load_recipe(recipe_for(), changes)
        return {stage.name: stage.inputs for stage in make_plan(recipe, Sources(recipe))}

    auto, there = (inputs("auto", has) for has in (False, True))
    assert auto == there, "another machine resumes the job"
    single, half = (inputs(asked, True) for asked in ("float32", "bfloat16"))
    for stage in ("quantize", "train/first"):
        assert auto[stage] != single[stage] != half[stage] != auto[stage]


def test_auto_is_float32_where_it_must(recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_forced_slow_precision_is_said(job_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs, job = ("quantize", "train"), job_for()
    monkeypatch.setattr("qwlora.pipeline.run.run_stage", lambda *_: {})

    def said(*changes: str) -> list[str]:
        job.run(*verbs, changes=["base.tuning.steps=2", *changes], replace=["first"])
        return [line for line in job.said if line.startswith("warning: ")]

    pretend(monkeypatch, False)
    assert said("base.solver=rtn") == []
    warned = said(*(change.format("bfloat16") for change in ASKED))
    for line, part in zip(warned, ("base.tuning", "adapter first"), strict=True):
        assert line.startswith(f"warning: {part}: compute bfloat16")
    assert all("several times" in line and "float32" in line for line in warned)
    pretend(monkeypatch, True)
    assert said(*(change.format("bfloat16") for change in ASKED), "seed=1") == []


def test_what_auto_was_is_a_result(job_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, True)
    job = job_for()
    assert job.run("quantize", "train")["train"]["first"]["compute"] == "bfloat16"
    assert load_recipe(job.out / "recipe.yaml").adapters[0].compute == "auto"
    pretend(monkeypatch, False)
    job.run("quantize", "train")
    assert not job.done


def test_tuning_resolves_auto_and_warns_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model("llama")
    solved = copy.deepcopy(reference)
    quantize_(solved, "w3-block32", "rtn")
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


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root folder of a machine with eight hardware threads, two to a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_threads_of_one_core_count_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(root) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    assert usable_cores(root) == 2


@pytest.mark.parametrize(
    ("where", "quota", "cores"),
    [
        ("job/step", "150000 100000", 2),
        ("job", "50000 100000", 1),  # of the group around it
        ("", "300000 100000", 3),
        ("job/step", "max 100000", 4),
        ("job/step", "unreadable", 4),
        ("job/step", "6400000 100000", 4),
    ],
)
def test_quotas_of_cgroup_2_bound_the_cores(root: Path, where: str, quota: str, cores: int) -> None:
    write(root / "proc/self/cgroup", "0::/job/step\n")
    write(root / "sys/fs/cgroup" / where / "cpu.max", f"{quota}\n")
    assert usable_cores(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [(250000, 3), (-1, 4)])
def test_a_quota_of_cgroup_1_bounds_the_cores(root: Path, quota: int, cores: int) -> None:
    write(root / "proc/self/cgroup", "4:memory:/a\n3:cpuset:/b\n1:cpu,cpuacct:/job\n0::/\n")
    folder = root / "sys/fs/cgroup/cpu/job"
    write(folder / "cpu.cfs_quota_us", f"{quota}\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    assert usable_cores(root) == cores


def test_a_group_outside_the_container_is_looked_up_at_the_root(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/host/pod\n")
    write(root / "sys/fs/cgroup/cpu.max", "100000 100000\n")
    assert usable_cores(root) == 1


WAITING = {"OMP_WAIT_POLICY": "passive"}
COUNT = {"OMP_NUM_THREADS": str(usable_cores())}


@pytest.mark.parametrize(
    ("chosen", "added"),
    [
        ("", WAITING | COUNT),
        *((name, COUNT) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")),
        *((name, WAITING) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")),
    ],
)
def test_what_the_user_did_not_set_is_set(chosen: str, added: dict[str, str]) -> None:
    environment = {chosen: "7"}
    configure_threads(environment)
    assert environment == added | {chosen: "7"}


@pytest.mark.parametrize(("processes", "threads"), [("2", "2"), ("3", "1"), ("9", "1")])
def test_processes_share_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str, threads: str
) -> None:
    monkeypatch.setattr("qwlora.system.machine.usable_cores", lambda: 4)
    environment = {"LOCAL_WORLD_SIZE": processes}
    configure_threads(environment)
    assert environment["OMP_NUM_THREADS"] == threads


IMPORT_WATCHED = """
import builtins, os, sys
original = builtins.__import__
def watched(name, *rest):
    if name == 'torch' and 'torch' not in sys.modules:
        print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('OMP_NUM_THREADS'))
        os._exit(0)
    return original(name, *rest)
builtins.__import__ = watched
from qwlora.cli.main import main
sys.argv = ['qwlora', 'inspect', '.']
main()
"""


def test_the_command_line_decides_before_torch_is_imported() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    command = [sys.executable, "-c", IMPORT_WATCHED]
    done = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.split() == ["passive", str(usable_cores())]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is in /proc")


def resident_bytes() -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


@linux_only
def test_holes_between_blocks_are_given_back() -> None:
    blocks = [torch.ones(2**14) for _ in range(1600)]  # 64 KiB each, 105 MB
    kept = blocks[::20]
    del blocks
    before = resident_bytes()
    assert return_freed_memory()
    assert resident_bytes() < before - 70e6
    assert all(float(block.sum()) == 2**14 for block in kept)


@linux_only
def test_the_peak_is_counted_anew() -> None:
    reset_peak_rss()
    before = peak_rss_bytes()
    with mmap.mmap(-1, 2**26) as block:
        for _ in range(64):
            block.write(bytes(2**20))
    assert before + 60e6 < peak_rss_bytes() < before + 90e6
    reset_peak_rss()
    assert peak_rss_bytes() < before + 30e6
