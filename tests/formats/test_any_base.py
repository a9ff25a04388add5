"""Bases of any module: what is saved loads again, or is refused before the old base goes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qwlora
from conftest import byte_tokenizer, packed_model, tiny_model
from formats.models import mixtral
from qwlora.errors import CalibrationError, FingerprintError, GridError, QwloraWarning, SourceError
from qwlora.formats.base_files import replacing_base
from qwlora.nn import is_packed

X = torch.linspace(-1, 1, 2 * 32).view(2, 32)


class Row(nn.Module):
    """Two linear layers around something of the test's."""

    def __init__(self, middle: nn.Module | None = None, last: float = 1e-5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.middle = middle or nn.Identity()
        self.norm = nn.LayerNorm(32, eps=last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.last(torch.tanh(self.middle(self.first(x)))))


class Inside(nn.Module):
    """A part that is called like one of PEFT's, and a parameter of the same name as the part's."""

    def __init__(self, name: str):
        super().__init__()
        self.add_module(name, nn.Linear(32, 32))
        self.part, self.bias = name, nn.Parameter(torch.ones(32) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.part)(x) + self.bias


class Diffuser(Row):
    """Looks like a class of diffusers."""

    __module__ = "diffusers.models"

    def save_config(self, folder: Path) -> None:
        raise AssertionError


class OwnDiffuser(Diffuser):
    """Its code is not in diffusers, so only the caller can build it."""


class Odd(nn.Module):
    """A layer under two names, values that parameters share without being one, strides, float64, a
    3-D parameter of the module that is saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = (nn.Linear(32, 32) for _ in range(3))
        self.again = self.one
        self.mix = nn.Parameter(torch.randn(3, 32, 32) / 6)
        self.two.weight = nn.Parameter(self.one.weight.data)
        row = torch.randn(64)
        self.between = nn.Parameter(row[16:48])
        self.one.bias, self.two.bias = nn.Parameter(row[:32]), nn.Parameter(row[32:])
        self.last.bias = nn.Parameter(torch.ones(1).expand(32))
        self.register_buffer("mean", torch.full((64,), 0.1, dtype=torch.float64)[::2])
        self.register_buffer("order", torch.arange(32).flip(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x * self.between - self.mean.float())[..., self.order] @ self.mix.sum(0)
        return self.last(torch.tanh(self.again(self.two(torch.tanh(self.one(x))))))


MODELS: dict[str, tuple[Any, list[Any]]] = {
    "a layer called lora_head": (lambda: Row(Inside("lora_head")), []),
    "a part called base_layer": (lambda: Row(Inside("base_layer")), []),
    "a part called original_module": (lambda: Row(Inside("original_module")), []),
    "data parallelism": (lambda: nn.DataParallel(Row()), []),
    "odd, packed": (Odd, []),
    "odd, mostly float": (Odd, [qwlora.LayerRule(name, None) for name in ("one", "two", "mix")]),
    "a subclass of a model of diffusers": (OwnDiffuser, []),
}


@pytest.mark.parametrize(("make", "rules"), MODELS.values(), ids=MODELS)
def test_what_is_saved_is_loaded(make: Any, rules: Any, tmp_path: Path) -> None:
    model = make().eval()
    qwlora.quantize_(model, "w4-block16", "rtn", rules=rules)
    identity = qwlora.save_base(model, str(tmp_path / "base"))
    loaded = qwlora.load_base(tmp_path / "base", model=getattr(make(), "module", make()))
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
    assert qwlora.fingerprint(loaded) == qwlora.fingerprint(model) == identity
    assert not hasattr(loaded, "save_pretrained")
    inner = getattr(model, "module", model)
    target = next(n for n, m in inner.named_modules() if isinstance(m, nn.Linear))
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    trained = get_peft_model(inner, config).eval()
    qwlora.save_adapter(trained, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(qwlora.load_adapter(loaded, tmp_path / "adapter")(X), trained(X))


def test_a_float_model_with_other_settings_is_refused(tmp_path: Path) -> None:
    def build(last: float = 1e-5) -> Row:
        model = Row(last=last).eval()
        model.register_buffer("order", torch.arange(32), persistent=False)
        return model

    model = build()
    qwlora.quantize_(model, "w4-block16", "rtn")
    qwlora.save_base(model, tmp_path)
    with pytest.raises(FingerprintError, match=r"norm\.eps: default -> 0\.5"):
        qwlora.load_base(tmp_path, model=build(0.5))
    with pytest.raises(SourceError, match="is a Row that cannot be built"):
        qwlora.load_base(tmp_path)
    # a buffer that is not saved needs data in the float model
    assert torch.equal(qwlora.load_base(tmp_path, model=build()).order, model.order)
    with torch.device("meta"):
        empty = build()
    with pytest.raises(SourceError, match="order are on the meta device"):
        qwlora.load_base(tmp_path, model=empty)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda m: m.add_module("extra", nn.Linear(4, 4)), "extra.bias is not in the model"),
        (
            lambda m: m.model.norm.add_module("inner", nn.Linear(64, 64, bias=False)),
            r"layer 'model\.norm\.inner' of base\.json",
        ),
        (lambda m: m.model.layers.__delitem__(1), "layers.1.input_layernorm.weight is missing"),
    ],
)
def test_a_model_that_its_configuration_does_not_describe_needs_the_float_model(
    change: Any, fact: str, tmp_path: Path
) -> None:
    model, floats = tiny_model("llama"), tiny_model("llama")
    change(model), change(floats)
    qwlora.quantize_(model, "w4-block4", "rtn")
    with pytest.warns(QwloraWarning, match=fact):
        identity = qwlora.save_base(model, tmp_path)
    with pytest.raises(SourceError, match="a LlamaForCausalLM that cannot be built"):
        qwlora.load_base(tmp_path)
    assert qwlora.fingerprint(qwlora.load_base(tmp_path, model=floats)) == identity


def test_a_base_that_is_refused_leaves_the_old_one(tmp_path: Path) -> None:
    qwlora.save_base(packed_model("llama"), tmp_path / "old", byte_tokenizer())
    before, bad = files(tmp_path), tiny_model("llama")
    with pytest.raises(GridError, match="has no packed layer"):
        qwlora.save_base(bad, tmp_path / "old")
    qwlora.quantize_(bad, "w3-block32", "rtn")
    bad.model.norm.weight.data[3] = torch.nan
    for folder in ("old", "new/below"):
        with pytest.raises(CalibrationError, match=r"model\.norm\.weight contains 1 values"):
            qwlora.save_base(bad, tmp_path / folder)
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_base_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    first, second = packed_model("llama", layers=2), packed_model("llama", layers=1)
    qwlora.save_base(first, tmp_path, byte_tokenizer())
    for name in ("README.md", "base-lora.safetensors"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "base-00007.safetensors").write_text("of a larger one")
    old = set(files(tmp_path))
    qwlora.save_base(second, tmp_path)
    tokenizer = {name for name in old if "token" in name}
    assert tokenizer
    assert set(files(tmp_path)) == old - tokenizer - {"base-00007.safetensors"}
    assert (tmp_path / "base-lora.safetensors").read_text() == "mine"
    assert qwlora.fingerprint(qwlora.load_base(tmp_path)) == qwlora.fingerprint(second)
    with replacing_base(tmp_path, shard_bytes=20_000) as writer:
        writer.add(first)
        writer.finish(first, None, "x")
    assert not (tmp_path / "base.safetensors").exists()
    assert qwlora.fingerprint(qwlora.load_base(tmp_path)) == qwlora.fingerprint(first)


def test_nothing_of_others_is_deleted(tmp_path: Path) -> None:
    """Where no base was, and where a stranger's record lists what is none of a base."""
    mine = (
        tmp_path / "mine",
        tmp_path / "base/adapters/mine",
        tmp_path / "none/base-00001.safetensors",
    )
    for file in (*mine, tmp_path / "none" / "base.safetensors.index.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    record = {"files": dict.fromkeys(("adapters", ".", "../mine", str(mine[0])))}
    (tmp_path / "base" / "base.json").write_text(json.dumps(record))
    for folder in ("base", "none"):
        qwlora.save_base(packed_model("llama"), tmp_path / folder)
    assert [file.read_text() for file in mine] == ["mine"] * 3


def test_a_record_is_the_same_in_whatever_order_modules_are_written(tmp_path: Path) -> None:
    model = mixtral()
    qwlora.quantize_(model, "w4-block16", "rtn")
    names = [name for name, _ in model.model.named_children()]
    for folder, order in (("a", names), ("b", names[::-1])):
        with replacing_base(tmp_path / folder) as writer:
            for name in order:
                writer.add(model.model.get_submodule(name), f"model.{name}")
            writer.add(model.lm_head, "lm_head")
            writer.finish(model, None, "x")
    records = [(tmp_path / folder / "base.json").read_bytes() for folder in "ab"]
    assert records[0] == records[1]
    layers = list(json.loads(records[0])["layers"])
    assert layers == [p for p, m in model.named_modules() if is_packed(m)]


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for seed, folder in enumerate(("a", "b")):
        qwlora.save_adapter(get_peft_model(packed_model("llama", seed), config), tmp_path / folder)
    model: Any = packed_model("llama")
    with pytest.raises(FingerprintError):
        qwlora.load_adapter(model, tmp_path / "b")
    adapted = qwlora.load_adapter(model, tmp_path / "a")
    ids = torch.arange(8)[None]
    wanted = adapted(ids).logits
    with pytest.raises(SourceError, match=r"already has an adapter called 'default'"):
        qwlora.load_adapter(adapted, tmp_path / "a")
    with pytest.raises(FingerprintError):
        qwlora.load_adapter(adapted, tmp_path / "b", adapter_name="b")
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(adapted(ids).logits, wanted)
