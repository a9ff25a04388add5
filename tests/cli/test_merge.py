"""Merging: the verdict against what PEFT computes, and the models that are written."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer, tiny_model, write_recipe
from qwlora import load_adapter, load_base, merged_model, quantize_
from qwlora.adapter.adapter_deltas import merge_effect, rounding_losses, unpack_
from qwlora.cli.job_commands import merge_lines
from qwlora.errors import DirectoryError, MergeError
from qwlora.formats.base_folder import save_base
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import is_packed, packed_weights, tensor_out_in
from qwlora.pipeline.commands.open_job import open_job
from qwlora.pipeline.commands.write_model import write_merged
from qwlora.pipeline.run import run
from qwlora.quantize.layer_rules import LayerRule
from qwlora.recipe import load_recipe
from qwlora.system.output_path import check_target, new_folder
from qwlora.system.parameter_names import canonical_name
from simulation.tiny_architectures import make

IDS = torch.arange(40).view(2, 20)


def adapted(architecture: str, size: float, **options: Any) -> Any:
    model = with_adapter(architecture, target_modules="all-linear", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    return model


def with_adapter(architecture: str, rules: Sequence[LayerRule] = (), **options: Any) -> Any:
    """A quantized model with a random adapter."""
    model = tiny_model(architecture, layers=1)
    quantize_(model, "w4-block32", "rtn", rules=rules)
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tested here
        return get_peft_model(model, config).eval()


def written_and_read(merged: Any, folder: Path) -> Any:
    """What transformers reads computes the same, and it misses nothing."""
    merged.save_pretrained(folder)
    again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(IDS).logits, merged(IDS).logits)
    return again


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True}),  # Conv1D
        ("gpt2", {"use_rslora": True}),
        ("opt", {"use_rslora": True}),
        ("qwen3", {}),
    ],
)
def test_merged_into_floats(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Once written and read again by transformers, too."""
    model = adapted(architecture, 0.1, **options)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = merged_model(model, "float")
        assert not any(is_packed(module) for module in merged.modules())
        assert {name: type(module) for name, module in merged.named_modules()} == {
            n: type(m) for n, m in tiny_model(architecture, layers=1).named_modules()
        }
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        written_and_read(merged, tmp_path)


ENDS = {
    "llama": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize(
    ("architecture", "which"),
    [("llama", (0,)), ("llama", (1,)), *((architecture, (0, 1)) for architecture in ENDS)],
)
@pytest.mark.parametrize("is_packed_too", [False, True], ids=["float", "packed"])
def test_a_tied_layer_that_has_an_adapter_is_merged_by_itself(
    architecture: str, which: tuple[int, ...], is_packed_too: bool, tmp_path: Path
) -> None:
    rules = [LayerRule(ENDS[architecture][1], parse_scheme("w8-block32"))] if is_packed_too else []
    targets = [ENDS[architecture][i] for i in which]
    model = with_adapter(architecture, rules, target_modules=targets)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = merged_model(model, "float")
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not written_and_read(merged, tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize("which", [None, 0, 1], ids=["neither", "embedding", "head"])
def test_tied_packed_ends_are_rounded_each_for_itself(which: int | None, tmp_path: Path) -> None:
    # rtn keeps scales as float32, which packing does not copy
    rules = [LayerRule("lm_head", parse_scheme("w8-block32"), "rtn")]
    targets = ["q_proj"] if which is None else [ENDS["llama"][which]]
    model, twin = (with_adapter("llama", rules, target_modules=targets) for _ in range(2))
    merged, floats = merged_model(model, "requantized"), merged_model(twin, "float")
    assert all(is_packed(merged.get_submodule(path)) for path in ENDS["llama"])
    assert merged.get_submodule("lm_head").is_tied == (which is None)
    if which is not None:  # the other is as it was
        other = merged.get_submodule(path := ENDS["llama"][1 - which]).tensor.dequantize()
        torch.testing.assert_close(other, floats.get_submodule(path).weight)
        assert not torch.equal(*(merged.get_submodule(path).codes for path in ENDS["llama"]))
    save_base(merged, tmp_path, byte_tokenizer(), source="here")
    with torch.no_grad():
        torch.testing.assert_close(load_base(tmp_path).eval()(IDS).logits, merged(IDS).logits)


def test_a_tie_that_no_configuration_undoes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter("llama", target_modules=["lm_head"])
    kind = type(model.get_base_model())
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(kind, "get_expanded_tied_weights_keys", lambda *_, **__: tied)
    with pytest.raises(MergeError, match=r"lm_head: Llama\w+ always ties .*keep the adapter sep"):
        merged_model(model, "float")


def test_what_is_kept_of_no_gain_is_null() -> None:
    verdict = merge_effect({}, base=5.0, adapted=5.0, merged=5.1)
    assert json.loads(json.dumps(verdict, allow_nan=False))["kept"] is None
    worse = merge_lines(merge_effect({}, 5.0, 6.0, 5.1))
    assert "the adapter does not improve perplexity on this text" in worse
    assert merge_effect({}, base=6.0, adapted=5.0, merged=5.5)["kept"] == 0.5


@pytest.mark.parametrize(
    ("merged", "advice"), [(9.95, "Keep the adapter separate"), (9.02, "Merge")]
)
def test_the_advice_weighs_what_is_kept_of_the_gain(merged: float, advice: str) -> None:
    """An adapter that gained 10 %: a merge that is 1 % worse than it may have lost most of that."""
    verdict = merge_effect({}, base=10.0, adapted=9.0, merged=merged)
    assert verdict["recommendation"].startswith(advice)
    kept = merge_effect({}, base=20.0, adapted=10.0, merged=11.0)  # exactly 90 %
    assert kept["is_harmless"]
    small = merge_effect({}, base=10.0, adapted=9.95, merged=9.9974)  # keeps 5.2 %, 0.5 % worse
    assert not small["is_harmless"]
    assert small["recommendation"].startswith("Keep the adapter separate")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_onto_the_grid_it_is_the_float_merge_rounded(architecture: str) -> None:
    model, twin = adapted(architecture, 0.3), adapted(architecture, 0.3)
    before = {name: layer.encoding.scale for name, layer in packed_weights(model).items()}
    merged, floats = merged_model(model, "requantized"), merged_model(twin, "float")
    assert packed_weights(merged).keys() == before.keys()
    for name, layer in packed_weights(merged).items():
        weight = tensor_out_in(floats, name)
        assert torch.equal(layer.encoding.scale, before[name])
        step = layer.encoding.scale.repeat_interleave(32, dim=1)
        inside = (layer.codes > 0) & (layer.codes < 15)
        assert ((layer.quantized.dequantize() - weight).abs() <= step * 0.501)[inside].all()


def merged_in_float64(layer: Any, kind: str) -> Tensor:
    """Codes of the base's own grid nearest to W_hat and the active adapters, from the definitions of LoRA and DoRA."""
    base = layer.get_base_layer()
    grid, codes = base.encoding, base.codes.double()
    scale = grid.scale.double().repeat_interleave(32, 1)
    values = (codes + grid.offset.double().repeat_interleave(32, 1)) * scale
    delta = sum(
        layer.lora_B[name].weight.double()
        @ layer.lora_A[name].weight.double()
        * layer.scaling[name]
        for name in layer.active_adapters
    )
    if kind == "dora":
        (name,) = layer.active_adapters
        whole = values + delta
        magnitude = layer.lora_magnitude_vector[name].weight.double()
        delta = whole * (magnitude / whole.norm(dim=1))[:, None] - values
    return (codes + (delta / scale).round()).clamp(0, grid.scheme.steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w8-block32-asymmetric", "w4-block32", "w5-signed32"])
@pytest.mark.parametrize("kind", ["lora", "dora", "bias", "two"])
@torch.no_grad()
def test_codes_are_rounded_once_in_float64(kind: str, scheme: str, dtype: torch.dtype) -> None:
    model = tiny_model("opt", layers=1)
    quantize_(model, scheme, "rtn")
    torch.manual_seed(0)
    options: dict[str, Any] = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(
        kind, {}
    )
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "fc1"], **options)
    wrapped = get_peft_model(model, config).eval()
    if kind == "two":
        wrapped.add_adapter("second", config)
        wrapped.base_model.set_adapter(["default", "second"])
    wrapped.to(dtype)
    layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    expected = {canonical_name(n): merged_in_float64(m, kind) for n, m in layers.items()}
    biases = {
        canonical_name(n): m.base_layer.bias.double()
        + (m.lora_B["default"].bias.double() * m.scaling["default"] if kind == "bias" else 0)
        for n, m in layers.items()
    }
    before = {n: layer.codes for n, layer in packed_weights(wrapped).items()}
    merged = merged_model(wrapped)
    for name, layer in packed_weights(merged).items():
        path = name.removesuffix(".weight")
        if path not in expected:
            assert torch.equal(layer.codes, before[name])
            continue
        assert int((layer.codes != before[name]).sum()) > 100
        # at a tie of two codes, sums in another order may choose the other
        assert int((layer.codes != expected[path]).sum()) <= 1
        assert layer.compute_dtype == layer.bias.dtype == dtype
        torch.testing.assert_close(layer.bias, biases[path].to(dtype))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_untrained_adapter_changes_no_code(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = tiny_model("gpt2", layers=1)
    quantize_(model, "w7-block32-asymmetric", "rtn")
    model.to(dtype)
    before = {name: layer.codes for name, layer in packed_weights(model).items()}
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    merged = packed_weights(merged_model(wrapped))
    # the magnitude of DoRA is a norm in the model's dtype
    most = 0.02 if options and dtype != torch.float32 else 0.0
    assert merged.keys() == before.keys()
    for name, layer in merged.items():
        assert float((layer.codes != before[name]).float().mean()) <= most, name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite_is_refused_before_anything_changes(bad: float) -> None:
    model = with_adapter("llama", target_modules=["q_proj", "down_proj"])
    before = {name: layer.codes for name, layer in packed_weights(model).items()}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    layer.lora_B["default"].weight.data[3, 1] = bad
    with pytest.raises(MergeError, match=r"down_proj\.lora_B.* non-finite"):
        merged_model(model)
    assert all(torch.equal(p.codes, before[n]) for n, p in packed_weights(model).items())


def test_layers_next_to_fused_experts_are_merged_into_codes() -> None:
    model = make("Mixtral")
    quantize_(model, "w4-block32", "rtn")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        expected = [merged_in_float64(layer, "lora") for layer in layers]
    merged = [m for n, m in packed_weights(merged_model(wrapped)).items() if "q_proj" in n]
    for layer, codes in zip(merged, expected, strict=True):
        assert int((layer.codes != codes).sum()) <= 1


def test_rounding_loses_a_small_delta_and_keeps_a_large_one() -> None:
    model = adapted("llama", 1e-4)
    base = {name: layer.codes.clone() for name, layer in packed_weights(model).items()}
    shares = [layer["share"] for layer in rounding_losses(model).values()]
    assert min(shares) == 1
    merged = packed_weights(merged_model(model, "requantized"))
    assert all(torch.equal(layer.codes, base[name]) for name, layer in merged.items())
    layers = rounding_losses(adapted("llama", 10.0))
    assert all(layer["share"] < 0.5 and layer["rms_steps"] > 1 for layer in layers.values())


def test_unpacking_gives_back_the_classes_and_the_tie() -> None:
    model = tiny_model("llama", layers=1)
    kinds = {name: type(module) for name, module in model.named_modules()}
    rules = [LayerRule("lm_head", parse_scheme("w8-block32"))]
    quantize_(model, "w4-block32", "rtn", rules=rules)
    with torch.no_grad():
        expected = model(IDS).logits
        unpack_(model)
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(IDS).logits, expected)


def test_fused_experts_say_that_they_cannot_be_merged() -> None:
    model = make("Mixtral")
    quantize_(model, "w4-block32", "rtn")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with pytest.raises(MergeError, match=r"experts.*Keep the adapter separate"):
        merged_model(wrapped, "float")


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], corpus: Path
) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    first = {"name": "first", "rank": 4, "steps": 20, "learning_rate": 0.01, "warmup_steps": 1}
    model = checkpoints["one-layer llama"]
    path = write_recipe(folder, model, corpus, adapters=[first], preset="balanced")
    run(load_recipe(path), folder / "out", ("quantize", "train"))
    return folder / "out"


@pytest.mark.slow
def test_the_command_prints_the_verdict_and_writes_what_it_says(job: Path, tmp_path: Path) -> None:
    verdict = json.loads(answered("merge-check", job, "first", "--json"))
    assert 0 < verdict["share"] < 1
    assert verdict["adapted"] < verdict["base"]
    packed = packed_weights(load_base(job / "base"))
    assert verdict["layers"].keys() == {name.removesuffix(".weight") for name in packed}
    (tmp_path / ".float.part").mkdir()  # the user's own
    into_float = ("merge", job, "first", "--into", "float", "--out", tmp_path / "float")
    said = answered(*into_float)
    assert "smaller than half a quantization step" in said
    assert f"merged into the integers {verdict['merged']:.3f}" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [".float.part", "float"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    again = qwlora(*into_float)
    assert (again.returncode, again.stdout) == (2, "")  # before the verdict
    assert "is not empty" in again.stderr
    answered("merge", job, "first", "--into", "requantized", "--out", tmp_path / "base")
    assert len(packed_weights(load_base(tmp_path / "base"))) == 7


@pytest.mark.slow
def test_a_mergeable_adapter_is_its_merged_base_everywhere(job_for: Any, tmp_path: Path) -> None:
    """Trained, evaluated, simulated, run in ONNX Runtime and merged: the same integers."""
    first = {"name": "first", "rank": 4, "alpha": 64, "steps": 8, "warmup_steps": 1}
    job = job_for(adapters=[{**first, "learning_rate": 0.02, "mergeable": True}])
    results = job.run()
    assert "verify/onnx_each/first" in job.done
    assert results["parity"]["onnx_each"]["first"]["passed"]
    adapted = results["perplexity"]["adapted"]["first"]
    assert adapted < results["perplexity"]["base"] - 1
    verdict = json.loads(answered("merge-check", job.out, "first", "--json"))
    assert (verdict["adapted"], verdict["merged"], verdict["kept"]) == (adapted, adapted, 1)
    merged = tmp_path / "merged"
    said = answered("merge", job.out, "first", "--into", "requantized", "--out", merged)
    assert "it was trained as the merged integers" in said
    layers = packed_weights(load_base(merged))
    model = onnx.load(job.out / "export/onnx_each/first/model.onnx")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    before = packed_weights(load_base(job.out / "base"))
    for name, layer in layers.items():
        assert not torch.equal(layer.codes, before[name].codes)
        codes = torch.from_numpy(stored[f"{name}.codes"].astype("int16"))  # [in, out]
        assert torch.equal(codes.T, layer.codes.to(torch.int16) - 8)
    floats = tiny_model("llama").state_dict()
    trained = load_adapter(
        load_base(job.out / "base"),
        job.out / "adapters/first",
        weight=lambda path: floats[f"{path}.weight"],
    ).eval()
    with torch.no_grad():
        assert torch.equal(trained(IDS).logits, load_base(merged).eval()(IDS).logits)


@pytest.mark.slow
def test_a_terminal_sees_how_far_the_verdict_is(job: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        with subprocess.Popen(
            [sys.executable, "-m", "qwlora", "merge-check", str(job), "first"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment,
        ) as process:
            os.close(theirs)
            seen = b""
            with contextlib.suppress(OSError):  # the other end was closed
                while part := terminal.read(4096):
                    seen += part
            assert process.stdout is not None
            printed = process.stdout.read()
    assert all(f"perplexity, {what}".encode() in seen for what in ("adapted", "base", "merged"))
    assert b"4/4" in seen
    assert b"smaller than half a quantization step" in printed
    assert b"perplexity, merged" not in printed


def test_an_unusable_place_is_refused_before_the_verdict(job: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for place, message in (
        (tmp_path / "notes.txt", "is a file; --out names a directory"),
        (tmp_path / "notes.txt" / "a" / "b", "notes.txt' is a file; choose"),
        (".", "'.' is the current directory"),
    ):
        done = qwlora("merge", job, "first", "--into", "float", "--out", place, cwd=empty)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "notes.txt"]
    with pytest.raises(DirectoryError, match="is a file; --out names a directory"):
        check_target(tmp_path / "notes.txt")


@pytest.mark.parametrize(("into", "size"), [("float", "100k"), ("requantized", "16k")])
def test_a_full_disk_keeps_nothing(job: Path, mounted: Any, into: Any, size: str) -> None:
    opened, _ = open_job(job)
    disk = mounted(f"size={size}")
    full = "new/merged': no space left on the disk. Nothing half-written was kept. Free some space"
    place = disk / "new" / "merged"
    with pytest.raises(DirectoryError, match=full), new_folder(place) as folder:
        write_merged(opened.new_context(), "first", into, folder)
    assert list(disk.iterdir()) == []


def test_a_place_that_cannot_be_replaced_is_named(mounted: Any, tmp_path: Path) -> None:
    disk = mounted("ro")
    for place in (disk / "merged", disk):
        with pytest.raises(DirectoryError, match="is not writable; choose another --out"):
            check_target(place)
    with pytest.raises(DirectoryError, match="is a mount point"):
        check_target(mounted("size=10m"))
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_what_is_not_there_is_named(job: Path, tmp_path: Path) -> None:
    assert "has no adapter 'other'; there are first" in refused("merge-check", job, "other")
    assert "is not a job directory" in refused("merge-check", tmp_path, "first")
    wrong = refused("merge", job, "first", "--into", "gold", "--out", tmp_path / "x")
    assert "'requantized'" in wrong
    assert not (tmp_path / "x").exists()
