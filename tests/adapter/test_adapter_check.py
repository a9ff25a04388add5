"""`qwlora adapters`: listing and checking."""

import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adapter.small_models import mixture
from attack.hostile_models import edit
from cli.command_line import answered, qwlora, refused
from conftest import reseal, tiny_model, write_recipe
from qwlora import save_adapter
from qwlora.adapter.adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterReport,
    adapter_report,
    base_of,
    find_adapters,
    job_fingerprint,
    problems,
)
from qwlora.errors import SourceError
from qwlora.formats.base_files import FORMAT
from qwlora.pipeline.store import STAGE, STAGES, Record


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job's directory with two adapters of one base."""
    for name, more in (("a", {}), ("b", {"use_dora": True, "rank_pattern": {"q_proj": 3}})):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **more)
        model = get_peft_model(tiny_model("llama"), config)
        save_adapter(model, tmp_path / "adapters" / name)
    (tmp_path / "base").mkdir()
    identity = base_of(tmp_path / "adapters" / "a")
    record = {"format": FORMAT, "fingerprint": identity, "source": "", "layers": {}, "tensors": {}}
    (tmp_path / "base" / "base.json").write_text(json.dumps(record))
    (tmp_path / ".qwlora" / "work").mkdir(parents=True)
    (tmp_path / ".qwlora" / "work" / "adapter_config.json").write_text("{}")
    return tmp_path


def test_report_matches_the_adapters(job: Path) -> None:
    a, b = (adapter_report(folder, job) for folder in find_adapters(job))
    weights = load_file(job / "adapters" / "a" / WEIGHTS)
    count = sum(t.numel() for t in weights.values())
    assert a == AdapterReport("adapters/a", "LoRA", 2, 4, 4, count, job_fingerprint(job))
    assert (b.kind, b.modules) == ("DoRA", 4)
    for name in "ab":
        assert problems(job / "adapters" / name, job_fingerprint(job)) == []


def test_an_unreadable_adapter_or_base_is_named_beside_the_others(job: Path) -> None:
    (job / "adapters" / "a" / WEIGHTS).write_bytes(b"no safetensors")
    listed = qwlora("adapters", "list", job)
    assert listed.returncode == 2
    assert "adapters/b" in listed.stdout
    assert f"adapters/a': {WEIGHTS} cannot be read" in listed.stderr
    listed = qwlora("adapters", "list", job, "--json")
    names = [a["name"] for a in json.loads(listed.stdout)["adapters"]]
    assert (listed.returncode, names) == (2, ["adapters/b"])
    (job / "base" / "base.json").write_text("{}")
    with pytest.raises(SourceError, match="has format None"):
        job_fingerprint(job)
    for folder, message in (("base", "no adapter is in"), ("nowhere", "is not a folder")):
        with pytest.raises(SourceError, match=message):
            find_adapters(job / folder)


def test_adapters_on_fused_experts_pass(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    get_peft_model(mixture(), config).save_pretrained(str(tmp_path))
    assert problems(tmp_path, None) == []
    ends = ["gate_up_proj", "down_proj"]  # PEFT takes the ends of names
    edit(CONFIG, target_parameters=ends)(tmp_path, tmp_path)
    assert problems(tmp_path, None) == []


def test_names_an_adapter_of_another_base(job: Path) -> None:
    assert "but this base has 0000" in problems(job / "adapters" / "a", "0" * 64)[0]
    (job / "adapters" / "a" / "qwlora.json").unlink()
    refused = problems(job / "adapters" / "a", job_fingerprint(job), "refuse")
    assert "does not say which base" in refused[0]
    assert problems(job / "adapters" / "a", job_fingerprint(job)) == []
    (job / "adapters" / "a" / "qwlora.json").write_text("{}")
    assert "qwlora.json changed" in problems(job / "adapters" / "a", job_fingerprint(job))[0]


def test_commands(job: Path) -> None:
    listed = answered("adapters", "list", job)
    assert "adapters/b" in listed
    assert "DoRA" in listed
    found = json.loads(answered("adapters", "list", job, "--json"))["adapters"]
    assert found[0]["rank"] == 2
    assert answered("adapters", "check", job) == "adapters/a: good\nadapters/b: good\n"
    folder = job / "adapters" / "a"
    edit(CONFIG, r=5)(folder, folder)
    reseal(folder, "qwlora.json")
    (found,) = problems(folder, job_fingerprint(job))
    assert found == f"{CONFIG} asks for rank 5, but the weights have at most 2"
    assert f"adapters/a: {found}" in problems_said(job)
    refused("adapters", "check", job / "base")


def problems_said(job: Path, *options: str) -> str:
    """What `qwlora adapters check` says when it found some."""
    checked = qwlora("adapters", "check", job, *options)
    assert checked.returncode == 1, checked
    return checked.stdout


def test_reports_a_deleted_adapter_as_missing(
    job: Path, checkpoints: dict[str, Path], corpus: Path
) -> None:
    """Its record went with its folder, but another stage has read it."""
    adapters = [{"name": name} for name in ("a", "b", "c")]
    write_recipe(job, checkpoints["one-layer llama"], corpus, adapters=adapters)
    for name in ("a", "c"):
        file = job / STAGES / "evaluate" / "adapted" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Record("evaluate/adapted", {}, {}).text())
    message = "adapters/c: this job trained it, but the folder is missing. Train it again: "
    message += f"qwlora train {job}\n"
    assert problems_said(job) == f"{message}adapters/a: good\nadapters/b: good\n"
    shutil.rmtree(job / "adapters")
    assert problems_said(job) == message.replace("adapters/c", "adapters/a") + message


def test_a_job_misses_a_file_that_it_wrote(job: Path) -> None:
    """Without its record, an adapter of the job would look like one that PEFT saved."""
    folder = job / "adapters" / "a"
    (folder / STAGE).write_text(Record("train", {}, {}, files={"qwlora.json": ""}).text())
    (folder / "qwlora.json").unlink()
    message = "adapters/a: qwlora.json: written by this job, but missing"
    assert re.search(message, problems_said(job))


def test_adapters_saved_by_peft_pass(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "a"))
    good = "a: good; does not record its base; unverified (no digests of its files)\n"
    assert answered("adapters", "check", tmp_path) == good
    assert "does not say which base it belongs" in problems_said(tmp_path, "--needs-base")
