"""A stage is current only if everything that it read is there and unchanged, all the way up."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import flip_bit
from pipeline.conftest import FakeJob
from qwlora.errors import DirectoryError, VerificationError
from qwlora.pipeline.commands.manage_adapters import add_adapter
from qwlora.pipeline.commands.open_job import JobModels, ModelName, open_job
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.plan import JobTexts, make_plan
from qwlora.pipeline.plan.stale_stages import dependents
from qwlora.pipeline.running import run_job
from qwlora.recipe import load_recipe

ALL = [
    "evaluate/float",
    "quantize",
    "evaluate/base",
    "train/first",
    "calibrate/_base",
    "export/onnx",
    "evaluate/adapted/first",
    "calibrate/first",
    "evaluate/simulated/first",
    "export/onnx/first",
    "verify/onnx/first",
    "verify/onnx",
]


def damage(path: Path) -> None:
    """Remove a folder, empty JSON, and flip a bit of anything else."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.suffix == ".json":
        path.write_text("")
    else:
        flip_bit(path)


EXPORTED = ["calibrate/first", "export/onnx/first"]
DAMAGES = {  # what is said, and the stages that are needed, by what is damaged
    "export": ("export/onnx/base/ is missing", ["export/onnx", "export/onnx/first"]),
    "export/onnx/first/part/settings.json": ("PATH has changed", EXPORTED[1:]),
    "export/onnx/first/weights.bin": ("PATH has changed", EXPORTED[1:]),
    "simulation/first/weights.bin": ("PATH has changed", EXPORTED),
    "adapters": ("adapters/first/ is missing", ["train/first", *EXPORTED]),
    "base": ("base/ is missing", ["quantize", *ALL[3:6], *EXPORTED]),
}


@pytest.mark.parametrize("path", DAMAGES)
def test_verify_names_what_is_missing_or_changed_and_run_repairs(job: FakeJob, path: str) -> None:
    found, needed = DAMAGES[path]
    found = found.replace("PATH", path)
    job.run()
    damage(job.out / path)
    before = (job.out / "results.json").read_bytes()
    with pytest.raises(DirectoryError) as caught:
        job.run("verify")
    message = str(caught.value)
    assert message.startswith(f"verify needs {', '.join(needed)}, missing or out of date")
    assert f"  {needed[0]}: {found}" in message
    verbs = dict.fromkeys(name.partition("/")[0] for name in needed)
    assert message.endswith(" && ".join(f"qwlora {verb} --out {job.out}" for verb in verbs))
    assert not job.ran
    assert (job.out / "results.json").read_bytes() == before
    job.run()
    assert job.ran == [needed[0], *after(job, needed[0])]
    assert f"{needed[0]} ... ({found}" in " ".join(job.said)
    job.run()
    assert not job.ran


def after(job: FakeJob, stage: str) -> list[str]:
    """The stages that depend on one, in their order."""
    recipe = load_recipe(job.recipe)
    found = dependents(make_plan(recipe, JobTexts(recipe)), stage)
    return [name for name in ALL if name in found]


WEIGHTS_ONLY = [  # files that hold no activations need no calibration and no simulation
    "evaluate/float",
    "quantize",
    "evaluate/base",
    "export/hf",
    "export/mlx",
    "train/first",
    "evaluate/adapted/first",
    *(f"{verb}/{name}/first" for name in ("hf", "mlx") for verb in ("export", "verify")),
]


def test_only_what_a_target_needs_runs(job: FakeJob) -> None:
    job.run(changes=["export.targets=[hf, mlx]", "simulation.base_activations=adapter_only"])
    assert job.ran == WEIGHTS_ONLY
    job.run("calibrate", changes=["export.targets=[hf, mlx]"])
    assert job.said[0].startswith("calibrate: nothing to do")
    with pytest.raises(DirectoryError, match=r"no simulations: no target .*\(hf, mlx\) holds"):
        JobModels(job.out).check(ModelName("simulated", "first"))
    job.run(changes=["export.targets=[hf, onnx]"])
    assert job.ran == [name for name in ALL if name not in WEIGHTS_ONLY]
    job.run(changes=["export.targets=[]"])
    assert not job.ran


def test_a_target_that_comes_back_is_current(job: FakeJob) -> None:
    job.run()
    job.run(changes=["export.targets=[hf]"])
    job.run()
    assert not job.ran
    # not if what it read was made again meanwhile, or its files changed
    job.run(changes=["export.targets=[hf]"])
    damage(job.out / "adapters")
    job.run(changes=["export.targets=[hf]"])
    job.run()
    assert job.ran == ["calibrate/_base", *ALL[5:6], *ALL[7:]]
    job.run(changes=["export.targets=[hf]"])
    damage(job.out / "export/onnx/first/weights.bin")
    job.run(changes=["export.targets=[hf]"])
    job.run()
    assert job.ran == ["export/onnx/first", "verify/onnx/first"]


CHANGES = {
    "workflow=qwa-lora": ("simulation.activation_bitwidth=8", "activation_bitwidth: 16, now 8"),
    "base.bits=5": ("export.targets=[onnx, gguf]", r"export.targets: \['onnx'\], now"),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_change_elsewhere_that_adapters_depend_on_is_named(job: FakeJob, setting: str) -> None:
    change, named = CHANGES[setting]
    job.run(changes=[setting])
    with pytest.raises(DirectoryError, match=f"(?s)trained differently, first.*{named}"):
        job.run(changes=[setting, change])


def test_evaluate_without_base_and_adapters_is_refused(job: FakeJob) -> None:
    job.run()
    shutil.rmtree(job.out / "base")
    shutil.rmtree(job.out / "adapters")
    reasons = r"(?s)evaluate needs quantize, train/first, calibrate/first, missing"
    reasons += r".*  quantize: base/ is missing\n  train/first: adapters/first/ is missing\n"
    reasons += r"  calibrate/first: reads train/first\n"
    with pytest.raises(DirectoryError, match=reasons):
        job.run("evaluate")


def test_verify_always_runs_when_asked_for_and_a_full_run_skips_it(job: FakeJob) -> None:
    job.run()
    job.run()
    assert not job.ran
    job.run("verify")
    assert job.ran == ["verify/onnx/first", "verify/onnx"]
    job.run("evaluate")
    assert not job.ran


def test_a_proof_that_fails_leaves_no_earlier_proof(job: FakeJob) -> None:
    assert "verify/onnx/first" in job.run()

    def fail(stage: str) -> None:
        if stage != "verify/onnx/first":
            return
        problems = ["too far"]
        measured = {"first": {"passed": False, "problems": problems}}
        raise VerificationError("files", problems, {"parity": {"onnx": measured}})

    job.on_stage = fail
    with pytest.raises(VerificationError) as raised:
        job.run("verify")
    results = json.loads((job.out / "results.json").read_text())
    assert raised.value.results == results
    assert results["parity"]["onnx"]["first"]["problems"] == ["too far"]
    assert "verify/onnx/first" not in results
    assert "export/onnx/first" in results
    job.on_stage = lambda name: None
    job.run()
    assert job.ran == ["verify/onnx/first"]


def test_results_hold_only_what_is_current(job: FakeJob) -> None:
    job.run()
    flip_bit(job.out / "simulation" / "first" / "weights.bin")
    results = job.run("quantize")
    assert set(results) == {"format", "recipe", "stages", "sizes", "run", *ALL[:7], ALL[-1]}


@pytest.mark.parametrize("path", ["base/weights.bin", "adapters/first/weights.bin"])
def test_verbs_that_read_a_job_refuse_files_that_it_did_not_make(job: FakeJob, path: str) -> None:
    job.run()
    flip_bit(job.out / path)
    with pytest.raises(DirectoryError, match=re.escape(f"{path} has changed")):
        open_job(job.out)


DAMAGED = {
    "no text": lambda text: b"\xff\x00" * 500,
    "cut off": lambda text: text[: len(text) // 2],
    "a digit of a measurement": lambda text: text.replace(b'"measured": 1', b'"measured": 7'),
}


@pytest.mark.parametrize(
    ("what", "stage"), zip(DAMAGED, ("quantize", "evaluate/base", "verify/onnx"), strict=True)
)
def test_a_damaged_record_makes_its_stage_run_again(job: FakeJob, what: str, stage: str) -> None:
    job.run()
    file = job.out / ".qwlora" / "records" / f"{stage}.json"
    file.write_bytes(DAMAGED[what](file.read_bytes()))
    results = job.run()
    assert job.ran == [stage, *after(job, stage)]
    assert results[stage] == {"measured": 1}
    job.run()
    assert not job.ran


@pytest.fixture
def read_only(job: FakeJob, mounted: Callable[[str], Path]) -> Any:
    """Runs the job on a disk, which is read-only from then on."""
    disk = mounted("size=10m")
    job.out = disk / "out"
    job.run()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return job


def test_a_current_job_in_a_read_only_folder_can_be_read(read_only: FakeJob) -> None:
    results = json.loads((read_only.out / "results.json").read_text())
    for verbs in ((), ("evaluate",), ("quantize",)):
        assert read_only.run(*verbs) == results
        assert not read_only.ran
    for verbs in (("verify",), ("evaluate", "verify")):
        with pytest.raises(DirectoryError, match="is not writable, but verify/onnx/first must run"):
            read_only.run(*verbs)
    with pytest.raises(DirectoryError, match=r"not writable, but evaluate/float .*inputs changed"):
        read_only.run(changes=("seed=7",), replace=True)
    assert not read_only.ran


NO_READING = """
import sys
from qwlora.pipeline.job import digests
def refuse(self, file, path, size): raise AssertionError(path)
digests.Digests._hash = refuse
from qwlora.cli.main import main
try: main()
finally: assert 'torch' not in sys.modules
"""


def test_skipping_reads_nothing_imports_no_torch(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwlora.pipeline.job.digests.SETTLED_NS", -(10**18))
    job.run()
    job.run()
    command = [sys.executable, "-c", NO_READING]
    command += ["run", str(job.recipe), "--out", str(job.out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= set(ALL)


def test_work_of_a_stage_that_was_done_is_gone(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def keep(folder: Directory, stage: str, key: str | None = None) -> None:
        raise KeyboardInterrupt

    def place(folder: Directory, stage: str, key: str) -> Path:
        places.append(real(folder, stage, key))
        places[-1].mkdir(parents=True)
        return places[-1]

    real = Directory.work
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "drop_work", keep)
        patched.setattr(Directory, "work", place)
        with pytest.raises(KeyboardInterrupt):
            job.run("quantize")
    (work,) = places
    other = work.with_name(f"quantize-{'0' * 16}")
    other.mkdir()
    assert work.exists()
    job.run("quantize")
    assert job.ran == []
    assert not work.exists()
    assert other.exists()


def test_a_recipe_changed_meanwhile_stops_a_run(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.run()
    recipe, start = job.out / "recipe.yaml", run_job.new_context

    def meanwhile(*arguments: Any) -> Any:
        add_adapter(job.out, "second")
        return start(*arguments)

    monkeypatch.setattr(run_job, "new_context", meanwhile)
    with pytest.raises(DirectoryError, match="changed meanwhile; run again"):
        run_job.run_file(recipe, job.out, ("seed=1",), replace=True)
    assert [adapter.name for adapter in load_recipe(recipe).adapters] == ["first", "second"]
