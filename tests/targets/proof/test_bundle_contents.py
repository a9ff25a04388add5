"""What may be in a bundle: somebody else's files are compared with what a target writes."""

import json
import re
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from conftest import tiny_model
from qwlora.errors import SourceError
from qwlora.formats.model_source import load_model
from qwlora.system.time_limit import time_limit
from qwlora.targets.onnx.onnx_runtime import read_session_options
from qwlora.targets.proof.contents import check_contents, known_settings, misfits
from qwlora.targets.registry import TARGETS
from qwlora.targets.weights.hf import TransformersRuntime
from targets.damage import edit_json


def check(folder: Path, place: str) -> None:
    """Check the files of `folder` as those of a `target/base` or a `target/adapter`."""
    target, part = place.split("/")
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    check_contents(TARGETS[target].backend.contents, folder, files, part == "base")


STRANGE_FILES = {
    "genai/base": ["ops.so", "ops.dll"],
    "genai/adapter": ["genai_config.json"],
    # transformers would load the adapter that the last one names
    "hf/base": ["modeling_llama.py", "pytorch_model.bin", "adapter_config.json"],
    "hf/adapter": ["adapter_model.bin", "sub/adapter_config.json"],
    "mlx/base": ["custom.py"],
    "openvino/base": ["extension.so"],
    "onnx/base": ["libops.dylib"],
    "gguf/adapter": ["base.gguf"],
    "qairt/adapter": ["run.sh"],
    "aimet/adapter": ["model.aimet/plugin.so"],
}


@pytest.mark.parametrize("place", STRANGE_FILES)
def test_a_file_that_no_export_writes_is_refused(place: str, tmp_path: Path) -> None:
    for number, name in enumerate(STRANGE_FILES[place]):
        folder = tmp_path / str(number)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
        with pytest.raises(SourceError, match=f"holds {re.escape(name)}, which no export writes"):
            check(folder, place)


GENAI = {"model": {"type": "llama", "decoder": {"session_options": {"provider_options": []}}}}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
PEFT = {"peft_type": "LORA", "r": 2, "target_modules": ["layers.0.q_proj"]}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "keys": ["layers.0.q_proj"]}}


def put(content: Any, path: str, value: Any) -> Any:
    """A copy of JSON content with one value set."""
    copied = json.loads(json.dumps(content))
    *outer, last = path.split("/")
    inner = copied
    for key in outer:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return copied


GEMMA = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "dtype": "float16"}}
GRAPHS = {"graphs": {"decode": {"host": "a.onnx", "compiled": "device/a.onnx"}}}
PROVIDERS = [{"qnn": {"backend_path": "x"}}]
HUNGRY_GROUP = {"group_0": {"targets": ["re:((a+)+)+b"]}}
OPTIONS = "model/decoder/session_options"
CODE = ["auto_map", "custom_ops_library", "experts_implementation", "model_file"]
CODE += ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]


@pytest.mark.parametrize(
    ("place", "name", "content", "path", "value"),
    [
        ("genai/base", "genai_config.json", GENAI, "model/decoder/filename", "../first/x.onnx"),
        ("genai/base", "genai_config.json", GENAI, f"{OPTIONS}/custom_ops_library", "model.data"),
        ("genai/base", "genai_config.json", GENAI, f"{OPTIONS}/provider_options", PROVIDERS),
        ("genai/base", "genai_config.json", GENAI, "model/vision", {"filename": "model.onnx"}),
        ("hf/base", "config.json", CONFIG, "auto_map", {"AutoModelForCausalLM": "x--y.Z"}),
        ("hf/base", "config.json", CONFIG, "attn_implementation", "someone/kernel"),
        ("hf/base", "config.json", CONFIG, "text_config/_attn_implementation", "a/b"),
        ("hf/base", "config.json", CONFIG, "model_type", "no_such_model"),
        ("hf/base", "config.json", CONFIG, "a_setting", {"of": ["text"]}),
        ("hf/base", "config.json", GEMMA, "text_config/file", "x.py"),
        ("hf/base", "config.json", CONFIG, "quantization_config", {"quant_method": "bitnet"}),
        ("hf/base", "config.json", CONFIG, "quantization_config/config_groups", HUNGRY_GROUP),
        ("hf/base", "config.json", CONFIG, "quantization_config/ignore", ["re:(.*a){30}"]),
        ("hf/base", "generation_config.json", {}, "custom_generate", "someone/code"),
        ("hf/base", "tokenizer_config.json", {}, "auto_map", {"AutoTokenizer": ["x.Y", None]}),
        ("hf/adapter", "adapter_config.json", PEFT, "auto_mapping", {"parent_library": "x"}),
        ("hf/adapter", "adapter_config.json", PEFT, "megatron_core", "this"),
        ("hf/adapter", "adapter_config.json", PEFT, "target_modules", "((a+)+)+b"),
        ("hf/adapter", "adapter_config.json", PEFT, "peft_type", "LOHA"),
        ("hf/adapter", "adapter_config.json", PEFT, "use_dora", True),
        ("hf/adapter", "adapter_config.json", PEFT, "base_model_name_or_path", "someone/model"),
        ("mlx/base", "config.json", CONFIG, "model_file", "model.safetensors"),
        ("mlx/base", "config.json", CONFIG, "quantization", {"group_size": "32"}),
        ("mlx/adapter", "adapter_config.json", MLX, "fine_tune_type", "full"),
        ("openvino/base", "config.json", CONFIG, "experts_implementation", "a/b"),
        ("onnx/base", "session_options.json", {}, "session.qdq_matmulnbits_accuracy_level", "4"),
        ("onnx/base", "session_options.json", {}, "ep.context_file_path", "/etc/passwd"),
        ("aimet/adapter", "graphs.json", GRAPHS, "graphs/decode/host", "../../other.onnx"),
        ("qairt/adapter", "graphs.json", GRAPHS, "graphs/decode/host", "/etc/passwd"),
        ("qairt/adapter", "graphs.json", GRAPHS, "graphs/decode/host", "proof/first/x.onnx"),
        ("aimet/adapter", "graphs.json", GRAPHS, "graphs/decode/model", ".."),
        ("qairt/adapter", "graphs.json", GRAPHS, "graphs", {".hidden": {}}),
        ("qairt/adapter", "graphs.json", GRAPHS, "graphs", {"../other": {}}),
    ],
)
def test_a_value_that_no_export_writes_is_refused(
    place: str, name: str, content: dict[str, Any], path: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    check(tmp_path, place)
    (tmp_path / name).write_text(json.dumps(put(content, path, value)))
    with pytest.raises(SourceError, match=rf"{name}.*nothing in it was run"):
        check(tmp_path, place)


@pytest.mark.parametrize("key", CODE)
def test_no_part_of_a_model_names_code(key: str, tmp_path: Path) -> None:
    """Neither where the class of the part, which says which keys there are, is not known."""
    config = {"model_type": "gemma3", "text_config": {"dtype": "float16", key: None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, "hf/base")
    (tmp_path / "config.json").write_text(json.dumps(put(config, f"text_config/{key}", "a")))
    with pytest.raises(SourceError, match=f"{key} .* names code"):
        check(tmp_path, "hf/base")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_tokens_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(dict.fromkeys(CODE, 1)))
    check(tmp_path, "hf/base")


def test_an_index_names_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").touch()
    index = {"metadata": {"total_size": 4}, "weight_map": {"w": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(tmp_path, "hf/base")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(SourceError, match=r'w is "model-1\.safetensors"'):
        check(tmp_path, "hf/base")


STRANGE = ["[]", '["a"]', '"a"', "{", "1" * 5000, '{"model_type": ["a"], "b": "c"}']


@pytest.mark.parametrize("content", STRANGE)
def test_configurations_of_another_kind_are_refused(content: str, tmp_path: Path) -> None:
    for name, target in (("config.json", "hf"), ("genai_config.json", "genai")):
        folder = tmp_path / target
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(SourceError, match=name):
            check(folder, f"{target}/base")
    for options in (content, '{"session.disable_quant_qdq": 1}'):
        (tmp_path / "session_options.json").write_text(options)
        with pytest.raises(SourceError, match=r"session_options\.json.*export the model again"):
            read_session_options(tmp_path)


def test_an_integer_is_neither_a_flag_nor_a_text() -> None:
    assert list(misfits({"a": 1, "b": True}, {"a": int, "b": bool})) == []
    assert list(misfits({"a": True, "b": 1}, {"a": int, "b": bool})) == ["a is true", "b is 1"]
    assert list(misfits({"a": 0}, {"a": False})) == ["a is 0"]


@pytest.mark.parametrize(
    ("value", "form", "problem"),
    [
        ({"a": None}, {"b": int}, "key 'a' is unknown"),
        ({"a": {}}, {"a": int}, "a is {}"),
        ({"a": "b"}, {"a": [str]}, 'a is "b"'),
        ({"a": ["b"]}, {"a": []}, 'a is ["b"]'),
        ({"a": 1}, {"a": re.compile("1")}, "a is 1"),
        ({"a": 1}, {"*": frozenset({2, 3})}, "a is 1"),
        ({"a": 1}, {"*": frozenset({1, 2})}, None),
        ({"a": []}, {"a": []}, None),
        ({"a": True}, {"a": object}, None),
    ],
)
def test_a_value_has_the_kind_of_its_form(value: Any, form: Any, problem: str | None) -> None:
    assert list(misfits(value, form)) == ([problem] if problem else [])


def test_text_that_transformers_does_not_know_is_not_written() -> None:
    settings = {**CONFIG, "mine": 3, "also": [1.5], "file": "x.py", "nested": {"file": "x.py"}}
    assert known_settings(settings) == {**CONFIG, "mine": 3, "also": [1.5]}
    other = {"model_type": "no_such_model", "mine": 3}
    assert known_settings({**other, "hidden_act": "silu"}) == other
    generation = {"cache_implementation": "static"}
    assert known_settings({**generation, "file": "x.py"}) == generation


def test_a_script_that_the_user_would_run_is_the_exporters(tmp_path: Path) -> None:
    templates = resources.files("qwlora.targets.npu") / "aimet_templates"
    script = (templates / "submit_aihub.py.template").read_text()
    assert "@FULL_TYPE@" in script
    path = tmp_path / "submit_aihub.py"
    for word in ("w8a16", "int8"):
        path.write_text(script.replace("@FULL_TYPE@", word))
        check(tmp_path, "aimet/adapter")
    injected = script.replace("@FULL_TYPE@", 'int8"; import os; "')
    for changed in (injected, f"{script}\nprint(1)", "\xff"):
        path.write_text(changed, encoding="latin-1")
        with pytest.raises(SourceError, match=r"submit_aihub\.py.* not the script"):
            check(tmp_path, "aimet/adapter")


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


def test_a_compiled_context_is_refused(tmp_path: Path) -> None:
    model = model_of("EPContext", domain="com.microsoft", ep_cache_context="a.so")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SourceError, match="compiled code"):
        check(tmp_path, "onnx/base")
    (tmp_path / "base" / "device").mkdir(parents=True)
    (tmp_path / "model.onnx").rename(tmp_path / "base" / "device" / "decode_ctx.onnx")
    check(tmp_path, "qnn/adapter")  # the export's own, which nothing here opens


def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"model\.onnx' is not an ONNX model"):
        check(tmp_path, "onnx/base")


def test_a_pattern_that_takes_forever_is_refused_before_peft_matches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(time_limit, seconds=0.5)
    monkeypatch.setattr("qwlora.adapter.adapter_files.time_limit", short)
    pattern = r"(?:(?:\w+\.?)*)*,"
    config = {"peft_type": "LORA", "r": 2, "alpha_pattern": {pattern: 1}, "target_modules": ["x"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    runtime = TransformersRuntime(tiny_model("llama", layers=1))
    with pytest.raises(SourceError, match=r"alpha_pattern .*takes more than"):
        runtime.use(tmp_path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_a_model_does_not_choose_its_kernels(key: str, value: Any, tmp_path: Path) -> None:
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    edit_json("config.json", lambda config: config.update({key: value}))(tmp_path)
    model = load_model(str(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
