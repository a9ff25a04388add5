"""Python code in a model's folder runs only if the recipe says so."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cli.command_line import qwlora
from formats.models import edit_json
from qwlora import fingerprint, load_base, quantize_, save_base

TOUCH = "import pathlib\npathlib.Path({ran!r}).touch()\n"
CONFIG_CODE = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .own_config import OwnConfig
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
PLAIN_CODE = """
from transformers import LlamaForCausalLM
class OwnModel(LlamaForCausalLM):
    pass
"""
TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A whole checkpoint, without any code."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the folder's code makes."""
    return tmp_path / "code_ran"


@pytest.fixture
def own_model(folder: Path, ran: Path) -> Path:
    touch = TOUCH.format(ran=str(ran))
    (folder / "own_config.py").write_text(touch + CONFIG_CODE)
    (folder / "own_model.py").write_text(touch + MODEL_CODE)
    auto_map = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    edit_json(folder / "config.json", model_type="own_llama", auto_map=auto_map)
    return folder


@pytest.fixture
def own_tokenizer(folder: Path, ran: Path) -> Path:
    (folder / "own_tokenizer.py").write_text(TOUCH.format(ran=str(ran)) + TOKENIZER_CODE)
    auto_map = {"AutoTokenizer": ["own_tokenizer.OwnTokenizer"] * 2}
    file = folder / "tokenizer_config.json"
    edit_json(file, tokenizer_class="OwnTokenizer", auto_map=auto_map)
    return folder


@pytest.fixture(autouse=True)
def willing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`y` is typed at every question."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


def test_code_of_a_model_does_not_run(
    recipe_for: Any, own_model: Path, ran: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(model={"source": str(own_model)})
    done = qwlora("run", recipe, "--out", tmp_path / "out")
    assert (done.returncode, ran.exists()) == (2, False)
    assert done.stderr.startswith("qwlora: ")
    assert "model.trust_remote_code: true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_code_of_a_tokenizer_does_not_run(recipe_for: Any, own_tokenizer: Path, ran: Path) -> None:
    done = qwlora("data", recipe_for(model={"source": str(own_tokenizer)}))
    assert (done.returncode, ran.exists()) == (2, False)
    assert "model.trust_remote_code: true" in done.stderr


def test_trusted_code_runs_and_every_summary_says_so(
    recipe_for: Any, own_model: Path, own_tokenizer: Path, ran: Path, tmp_path: Path
) -> None:
    model = {"source": str(own_model), "trust_remote_code": True}
    recipe = recipe_for(model=model, export={"targets": []})
    done = qwlora("quantize", recipe, "--out", tmp_path / "out")
    assert (done.returncode, ran.exists()) == (0, True), done.stderr
    assert "trust_remote_code" in done.stdout
    record = json.loads((tmp_path / "out" / "base" / "base.json").read_text())
    assert record["trust_remote_code"] is True
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trust_remote_code"] is True
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["model"]["trust_remote_code"]


@pytest.mark.parametrize("part", ["own_model", "own_config", "own_tokenizer"])
def test_a_base_holds_the_code_of_its_parts_and_says_so(
    folder: Path, part: str, tmp_path: Path
) -> None:
    code = {"own_model": PLAIN_CODE, "own_config": CONFIG_CODE, "own_tokenizer": TOKENIZER_CODE}
    (folder / f"{part}.py").write_text(code[part])
    if part == "own_tokenizer":
        auto_map: Any = {"AutoTokenizer": ["own_tokenizer.OwnTokenizer"] * 2}
        edit_json(folder / "tokenizer_config.json", auto_map=auto_map)
    else:
        kind = {"own_model": "AutoModelForCausalLM", "own_config": "AutoConfig"}[part]
        auto_map = {kind: f"{part}.{'OwnModel' if part == 'own_model' else 'OwnConfig'}"}
        edit_json(folder / "config.json", auto_map=auto_map)
    trusted: Any = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trusted)
    load = LlamaForCausalLM if part == "own_config" else AutoModelForCausalLM
    model: Any = load.from_pretrained(folder, config=config, **trusted)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    quantize_(model, "w4-block32", "rtn")
    identity = save_base(model, tmp_path / "base", tokenizer)
    record = json.loads((tmp_path / "base" / "base.json").read_text())
    assert record["trust_remote_code"] is True
    assert f"{part}.py" in record["files"]
    loaded = load_base(tmp_path / "base", trust_remote_code=True)
    assert type(loaded).__name__ == type(model).__name__
    assert fingerprint(loaded) == identity
    config = AutoConfig.from_pretrained(tmp_path / "base", **trusted)
    model = load.from_pretrained(tmp_path / "base", config=config, **trusted)
    assert fingerprint(model) == identity
