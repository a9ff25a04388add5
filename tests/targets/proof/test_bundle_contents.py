"""What may be in a bundle: somebody else's files are compared with what a target writes."""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from conftest import tiny_model
from qwlora.errors import QwloraError, SourceError
from qwlora.formats.model_source import load_model
from qwlora.targets.onnx.onnx_runtime import read_session_options
from qwlora.targets.onnx.web import PAGE
from qwlora.targets.proof.contents import check_contents, known_settings, misfits
from qwlora.targets.registry import TARGETS
from targets.damage import edit_json
from targets.proof.toy_runtime import TableRuntime


def check(folder: Path, place: str) -> None:
    """Check the files of `folder` as those of a `target/base` or a `target/adapter`."""
    target, part = place.split("/")
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    check_contents(TARGETS[target].backend.contents, folder, files, part == "base")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("genai/adapter", "genai_config.json"),
        ("hf/base", "pytorch_model.bin"),
        ("hf/base", "adapter_config.json"),  # transformers would load the adapter that it names
        ("hf/adapter", "adapter_model.bin"),
        ("hf/adapter", "sub/adapter_config.json"),
        ("gguf/adapter", "base.gguf"),
        ("aimet/adapter", "model.aimet/plugin.so"),
    ],
)
def test_a_file_that_no_export_writes_is_refused(place: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match=re.escape(name)):
        check(tmp_path, place)


GENAI = {"model": {"type": "llama", "decoder": {"session_options": {"provider_options": []}}}}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
PEFT = {"peft_type": "LORA", "r": 2, "target_modules": ["layers.0.q_proj"]}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "keys": ["layers.0.q_proj"]}}


def put(content: Any, path: str, value: Any) -> Any:
    """A copy of JSON content with one value set."""
    key, _, rest = path.partition("/")
    return {**content, key: put(content.get(key, {}), rest, value) if rest else value}


GRAPHS = {"graphs": {"decode": {"host": "a.onnx", "compiled": "device/a.onnx"}}}
PROVIDERS = [{"qnn": {"backend_path": "x"}}]
HUNGRY_GROUP = {"group_0": {"targets": ["re:((a+)+)+b"]}}
DECODER, GENAI_CONFIG = "model/decoder", "genai/base/genai_config.json"
CODE = ["auto_map", "custom_ops_library", "experts_implementation", "model_file"]
CODE += ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
HF, ADAPTER = "hf/base/config.json", "hf/adapter/adapter_config.json"
MODEL = {GENAI_CONFIG: GENAI, ADAPTER: PEFT, "mlx/adapter/adapter_config.json": MLX}
MODEL |= dict.fromkeys((HF, "mlx/base/config.json", "openvino/base/config.json"), CONFIG)
MODEL |= dict.fromkeys(("aimet/adapter/graphs.json", "qairt/adapter/graphs.json"), GRAPHS)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        (GENAI_CONFIG, f"{DECODER}/filename", "../first/x.onnx"),
        (GENAI_CONFIG, f"{DECODER}/session_options/custom_ops_library", "model.data"),
        (GENAI_CONFIG, f"{DECODER}/session_options/provider_options", PROVIDERS),
        (GENAI_CONFIG, "model/vision", {"filename": "model.onnx"}),
        (HF, "auto_map", {"AutoModelForCausalLM": "x--y.Z"}),
        (HF, "attn_implementation", "someone/kernel"),
        (HF, "model_type", "no_such_model"),
        (HF, "a_setting", {"of": ["text"]}),
        (HF, "quantization_config", {"quant_method": "bitnet"}),
        (HF, "quantization_config/config_groups", HUNGRY_GROUP),
        (HF, "quantization_config/ignore", ["re:(.*a){30}"]),
        ("hf/base/generation_config.json", "custom_generate", "someone/code"),
        ("hf/base/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.Y", None]}),
        (ADAPTER, "auto_mapping", {"parent_library": "x"}),
        (ADAPTER, "megatron_core", "this"),
        (ADAPTER, "target_modules", "((a+)+)+b"),
        (ADAPTER, "peft_type", "LOHA"),
        (ADAPTER, "use_dora", True),
        (ADAPTER, "base_model_name_or_path", "someone/model"),
        ("mlx/base/config.json", "model_file", "model.safetensors"),
        ("mlx/base/config.json", "quantization", {"group_size": "32"}),
        ("mlx/adapter/adapter_config.json", "fine_tune_type", "full"),
        ("openvino/base/config.json", "experts_implementation", "a/b"),
        ("onnx/base/session_options.json", "session.qdq_matmulnbits_accuracy_level", "4"),
        ("onnx/base/session_options.json", "ep.context_file_path", "/etc/passwd"),
        ("aimet/adapter/graphs.json", "graphs/decode/host", "../../other.onnx"),
        ("aimet/adapter/graphs.json", "graphs/decode/model", ".."),
        ("qairt/adapter/graphs.json", "graphs/decode/host", "/etc/passwd"),
        ("qairt/adapter/graphs.json", "graphs/decode/host", "proof/first/x.onnx"),
        ("qairt/adapter/graphs.json", "graphs", {".hidden": {}}),
        ("qairt/adapter/graphs.json", "graphs", {"../other": {}}),
        ("qairt/adapter/genie_config.json", "dialog/engine/model/library", {"model-bin": "x.so"}),
    ],
)
def test_a_value_no_export_writes_is_refused(
    file: str, path: str, value: Any, tmp_path: Path
) -> None:
    (place, _, name), content = file.rpartition("/"), MODEL.get(file, {})
    (tmp_path / name).write_text(json.dumps(content))
    check(tmp_path, place)
    (tmp_path / name).write_text(json.dumps(put(content, path, value)))
    with pytest.raises(SourceError, match=rf"{name}.*Nothing in it was run"):
        check(tmp_path, place)


def test_no_part_of_a_model_names_code_and_tokens_may_have_any_name(tmp_path: Path) -> None:
    """Neither where the class of the part, which says which keys there are, is not known."""
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(CODE, 1)))
    part = {"dtype": "float16", **dict.fromkeys(CODE)}
    config = {"model_type": "gemma3", "text_config": part}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, "hf/base")
    changes = {f"text_config/{key}": "a" for key in CODE}
    changes |= {"text_config": {"model_type": "gemma3_text", "file": "x.py"}}
    for path, value in changes.items():
        (tmp_path / "config.json").write_text(json.dumps(put(config, path, value)))
        with pytest.raises(SourceError, match=path.rpartition("/")[2] if value == "a" else "file"):
            check(tmp_path, "hf/base")


STRANGE = ["[]", '["a"]', '"a"', "{", "1" * 5000, '{"model_type": ["a"], "b": "c"}']


@pytest.mark.parametrize("content", STRANGE)
def test_configurations_of_another_kind_are_refused(content: str, tmp_path: Path) -> None:
    for name, place in (("config.json", "hf/base"), ("genai_config.json", "genai/base")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SourceError, match=name):
            check(tmp_path, place)
        (tmp_path / name).unlink()
    for options in (content, '{"session.disable_quant_qdq": 1}'):
        (tmp_path / "session_options.json").write_text(options)
        with pytest.raises(SourceError, match=r"session_options\.json.*export the model again"):
            read_session_options(tmp_path)


@pytest.mark.parametrize(
    ("value", "form", "problem"),
    [
        (None, int, "a is null"),
        ("b", [str], 'a is "b"'),
        (["b"], [], 'a is ["b"]'),
        (1, re.compile("1"), "a is 1"),
        (1, frozenset({2, 3}), "a is 1"),
        (1, frozenset({1, 2}), None),
        ([], [], None),
        (True, object, None),
        (True, bool, None),
        (True, int, "a is true"),  # an integer is neither a flag nor a text
        (1, bool, "a is 1"),
        (0, False, "a is 0"),
    ],
)
def test_a_value_has_the_kind_of_its_form(value: Any, form: Any, problem: str | None) -> None:
    for key in ("a", "*"):
        assert list(misfits({"a": value}, {key: form})) == ([problem] if problem else [])
    assert list(misfits({"a": value}, {"b": form})) == ["key 'a' is unknown"]


def test_text_that_transformers_does_not_know_is_not_written() -> None:
    settings = {**CONFIG, "mine": 3, "also": [1.5], "file": "x.py", "nested": {"file": "x.py"}}
    assert known_settings(settings) == {**CONFIG, "mine": 3, "also": [1.5]}
    other = {"model_type": "no_such_model", "mine": 3}
    assert known_settings({**other, "hidden_act": "silu"}) == other
    generation = {"cache_implementation": "static"}
    assert known_settings({**generation, "file": "x.py"}) == generation


SCRIPTS = [("aimet/adapter/submit_aihub.py", "npu/aimet_templates/submit_aihub.py.template")]
SCRIPTS += [(f"web/base/{name}", f"onnx/web_files/{name}") for name in PAGE]


@pytest.mark.parametrize(("file", "template"), SCRIPTS)
def test_a_script_that_the_user_would_run_is_the_exporters(
    file: str, template: str, tmp_path: Path
) -> None:
    script = resources.files("qwlora.targets").joinpath(template).read_text()
    place, _, name = file.rpartition("/")
    for word in ("w8a16", "int8"):
        (tmp_path / name).write_text(script.replace("@FULL_TYPE@", word))
        check(tmp_path, place)
    injected = script.replace("@FULL_TYPE@", 'int8"; import os; "')
    assert ("@FULL_TYPE@" in script) == file.startswith("aimet")
    for changed in (injected.replace("adapter", "else", 1), f"{injected}\nprint(1)", "\xff"):
        (tmp_path / name).write_text(changed, encoding="latin-1")
        with pytest.raises(SourceError, match=rf"{name}.* not the script"):
            check(tmp_path, place)


def model_of(operator: str, **attributes: Any) -> onnx.ModelProto:
    """A model of one operator without inputs."""
    node = helper.make_node(operator, [], ["y"], **attributes)
    outputs = [helper.make_tensor_value_info("y", 1, [1])]
    return helper.make_model(helper.make_graph([node], "g", [], outputs))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "absent", "weights/../w"])
def test_tensor_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", 1, [1], [0.0])
    model = model_of("Constant", value=tensor)  # inside an attribute
    stored = model.graph.node[0].attribute[0].t
    stored.ClearField("float_data")
    stored.data_location = onnx.TensorProto.EXTERNAL
    stored.external_data.add(key="offset", value="0")
    entry = stored.external_data.add(key="location", value="model.onnx.data")
    (tmp_path / "model.onnx.data").write_bytes(bytes(4))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    check(tmp_path, "genai/base")
    entry.value = location
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="'w' is stored in"):
        check(tmp_path, "genai/base")


def test_a_compiled_context_and_a_file_that_is_no_model_are_refused(tmp_path: Path) -> None:
    model = model_of("EPContext", domain="com.microsoft", ep_cache_context="a.so")
    (tmp_path / "model.onnx").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"model\.onnx' is not an ONNX model"):
        check(tmp_path, "onnx/base")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SourceError, match="compiled code"):
        check(tmp_path, "onnx/base")
    (tmp_path / "base" / "device").mkdir(parents=True)
    (tmp_path / "model.onnx").rename(tmp_path / "base" / "device" / "decode_ctx.onnx")
    check(tmp_path, "qnn/adapter")  # the export's own, which nothing here opens


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_a_model_does_not_choose_its_kernels(key: str, value: Any, tmp_path: Path) -> None:
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    edit_json("config.json", lambda config: config.update({key: value}))(tmp_path)
    model = load_model(str(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))


CODE_KEYS = {"session_options": [{"custom_ops_library": "a.data"}], "auto_map": {"A": "x.Y"}}


def adding(name: str, content: str = "1") -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return attack


BESIDE = {  # what is next to the files of all use cases
    "hidden file": adding(".extension.so"),
    "proof": adding("proof/proof.json", "{}"),
}
ATTACKS = BESIDE | {
    "strange file": adding("extension.so"),
    "nested file": adding("custom_generate/generate.py"),
    "key that names code": adding("qwlora.json", json.dumps(CODE_KEYS)),
    "key twice": adding("qwlora.json", '{"target": 1, "target": 2}'),
    "link": lambda folder: (folder / "README.md").symlink_to("/etc/hostname"),
    "pipe": lambda folder: os.mkfifo(folder / "README.md"),
}
DATA = (".onnx_adapter", ".safetensors", ".gguf", ".data", ".bin")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_runtime_opens_what_no_export_writes(
    target: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, opened = TARGETS[target], list[Any]()
    is_beside = known.has_cases and attack in BESIDE

    class Recorder(TableRuntime):
        def switch_to(self, adapter: Path | None) -> None:
            opened.append(adapter)

    def open_files(self: Any, folder: Path, case: str) -> Recorder:
        opened.append(folder)
        return Recorder({})

    monkeypatch.setattr(type(known.backend), "open", open_files)
    monkeypatch.setattr(type(known), "require_packages", lambda self: None)
    parts = [p for name in ("first", "second") for p in known.parts(tmp_path, name).values()]
    for folder in (tmp_path / "proof", *parts):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".model.onnx.part").write_bytes(b"of a killed writer")
    for folder in parts:
        contents = known.backend.contents
        patterns = contents.base if folder.name == "base" else contents.adapter
        written = folder / next(p for p in patterns if p.endswith(DATA)).replace("*", "a")
        written.parent.mkdir(exist_ok=True)
        written.touch()
        (folder / "stage.json").write_text("of the job that exported it")
    if is_beside:
        ATTACKS[attack](tmp_path)
    runtime = known.open(tmp_path, "first")
    assert opened
    if known.has_base:
        for alone in (None, "base"):
            opened.clear()
            known.open(tmp_path, alone)
            assert opened == [tmp_path / "base"]
    for folder in dict.fromkeys(() if is_beside else parts):
        ATTACKS[attack](folder)
        opened.clear()
        is_switch = folder.name == "second" and known.has_base  # while another adapter is open
        name = "second" if folder.name == "second" else "first"
        act = partial(runtime.use, folder) if is_switch else partial(known.open, tmp_path, name)
        with pytest.raises(SourceError, match=str(folder)):
            act()
        assert not any(place == folder for place in opened)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize(
    "name", ["../base.safetensors", "/x.safetensors", "x.bin", "absent.safetensors", 1]
)
def test_shards_are_files_of_the_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(QwloraError, match=r"index\.json.*lm_head"):
        TARGETS["hf"].open(tmp_path)
