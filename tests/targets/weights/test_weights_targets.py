"""Targets with the base's integers and adapters beside it: every scheme is held exactly or refused,
and each runtime computes what was trained."""

import json
import re
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import tiny_model
from qwlora import quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, QwloraWarning
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme
from qwlora.nn import packed_weights
from qwlora.quantize.layer_rules import LayerRule
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Backend, ExportedBase, Runtime
from simulation.tiny_architectures import DECODER
from targets.client_programs import with_clients
from targets.proofs import verify_weights
from targets.weights.bundles import pack_linears, write_adapter, write_base

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(3))


def target(name: str) -> Backend:
    return TARGETS[name].backend


def base(
    scheme: Scheme | str, architecture: str = "llama", solver: str = "rtn", **more: Any
) -> Any:
    model = tiny_model(architecture, layers=1)
    if isinstance(scheme, Scheme) and scheme.float_offset:  # solvers make none; GGUF files do
        pack_linears(model, cycle([scheme]))
    else:
        quantize_(model, scheme, solver, **more)
    return model


def adapters(model: Any, folder: Path) -> PeftModel:
    """Two adapters, one with rsLoRA and patterns, in folders of their own."""
    torch.manual_seed(0)
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    known = ("q_proj", "up_proj", "down_proj", "c_attn", "c_fc", "fc2", "dense_h_to_4h")
    some = [name for name in known if name in names]
    if not model.config.tie_word_embeddings:
        some.append("lm_head")
    wide = next(name for name in ("up_proj", "c_fc", "fc2", "dense_h_to_4h") if name in names)
    patterns = {"rank_pattern": {wide: 3}, "alpha_pattern": {wide: 5, some[-1]: 1}}
    random: Any = {"init_lora_weights": False}
    a = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **random)
    b = LoraConfig(r=6, lora_alpha=12, use_rslora=True, target_modules=some, **patterns, **random)
    adapted = get_peft_model(model, a, adapter_name="first")
    adapted.add_adapter("second", b)
    for name in ("first", "second"):
        save_adapter(adapted, folder / name, adapter=name)
    return adapted.eval()


MIXED = [LayerRule(match="*.mlp.*", scheme=Scheme(8, True, PerChannel()))]
EMBEDDING = [LayerRule(match="*embed_tokens", scheme=Scheme(8, True, PerBlock(32)))]
FLOAT = [LayerRule(match="*.self_attention.dense", scheme=None)]
OFFSET = Scheme(4, False, PerBlock(32), float_offset=True)
# tied and other heads, grouped heads, biases, layers that stay float or have another grid
WITHOUT_BIAS: list[Any] = [("llama", "w4-block32", []), ("qwen3", "w4-block32", MIXED)]
WITHOUT_BIAS += [("llama", "w4-block32-asymmetric", []), ("llama", "w8-channel", EMBEDDING)]
OF_ONNX: list[Any] = [("llama", "w4-block32", []), ("qwen3", "w4-block32-asymmetric", MIXED)]
OF_ONNX += [("gpt2", "w3-block64-asymmetric", []), ("falcon", "w4-block32", FLOAT)]
OF_ONNX += [("opt", OFFSET, [])]
OF_XNNPACK: list[Any] = [("qwen3", "w4-bf16block32", MIXED), ("gpt2", "w3-channel", [])]
OF_XNNPACK += [("opt", "w8-tensor", [])]
CASES = [(name, *case) for name in ("hf", "mlx") for case in WITHOUT_BIAS]
CASES += [(name, *case) for name in ("genai", "openvino", "web") for case in OF_ONNX]
CASES += [(name, "llama", "w2-channel", EMBEDDING) for name in ("genai", "web")]
CASES += [("executorch", *case) for case in OF_XNNPACK]


@pytest.mark.parametrize(("name", "architecture", "scheme", "rules"), with_clients(CASES))
def test_the_runtime_computes_base_and_adapters(
    name: str, architecture: str, scheme: Any, rules: list[LayerRule], tmp_path: Path
) -> None:
    kind = target(name)
    solver = "search" if TARGETS[name].limits.has_float16_scales else "rtn"
    model = base(scheme, architecture, solver, rules=rules)
    write_base(kind, model, tmp_path)
    adapted = adapters(model, tmp_path / "trained")
    runtime = kind.open(tmp_path / "base", "base")
    for adapter in ("first", "second", "first"):  # switched in one runtime
        write_adapter(kind, tmp_path, adapter)
        folder = tmp_path / adapter
        adapted.set_adapter(adapter)
        parity = verify_weights(runtime, adapted, folder, as_sequences(IDS), kind.rounding(adapted))
        assert parity.problems == []
        assert parity.figures["exact"]["adapter"]["tokens"] == IDS.numel()
        runtime.use(folder)
        tokens = runtime.decode(IDS[:1], 4)  # with a cache
        whole = torch.cat([IDS[:1], torch.tensor([tokens])], dim=1)
        with torch.no_grad(), kind.rounding(adapted) or nullcontext():
            likeliest = adapted(input_ids=whole).logits[0, -5:-1].argmax(-1)
        assert tokens == likeliest.tolist() == Runtime.decode(runtime, IDS[:1], 4)
    second, rounding = tmp_path / "second", kind.rounding(adapted)
    wrong = verify_weights(runtime, adapted, second, as_sequences(IDS), rounding)
    assert any("with the adapter" in problem for problem in wrong.problems)


OTHERS = {
    "gpt_neox": "cannot build gpt_neox: .*'rotary_pct'",
    "gptj": r"other weights, or names of them, in gptj: model\.h\.0\.attn\.k_proj\.weight",
    "glm": "rotates 16 values of a head in glm, and not 8",
    "olmo": "cannot build olmo",
    "nanochat": r"other weights.* in nanochat: model\.embed_tokens",
    "opt": "cannot build opt: Model type opt not supported",
    "falcon_h1": r"other weights.* in falcon_h1: .*\.down_proj\.weight",  # loading scales codes
}


@pytest.mark.client
def test_what_mlx_lm_computes_otherwise_is_refused() -> None:
    def problem(kind: str, **settings: Any) -> str:
        config = AutoConfig.for_model(kind, **{**DECODER, "head_dim": 16, **settings})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return str(target("mlx").model_problem(model, None))

    for kind, reason in OTHERS.items():
        assert re.search(reason, problem(kind)), problem(kind)
    for kind in ("llama", "glm4", "phi"):
        assert problem(kind) == "None", problem(kind)
    griffin = {"num_hidden_layers": 3, "num_key_value_heads": 1}  # rotates a half, as mlx-lm does
    assert problem("recurrent_gemma", **griffin) == "None"
    long = {"rope_theta": 5e3, "rope_type": "longrope", "short_factor": [1.0] * 8}
    long |= {"long_factor": [1 + i / 3 for i in range(8)], "original_max_position_embeddings": 16}
    assert "never by short_factor" in problem("phi3", rope_parameters=long, pad_token_id=0)
    # in gemma2, mlx-lm lets all layers attend to all tokens
    with pytest.warns(QwloraWarning, match="last 8 tokens, in mlx-lm to all"):
        assert problem("gemma2", sliding_window=8) == "None"
    assert problem("gemma3_text", sliding_window=8, num_hidden_layers=6) == "None"


@pytest.mark.parametrize(("solver", "dtype"), [("search", "float16"), ("rtn", "float32")])
def test_the_type_in_config_json_holds_every_scale(solver: str, dtype: str, tmp_path: Path) -> None:
    """vLLM keeps scales in this type, and of float32 it makes bfloat16."""
    model = base("w4-block32", solver=solver)
    write_base(target("hf"), model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path / "base").dtype == getattr(torch, dtype)
    read = packed_weights(load_precomputed(open_checkpoint(tmp_path / "base")))
    for name, layer in packed_weights(model).items():
        assert torch.equal(read[name].encoding.scale, layer.encoding.scale)


@pytest.mark.parametrize("name", ["hf", "mlx", "qairt_pipeline"])
def test_conv1d_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"c_attn\.weight.*Conv1D"):
        target(name).write_base(ExportedBase(base("w4-channel", "gpt2"), None), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_asymmetric_grid_beside_another_is_refused_by_hf(tmp_path: Path) -> None:
    model = base("w4-block32-asymmetric", rules=MIXED)
    with pytest.raises(ExportError, match=r"int4 asymmetric .*int8 symmetric per chan.* together"):
        target("hf").write_base(ExportedBase(model, None), tmp_path)


def test_a_canonical_adapter_has_one_scale_for_everyone(tmp_path: Path) -> None:
    adapted = adapters(base("w4-block32"), tmp_path / "trained")
    for adapter in ("first", "second"):
        canonical = read_canonical(tmp_path / "trained" / adapter)
        for module, (a, b) in canonical.factors.items():
            layer: Any = adapted.get_submodule(f"base_model.model.{module}")
            delta = layer.get_delta_weight(adapter).detach()
            torch.testing.assert_close(b @ a, delta, rtol=1e-5, atol=1e-6)
        assert canonical.rank == {"first": 4, "second": 6}[adapter]
        assert canonical.base_fingerprint is not None
        write_adapter(target("hf"), tmp_path, adapter)
        config = json.loads((tmp_path / adapter / "adapter_config.json").read_text())
        assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
        assert config["rank_pattern"] == config["alpha_pattern"]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers")
def test_an_adapter_without_a_canonical_form_is_refused(tmp_path: Path) -> None:
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    embedding = LoraConfig(r=2, target_modules=["embed_tokens"])
    for i, config in enumerate((dora, embedding)):
        model = get_peft_model(tiny_model("llama", layers=1), config)
        model.save_pretrained(str(tmp_path / str(i)))
        with pytest.raises(ExportError, match=r"only LoRA factors of linear layers"):
            read_canonical(tmp_path / str(i))


def test_an_mlx_adapter_pads_ranks(tmp_path: Path) -> None:
    adapters(base("w4-block32"), tmp_path / "trained")
    write_adapter(target("mlx"), tmp_path, "second")
    tensors = load_file(tmp_path / "second" / "adapters.safetensors")
    assert {t.shape[1 if n.endswith("a") else 0] for n, t in tensors.items()} == {6}
