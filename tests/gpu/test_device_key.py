"""`device` in a recipe and on the command line: which device it is, and what stages do with it."""

import json
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from formats.test_precomputed import Held
from gpu.pretend_device import COUNTS, CPU, NAME
from gpu.test_stages import IDS
from quantize.test_quantize_model import deep, from_files
from qwlora.errors import DeviceError, RecipeError
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.system import machine
from qwlora.system.device import exact_device, memory_of, pick_device


class Watched(Held):
    """Notes which tensors are read while the main thread does something else."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.ahead = set[str]()

    def read(self, name: str) -> Any:
        if current_thread() is not main_thread():
            self.ahead.add(name)
        return super().read(name)


@pytest.fixture
def automatic(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, which `auto` chooses."""
    monkeypatch.setattr(machine, "accelerator", lambda: device.type)
    return device


def test_auto_takes_what_there_is(automatic: torch.device, recipe_for: Any) -> None:
    assert pick_device("auto") == pick_device(f"{automatic.type}:0") == automatic
    assert pick_device("cpu") == CPU
    for key in ("xpu", "mps", "cuda:99"):
        with pytest.raises(DeviceError, match=rf"device: {key} .*--device auto"):
            pick_device(key)
    for key in ("gpu", "cuda:", "cpu:0"):
        with pytest.raises(RecipeError, match="device"):
            load_recipe(recipe_for(), (f"device={key!r}",))
    devices = [torch.device(name) for name in ("cpu", "cuda:1", "mps", "xpu:0")]
    assert [exact_device(device) for device in devices] == [*devices[:2], CPU, CPU], "no float64"


def test_large_models_are_quantized_piece_by_piece(device: torch.device, tmp_path: Path) -> None:
    model = deep()
    whole = sum(p.nbytes for p in model.parameters())
    with memory_of(device, "quantize") as memory:
        from_files(Held(model), tmp_path / "modules", solver="rtn", device=device)
    assert 0 < memory["peak_device_bytes"] < whole / 2
    options = {"solver": "gptq", "calibration": IDS[:1], "device": device}
    folders = [tmp_path / "first", tmp_path / "again"]  # the second reads the blocks in `work`
    read = Watched(model)
    made = [from_files(read, f, work=tmp_path / "work", **options) for f in folders]
    assert made[0] == made[1]
    assert {str(block) for block in range(1, 8)} <= {name.split(".")[2] for name in read.ahead}
    assert json.loads((folders[1] / "base.json").read_text())["device"] == device.type
    COUNTS.limit = COUNTS.allocated + whole // 2
    message = "^train/first: .*out of memory.*batch_sequences.*device: cpu"
    with pytest.raises(DeviceError, match=message), memory_of(device, "train/first"):
        torch.empty(whole if device.type == NAME else 2**44, device=device)


def test_a_job_on_the_device(automatic: torch.device, job_for: Any) -> None:
    adapter = {"name": "first", "rank": 2, "steps": 2, "warmup_steps": 1, "objective": "recovery"}
    job = job_for("one-layer llama", adapters=[adapter])
    here, away = job.run("quantize", changes=["device=cpu"]), job.out.with_name("away")
    there = run(load_recipe(job.recipe), away, ("quantize", "train", "evaluate"))
    assert there["base"]["fingerprint"] == here["base"]["fingerprint"]
    assert (here["base"]["device"], there["base"]["device"]) == ("cpu", automatic.type)
    for part in ("quantize", "train/first", "evaluate/adapted/first"):
        stage = there["stages"][part.partition("/")[0]]["parts"][part]
        assert stage["device"] == automatic.type
        assert stage["peak_device_bytes"] > 10_000
    assert "device" not in here["stages"]["quantize"]["parts"]["quantize"]
    assert f" of {automatic.type}" in (away / "report.html").read_text()
