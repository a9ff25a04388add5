"""A stage is current only if everything that it read is there and unchanged, all the way up."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import flip_bit
from pipeline.conftest import FakeJob
from qwlora.errors import DirectoryError, SourceError, VerificationError
from qwlora.pipeline import run as run_module
from qwlora.pipeline.commands.manage_adapters import add_adapter
from qwlora.pipeline.commands.open_job import JobModels, ModelName, open_job
from qwlora.pipeline.store import Store
from qwlora.recipe import load_recipe
from qwlora.targets.target import Target

STAGES = """
evaluate/float quantize evaluate/base train/first calibrate/_base export/onnx evaluate/adapted/first
calibrate/first evaluate/simulated/first export/onnx/first verify/onnx/first verify/onnx
"""
ALL = STAGES.split()


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
    "export": ("has not run", ["export/onnx", "export/onnx/first"]),
    "export/onnx/first/part/settings.json": ("PATH has changed", EXPORTED[1:]),
    "export/onnx/first/weights.bin": ("PATH has changed", EXPORTED[1:]),
    "export/onnx/first/stage.json": ("export/onnx/first: its record is damaged", EXPORTED[1:]),
    "simulation/first/weights.bin": ("PATH has changed", EXPORTED),
    "adapters": ("has not run", ["train/first", *EXPORTED]),
    "base": ("has not run", ["quantize", *ALL[3:6], *EXPORTED]),
}


@pytest.mark.parametrize("path", DAMAGES)
def test_verify_names_what_is_missing_or_changed_and_run_repairs(job: FakeJob, path: str) -> None:
    """What is made again has the same bytes here, so nothing that read it runs again."""
    problem, needed = DAMAGES[path]
    job.run()
    damage(job.out / path)
    before = (job.out / "results.json").read_bytes()
    with pytest.raises(DirectoryError) as caught:
        job.run("verify")
    message = str(caught.value)
    assert message.startswith(f"verify needs {', '.join(needed)}, missing or out of date")
    assert f"  {needed[0]}: {problem.replace('PATH', path)}" in message
    verbs = dict.fromkeys(name.partition("/")[0] for name in needed)
    assert message.endswith(" && ".join(f"qwlora {verb} {job.out}" for verb in verbs))
    assert not job.ran
    assert (job.out / "results.json").read_bytes() == before
    job.run()
    lost = [name for name in ALL if name.startswith(f"{path}/") or name.startswith("verify/onnx/")]
    assert job.ran == (lost if path == "export" else needed[:1])
    job.run()
    assert not job.ran


def test_what_reads_other_bytes_runs_again(job: FakeJob) -> None:
    job.run()
    damage(job.out / "simulation" / "first" / "weights.bin")
    job.written = b"others"
    job.run()
    assert job.ran == ["calibrate/first", "evaluate/simulated/first", *EXPORTED[1:], ALL[10]]
    reason = "calibrate/first has changed"
    assert f"export/onnx/first ... ({reason})" in job.said
    damage(job.out / "base" / "weights.bin")
    with pytest.raises(DirectoryError, match=r"(?s)train first again, .*:\n  quantize has changed"):
        job.run()
    assert job.ran == ["quantize", "evaluate/base"]


def test_only_what_a_target_needs_runs(job: FakeJob) -> None:
    job.run(changes=["export.targets=[hf, mlx]", "simulation.base_activations=adapter_only"])
    # files that hold no activations need no calibration and no simulation
    ran = [*job.ran]
    assert {"export/hf", "verify/mlx/first", "evaluate/adapted/first"} < {*ran}
    assert not [name for name in ran if "calibrate" in name or "simulated" in name]
    job.run("calibrate", changes=["export.targets=[hf, mlx]"])
    assert job.said[0].startswith("calibrate: nothing to do")
    with pytest.raises(DirectoryError, match=r"no simulations, because no target .* has hf, mlx\."):
        JobModels(job.out).check(ModelName("simulated", "first"))
    job.run(changes=["export.targets=[hf, onnx]"])
    assert job.ran == [name for name in ALL if name not in ran]
    job.run(changes=["export.targets=[]"])
    assert not job.ran


def test_a_target_that_comes_back_is_current_unless_its_files_changed(job: FakeJob) -> None:
    for ran in (ALL, []):
        job.run()
        assert job.ran == ran
        job.run(changes=["export.targets=[hf]"])
    damage(job.out / "export/onnx/first/weights.bin")
    job.run()
    assert job.ran == ["export/onnx/first"]


CHANGES = {
    "workflow=qwa-lora": ("simulation.activation_bitwidth=8", "activation_bitwidth: 16 -> 8"),
    "base.bits=5": ("export.targets=[onnx, gguf]", r"export.targets \(schemes .*\): \["),
    "name=tiny": ("adapters.0.steps=3", "first.steps: 6 -> 3"),
    "seed=0": ("workflow=qwa-lora", "workflow: qw-lora -> qwa-lora\n  q.* is new"),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_an_adapter_that_is_trained_differently_is_replaced_only_on_request(job, setting) -> None:
    change, named = CHANGES[setting]
    job.run(changes=[setting])
    again = rf"(?s)train first again, because .*:.*{named}.*, add --replace first to the command"
    for replace, message in (((), again), (("third",), "--replace third: the recipe has first")):
        with pytest.raises(DirectoryError, match=message):
            job.run(changes=[setting, change], replace=replace)
        assert not job.ran
    job.run(changes=[setting, change], replace=["first"])
    assert "train/first" in job.ran


def test_verbs_run_what_they_can_and_verify_always_runs(job: FakeJob) -> None:
    job.run("quantize", "train", "evaluate")
    assert "evaluate/simulated/first: left out, calibrate/first has not run" in job.said
    known = [name for name in ALL if name in job.ran]
    assert "evaluate/adapted/first" in known  # before it is calibrated
    rest = [name for name in ALL if name not in known]
    for verbs, ran in (((), rest), ((), []), (("verify",), ALL[10:]), (("evaluate",), [])):
        job.run(*verbs)
        assert job.ran == ran


def test_a_check_that_fails_stops_no_other_and_is_repeated(job: FakeJob) -> None:
    measured = {"*": {"passed": False, "problems": ["too far"]}}
    error = VerificationError("files", ["too far"], {"parity": {"onnx": measured}})
    job.errors["verify/onnx/first"] = error
    for _ in range(2):
        with pytest.raises(VerificationError) as raised:
            job.run()
        results = json.loads((job.out / "results.json").read_text())
        assert raised.value.results == results
        assert results["parity"]["onnx"]["first"]["problems"] == ["too far"]
        assert results["run"]["state"] == "failed"
        assert "verify/onnx" in results
    assert job.ran == ["verify/onnx/first"]
    assert "verify/onnx/first ... (its check failed)" in job.said
    job.errors.clear()
    assert "parity" not in job.run()
    assert job.ran == ["verify/onnx/first"]


def test_a_runtime_that_is_missing_replaces_no_proof(job, monkeypatch) -> None:
    job.run()
    with monkeypatch.context() as patched:
        patched.setattr(Target, "missing", lambda *arguments: "no runtime")
        job.run("verify")
        said = "verify/onnx/first: not run here (no runtime); its existing proof is kept"
        assert said in job.said
        assert "verify/onnx/first" not in job.ran
        damage(job.out / "export/onnx/first/weights.bin")
        job.written = b"others"  # which nothing has proven
        job.run()
        assert job.ran == ["export/onnx/first", "verify/onnx/first"]
        job.run()
        assert not job.ran
    job.run()
    assert job.ran == ["verify/onnx/first"]
    assert "verify/onnx/first ... (was not run yet (no runtime))" in job.said


def test_verbs_that_read_a_job_refuse_files_that_it_did_not_make(job: FakeJob) -> None:
    job.run()
    for path in ("base/weights.bin", "adapters/first/weights.bin"):
        flip_bit(job.out / path)
        with pytest.raises(DirectoryError, match=re.escape(f"{path} has changed")):
            open_job(job.out)
        flip_bit(job.out / path)  # back


def test_a_current_job_in_a_read_only_folder_can_be_read(job, mounted) -> None:
    disk = mounted("size=10m")
    job.out = disk / "out"
    results = job.run()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for verbs in ((), ("evaluate",), ("quantize",)):
        assert job.run(*verbs) == results
        assert not job.ran
    with pytest.raises(DirectoryError, match="is not writable, but verify/onnx/first must run"):
        job.run("evaluate", "verify")
    with pytest.raises(DirectoryError, match=r"not writable, but evaluate/float .*data.source"):
        job.run(changes=["seed=7"], replace=["first"])
    assert not job.ran


NO_READING = """
import sys
from qwlora.system.seen import Seen
def refuse(self, file, path, size): raise AssertionError(path)
Seen._hash = refuse
from qwlora.cli.main import main
try: main()
finally: assert 'torch' not in sys.modules
"""


def test_skipping_reads_nothing_imports_no_torch(job, monkeypatch) -> None:
    monkeypatch.setattr("qwlora.system.seen.SETTLED_NS", -(10**18))
    job.run()
    job.run()
    command = [sys.executable, "-c", NO_READING, "run", str(job.out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= set(ALL)


def test_a_stage_that_must_run_names_the_source_that_is_gone(job: FakeJob, tmp_path: Path) -> None:
    text = Path(shutil.copytree(load_recipe(job.recipe).data.source, tmp_path / "text"))
    job.run(changes=[f"data.source={text}"])
    shutil.rmtree(text)
    job.recipe = job.out / "recipe.yaml"
    job.run()
    assert not job.ran
    assert sum(str(text) in line for line in job.said) == 1
    damage(job.out / "simulation")
    with pytest.raises(SourceError, match=re.escape(str(text))):
        job.run()
    assert not job.ran


def test_unfinished_work_is_of_one_key_and_goes_when_it_is_done(job, monkeypatch) -> None:
    works: list[Path] = []

    def stage(context: Any, stage: Any, scratch: Path, work: Path) -> dict[str, Any]:
        works.append(work)
        work.mkdir(parents=True, exist_ok=True)
        (work / "half").touch()
        if len(works) <= 3:
            raise KeyboardInterrupt
        return job.stage(context, stage, scratch, work)

    monkeypatch.setattr("qwlora.pipeline.run.run_stage", stage)
    for change in ("base.solver=rtn", "base.solver=sqnr", "base.solver=rtn"):
        with pytest.raises(KeyboardInterrupt):
            job.run("quantize", changes=[change])
    assert works[0] == works[2] != works[1]
    job.run("quantize", changes=["base.solver=rtn"])
    assert [work.is_dir() for work in works[:2]] == [False, True]
    works[0].mkdir()  # a kill after the stage was finished
    job.run("quantize", changes=["base.solver=rtn"])
    assert not works[0].exists()


def test_a_recipe_changed_meanwhile_stops_a_run(job, monkeypatch) -> None:
    job.run()
    job.recipe, locked = job.out / "recipe.yaml", Store.locked

    def meanwhile(store: Store) -> Any:
        monkeypatch.undo()
        add_adapter(job.out, "second")
        return locked(store)

    monkeypatch.setattr(Store, "locked", meanwhile)
    with pytest.raises(DirectoryError, match="changed meanwhile; run again"):
        run_module.run(job.recipe, job.out, changes=("seed=1",), replace=["first"])
    assert [adapter.name for adapter in load_recipe(job.recipe).adapters] == ["first", "second"]
