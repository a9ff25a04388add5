"""docs/fingerprint.md is enough to compute a fingerprint: examples/read_base.py, which does not use
this package, agrees with it on every kind of base."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

from conftest import flip_bit
from docs.snippets import ROOT
from formats.models import gpt2, llama, mixtral
from qwlora import PerBlock, PerTensor, Scheme, fingerprint, save_base
from qwlora.formats.base_files import BaseWriter
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.packing import pack
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import is_packable, pack_at_, packed_weights, tensor_out_in
from qwlora.nn.fingerprint import combined_fingerprint, tensor_digest
from qwlora.nn.packed_layer import packed_layers

READER = ROOT / "examples/read_base.py"
VECTORS: dict[str, Any] = json.loads((ROOT / "docs/fingerprint-vectors.json").read_text())
reader = runpy.run_path(str(READER))


def base(model: nn.Module, scheme: Scheme) -> nn.Module:
    """`model` with everything packed that can be."""
    names = [f"{path}.weight" for path, module in model.named_modules() if is_packable(module)]
    names += [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    for name in names:
        if name not in packed_weights(model):  # as the one it is tied to
            weight = tensor_out_in(model, name).detach().float()
            encoding = measure(weight, scheme)
            pack_at_(model, name, QuantizedTensor(encoding.quantize(weight), encoding))
    return model


GRIDS = {
    **{name: parse_scheme(name) for name in ("w4-block32", "w4-lpbq16", "w4-signed16")},
    "w3-channel-asymmetric": parse_scheme("w3-channel-asymmetric"),
    "w8-tensor": Scheme(8, True, PerTensor()),
    "w5-tensor-asymmetric": Scheme(5, False, PerTensor()),
    "w7-block16-asymmetric": Scheme(7, False, PerBlock(16)),
    "float minimum": Scheme(6, False, PerBlock(32), float_offset=True),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_reader_agrees_on_every_grid(name: str, tmp_path: Path) -> None:
    model = base(llama(tie_word_embeddings=True, num_hidden_layers=1), GRIDS[name])
    assert packed_weights(model)["lm_head.weight"].is_tied
    identity = save_base(model, tmp_path)
    assert reader["fingerprint"](tmp_path) == identity == fingerprint(model)
    for layer in packed_layers(model).values():
        packed = layer.tensor.parts.packed.numpy()
        unpacked = reader["codes"](packed, layer.scheme.bitwidth, layer.tensor.count)
        assert np.array_equal(unpacked, layer.codes.numpy())


def test_the_reader_agrees_on_every_kind_of_model(tmp_path: Path) -> None:
    models = [mixtral(num_hidden_layers=1), gpt2(n_layer=1), llama(num_hidden_layers=1).bfloat16()]
    without_configuration = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))
    for number, model in enumerate([*models, without_configuration]):
        folder = tmp_path / str(number)
        assert save_base(base(model, GRIDS["w4-block32"]), folder) == reader["fingerprint"](folder)


def test_the_reader_sees_any_changed_byte_and_reads_shards(tmp_path: Path) -> None:
    model = base(llama(num_hidden_layers=1), GRIDS["w4-block32"])
    writer = BaseWriter(tmp_path, shard_bytes=4_000)
    writer.add(model)
    assert writer.finish(model, None, "") == reader["fingerprint"](tmp_path)
    flip_bit(sorted(tmp_path.glob("base-*.safetensors"))[2], -1)
    assert reader["fingerprint"](tmp_path) != fingerprint(model)


@pytest.mark.parametrize("vector", VECTORS["tensors"], ids=lambda v: v["name"])
def test_vectors_of_tensors(vector: dict[str, Any], tmp_path: Path) -> None:
    stored = np.frombuffer(bytes.fromhex(vector["bytes"]), vector["numpy"])
    kind = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}
    file = tmp_path / "one.safetensors"
    file.write_bytes(save({vector["name"]: stored.reshape(vector["shape"])}))
    ((name, *rest),) = reader["stored_tensors"](file)
    assert reader["tensor_digest"](name, vector["grid"], *rest) == vector["digest"]
    tensor = torch.tensor(stored, dtype=kind[vector["numpy"]]).view(vector["shape"])
    assert tensor_digest(vector["name"], vector["grid"], tensor) == vector["digest"]


@pytest.mark.parametrize("vector", VECTORS["packing"], ids=lambda v: f"{v['bitwidth']} bits")
def test_vectors_of_packing(vector: dict[str, Any]) -> None:
    bitwidth, numbers = vector["bitwidth"], vector["codes"]
    stored = np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8)[None]
    assert reader["codes"](stored, bitwidth, len(numbers)).tolist() == [numbers]
    packed = pack(torch.tensor([numbers], dtype=torch.uint8), bitwidth)
    assert bytes(packed.flatten().tolist()).hex() == vector["bytes"]


def test_the_vector_of_a_base(tmp_path: Path) -> None:
    stored = {
        v["name"]: np.frombuffer(bytes.fromhex(v["bytes"]), v["numpy"]).reshape(v["shape"])
        for v in VECTORS["tensors"]
    }
    (tmp_path / "base.safetensors").write_bytes(save(stored))
    layer = {"shape": [2, 4], **json.loads(VECTORS["tensors"][0]["grid"])}
    record = {"configuration": VECTORS["configuration"], "layers": {"proj": layer}}
    (tmp_path / "base.json").write_text(json.dumps(record))
    digests = {vector["name"]: vector["digest"] for vector in VECTORS["tensors"]}
    combined = combined_fingerprint(digests, json.loads(VECTORS["configuration"]))
    assert reader["fingerprint"](tmp_path) == combined == VECTORS["fingerprint"]
