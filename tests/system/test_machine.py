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
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.tune_scales import TuningSettings, tune_
from qwlora.recipe import load_recipe
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
    monkeypatch.setattr(machine, "has_bfloat16", machine.has_bfloat16.__wrapped__)
    assert auto_compute("cpu") == ("bfloat16" if feature else "float32")


ASKED = ("base.tuning.compute={0}", "adapters.0.compute={0}")


def test_auto_is_float32_where_it_must(recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def precisions(*changes: str) -> list[str]:
        resolved = resolve_compute(load_recipe(path, changes))
        return [resolved.base.tuning.compute, *(adapter.compute for adapter in resolved.adapters)]

    pretend(monkeypatch, True)
    adapters = [
        {"name": "first", "steps": 6},
        {"name": "same", "continue_from": "first", "steps": 0},
        {"name": "asked", "steps": 6, "compute": "float32"},
    ]
    path = recipe_for(adapters=adapters)
    assert precisions() == ["auto", "bfloat16", "float32", "float32"]
    assert precisions("workflow=qwa-lora", "adapters=[{name: first}]") == ["auto", "float32"]


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
    pretend(monkeypatch, True)
    assert said(*(change.format("bfloat16") for change in ASKED), "seed=1") == []


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


VERSION_1 = "4:memory:/a\n3:cpuset:/b\n1:cpu,cpuacct:/job\n0::/"
CPU = "cpu/job/cpu.cfs"


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/job/step", {}, 4),
        ("0::/job/step", {"job/step/cpu.max": "150000 100000"}, 2),
        ("0::/job/step", {"job/cpu.max": "50000 100000"}, 1),  # of the group around it
        ("0::/outside/the/container", {"cpu.max": "300000 100000"}, 3),
        ("0::/job/step", {"job/step/cpu.max": "max 100000"}, 4),
        ("0::/job/step", {"job/step/cpu.max": "unreadable"}, 4),
        ("0::/job/step", {"job/step/cpu.max": "6400000 100000"}, 4),
        (VERSION_1, {f"{CPU}_quota_us": "250000", f"{CPU}_period_us": "100000"}, 3),
        (VERSION_1, {f"{CPU}_quota_us": "-1", f"{CPU}_period_us": "100000"}, 4),
    ],
)
def test_threads_of_a_core_count_once_and_quotas_of_cgroups_bound(
    tmp_path, monkeypatch, group, files, cores
) -> None:
    """On a machine with eight hardware threads, two to a core."""
    written = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    written["proc/self/cgroup"] = group
    for cpu in range(8):
        name = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        written[name] = f"{cpu % 4},{cpu % 4 + 4}"
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(tmp_path) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    assert usable_cores(tmp_path) == min(cores, 2)


WAITING = {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(
    ("chosen", "value", "added"),
    [
        ("", "", {**WAITING, "OMP_NUM_THREADS": "4"}),
        ("LOCAL_WORLD_SIZE", "3", {**WAITING, "OMP_NUM_THREADS": "1"}),  # processes share cores
        ("OMP_WAIT_POLICY", "active", {"OMP_NUM_THREADS": "4"}),
        ("GOMP_SPINCOUNT", "7", {"OMP_NUM_THREADS": "4"}),
        ("KMP_BLOCKTIME", "7", {"OMP_NUM_THREADS": "4"}),
        ("OMP_NUM_THREADS", "7", WAITING),
        ("MKL_NUM_THREADS", "7", WAITING),
    ],
)
def test_what_the_user_did_not_set_is_set(monkeypatch, chosen, value, added) -> None:
    monkeypatch.setattr("qwlora.system.machine.usable_cores", lambda: 4)
    environment = {chosen: value}
    configure_threads(environment)
    assert environment == {chosen: value} | added


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
