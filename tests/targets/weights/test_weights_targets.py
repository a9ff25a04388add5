"""Targets with the base's integers and adapters beside it: every scheme of docs/support.md, and some
others, is held exactly or refused, and each runtime computes what was trained. Adapters are switched
in one session, and compute the bits of a session of their own."""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import tiny_model
from qwlora import quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, QwloraWarning
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, parse_scheme, short_name
from qwlora.nn import packed_weights
from qwlora.quantize.layer_rules import LayerRule
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.proof.readme import usage
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Backend, ExportedBase, Runtime, Target
from simulation.tiny_architectures import DECODER, with_large_weights
from targets.client_programs import with_clients
from targets.proofs import verify_weights
from targets.support_matrix import SCHEMES, WEIGHTS
from targets.weights.bundles import pack_linears, read_base, write_adapter, write_base

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(3))
SOLVERS = {True: "search", False: "rtn"}  # by whether the files hold scales in float16


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
CASES += [("gguf", "llama", "w4-block32", [])]


@pytest.mark.parametrize(("name", "architecture", "scheme", "rules"), with_clients(CASES))
def test_the_runtime_computes_base_and_adapters(
    name: str, architecture: str, scheme: Any, rules: list[LayerRule], tmp_path: Path
) -> None:
    kind = target(name)
    solver = SOLVERS[TARGETS[name].limits.has_float16_scales]
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
    "gptj": r"other weights or names in gptj: model\.h\.0\.attn\.k_proj\.weight",
    "glm": "rotates 16 values of a head in glm, not 8",
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
    read = packed_weights(read_base(tmp_path / "base"))
    for name, layer in packed_weights(model).items():
        assert torch.equal(read[name].encoding.scale, layer.encoding.scale)


@pytest.mark.parametrize("name", ["hf", "mlx", "qairt_pipeline"])
def test_conv1d_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"c_attn\.weight.*Conv1D"):
        target(name).write_base(ExportedBase(base("w4-channel", "gpt2"), None), tmp_path)
    assert list(tmp_path.iterdir()) == []


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


TEXT = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(3))
NEW_TOKENS = 8
STATES = ("first", "second", None, "first")


def bundle_of(name: str, folder: Path) -> PeftModel:
    """The files of a target: a base and adapters of different ranks and layers."""
    scheme = "w4-bf16block32" if name == "executorch" else "w4-block32"
    model = base(scheme, solver=SOLVERS[TARGETS[name].limits.has_float16_scales])
    write_base(target(name), model, folder)
    adapted = adapters(model, folder / "trained")
    for adapter in ("first", "second"):
        write_adapter(target(name), folder, adapter)
    return adapted


@pytest.mark.parametrize("name", with_clients(WEIGHTS))
def test_switched_adapters_compute_what_they_do_alone(name: str, tmp_path: Path) -> None:
    bundle_of(name, tmp_path)

    def computed(session: Any, state: str | None) -> list[tuple[Any, list[int]]]:
        session.use(None if state is None else tmp_path / state)
        settings = filter(None, (session, session.shipped))
        return [(each.logits(TEXT).tolist(), each.decode(TEXT, NEW_TOKENS)) for each in settings]

    alone = {state: computed(TARGETS[name].open(tmp_path), state) for state in STATES}
    together = TARGETS[name].open(tmp_path)
    for state in STATES:
        assert computed(together, state) == alone[state]
    assert len({str(found[0]) for found in alone.values()}) == 3


@pytest.mark.parametrize("name", with_clients(["hf", "mlx", "genai", "executorch"]))
def test_the_lines_of_the_readme_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_of(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    for adapter in (None, "first"):
        lines = usage(name, "base", adapter)
        exec(lines.partition("```python\n")[2].partition("```")[0], {})


MATRICES = 7  # of a layer
SIZES = {"hidden_size": 128, "intermediate_size": 256}  # matrices have blocks of 128
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"vocab_size": 300, "max_position_embeddings": 128}
NAMES = ("w4-tensor", "w5-tensor-asymmetric", "w4-block16", "w4-lpbq32", "w7-block32", "w7-channel")
EVERY = [*SCHEMES, *map(parse_scheme, NAMES)]


def problems(target: Target, *schemes: Scheme) -> list[str]:
    """Why a target cannot hold these schemes, one by one or together."""
    return refusals(target, Subject(weights={str(scheme): Weight(scheme) for scheme in schemes}))


def groups(target: Target, schemes: Sequence[Scheme]) -> list[list[Scheme]]:
    """The schemes that one base can have together."""
    found: list[list[Scheme]] = []
    for scheme in schemes:
        group = next((g for g in found if not problems(target, *g, scheme)), None)
        if group is None:
            found.append([scheme])
        else:
            group.append(scheme)
    return found


def written(name: str, schemes: Sequence[Scheme], folder: Path) -> Any:
    """A model with a matrix on each scheme; `folder`/base has its files."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    layers = -(-len(schemes) // MATRICES)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=True)
    model = with_large_weights(LlamaForCausalLM(config))
    pack_linears(model, cycle(schemes), WEIGHTS[name].limits.has_float16_scales)
    write_base(WEIGHTS[name].backend, model, folder)
    return model


@pytest.mark.parametrize("name", ["hf", "mlx", "gguf", "qairt_pipeline"])
def test_every_scheme_that_a_target_holds_is_read_back(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    held = [scheme for scheme in EVERY if not problems(target, scheme)]
    if target.limits.has_float16_scales:  # no LPBQ has such scales
        held = [scheme for scheme in held if "lpbq" not in short_name(scheme)]
    assert held
    for number, schemes in enumerate(groups(target, held)):
        folder = tmp_path / str(number)
        model = written(name, schemes, folder)
        found, expected = packed_weights(read_base(folder / "base")), packed_weights(model)
        assert found.keys() == expected.keys()
        for path, layer in expected.items():
            values, others = found[path].tensor.dequantize(), layer.tensor.dequantize()
            scheme = layer.encoding.scheme
            is_turned = name not in ("hf", "gguf") and bool((layer.encoding.scale < 0).any())
            if not is_turned:  # by others, so that scales are positive
                assert torch.equal(found[path].codes, layer.codes), scheme
            if name == "mlx" and not scheme.float_offset:  # it adds offset * scale
                rounding = torch.finfo(torch.float32).eps * float(others.abs().max())
                assert float((values - others).abs().max()) <= 2 * rounding, scheme
            else:
                assert torch.equal(values, others), scheme


@pytest.mark.slow
@pytest.mark.parametrize("name", with_clients(WEIGHTS))
def test_the_runtime_computes_every_scheme_that_the_target_holds(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    held = [scheme for scheme in SCHEMES if not problems(target, scheme)]
    for number, schemes in enumerate(groups(target, held)):
        folder = tmp_path / str(number)
        model = written(name, schemes, folder)
        torch.manual_seed(1)
        shape = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, shape).eval()
        save_adapter(adapted, folder / "trained" / "adapter")
        write_adapter(target.backend, folder, "adapter")
        runtime = target.open(folder)
        rounding = target.backend.rounding(adapted)
        parity = verify_weights(runtime, adapted, folder / "adapter", as_sequences(TEXT), rounding)
        assert parity.problems == [], ", ".join(map(short_name, schemes))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "openvino"])  # it holds all
def test_a_scheme_that_the_target_lacks_is_refused(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    lacking = [scheme for scheme in EVERY if problems(target, scheme)]
    assert lacking
    with pytest.raises(ExportError) as refusal:
        written(name, lacking, tmp_path)
    (more,) = re.findall(r"; and (\d+) more", str(refusal.value)) or ["0"]
    listed = sum(f"{scheme}: " in str(refusal.value) for scheme in lacking)
    assert listed + int(more) == len({*lacking})
    assert list((tmp_path / "base").iterdir()) == []
