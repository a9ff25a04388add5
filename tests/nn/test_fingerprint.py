import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from formats.models import llama
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, SignedBlock
from qwlora.nn import pack_module
from qwlora.nn.fingerprint import (
    adapter_fingerprint,
    base_tensors,
    fingerprint,
    keep_fingerprint_,
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
        self.norm = nn.LayerNorm(16)
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


def test_what_a_forward_pass_does_not_keep_leaves_it_alone(model):
    before = fingerprint(model)
    model.fc.cache.add_(1)
    model.train()
    model.norm.weight.requires_grad_(False)
    assert fingerprint(model) == before


def test_an_adapter_leaves_it_alone(model):
    peft = pytest.importorskip("peft")
    before = fingerprint(model)
    names = set(base_tensors(model))
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    assert any("lora_A" in name for name, _ in wrapped.named_parameters())
    assert fingerprint(wrapped) == fingerprint(wrapped.base_model.model) == before
    assert set(base_tensors(wrapped)) == names
    wrapped.base_model.model.norm.bias.data[0] += 1
    assert fingerprint(wrapped) != before


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
    peft = pytest.importorskip("peft")
    layers = ["layers.0", "layers.1", "words"]
    config = peft.LoraConfig(
        r=2, target_modules=layers, use_dora=True, lora_bias=False, modules_to_save=["head"]
    )
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


def test_an_adapter_is_known_whatever_its_name():
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


def test_an_adapter_that_is_switched_off_is_none():
    wrapped = with_adapters("first", "second")
    before = adapter_fingerprint(wrapped)
    with wrapped.disable_adapter():
        assert adapter_fingerprint(wrapped) is None
    assert adapter_fingerprint(wrapped) == before
    assert adapter_fingerprint(Layered()) is None


def test_the_scaling_of_an_adapter_counts_and_not_that_of_others():
    wrapped = with_adapters("first", "second")
    before = adapter_fingerprint(wrapped)
    scaling = wrapped.base_model.model.layers[0].scaling
    scaling["second"] *= 2
    assert adapter_fingerprint(wrapped) == before
    scaling["first"] *= 2
    assert adapter_fingerprint(wrapped) != before


FIRST = "2e2f91c2cd0d4b7fbdf81797c88868edc550ae58ae6995df3c854ef31589a06c"
BLOCKS = '{"axis": null, "bitwidth": 4, "block_size": 8, "symmetric": false}'
CHANNELS = '{"axis": 1, "bitwidth": 8, "block_size": null, "symmetric": true}'
STORED = {
    BLOCKS: "ead917f80736cd65710498c7315afc1a499873e137a83068e23414752feb522f",
    CHANNELS: "da8cc7f926a3a714298da8affb91967e985e5c816f6e216432ebc6c3ecd9a9de",
}


def test_the_fingerprint_of_an_adapter_stays_over_versions():
    assert adapter_fingerprint(with_adapters("first")) == FIRST


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


def test_tied_tensors_are_listed_once(model):
    names = set(base_tensors(model))
    packed = {"fc.packed", "fc.scale", "fc.zero_point", "fc.bias"}
    assert names == packed | {"norm.weight", "norm.bias", "head.weight"}
    assert base_tensors(model)["fc.packed"][0] == Scheme(4, False, PerBlock(8)).to_text()
    assert base_tensors(model)["fc.bias"][0] == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
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


def test_what_the_configuration_says_besides_leaves_it_alone():
    model = llama()
    before = fingerprint(model)
    named = {"_name_or_path": "elsewhere", "architectures": ["LlamaForCausalLM"]}
    model.config.update({**named, "use_cache": False, "pad_token_id": 3, "dtype": "bfloat16"})
    model.config.transformers_version = "5.24.9"
    assert fingerprint(model) == before
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model) != before


def test_a_key_that_a_newer_library_adds_with_its_default_leaves_it_alone():
    @dataclass(repr=False)
    class Newer(LlamaConfig):
        sink_scale: float = 1.0
        other: int | None = None

    model = llama()
    before = fingerprint(model)
    newer = Newer(**model.config.to_dict())
    assert newer.to_dict()["sink_scale"] == 1.0
    model.config = newer
    assert fingerprint(model) == before
    model.config.sink_scale = 2.0
    assert fingerprint(model) != before


def test_a_value_is_the_same_in_a_wider_type():
    model = llama().bfloat16()
    before = fingerprint(model)
    assert fingerprint(model.float()) == before
    model.model.norm.weight.data[3] += 2**-20
    assert fingerprint(model) != before


def test_a_kept_fingerprint_ends_with_the_first_change():
    model = llama()
    identity = fingerprint(model)
    model.bfloat16()
    assert fingerprint(model) != identity, "these weights do not fit bfloat16"
    keep_fingerprint_(model, fingerprint(model), identity)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == identity
    model.model.norm.weight.data[0] += 1
    assert fingerprint(model) != identity
