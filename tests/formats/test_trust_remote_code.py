"""Python code in a model's folder runs only if the recipe says so."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwlora.cli.main import main

CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({ran!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL_CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .own_config import OwnConfig
Path({ran!r}).touch()
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({ran!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def folder(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A whole checkpoint, without any code."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in checkpoints["llama"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the folder's code makes."""
    return tmp_path / "code_ran"


@pytest.fixture
def own_model(folder: Path, ran: Path) -> Path:
    (folder / "own_config.py").write_text(CONFIG_CODE.format(ran=str(ran)))
    (folder / "own_model.py").write_text(MODEL_CODE.format(ran=str(ran)))
    auto_map = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    edit(folder / "config.json", model_type="own_llama", auto_map=auto_map)
    return folder


@pytest.fixture
def own_tokenizer(folder: Path, ran: Path) -> Path:
    (folder / "own_tokenizer.py").write_text(TOKENIZER_CODE.format(ran=str(ran)))
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own_tokenizer.OwnTokenizer", "own_tokenizer.OwnTokenizer"]},
    )
    return folder


@pytest.fixture
def call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The command line, with `y` typed at every question."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qwlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def trusting(source: Path) -> dict[str, Any]:
    return {"source": str(source), "trust_remote_code": True}


def test_code_named_in_config_json_does_not_run(
    call: Any, recipe_for: Any, own_model: Path, ran: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(model={"source": str(own_model)})
    code, _, errors = call("run", recipe, "--out", tmp_path / "out")
    assert not ran.exists()
    assert code == 2
    assert errors.startswith("qwlora: ")
    assert "model.trust_remote_code: true" in errors
    assert not (tmp_path / "out").exists()


def test_code_named_in_tokenizer_config_json_does_not_run(
    call: Any, recipe_for: Any, own_tokenizer: Path, ran: Path
) -> None:
    code, _, errors = call("data", recipe_for(model={"source": str(own_tokenizer)}))
    assert not ran.exists()
    assert code == 2
    assert "model.trust_remote_code: true" in errors


def test_trusted_code_runs_and_every_summary_says_so(
    call: Any, recipe_for: Any, own_model: Path, own_tokenizer: Path, ran: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(model=trusting(own_model), export={"targets": []})
    code, out, errors = call("run", recipe, "--out", tmp_path / "out")
    assert code == 0, errors
    assert ran.exists()
    assert "trust_remote_code" in out
    record = json.loads((tmp_path / "out" / "base" / "base.json").read_text())
    assert record["trust_remote_code"] is True
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trust_remote_code"] is True
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"][
        "trust_remote_code"
    ]
