"""Merging: the verdict against what PEFT computes, and the models that are written."""

import json
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

from cli.command_line import answered, refused
from conftest import byte_tokenizer, tiny_model, write_recipe
from qwlora import load_adapter, load_base, merged_model, quantize_
from qwlora.adapter.adapter_deltas import merge_effect, rounding_losses
from qwlora.errors import DirectoryError, MergeError
from qwlora.formats.base_folder import save_base
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import is_packed, packed_weights
from qwlora.pipeline.run import run
from qwlora.quantize.layer_rules import LayerRule
from qwlora.recipe import load_recipe
from qwlora.system.output_path import check_target
from qwlora.system.parameter_names import canonical_name
from simulation.tiny_architectures import make

IDS = torch.arange(40).view(2, 20)


def with_adapter(
    architecture: str, rules: Sequence[LayerRule] = (), size: float = 1.0, **options: Any
) -> Any:
    """A quantized model with a random adapter, on all linear layers if none are named."""
    model = make(architecture) if architecture == "Mixtral" else tiny_model(architecture, layers=1)
    quantize_(model, "w4-block32", "rtn", rules=rules)
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    config = LoraConfig(r=4, init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tested here
        wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    return wrapped


def written_and_read(merged: Any, folder: Path) -> Any:
    """What transformers reads computes the same, and it misses nothing."""
    merged.save_pretrained(folder)
    again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(IDS).logits, merged(IDS).logits)
    return again


ENDS = {
    "llama": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "lm_head"),
}
INTO_FLOATS: list[tuple[str, bool, dict[str, Any]]] = [  # and whether the head is packed too
    ("llama", False, {"use_dora": True}),
    ("gpt2", False, {"use_dora": True}),  # Conv1D
    ("opt", False, {"use_rslora": True}),
    *(
        ("llama", packed, {"target_modules": [e]})
        for e in ENDS["llama"]
        for packed in (False, True)
    ),
    *((architecture, True, {"target_modules": [*ends]}) for architecture, ends in ENDS.items()),
]


@pytest.mark.parametrize(("architecture", "is_head_packed", "options"), INTO_FLOATS)
def test_merged_into_floats(architecture, is_head_packed, options, tmp_path) -> None:
    """A tied layer that has an adapter is merged by itself."""
    rules = [LayerRule("lm_head", parse_scheme("w8-block32"))] if is_head_packed else []
    is_tied = "target_modules" not in options
    model = with_adapter(architecture, rules, size=0.1 if is_tied else 1.0, **options)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = merged_model(model, "float")
        assert {name: type(module) for name, module in merged.named_modules()} == {
            n: type(m) for n, m in tiny_model(architecture, layers=1).named_modules()
        }
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert written_and_read(merged, tmp_path).config.tie_word_embeddings == is_tied


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


@pytest.mark.parametrize(
    ("base", "adapted", "merged", "kept", "is_harmless"),
    [
        (5.0, 5.0, 5.1, None, False),  # there is no gain
        (10.0, 9.0, 9.95, 0.05, False),  # 1 % worse, which is most of what was gained
        (10.0, 9.0, 9.02, 0.98, True),
        (20.0, 10.0, 11.0, 0.9, True),  # exactly 90 %
        (10.0, 9.95, 9.9974, 0.052, False),  # half a percent worse
    ],
)
def test_the_advice_weighs_what_is_kept_of_the_gain(
    base: float, adapted: float, merged: float, kept: float | None, is_harmless: bool
) -> None:
    verdict = merge_effect({}, base=base, adapted=adapted, merged=merged)
    found = json.loads(json.dumps(verdict, allow_nan=False))
    assert found["kept"] == (kept if kept is None else pytest.approx(kept))
    assert found["is_harmless"] == is_harmless
    advice = {True: "Merge", False: "Keep the adapter separate"}[is_harmless]
    assert found["recommendation"].startswith("There is nothing" if kept is None else advice)


def merged_in_float64(layer: Any, kind: str) -> Tensor:
    """Codes of the base's own grid nearest to W_hat and the active adapters, from the definitions of LoRA and DoRA."""
    base = layer.get_base_layer()
    grid, codes = base.encoding, base.codes.double()
    scale = grid.scale.double().repeat_interleave(32, 1)
    values = (codes + grid.offset.double().repeat_interleave(32, 1)) * scale
    down, up = layer.lora_A.double(), layer.lora_B.double()
    names = layer.active_adapters
    delta = sum(up[name].weight @ down[name].weight * layer.scaling[name] for name in names)
    if kind == "dora":
        whole = values + delta
        magnitude = layer.lora_magnitude_vector[names[0]].weight.double()
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
    options: dict[str, Any] = {"use_dora": kind == "dora", "lora_bias": kind == "bias"}
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "fc1"], **options)
    wrapped = get_peft_model(model, config).eval()
    if kind == "two":
        wrapped.add_adapter("second", config)
        wrapped.base_model.set_adapter(["default", "second"])
    wrapped.to(dtype)
    layers = {canonical_name(n): m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    expected = {name: merged_in_float64(layer, kind) for name, layer in layers.items()}
    biases = {name: layer.base_layer.bias.double() for name, layer in layers.items()}
    if kind == "bias":
        for name, layer in layers.items():
            biases[name] += layer.lora_B["default"].bias.double() * layer.scaling["default"]
    before = {n: layer.codes for n, layer in packed_weights(wrapped).items()}
    for name, layer in packed_weights(merged_model(wrapped)).items():
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
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


def test_rounding_loses_a_small_delta_and_keeps_a_large_one() -> None:
    model = with_adapter("llama", size=1e-4)
    base = {name: layer.codes.clone() for name, layer in packed_weights(model).items()}
    shares = [layer["share"] for layer in rounding_losses(model).values()]
    assert min(shares) == 1
    merged = packed_weights(merged_model(model, "requantized"))
    assert all(torch.equal(layer.codes, base[name]) for name, layer in merged.items())
    layers = rounding_losses(with_adapter("llama", size=10.0))
    assert all(layer["share"] < 0.5 and layer["rms_steps"] > 1 for layer in layers.values())


def test_layers_next_to_fused_experts_are_merged_into_codes_and_not_into_floats() -> None:
    wrapped = with_adapter("Mixtral", target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"experts.*Keep the adapter separate"):
        merged_model(wrapped, "float")
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        expected = [merged_in_float64(layer, "lora") for layer in layers]
    merged = [m for n, m in packed_weights(merged_model(wrapped)).items() if "q_proj" in n]
    for layer, codes in zip(merged, expected, strict=True):
        assert int((layer.codes != codes).sum()) <= 1


@pytest.fixture(scope="module")
def job(tmp_path_factory: Any, checkpoints: dict[str, Path], corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    first = {"name": "first", "rank": 4, "steps": 20, "learning_rate": 0.01, "warmup_steps": 1}
    model = checkpoints["one-layer llama"]
    path = write_recipe(folder, model, corpus, adapters=[first], preset="balanced")
    run(load_recipe(path), folder / "out", ("quantize", "train"))
    return folder / "out"


@pytest.mark.slow
def test_the_command_prints_the_verdict_and_writes_what_it_says(job: Path, tmp_path: Path) -> None:
    verdict = json.loads(answered("merge", job, "first", "--json"))
    assert 0 < verdict["share"] < 1
    assert verdict["adapted"] < verdict["base"]
    packed = packed_weights(load_base(job / "base"))
    assert verdict["layers"].keys() == {name.removesuffix(".weight") for name in packed}
    into_float = ("merge", job, "first", "--into", "float", "--out", tmp_path / "float")
    said = answered(*into_float)
    assert "smaller than half a quantization step" in said
    assert f"merged into the integers {verdict['merged']:.3f}" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert "is not empty" in refused(*into_float)  # before the verdict
    answered("merge", job, "first", "--into", "requantized", "--out", tmp_path / "base")
    assert len(packed_weights(load_base(tmp_path / "base"))) == 7


@pytest.mark.slow
def test_a_mergeable_adapter_is_its_merged_base_everywhere(job_for: Any, tmp_path: Path) -> None:
    """Trained, evaluated, simulated, run in ONNX Runtime and merged: the same integers."""
    first = {"name": "first", "rank": 4, "alpha": 64, "steps": 8, "warmup_steps": 1}
    job = job_for(adapters=[{**first, "learning_rate": 0.02, "mergeable": True}])
    results = job.run()
    assert results["parity"]["onnx_each"]["first"]["passed"]
    adapted = results["perplexity"]["adapted"]["first"]
    assert adapted < results["perplexity"]["base"] - 1
    verdict = json.loads(answered("merge", job.out, "first", "--json"))
    assert (verdict["adapted"], verdict["merged"], verdict["kept"]) == (adapted, adapted, 1)
    merged, base = tmp_path / "merged", job.out / "base"
    answered("merge", job.out, "first", "--into", "requantized", "--out", merged)
    model = onnx.load(job.out / "export/onnx_each/first/model.onnx")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    before = packed_weights(load_base(base))
    for name, layer in packed_weights(load_base(merged)).items():
        assert not torch.equal(layer.codes, before[name].codes)
        codes = torch.from_numpy(stored[f"{name}.codes"].astype("int16"))  # [in, out]
        assert torch.equal(codes.T, layer.codes.to(torch.int16) - 8)
    floats, adapter = tiny_model("llama").state_dict(), job.out / "adapters/first"
    trained = load_adapter(load_base(base), adapter, weight=lambda path: floats[f"{path}.weight"])
    with torch.no_grad():
        assert torch.equal(trained.eval()(IDS).logits, load_base(merged).eval()(IDS).logits)


def test_an_unusable_place_is_refused_before_the_verdict(job: Path, tmp_path: Path) -> None:
    merge = ("merge", job, "first", "--into", "float", "--out")
    assert "'.' is the current directory" in refused(*merge, ".", cwd=tmp_path)
    assert "recipe.yaml' is a file" in refused(*merge, job / "recipe.yaml" / "a")
    assert "there are first" in refused("merge", job, "other")
    assert not [*tmp_path.iterdir()]


def test_a_place_that_cannot_be_replaced_is_named(mounted: Any) -> None:
    with pytest.raises(DirectoryError, match="is not writable"):
        check_target(mounted("ro") / "merged")
    with pytest.raises(DirectoryError, match="is a mount point"):
        check_target(mounted("size=10m"))
