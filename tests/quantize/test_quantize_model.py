"""Quantizing a model: which layers, by which rules, block by block on calibration data, and resumed. From
a checkpoint: the same base, with few blocks in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from adapter.small_models import mixture
from conftest import ARCHITECTURES, EACH_ARCHITECTURE, byte_tokenizer, tiny_model
from formats.models import logits
from formats.packing import packed_and_twin
from formats.test_precomputed import KINDS, Held, model_of
from qwlora import PackedLinear, fingerprint, load_base, observe_moments, quantize_, simulate, tune_
from qwlora.errors import CalibrationError, GridError, SourceError
from qwlora.formats.base_files import BaseWriter
from qwlora.formats.checkpoint import LazyModel
from qwlora.grid.scheme import PerBlock, Scheme, parse_scheme
from qwlora.nn import packed_weights
from qwlora.quantize.block_runner import BlockRunner
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.layer_rules import LayerRule, find_tensors
from qwlora.quantize.layer_statistics import observe
from qwlora.quantize.quantize_blocks import tensors_by_block
from qwlora.quantize.quantize_model import InFiles, QuantizeReport, quantize_checkpoint


def token_ids(count: int = 6, tokens: int = 24) -> Tensor:
    return torch.randint(0, 250, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_is_taken_but_the_output_head(architecture: str) -> None:
    model = tiny_model(architecture)
    head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
    names = [n for n, m in model.named_modules() if isinstance(m, linear) and m is not head]
    report = quantize_(model, "w4-block32", solver="rtn")
    assert {type(model.get_submodule(name)) for name in names} == {PackedLinear}
    assert len(packed_weights(model)) == len(names) == len(report.layers)
    assert not isinstance(model.get_output_embeddings(), PackedLinear)
    left = find_tensors(model)
    assert not any(candidate.by_default for candidate in left.values())
    assert not {f"{name}.weight" for name in names} & left.keys()
    sizes = [layer.tensor.codes.numel() for layer in packed_weights(model).values()]
    assert report.size.weights == sum(sizes)


def test_rules_mix_grids_and_solvers_and_keep_layers_float() -> None:
    model = tiny_model("qwen3")
    rules = [
        LayerRule("model.layers.0.*_proj", None),
        LayerRule("*.down_proj", Scheme(8, granularity=PerBlock(16)), "rtn"),
        LayerRule("*.down_proj", None),  # the first that matches has decided
        LayerRule("lm_head", parse_scheme("w8-channel")),
    ]
    report = quantize_(model, "w4-block32", "search", rules=rules)
    schemes = {name: str(layer.scheme) for name, layer in packed_weights(model).items()}
    assert not any(name.startswith("model.layers.0") for name in schemes)
    assert schemes["model.layers.1.mlp.down_proj.weight"] == "int8 symmetric per block 16"
    assert schemes["model.layers.1.mlp.up_proj.weight"] == "int4 symmetric per block 32"
    assert schemes["lm_head.weight"] == "int8 symmetric per channel"
    assert report.layers["model.layers.1.mlp.down_proj.weight"].solver == "rtn"


def test_a_tied_embedding_is_packed_once_when_a_rule_names_it_or_its_head() -> None:
    for pattern in ("model.embed_tokens", "lm_head"):
        model = tiny_model("llama")
        quantize_(model, "w4-block32", rules=[LayerRule(pattern, parse_scheme("w8-block32"))])
        layers = packed_weights(model)
        head, table = layers["lm_head.weight"], layers["model.embed_tokens.weight"]
        assert head.is_tied
        assert head.tensor.parts.packed is table.tensor.parts.packed
        assert model(token_ids()).logits.shape == (6, 24, 260)


def test_fused_experts_are_packed_by_default_a_channel_being_a_row_of_one() -> None:
    model = mixture(layers=2)
    before = model(token_ids()).logits
    report = quantize_(model, "w8-channel", "search")
    experts = report.layers["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.scheme == "int8 symmetric per block 32"
    assert report.size.float_weights < 2.2 * 260 * 32
    assert (model(token_ids()).logits - before).abs().max() < 0.05 * before.abs().max()


def test_gptq_beats_rounding_in_every_layer_and_says_so() -> None:
    reference, model, rounded = (tiny_model("llama") for _ in range(3))
    report = quantize_(model, "w3-block32", "gptq", calibration=token_ids(16, 32))
    quantize_(rounded, "w3-block32", "rtn")
    assert all(layer.error < layer.rtn_error for layer in report.layers.values())
    ids = torch.randint(0, 250, (8, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        off, further = (m(ids).logits - reference(ids).logits for m in (model, rounded))
    assert off.square().mean() < further.square().mean()


def test_dropout_is_off_while_a_model_in_training_mode_is_quantized() -> None:
    models = [tiny_model("opt"), tiny_model("opt").train()]  # a new model is in training mode
    models[1].lm_head.eval()
    for model in models:
        quantize_(model, "w4-block32", "gptq", calibration=token_ids())
    assert fingerprint(models[0]) == fingerprint(models[1])
    in_evaluation = [path for path, m in models[1].named_modules() if not m.training]
    assert in_evaluation == ["lm_head"]


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_moments_of_a_packed_model_are_those_of_its_floats(architecture: str) -> None:
    ids = token_ids(8)
    model, twin = packed_and_twin(tiny_model(architecture), "w2-block32")
    found = dict(observe_moments(model, ids))
    names = [f"{path}.weight" for path in found]
    blocks = tensors_by_block(twin, names)
    expected = {}
    with BlockRunner(twin, blocks, [{"input_ids": row[None]} for row in ids]) as runner:
        for path in runner:
            for name, observed in observe(twin, path, blocks[path], runner).items():
                expected[name.removesuffix(".weight")] = observed.moment
    assert len(found) >= 8
    assert found.keys() == expected.keys()
    for path, moment in expected.items():
        torch.testing.assert_close(tuple(found[path]), tuple(moment))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_has_no_moment_of_outputs_as_large_as_the_vocabulary(tied: bool) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    rules = [LayerRule("lm_head", parse_scheme("w8-block32"))]
    ids = token_ids()
    quantize_(model, "w4-block32", "gptq", rules=rules, calibration=ids)
    found = dict(observe_moments(model, ids))
    assert all((found[path].output is None) == (path == "lm_head") for path in found)
    assert len(found) >= 14
    assert found["lm_head"].input.shape == (64, 64)
    with pytest.raises(GridError, match="no linear layer of the model is packed"):
        dict(observe_moments(tiny_model("llama"), ids))
    later = observe_moments(model, ids)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(GridError, match="the model has an adapter"):
        dict(later)


def test_only_layers_that_follow_their_inputs_need_to_be_differentiated() -> None:
    model = tiny_model("llama")
    inner = model.model.layers[0].forward
    model.model.layers[0].forward = torch.no_grad()(inner)
    with pytest.raises(CalibrationError, match=r"the result of model\.layers\.0 can be differen"):
        quantize_(model, "w4-block32", "gptq", calibration=token_ids())
    rules = [LayerRule("model.layers.0.*", parse_scheme("w4-block32"), "search")]
    report = quantize_(model, "w4-block32", "gptq", rules=rules, calibration=token_ids())
    assert report.layers["model.layers.0.mlp.up_proj.weight"].solver == "search"
    assert report.layers["model.layers.1.mlp.up_proj.weight"].solver == "gptq"


# Leaves k_proj and down_proj to quantize: the cache is under test, not the solver.
FEW = [LayerRule(f"*.{name}_proj", None) for name in ("q", "v", "o", "gate", "up")]


def solve(seed: int = 0, **changes: Any) -> tuple[str, Any]:
    """Fingerprint and report of a tiny model that gptq quantized."""
    model = tiny_model("llama", seed)
    asked: dict[str, Any] = {"calibration": token_ids(), "rules": FEW, "scheme": "w3-block32"}
    report = quantize_(model, solver="gptq", **asked | changes)
    return fingerprint(model), report


def stops_after_one(items: Any, description: str, total: int | None = None) -> Any:
    """As `Track`; interrupts before the second item."""
    yield next(iter(items))
    raise KeyboardInterrupt


def test_an_interrupted_run_resumes_after_the_last_finished_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        solve(work=tmp_path, track=stops_after_one)
    (finished,) = tmp_path.iterdir()
    stamp = finished.stat().st_mtime_ns
    assert solve(work=tmp_path) == solve()
    assert finished.stat().st_mtime_ns == stamp, "the finished block was solved again"
    finished.write_bytes(finished.read_bytes()[:-1])
    assert solve(work=tmp_path) == solve()


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "w4-block32"},
        {"calibration": token_ids().flip(0, 1)},
        {"rules": [LayerRule("model.layers.*.down_proj", None), *FEW]},
        {"settings": {"gptq": GptqSettings(activation_order=True)}},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_call_does_not_use_cached_blocks(tmp_path: Path, change: dict[str, Any]) -> None:
    first, changed = solve(work=tmp_path), solve(**change)
    assert solve(**change, work=tmp_path) == changed != first


def test_what_cannot_be_quantized_is_named() -> None:
    wrong_rules = [
        LayerRule("*.dwn_proj", None),
        LayerRule("*.k_proj", None),
        LayerRule("lm_hed", None),
        LayerRule("model.embed_tokens", parse_scheme("w8-block32"), "gptq"),
    ]
    gathered = r"(?s)3 of .*'\*.dwn_proj'.*mean model.layers.0.mlp.down_proj.*'lm_hed'.*lm_head"
    gathered += ".*model.embed_tokens: solver gptq"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"scheme": "w4-block48"}, r"14 of 14 layers .*\n.*q_proj.*block 48 .*\[64, 64\]"),
        ({"rules": [LayerRule("*1.*down_proj", Scheme(12))]}, "1 of 14 .*\n.*12 bits are not"),
        ({"scheme": "int4"}, "scheme 'int4' is not understood"),
        ({"solver": "magic"}, "solver 'magic'"),
        ({"settings": {"magic": None}}, "solver 'magic'"),
        ({"solver": "gptq"}, "need calibration data"),
        ({"rules": wrong_rules}, gathered),
    ]
    for change, message in changes:
        with pytest.raises(GridError, match=message):
            quantize_(tiny_model("llama"), **{"scheme": "w4-block32", **change})
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    message = r"model.layers.1.mlp.up_proj.weight contains 1 values .* first at index \[3, 4\]"
    with pytest.raises(CalibrationError, match=message):
        quantize_(model, "w4-block32")
    with pytest.raises(GridError, match="no layer left"):
        quantize_(nn.ReLU(), "w4-block32")


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = tiny_model("llama")
    model.model.spare = nn.ModuleList([nn.Linear(64, 64)])
    with pytest.raises(CalibrationError, match=r"model\.spare\.0\.weight.*solver: search"):
        quantize_(model, "w4-block32", "gptq", calibration=token_ids())
    assert not packed_weights(model), "it was left half packed"
    rules = [LayerRule("model.spare.0", Scheme(4), "search")]
    quantize_(model, "w4-block32", "gptq", calibration=token_ids(), rules=rules)
    assert isinstance(model.model.spare[0], PackedLinear)


def test_what_stands_beside_the_body_of_a_model_is_a_head_and_stays_float() -> None:
    """Whatever it is called: transformers names the body, the rest makes the result from it."""
    sizes: dict[str, Any] = {"vocab_size": 260, "pad_token_id": 0}
    t5 = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, **sizes)
    found = find_tensors(T5ForConditionalGeneration(t5))  # names none
    assert sum(candidate.by_default for candidate in found.values()) == 16
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, num_labels=3, **sizes)
    lora = LoraConfig(target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    for wrap in (lambda m: m, lambda m: get_peft_model(m, lora)):
        found = find_tensors(wrap(GPT2ForSequenceClassification(config)))
        default = {c.paths[0].rpartition(".")[2] for c in found.values() if c.by_default}
        assert default == {"c_attn", "c_proj", "c_fc"}
        assert ("score",) in [c.paths for c in found.values()], "a rule still reaches it"
    rules = [LayerRule("score", parse_scheme("w8-block32"))]
    report = quantize_(GPT2ForSequenceClassification(config), "w4-block32", rules=rules)
    assert report.layers["score.weight"].scheme.startswith("int8")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "at least one (sequence|batch), but got none"),
        (torch.full((2, 6), 260), "260 to 260, but the model's vocabulary has 260 entries"),
        ([{"input_ids": torch.tensor([[4, -2]])}], "range from -2 to 4"),
        (torch.rand(2, 8), "input_ids are torch.float32"),
        (torch.arange(8), r"of shape .*, but token ids are"),
    ],
)
@pytest.mark.parametrize("step", ["quantize", "moments", "tune", "simulate"])
def test_unusable_calibration_data_is_named(calibration: Any, message: str, step: str) -> None:
    model = tiny_model("llama", layers=1)
    if step != "quantize":
        quantize_(model, "w4-block32", "rtn")
    use: Any = {
        "quantize": lambda: quantize_(model, "w4-block32", "gptq", calibration=calibration),
        "moments": lambda: dict(observe_moments(model, calibration)),
        "tune": lambda: tune_(model, tiny_model("llama", layers=1), calibration),
        "simulate": lambda: simulate(model, {"input_ids": torch.arange(8)[None]}).calibrate(
            [{"input_ids": calibration}] if isinstance(calibration, Tensor) else calibration
        ),
    }
    with pytest.raises(CalibrationError, match=message):
        use[step]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_streaming_makes_the_same_base_as_in_memory(kind: str, solver: str, tmp_path: Path) -> None:
    rules = [
        LayerRule("*embed_tokens", parse_scheme("w4-block16"), "search"),
        LayerRule("*.layers.0.mlp.down_proj", None),
        LayerRule("*.down_proj", parse_scheme("w8-channel")),
    ]
    how: dict[str, Any] = {"rules": rules if kind in ("llama", "qwen3") else []}
    of_files: dict[str, Any] = {"shard_bytes": 30_000, "solver": solver, **how}
    if solver == "gptq":
        how |= {"calibration": token_ids(3, 16)}
        of_files |= how
    model = model_of(kind)
    report = quantize_(model, "w4-block32", solver, **how)
    result = from_files(Held(model_of(kind)), tmp_path / "base", **of_files)
    assert result == (fingerprint(model), report)
    loaded = load_base(tmp_path / "base")
    assert torch.equal(logits(loaded), logits(model))


def from_files(
    checkpoint: Held, folder: Path, solver: str = "gptq", **options: Any
) -> tuple[str, QuantizeReport]:
    folder.mkdir(exist_ok=True)
    tokenizer, scheme = byte_tokenizer(), "w4-block32"
    return quantize_checkpoint(checkpoint, tokenizer, folder, "x", scheme, solver, **options)


def deep() -> PreTrainedModel:
    """Eight blocks, each larger than what is outside of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    config = LlamaConfig(**sizes, **ids, num_attention_heads=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def test_streaming_holds_two_blocks_at_most(tmp_path: Path, loaded_at_finish: Any) -> None:
    gc.collect()
    model = deep()
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = model.model.embed_tokens.weight.nbytes + model.model.norm.weight.nbytes
    checkpoint = Held(model)
    from_files(checkpoint, tmp_path, calibration=token_ids(3, 16), shard_bytes=10_000)
    assert [name for name in loaded_at_finish if not name.startswith("model.layers.7.")] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert checkpoint.most_alive <= outside + 2 * block + 20_000
    assert checkpoint.most_alive < sum(p.nbytes for p in model.parameters()) / 2


def test_streaming_resumes_after_the_last_finished_block(tmp_path: Path) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    ask: dict[str, Any] = {"calibration": token_ids(3, 16), "work": work}
    with pytest.raises(KeyboardInterrupt):
        from_files(Held(tiny_model("llama")), base, track=stops_after_one, **ask)
    assert [file.name for file in work.iterdir()] == ["model.layers.0.safetensors"]
    with pytest.raises(SourceError, match="is not a QWLoRA base"):
        load_base(base)
    identity, _ = from_files(Held(tiny_model("llama")), base, **ask)
    model = tiny_model("llama")
    quantize_(model, "w4-block32", "gptq", calibration=token_ids(3, 16))
    assert identity == fingerprint(model) == fingerprint(load_base(base))


def test_a_block_that_runs_again_is_refused(tmp_path: Path) -> None:
    lazy = LazyModel(Held(tiny_model("llama")))
    first, second = "model.layers.0", "model.layers.1"
    for path in (first, second):
        lazy.model.get_submodule(path).forward = lambda: None  # type: ignore[method-assign]
    with InFiles(lazy, BaseWriter(tmp_path)).blocks({first: [], second: []}, 1):
        lazy.model.get_submodule(first)()
        lazy.model.get_submodule(second)()
        with pytest.raises(GridError, match=r"model\.layers\.0 runs again after a later block"):
            lazy.model.get_submodule(first)()
