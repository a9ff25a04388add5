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
OWN_TOKENIZER = {"AutoTokenizer": ["own_tokenizer.OwnTokenizer"] * 2}
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
PLAIN_CODE = MODEL_CODE.replace("from .own_config import OwnConfig\n", "")
PLAIN_CODE = PLAIN_CODE.replace("config_class = OwnConfig", "pass")
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
    file = folder / "tokenizer_config.json"
    edit_json(file, tokenizer_class="OwnTokenizer", auto_map=OWN_TOKENIZER)
    return folder


@pytest.fixture(autouse=True)
def willing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`y` is typed at every question."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


@pytest.mark.parametrize(("part", "verb"), [("own_model", "run"), ("own_tokenizer", "data")])
def test_code_does_not_run(recipe_for, part, verb, ran, tmp_path, request) -> None:
    recipe = recipe_for(model={"source": str(request.getfixturevalue(part))})
    done = qwlora(verb, recipe, *(["--out", tmp_path / "out"] if verb == "run" else []))
    assert (done.returncode, ran.exists()) == (2, False)
    assert done.stderr.startswith("qwlora: ")
    assert "model.trust_remote_code: true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_trusted_code_runs_and_every_summary_says_so(
    recipe_for, own_model, own_tokenizer, ran, tmp_path
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


@pytest.mark.parametrize(
    ("part", "code", "file", "auto_map"),
    [
        ("own_model", PLAIN_CODE, "config", {"AutoModelForCausalLM": "own_model.OwnModel"}),
        ("own_config", CONFIG_CODE, "config", {"AutoConfig": "own_config.OwnConfig"}),
        ("own_tokenizer", TOKENIZER_CODE, "tokenizer_config", OWN_TOKENIZER),
    ],
)
def test_a_base_holds_the_code_of_its_parts_and_says_so(
    folder, part, code, file, auto_map, tmp_path
) -> None:
    (folder / f"{part}.py").write_text(code)
    edit_json(folder / f"{file}.json", auto_map=auto_map)
    trusted: Any = {"trust_remote_code": True}
    load = LlamaForCausalLM if part == "own_config" else AutoModelForCausalLM

    def loaded(folder: Path) -> Any:
        config = AutoConfig.from_pretrained(folder, **trusted)
        return load.from_pretrained(folder, config=config, **trusted)

    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder, **trusted)
    quantize_(model, "w4-block32", "rtn")
    identity = save_base(model, tmp_path / "base", tokenizer)
    record = json.loads((tmp_path / "base" / "base.json").read_text())
    assert record["trust_remote_code"] is True
    assert f"{part}.py" in record["files"]
    base = load_base(tmp_path / "base", trust_remote_code=True)
    assert type(base).__name__ == type(model).__name__
    assert fingerprint(base) == fingerprint(loaded(tmp_path / "base")) == identity
