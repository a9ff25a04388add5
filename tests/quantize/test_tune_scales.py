"""Scales tuned against the float model: the gradient is autograd's own, codes stay, and what does not help is not kept."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conftest import tiny_model
from qwlora.errors import CalibrationError, GridError, RecipeError, SourceError
from qwlora.formats.base_folder import load_base
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, Scheme, parse_scheme
from qwlora.nn import PackedLinear, pack_module
from qwlora.nn.fingerprint import fingerprint
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.run import run
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import SOLVER_SCALES
from qwlora.pipeline.stages.model_stages import solver_scales
from qwlora.quantize import tune_scales
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.tune_scales import TuningSettings, _key, tune_
from qwlora.quantize.tuned_parameters import Tunable
from qwlora.recipe import load_recipe

NORMS = {"norm", "input_layernorm", "post_attention_layernorm", "ln_1", "ln_2", "ln_f"}
NAMES = ["w4-tensor", "w4-channel", "w4-block8", "w4-lpbq8", "w4-signed8"]
NAMES += ["w3-channel-asymmetric", "w2-block8-asymmetric"]
SCHEMES = [parse_scheme(name) for name in NAMES]
SCHEMES += [Scheme(4, False, PerBlock(8), float_offset=True)]


def ids(sequences: int = 48, tokens: int = 32) -> Tensor:
    return torch.randint(0, 250, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def pair(
    scheme: str = "w3-block32", architecture: str = "llama", layers: int = 2
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A quantized model and its float model."""
    model = tiny_model(architecture, layers=layers)
    teacher = copy.deepcopy(model)
    quantize_(model, scheme)
    return model, teacher


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def before(model: nn.Module, reference: nn.Module, batches: list[Any]) -> float:
    """Divergence of the last batch, which is held out, before tuning."""
    return tune_(copy.deepcopy(model), reference, batches, TuningSettings(steps=1)).before


def divergence(model: nn.Module, reference: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        h, g = (m(batch).logits.log_softmax(-1) for m in (model, reference))
    return float(F.kl_div(h, g, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_multiplied_weight(scheme: Scheme) -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    weight = model[0].weight.detach()
    encoding = measure(weight, scheme)
    layer = pack_module(model[0], QuantizedTensor(encoding.quantize(weight), encoding))
    model[0] = layer
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tuned = Tunable(model)
    factor = tuned.factors["0"]
    with tuned.learning():
        with torch.no_grad():
            factor.copy_(torch.linspace(-0.2, 0.3, factor.numel()).view(factor.shape))
        y = model(x)
        y.sin().sum().backward()
    found = x.grad, factor.grad
    x.grad, own = None, factor.detach().clone().requires_grad_()
    values, times = layer.tensor.dequantize(), (1 + own).view(len(own) if own.ndim else 1, -1)
    times = times.repeat_interleave(values.shape[1] // times.shape[1], 1)
    expected = F.linear(x, values * times, layer.bias)
    expected.sin().sum().backward()
    assert torch.allclose(y, expected, atol=1e-5)
    torch.testing.assert_close(found[0], x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], own.grad, rtol=1e-3, atol=1e-3)
    tuned.multiply_()  # what was tuned is what is stored
    torch.testing.assert_close(layer.tensor.dequantize(), values * times, rtol=2e-3, atol=2e-4)


CASES = [("llama", "w3-block32"), ("llama", "w2-block32-asymmetric")]
CASES += [pytest.param("llama", "w3-channel", marks=pytest.mark.slow)]
CASES += [pytest.param("gpt2", "w3-block32", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore::qwlora.system.machine.SlowComputeWarning")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "scheme"), CASES)
def test_models_come_nearer_and_no_code_moves(architecture: str, scheme: str, compute: str) -> None:
    model, reference = pair(scheme, architecture)
    before = {name: layer.tensor for name, layer in packed(model).items()}
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    training, held_out = ids()[order[:40]], ids()[order[40:]]
    far = divergence(model, reference, training)
    settings = TuningSettings(steps=30, learning_rate=1e-2, compute=compute)
    report = tune_(model, reference, ids(), settings)
    assert report.kept
    assert report.layers == len(before)
    assert report.after == pytest.approx(divergence(model, reference, held_out), rel=1e-4)
    assert divergence(model, reference, training) < 0.95 * far
    moved = 0
    for name, layer in packed(model).items():
        after = layer.tensor
        assert torch.equal(after.codes, before[name].codes)
        assert torch.equal(after.offset, before[name].offset)
        assert "forward" not in layer.__dict__
        if "block" in scheme:
            assert after.parts.scale.dtype == torch.float16
        moved += int((after.scale != before[name].scale).sum())
    assert moved
    assert not any(p.grad is not None for p in model.parameters())
    norms = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in NORMS]
    assert report.norms == len(norms)
    for norm, own in ((model.get_submodule(n), reference.get_submodule(n)) for n in norms):
        assert type(norm) is type(own)
        assert list(norm._parameters) == list(own._parameters)
        assert not torch.equal(norm.weight, own.weight)


def test_decoders_are_compared_where_their_own_mask_is() -> None:
    torch.manual_seed(0)
    ids_of = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, **ids_of)
    ).eval()
    reference = copy.deepcopy(model)
    quantize_(model, "w2-block32-asymmetric", "rtn")
    short = torch.tensor([[1] * 4 + [0] * 12])
    tokens = torch.randint(2, 50, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": short, "decoder_input_ids": tokens}
    other = {**batch, "decoder_input_ids": torch.cat([tokens[:, :8], tokens[:, :8]], 1)}
    half = {"decoder_attention_mask": torch.tensor([[1] * 8 + [0] * 8])}
    for mask, counts in (({}, True), (half, False)):  # tokens behind the encoder's mask count
        found = [before(model, reference, [batch, {**b, **mask}]) for b in (batch, other)]
        assert (found[0] != pytest.approx(found[1], rel=1e-4)) == counts


def test_labels_are_left_out_and_modes_and_adapters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.quantize.tune_scales._POSITIONS", 8)
    model, reference = pair()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    adapted.train()
    state = {name: p.clone() for name, p in adapted.named_parameters() if "lora" in name}
    adapted.base_model.model.model.layers[0].eval()
    modes = [m.training for m in adapted.modules()]
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids(6)]
    made: list[int] = []
    reference.register_forward_hook(lambda _, __, output: made.append(output.logits.shape[1]))
    assert tune_(adapted, reference, batches, TuningSettings(steps=2)).norms == 5
    assert set(made) == {8}, "long sequences are compared at some positions"
    assert [m.training for m in adapted.modules()] == modes
    assert all(torch.equal(adapted.get_parameter(name), p) for name, p in state.items())


def test_norms_are_told_apart_and_their_gain_is_tuned() -> None:
    gemma = Gemma3RMSNorm(6)
    with torch.no_grad():
        gemma.weight.copy_(torch.tensor([-0.9, 0.0, 0.5, 2.0, 7.0, -3.0]))
    shared = nn.LayerNorm(6)
    again = nn.LayerNorm(6)
    again.weight = shared.weight
    counts, no_norm, narrow = nn.BatchNorm1d(6), nn.PReLU(6), LlamaRMSNorm(6)
    with torch.no_grad():
        narrow.weight.copy_(torch.tensor([0.1, 0.3, 1.7, 1e-3, 9.0, 1.0]).bfloat16())
    model = nn.Sequential(gemma, shared, again, narrow, counts, no_norm)
    tuned = Tunable(model)
    weights = {name: module.weight.clone() for name, module in model.named_children()}
    assert set(tuned.norms) == {"0", "1", "2", "3"}
    assert set(tuned.factors) == {"0", "1", "3"}, "what is shared has one factor"
    f = torch.tensor([0.1, -0.1, 0.2, -0.2, 0.05, 0.3])
    with torch.no_grad():
        for factor in tuned.factors.values():
            factor.copy_(f)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain = gemma(x)
    with tuned.learning():
        outputs = [module(x) for module in (gemma, shared, again, narrow)]
    tuned.multiply_()
    torch.testing.assert_close(outputs[0], plain * (1 + f))
    for module, y in zip((gemma, shared, again, narrow), outputs, strict=True):
        near = 4e-3 if module is narrow or module is gemma else 1e-6
        torch.testing.assert_close(module(x), y, rtol=near, atol=4e-3)
    assert torch.equal(narrow.weight, narrow.weight.bfloat16().float())  # the type that held it
    assert not torch.equal(narrow.weight, weights["3"])
    assert all(torch.equal(m.weight, weights[n]) for n, m in model.named_children() if n in "45")
    assert int(counts.num_batches_tracked) == 0


def test_scales_of_few_weights_and_of_many_bits_learn_slowly() -> None:
    model = tiny_model("llama")
    rules = {"*.down_proj": "w4-channel", "*.q_proj": "w2-channel"}
    rules_of = [LayerRule(match, parse_scheme(name)) for match, name in rules.items()]
    quantize_(model, "w3-block32", rules=rules_of)
    tuned = Tunable(model)
    rates = {id(f): rate for rate, factors in tuned.by_rate(3e-3).items() for f in factors}
    assert len(rates) == len(tuned.factors)
    expected = {"layers.0.mlp.up_proj": 32**0.5 / 8, "layers.0.mlp.down_proj": 128**0.5 / 16}
    for name, rate in (expected | {"layers.0.self_attn.q_proj": 1, "norm": 1}).items():
        assert rates[id(tuned.factors[f"model.{name}"])] == pytest.approx(3e-3 * rate)


@pytest.mark.parametrize("how", ["no gain", "interrupted", "nan"])
def test_failed_tuning_changes_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair("w8-channel", architecture="gpt2")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [(type(m), "forward" in m.__dict__) for m in model.modules()]
    settings = TuningSettings(steps=3, learning_rate=0.5)
    if how == "no gain":
        report = tune_(model, reference, ids(), settings)
        assert not report.kept
        assert report.after >= report.before
    elif how == "interrupted":  # after learning
        scores = mock.Mock(side_effect=[1.0, KeyboardInterrupt])
        monkeypatch.setattr(tune_scales, "_mean_divergence", scores)
        with pytest.raises(KeyboardInterrupt):
            tune_(model, reference, ids(), settings)
    else:
        with torch.no_grad():
            reference.transformer.ln_f.weight.fill_(float("nan"))
        with pytest.raises(CalibrationError, match=r"is nan at step 1; .*lower learning rate"):
            tune_(model, reference, ids(), settings)
    assert [(type(m), "forward" in m.__dict__) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_padding_is_not_compared() -> None:
    model, reference = pair()
    tokens, is_token = ids()[:1], torch.arange(32) < 20
    full = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    padded = {"input_ids": tokens, "attention_mask": is_token[None].long()}
    other = {**padded, "input_ids": torch.where(is_token, tokens, 7)}
    found = [before(model, reference, [full, batch]) for batch in (padded, other, full)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(found[2], rel=1e-4)


def test_what_cannot_be_tuned_says_why() -> None:
    model, reference = pair()
    larger, sharing = tiny_model("llama"), copy.deepcopy(reference)
    larger.resize_token_embeddings(300)
    sharing.model.norm = model.model.norm
    for given, message in (
        ((reference, reference, ids()), "no layer of class Linear or Conv1D is packed"),
        ((model, reference, ids(1)), "at least two sequences"),
        ((model, sharing, ids()), r"share the weight of 'model\.norm'"),
        ((model, larger, ids()), r"logits are \[1, 32, 300\]"),
        ((model.model, reference.model, ids()), "LlamaModel"),
    ):
        with pytest.raises((GridError, CalibrationError), match=message):
            tune_(*given)


TUNING = ("base.tuning.steps=12", "base.tuning.learning_rate=0.01")


def test_a_recipe_tunes(recipe_for: Any, tmp_path: Path) -> None:
    def results_of(name: str, *changes: str) -> Any:
        asked = ("base.weights=w3-signed32", "adapters.0.init=qera", "adapters.0.steps=2", *changes)
        recipe = load_recipe(recipe_for("one-layer llama"), asked)
        return run(recipe, tmp_path / name, verbs=("quantize", "train"))

    plain, tuned = results_of("plain"), results_of("tuned", *TUNING)
    started, again = (found["train"]["first"]["init"]["layers"] for found in (plain, tuned))
    for path, errors in started.items():  # from what the solver lost, not from what tuning gained
        assert again[path] == pytest.approx(errors, rel=0.05)
    plain, tuned = plain["base"], tuned["base"]
    assert tuned["tuning"]["kept"]
    assert tuned["tuning"]["after"] < tuned["tuning"]["before"]
    assert plain["fingerprint"] != tuned["fingerprint"]
    assert "tuning" not in plain
    folders = [tmp_path / name / "base" for name in ("plain", "tuned")]
    one, two = map(packed, map(load_base, folders))
    assert all(torch.equal(one[name].codes, two[name].codes) for name in one)
    files, with_scales = ({path.name for path in folder.iterdir()} for folder in folders)
    assert with_scales == {*files, "tuning"}
    assert solver_scales(folders[0]) == {}
    kept = solver_scales(folders[1])
    assert kept.keys() == one.keys()
    assert all(torch.equal(kept[name], layer.tensor.parts.scale) for name, layer in one.items())
    assert any(not torch.equal(kept[name], layer.tensor.parts.scale) for name, layer in two.items())
    (folders[1] / SOLVER_SCALES).write_bytes(b"no safetensors")
    message = rf"'{folders[1]}': solver_scales.safetensors cannot be read"
    with pytest.raises(SourceError, match=message):
        solver_scales(folders[1])
    with pytest.raises(RecipeError, match="remove tuning"):
        load_recipe(recipe_for(), ("base={solver: keep, tuning: {steps: 4}}",))


@pytest.fixture
def each_step_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.quantize.tune_scales._SECONDS_BETWEEN", 0)
    monkeypatch.setattr("qwlora.quantize.tune_scales._TIMES_WRITING", 0)


def steps_run(track_stops_at: int | None, ran: list[int]) -> Any:
    """Tracks the steps that ran, and interrupts one."""

    def track(items: Any, description: str, total: int | None = None) -> Any:
        for item in items:
            if description == "tuning scales":
                if item == track_stops_at:
                    raise KeyboardInterrupt
                ran.append(item)
            yield item

    return track


@pytest.mark.usefixtures("each_step_written")
@pytest.mark.parametrize("stops_at", [1, 11])
def test_interrupted_tuning_ends_with_the_same_bits(stops_at: int, tmp_path: Path) -> None:
    solved, reference = pair(layers=1)

    def tuned(work: Path | None, stops: int | None = None, seed: int = 0) -> tuple[str, list[int]]:
        model, ran = copy.deepcopy(solved), list[int]()
        settings = TuningSettings(steps=12, learning_rate=1e-2, seed=seed)
        track = steps_run(stops, ran)
        # nine to learn from, so that they come again
        report = tune_(model, reference, ids(12), settings, work=work, track=track)
        assert report.resumed_from_step == ran[0]
        return fingerprint(model), ran

    whole = tuned(None)
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        tuned(work, stops_at)
    state = (work / "tuning.safetensors").read_bytes()
    assert tuned(work) == (whole[0], list(range(stops_at, 12)))
    (work / "tuning.safetensors").write_bytes(state)
    assert tuned(work, seed=1)[1] == list(range(12)), "another call begins"
    (work / "tuning.safetensors").write_bytes(state[: len(state) // 2])
    assert tuned(work) == whole


def test_a_state_is_of_all_that_decides() -> None:
    (solved, reference), tokens = pair(), ids(4, 1500)

    def key(
        model: nn.Module = solved, teacher: nn.Module = reference, batch: Any = None, seed: int = 0
    ) -> str:
        batches = [{"input_ids": tokens} if batch is None else batch]
        return _key(TuningSettings(seed=seed), batches, model, teacher)

    other, moved, narrow = (copy.deepcopy(m) for m in (reference, solved, reference))
    other.config.rms_norm_eps = 0.1
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with torch.no_grad():
        moved.model.norm.weight[0] += 1
        trained = get_peft_model(copy.deepcopy(solved), config)
        again = copy.deepcopy(trained)
        again.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] = 1
    later = tokens.clone()
    later[2, 700] += 1
    batches: list[Any] = [BatchEncoding({"input_ids": some[:3]}) for some in (later, tokens)]
    more = ("attention_mask", "token_type_ids")
    batches += [{"input_ids": tokens, name: tokens} for name in more]
    keys = [
        key(),
        key(seed=1),
        *(key(teacher=teacher) for teacher in (other, narrow.bfloat16())),
        *(key(model) for model in (moved, trained, again)),
        *(key(batch=batch) for batch in ({"input_ids": later}, *batches)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == key(batch=BatchEncoding({"input_ids": tokens}))


def test_what_cannot_be_tuned_is_found_before_any_work(recipe_for: Any, tmp_path: Path) -> None:
    layers = {"match": "model.layers.*", "keep": "float"}
    floats = [layers, {"match": "*embed_tokens", "weights": "w8-tensor"}]
    (tmp_path / "short.txt").write_text("a b c d e f g h " * 6)
    data = {"source": str(tmp_path / "short.txt"), "sequence_tokens": 32, "held_out": 0.5}
    data |= {"evaluation_sequences": 1, "calibration_sequences": 1}
    tuning = {"steps": 4}
    for sections, message in (
        ({"base": {"rules": floats, "tuning": tuning}}, r"packs none; set base\.tuning\.steps: 0"),
        ({"base": {"tuning": tuning}, "data": data}, "2 training sequences, but .* gives 1"),
    ):
        recipe = load_recipe(recipe_for(**sections))
        with pytest.raises((GridError, SourceError), match=message):
            run(recipe, tmp_path / "out", verbs=("quantize",))
        assert not (tmp_path / "out").exists()


def test_only_a_stage_that_tunes_depends_on_text(recipe_for: Any) -> None:
    def inputs(*changes: str) -> Any:
        recipe = load_recipe(recipe_for(), ("base.solver=rtn", *changes))
        plan = make_plan(recipe, Sources(recipe))
        return next(stage.inputs for stage in plan if stage.name == "quantize")

    shorter, tuning = "data.sequence_tokens=16", "base.tuning.steps=4"
    assert inputs(shorter) == inputs()
    assert inputs(shorter, tuning) != inputs(tuning)
