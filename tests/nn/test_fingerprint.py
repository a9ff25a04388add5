import copy
from dataclasses import dataclass

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from formats.models import llama
from qwlora import quantize_
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, SignedBlock
from qwlora.nn import pack_module
from qwlora.nn.fingerprint import (
    adapter_fingerprint,
    base_settings,
    base_tensors,
    changed_since,
    fingerprint,
    keep_fingerprint_,
    remember_base_,
    tensor_digest,
    tensor_digests,
)
from qwlora.nn.packed_layer import PackedLayer
from qwlora.system.parameter_names import adapter_of, is_adapter_name


def packed(encoding: Encoding, weight: torch.Tensor) -> PackedLayer:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    nn.init.zeros_(linear.bias)
    return pack_module(linear, QuantizedTensor(encoding.quantize(weight), encoding))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(8, 16)
        encoding = measure(weight, Scheme(4, False, PerBlock(8)))
        self.fc = packed(encoding, weight)
        self.fc.register_buffer("cache", torch.zeros(3), persistent=False)
        self.norm = nn.LayerNorm(16, eps=0.25)
        self.head = nn.Linear(16, 4, bias=False)
        self.tied = nn.Linear(16, 4, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.norm(x))


@pytest.fixture
def model():
    return Model().eval()


def move_layer(model):
    model.dense = model.fc
    del model.fc


CHANGES = {
    "a code": lambda m: m.fc.packed[3, 2].bitwise_xor_(1),
    "the last bit of a scale": lambda m: m.fc.scale[0, 0].nextafter_(torch.tensor(torch.inf)),
    "an offset": lambda m: m.fc.zero_point[-1, -1].bitwise_xor_(1),
    "a float": lambda m: m.norm.weight.data[5].add_(2**-23),
    "the sign of zero": lambda m: m.norm.bias.data[0].fill_(-0.0),
    "the layout": lambda m: setattr(m.fc, "scheme", Scheme(4, True, PerBlock(8))),
    "the kind of blocks": lambda m: setattr(m.fc, "scheme", Scheme(4, True, SignedBlock(8))),
    "the channels": lambda m: setattr(m.fc, "scheme", Scheme(4, False, PerChannel(0))),
    "the axis of the channels": lambda m: setattr(m.fc, "scheme", Scheme(4, False, PerChannel(1))),
    "a name": move_layer,
    "a type but no byte": lambda m: setattr(m.fc, "zero_point", m.fc.zero_point.view(torch.int8)),
    "a shape": lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight.data.view(4, 4))),
    "tensors of one shape": lambda m: m.norm._parameters.update(
        weight=m.norm.bias, bias=m.norm.weight
    ),
}


def test_any_change_of_the_base_changes_it():
    identities = {fingerprint(Model())}
    for change in CHANGES.values():
        model = Model()
        with torch.no_grad():
            change(model)
        identities.add(fingerprint(model))
    assert len(identities) == len(CHANGES) + 1
    values = torch.arange(8.0)  # vectors are hashed by value, however they lie in memory
    for strided in (values[::2], values[:1].expand(4), values.flip(0)):
        assert tensor_digest("x", "", strided) == tensor_digest("x", "", strided.clone())


def test_adapters_and_wrappers_leave_it_alone(model):
    before, names = fingerprint(model), set(base_tensors(model))
    # tied tensors are listed once
    packed = {"fc.packed", "fc.scale", "fc.zero_point", "fc.bias"}
    assert names == packed | {"norm.weight", "norm.bias", "head.weight"}
    assert base_tensors(model)["fc.packed"][0] == Scheme(4, False, PerBlock(8)).to_text()
    model.fc.cache.add_(1)
    model.train()
    model.norm.weight.requires_grad_(False)
    assert fingerprint(model) == before
    lora = {"target_modules": ["head"], "modules_to_save": ["norm"], "init_lora_weights": False}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **lora))
    for wrapped in (nn.DataParallel(model), torch.compile(model), adapted):
        assert fingerprint(wrapped) == before
        assert set(base_tensors(wrapped)) == names
    assert fingerprint(adapted.base_model.model) == before
    adapted.base_model.model.norm.original_module.bias.data[0] += 1
    assert fingerprint(adapted) != before
    inside = nn.Sequential(torch.compile(nn.Linear(8, 8)))
    assert set(base_tensors(inside)) == {"0.weight", "0.bias"}


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.words = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.layers[1](self.layers[0](self.words(ids))))


def with_adapters(*names):
    """Every kind of parameter that PEFT's LoRA has, its values counted from the adapter's place among `names`."""
    layers = ["layers.0", "layers.1", "words"]
    config = peft.LoraConfig(r=2, target_modules=layers, use_dora=True, modules_to_save=["head"])
    wrapped = peft.get_peft_model(Layered(), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for place, name in enumerate(names):
            for path, p in wrapped.named_parameters():
                is_of = path.endswith((f".{name}", f".{name}.weight", f".{name}.bias"))
                if is_adapter_name(path) and is_of:
                    p.copy_((torch.arange(p.numel()) / 64 + place).view_as(p))
    return wrapped


def test_an_adapter_is_known_whatever_its_name_by_values_and_scaling():
    both = with_adapters("0", "1")  # which are parts of the paths of layers too
    for place, name in enumerate(("0", "1")):
        both.set_adapter(name)
        ordinary = with_adapters("first", "second")
        ordinary.set_adapter(("first", "second")[place])
        assert adapter_fingerprint(both) == adapter_fingerprint(ordinary)
    before = adapter_fingerprint(both)
    paths = [path for path, _ in both.named_parameters() if is_adapter_name(path)]
    parts = {part for path in paths for part in path.split(".")}
    kinds = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    assert parts > kinds | {"lora_magnitude_vector", "modules_to_save"}
    for path in paths:
        p = both.get_parameter(path)
        p.data.neg_()
        assert (adapter_fingerprint(both) != before) is (adapter_of(path) == "1"), path
        p.data.neg_()
    scaling = both.base_model.model.layers[0].scaling
    scaling["0"] *= 2
    assert adapter_fingerprint(both) == before
    scaling["1"] *= 2
    assert adapter_fingerprint(both) != before
    with both.disable_adapter():
        assert adapter_fingerprint(both) is None
    assert adapter_fingerprint(Layered()) is None
    assert adapter_fingerprint(with_adapters("first")) == FIRST  # over versions


FIRST = "2e2f91c2cd0d4b7fbdf81797c88868edc550ae58ae6995df3c854ef31589a06c"
BLOCKS = '{"axis": null, "bitwidth": 4, "block_size": 8, "symmetric": false}'
CHANNELS = '{"axis": 1, "bitwidth": 8, "block_size": null, "symmetric": true}'
STORED = {
    BLOCKS: "ead917f80736cd65710498c7315afc1a499873e137a83068e23414752feb522f",
    CHANNELS: "da8cc7f926a3a714298da8affb91967e985e5c816f6e216432ebc6c3ecd9a9de",
}


@pytest.mark.parametrize(
    ("scheme", "text"),
    [(Scheme(4, False, PerBlock(8)), BLOCKS), (Scheme(8, True, PerChannel(1)), CHANNELS)],
)
def test_the_fingerprint_of_a_base_stays_over_versions(
    scheme: Scheme, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hashes the scheme's JSON, so rewording `str(scheme)` changes nothing."""
    weight, shape = torch.arange(128.0).view(8, 16).sin(), scheme.scale_shape((8, 16))
    offset = torch.full(shape, scheme.symmetric_offset, dtype=torch.int32)
    layer = packed(Encoding(scheme, torch.full(shape, 0.25), offset), weight)
    monkeypatch.setattr(Scheme, "__str__", lambda self: "in other words")
    assert scheme.to_text() == text
    assert fingerprint(nn.Sequential(layer)) == STORED[text]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    ],
    ids=str,
)
def test_what_the_configuration_says_of_the_computation_changes_it_though_no_tensor_does(changes):
    plain, changed = llama(), llama(**changes)
    tensors = (model.state_dict().values() for model in (plain, changed))
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.equal(plain(ids).logits, changed(ids).logits)
    assert fingerprint(plain) != fingerprint(changed)
    # that of every outermost part counts
    parts = [
        nn.ModuleDict({"towers": nn.ModuleDict({"a": llama(), "b": model})})
        for model in (plain, llama(), llama(use_cache=False), changed)
    ]
    one, same, besides, other = map(fingerprint, parts)
    assert one == same == besides != other


def test_what_a_configuration_says_besides_leaves_it_alone():
    @dataclass(repr=False)
    class Newer(LlamaConfig):
        sink_scale: float = 1.0
        other: int | None = None

    model = llama()
    before = fingerprint(model)
    named = {"_name_or_path": "elsewhere", "architectures": ["LlamaForCausalLM"]}
    model.config.update({**named, "use_cache": False, "pad_token_id": 3, "dtype": "bfloat16"})
    model.config.transformers_version = "5.24.9"
    assert fingerprint(model) == before
    # a key that a newer library adds, with its default
    model.config = Newer(**model.config.to_dict())
    assert model.config.to_dict()["sink_scale"] == 1.0
    assert fingerprint(model) == before
    model.config.sink_scale = 2.0
    assert fingerprint(model) != before
    # a model of transformers alone hashes its configuration as it is, so fingerprints stay
    assert base_settings(llama()) == base_settings(nn.DataParallel(llama()))
    assert "hidden_size" in base_settings(llama())


def test_a_kept_fingerprint_ends_with_the_first_change():
    model = llama()
    identity = fingerprint(model)
    model.bfloat16()
    narrow = fingerprint(model)
    assert narrow != identity, "these weights do not fit bfloat16"
    keep_fingerprint_(model, narrow, identity)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == identity
    model.model.norm.weight.data[0] += 1
    assert fingerprint(model) != identity
    wide = llama().bfloat16()
    before = fingerprint(wide)
    assert fingerprint(wide.float()) == before, "a value is the same in a wider type"
    wide.model.norm.weight.data[3] += 2**-20
    assert fingerprint(wide) != before


class Gated(nn.Module):
    """A module of the user's, with a number of its own."""

    def __init__(self, factor: float = 0.5, names: tuple[str, ...] = ("a",)):
        super().__init__()
        self.linear, self.factor, self.names = nn.Linear(8, 8), factor, names
        self._calls = 0

    def forward(self, x):
        self._calls += 1
        return self.linear(x) * self.factor


class Halved(nn.Dropout):
    """A class of dropout that computes something without dropping."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def seeded(*modules):
    """The modules in a row; those of equal shapes have equal tensors."""
    model = nn.Sequential(*modules).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = (torch.arange(tensor.numel()) + len(name)).view_as(tensor).sin()
                tensor.copy_(values + (1.5 if "var" in name else 0.1))
    return model


ROW = torch.linspace(-2, 3, 16).view(2, 8)
IMAGE, ROWS = torch.randn(1, 4, 9, 9), torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    ("one", "other", "x"),
    [
        (nn.LayerNorm(8), nn.LayerNorm(8, eps=0.25), ROW),
        (nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), IMAGE),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.5), IMAGE),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2), IMAGE),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2), IMAGE),
        (nn.AvgPool2d(3), nn.AvgPool2d(3, stride=1), IMAGE),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), IMAGE),
        (nn.ReLU(), nn.GELU(), ROW),
        (nn.GELU(), nn.GELU(approximate="tanh"), ROW),
        (nn.LeakyReLU(), nn.LeakyReLU(0.5), ROW),
        (nn.LSTM(8, 4), nn.LSTM(8, 4, batch_first=True), ROWS),
        (nn.RNN(8, 4), nn.RNN(8, 4, nonlinearity="relu"), ROWS),
        (nn.PairwiseDistance(), nn.PairwiseDistance(1), (ROW, ROW.flip(0))),
        (nn.EmbeddingBag(4, 8), nn.EmbeddingBag(4, 8, padding_idx=1), torch.tensor([[0, 1]])),
        (Halved(), Halved(factor=3), ROW),
        (nn.MultiheadAttention(8, 1), nn.MultiheadAttention(8, 2), (ROWS, ROWS, ROWS)),
        (
            nn.TransformerEncoderLayer(8, 2, 16),
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
            ROWS,
        ),
        (Gated(), Gated(0.75), ROW),
        (nn.Sequential(nn.Tanh(), Gated()), nn.Sequential(nn.Sigmoid(), Gated()), ROW),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_settings_of_modules_count_if_they_change_outputs(one, other, x):
    models = [seeded(one), seeded(other)]
    inputs = x if isinstance(x, tuple) else (x,)
    apart = [m[0](*inputs) for m in models]
    apart = [y[0] if isinstance(y, tuple) else y for y in apart]
    assert apart[0].shape != apart[1].shape or not torch.equal(*apart)
    assert fingerprint(models[0]) != fingerprint(models[1])
    assert fingerprint(models[0]) == fingerprint(copy.deepcopy(models[0]))


INERT = {
    "dropout": lambda m: setattr(m[1], "p", 0.75),
    "another class of dropout": lambda m: m.__setitem__(1, nn.Identity()),
    "in place": lambda m: setattr(m[2], "inplace", True),
    "the momentum of statistics": lambda m: setattr(m[3], "momentum", 0.5),
    "training mode": lambda m: m.train(),
    "a private attribute": lambda m: setattr(m[0], "_calls", 7),
    "an attribute without a value": lambda m: setattr(m[0], "cache", None),
    "a dict that JSON cannot hold": lambda m: setattr(m[0], "shapes", {(1, 2): 3, "a": 4}),
    "a container": lambda m: setattr(m, "extra", nn.ModuleList()),
}


@pytest.mark.parametrize("change", INERT.values(), ids=INERT)
def test_settings_that_change_no_output_do_not_count(change):
    model = seeded(Gated(), nn.Dropout(0.5), nn.ReLU(), nn.BatchNorm1d(8))
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["base_layer", "lora_gate", "modules_to_save", "original_module"])
def test_parts_with_the_names_of_wrappers_are_part_of_the_base(name):
    model = seeded(nn.Module())
    model[0].add_module(name, nn.Linear(4, 4))
    model[0].register_parameter("bias", nn.Parameter(torch.zeros(4)))
    before = fingerprint(model)
    assert {f"0.{name}.weight", f"0.{name}.bias", "0.bias"} == set(base_tensors(model))
    model[0].get_submodule(name).bias.data[1] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("0", ["0.linear.bias", "0.factor: 0.5 -> 0.25"]),
        ("0.linear", ["0.linear.bias"]),
        ("", ["0.linear.bias", "0.factor: 0.5 -> 0.25", "1.eps: default -> 0.5"]),
    ],
)
def test_changes_of_a_part_that_was_remembered_are_named(part, changes):
    model = nn.Sequential(Gated(), nn.LayerNorm(8))
    remember_base_(model.get_submodule(part))
    assert changed_since(model, tensor_digests(model)) == []
    model[0].linear.bias.data[0] += 1
    model[0].factor = 0.25
    model[1].eps = 0.5
    assert changed_since(model, tensor_digests(model)) == changes
    remember_base_(model)  # of the whole, which is now what counts
    assert changed_since(model, tensor_digests(model)) == []
    model[0].factor = 3
    assert changed_since(model, tensor_digests(model)) == ["0.factor: 0.25 -> 3"]
    remember_base_(model[0])  # of a part, later
    assert changed_since(model, tensor_digests(model)) == []
    model[1].bias.data[0] += 1
    assert changed_since(model, tensor_digests(model)) == ["1.bias"]


def test_settings_are_those_of_the_float_model() -> None:
    class Own(nn.Linear):
        """A linear layer with a number of its own."""

        factor = 1

    class Configured(nn.Module):
        """A model with a configuration, as diffusers has them."""

        def __init__(self, width: int = 4, scale: float = 1.0):
            super().__init__()
            self.config = {"_class_name": "Configured", "width": width, "scale": scale}
            self.norm = nn.LayerNorm(width, eps=0.5)

        def register_to_config(self) -> None: ...

    def model() -> nn.Module:
        own, shared = Own(32, 32), nn.LayerNorm(32, eps=0.25)
        own.factor = 2
        inside = nn.Sequential(shared)
        return nn.Sequential(own, shared, inside, nn.Linear(32, 8), nn.Embedding(4, 8, 1))

    packed = model()
    quantize_(packed, "w4-block32", "rtn")
    # a module under two names is listed once; the rows of a padding id are read like others
    assert base_settings(packed) == base_settings(model())
    assert base_settings(packed).keys() == {"0", "1"}
    assert base_settings(packed)["0"] == {"factor": 2}
    assert base_settings(Configured()) == {}  # without defaults
    assert base_settings(Configured(scale=2.0)) == {"scale": 2.0}
