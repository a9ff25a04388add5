"""Model sources: incomplete or quantized models are refused, never filled with random numbers."""

import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MllamaConfig

from conftest import byte_tokenizer, packed_model, tiny_model
from formats.gguf_models import metadata_of, stored_shapes, write_file
from formats.models import edit_json, edit_tensors
from qwlora import load_precomputed, save_base
from qwlora.adapter.adapter_files import adapter_folder
from qwlora.analysis.inspect_model import inspect_source
from qwlora.errors import SourceError
from qwlora.formats.checkpoint import auto_class
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
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


def save_integers(folder: Path) -> Path:
    model = packed_model("llama")
    save_base(model, folder, byte_tokenizer(), source="somewhere")
    return folder


@pytest.mark.parametrize("place", ["../outside.safetensors", "a/../../outside.safetensors"])
def test_an_index_that_names_a_file_outside_is_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (folder / "a").mkdir()
    names = load_file(folder / FILE)
    (folder / FILE).rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"outside\.safetensors', which is not a .* this folder"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_becomes_a_float32_model(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path)
    expected = tiny_model("llama").get_parameter(DOWN).to(dtype).float()
    for model in (load_model(str(tmp_path)), load_precomputed(FolderCheckpoint(tmp_path))):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.get_parameter(DOWN), expected)


def test_what_is_missing_is_not_made_up(folder: Path) -> None:
    other = "model.layers.1.mlp.down.weight"
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({DOWN: torch.ones(3, 3)}, "tensors of other shapes"),
        ({DOWN: None}, rf"missing from its files: {DOWN} of LlamaFor.*\. .*download it again"),
        ({other: torch.ones(2)}, f"its files hold {other}, which LlamaForCausalLM lacks"),
    ]
    for tensors, message in changes:
        edit_tensors(folder / FILE, tensors)
        with pytest.raises(SourceError, match=message):
            load_model(str(folder))


def test_a_config_with_fewer_layers_than_the_files_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    for load in (load_model, FolderCheckpoint):
        with pytest.raises(SourceError, match=r"model\.layers\.1\..* and 4 more"):
            load(str(folder))


def test_a_gguf_file_with_more_layers_than_its_metadata_is_refused(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    shapes = stored_shapes("llama", config)
    config.num_hidden_layers = 1
    metadata = metadata_of("llama", config, "llama")
    path, tokens = tmp_path / "half.gguf", config.vocab_size
    file = write_file(path, "llama", metadata, shapes, lambda *_: "F32", tokens)
    for load in (load_model, GgufCheckpoint):
        with pytest.raises(SourceError, match=r"blk\.1\.\w+.* and 4 more"):
            load(str(file))


def test_tensors_that_transformers_ignores_are_ignored(folder: Path) -> None:
    head = tiny_model("llama").model.embed_tokens.weight.detach()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(folder / FILE, {**frequencies, "lm_head.weight": head})
    found, expected = load_model(str(folder)), tiny_model("llama")
    assert torch.equal(found.get_parameter(DOWN), expected.get_parameter(DOWN))


def test_integers_are_not_loaded_as_floats(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = save_integers(tmp_path_factory.mktemp("base"))
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    for source in (folder, base):
        assert not locate(str(source)).holds_floats
        with pytest.raises(SourceError, match=r"holds integers.*\(base.solver: keep\)"):
            load_model(str(source))


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer.*\(tokenizer.json"):
        load_tokenizer(str(folder))


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"no config.json; give one of its files: a.gguf, b.gguf"):
        locate(str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A fake hub without network: folders by id, filtered as the real client does."""

    def download(
        repository: str, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        there, cache = tmp_path / "hub" / repository, tmp_path / "cache" / repository
        if not there.is_dir():
            raise OSError("404 Client Error")
        files = [str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
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
    save_integers(hub("owner/base"))
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
def test_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = tmp_path / "tiny_files"
    (package / "adapter").mkdir(parents=True)
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(f"package:{name}/model.gguf").path == package / "model.gguf"
    assert adapter_folder(f"package:{name}/adapter") == package / "adapter"
    with pytest.raises(SourceError, match=r"does not exist \(looked for .*/tiny_files/no\.gguf\)"):
        locate(f"package:{name}/no.gguf")


def test_a_package_that_is_not_installed_is_named() -> None:
    for locating in (locate, adapter_folder):
        with pytest.raises(SourceError, match=r"'no_such_package' is not.*pip install no-such-pac"):
            locating("package:no_such_package/x")


def test_what_the_hub_does_not_have_is_named(hub: Callable[[str], Path]) -> None:
    looked = r"model 'owner/nothing' is not a local path \(looked for /.*/owner/nothing\)"
    with pytest.raises(SourceError, match=rf"{looked}.*hub either:\n  404 Client Error"):
        load_model("owner/nothing")


@pytest.mark.parametrize(
    ("named", "loads"),
    [
        ("MllamaForConditionalGeneration", AutoModelForImageTextToText),
        ("MllamaForCausalLM", AutoModelForCausalLM),
        (None, AutoModelForCausalLM),
    ],
)
def test_the_configuration_says_whether_a_model_reads_images(named: str | None, loads: Any) -> None:
    assert auto_class(MllamaConfig(architectures=named and [named])) is loads


def test_a_script_among_the_packages_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter's, which is started from there."""
    script = Path(sysconfig.get_path("purelib")) / "ipykernel_launcher.py"
    monkeypatch.setattr("sys.argv", [str(script)])
    assert installed_module("peft") is not None
