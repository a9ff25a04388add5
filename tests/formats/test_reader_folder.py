"""Safetensors folders: header checks, and stored names mapped to the model's parameters."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from qwlora.errors import SourceError
from qwlora.formats.assemble_model import load_precomputed
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint, FormatReader
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, PerTensor, Scheme

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.data for name, tensor in model.named_parameters()}


def same(checkpoint: FolderCheckpoint, model: PreTrainedModel) -> bool:
    expected = parameters(model)
    return list(checkpoint.names()) == list(expected) and all(
        torch.equal(checkpoint.read(name), value) for name, value in expected.items()
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [llama, mixtral, gpt2])
def test_what_transformers_saves_is_read_back(tmp_path: Path, model: Any) -> None:
    model().save_pretrained(tmp_path)
    assert same(FolderCheckpoint(tmp_path), model())


def test_experts_are_stored_apart_and_read_as_one(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in checkpoint.files
    assert checkpoint.read("model.layers.0.mlp.experts.gate_up_proj").shape == (3, 128, 32)  # type: ignore[union-attr]


def test_shards_and_a_missing_prefix(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(FolderCheckpoint(tmp_path / "shards"), llama())
    gpt2().transformer.save_pretrained(tmp_path / "headless")
    assert "h.0.ln_1.weight" in FolderCheckpoint(tmp_path / "headless").files
    assert same(FolderCheckpoint(tmp_path / "headless"), gpt2())


def test_tied_weights_count_once_under_either_name(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    for stored in (
        {"lm_head.weight": table},
        {"lm_head.weight": table, "model.embed_tokens.weight": table.clone()},
    ):
        save_file({**tensors, **stored}, tmp_path / "model.safetensors")
        assert same(FolderCheckpoint(tmp_path), model)
    save_file(
        {**tensors, "lm_head.weight": table, "model.embed_tokens.weight": table + 1},
        tmp_path / "model.safetensors",
    )
    checkpoint = FolderCheckpoint(tmp_path)
    with pytest.raises(
        SourceError,
        match=r"config.json ties 'model.embed_tokens.weight' and 'lm_head.weight', but the files hold different values",
    ):
        checkpoint.read("model.embed_tokens.weight")
    with pytest.raises(
        SourceError, match=r"'lm_head.weight' is not a parameter of LlamaForCausalLM"
    ):
        checkpoint.read("lm_head.weight")


@pytest.mark.parametrize("offset", [-8, -7])
def test_tied_integers_that_differ_in_their_offset(tmp_path: Path, offset: int) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    save_file(
        {**load_file(tmp_path / "model.safetensors"), "lm_head.weight": table},
        tmp_path / "model.safetensors",
    )
    codes, scale = torch.ones(table.shape, dtype=torch.uint8), torch.ones(64, 2)

    class Integers(FormatReader):
        def read(self, name: str) -> Any:
            if name not in ("lm_head.weight", "model.embed_tokens.weight"):
                return super().read(name)
            value = offset if name.startswith("lm_head") else -8
            offsets = torch.full((64, 2), value, dtype=torch.int32)
            return QuantizedTensor(codes, Encoding(Scheme(4, False, PerBlock(16)), scale, offsets))

    checkpoint = FolderCheckpoint(tmp_path, Integers)
    if offset == -8:
        assert isinstance(checkpoint.read("model.embed_tokens.weight"), QuantizedTensor)
        return
    with pytest.raises(SourceError, match="the files hold different values"):
        checkpoint.read("model.embed_tokens.weight")


def test_old_buffers_are_left_out(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        tmp_path / "model.safetensors",
    )
    assert same(FolderCheckpoint(tmp_path), llama())


class Quantized(FormatReader):
    """Stored tensors of which every expert is integers on one scheme."""

    def __init__(self, files: SafetensorsFiles, scheme: Scheme, only: str = "experts"):
        super().__init__(files)
        self.scheme, self.only = scheme, only

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = self.files.read(name)
        if self.only not in name:
            return value
        encoding = measure(value, self.scheme)
        return QuantizedTensor(encoding.quantize(value), encoding)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(16)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_experts_become_one_quantized_tensor(
    tmp_path: Path, granularity: Granularity, symmetric: bool
) -> None:
    """The values are those of each expert, quantized alone, joined as transformers joins floats."""
    mixtral().save_pretrained(tmp_path)
    scheme = Scheme(4, symmetric, granularity)
    checkpoint = FolderCheckpoint(tmp_path, lambda files: Quantized(files, scheme))
    floats = load_file(tmp_path / "model.safetensors")

    def expert(layer: int, index: int, part: str) -> Tensor:
        value = floats[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{part}.weight"]
        return measure(value, scheme).fake_quantize(value)

    for layer in range(2):
        fused = checkpoint.read(f"model.layers.{layer}.mlp.experts.gate_up_proj")
        down = checkpoint.read(f"model.layers.{layer}.mlp.experts.down_proj")
        assert isinstance(fused, QuantizedTensor)
        assert isinstance(down, QuantizedTensor)
        assert fused.codes.shape == (3, 128, 32)
        for i in range(3):
            assert torch.equal(
                fused.dequantize()[i], torch.cat([expert(layer, i, "w1"), expert(layer, i, "w3")])
            )
            assert torch.equal(down.dequantize()[i], expert(layer, i, "w2"))


def test_experts_of_two_kinds_are_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    checkpoint = FolderCheckpoint(
        tmp_path, lambda files: Quantized(files, Scheme(4), only="experts.1")
    )
    with pytest.raises(
        SourceError,
        match=r"'model.layers.0.mlp.experts.down_proj' is stored in several tensors.*\(.*experts.0.w2.weight is float and .*experts.1.w2.weight",
    ):
        checkpoint.read("model.layers.0.mlp.experts.down_proj")

    class Mixed(Quantized):
        def read(self, name: str) -> Tensor | QuantizedTensor:
            self.scheme = Scheme(8 if ".1." in name else 4)
            return super().read(name)

    mixed = FolderCheckpoint(tmp_path, lambda files: Mixed(files, Scheme(4), only="experts"))
    with pytest.raises(
        SourceError,
        match=r"the parts of parameter 'model.layers.0.mlp.experts.down_proj' have different schemes",
    ):
        mixed.read("model.layers.0.mlp.experts.down_proj")


TENSORS: dict[str, dict[str, Tensor | None]] = {
    "'model.norm.weight' is missing from the files": {"model.norm.weight": None},
    "'model.extra.weight' is in the files, but not in LlamaForCausalLM": {
        "model.extra.weight": torch.ones(2)
    },
    r"'model.norm.weight' has shape \[33\] in the files, but \[32\] in the model": {
        "model.norm.weight": torch.ones(33)
    },
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "num_hidden_layers is 1000000000, but models have 0 to 1,000": {"num_hidden_layers": 10**9},
    "config.json cannot be read": {"model_type": "nonesuch"},
    "vocab_size is -3, but models have 1 to 100,000,000": {"vocab_size": -3},
    "quant_method 'hqq' is not supported; gptq, awq, compressed-tensors, mlx, GGUF files and": {
        "quantization_config": {"quant_method": "hqq"}
    },
    "quantization_config must be an object, but is 'gptq'": {"quantization_config": "gptq"},
}


@pytest.mark.parametrize("message", [*TENSORS, *CONFIGURATIONS])
def test_folders_that_do_not_fit_their_configuration(tmp_path: Path, message: str) -> None:
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | TENSORS.get(message, {})
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | CONFIGURATIONS.get(message, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"a": ' + "[" * 100_000, "{"])
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(SourceError, match=r"generation_config.json' cannot be read.*remove it"):
        load_precomputed(open_checkpoint(tmp_path))


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is neither a folder nor a .gguf file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"config.json' cannot be read"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        SourceError, match=r"is quantized already \(GGUF\).*only with a float model"
    ):
        open_checkpoint(tmp_path / "model.gguf", encodings="x")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(SourceError, match=r"is quantized already \(awq\)"):
        open_checkpoint(tmp_path, encodings="x")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SourceError, match="is not a JSON object"):
        open_checkpoint(tmp_path)


# Files


def header(content: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [  # what safetensors refuses reaches the user with the file's name
        b"",
        header(b"{}", length=10**12),
        header({"a": entry()}, b"\0" * 4),
        header({"a": entry(shape=[2**40, 2**40])}, b"\0" * 8),
        header({"a": entry(), "b": entry()}, b"\0" * 8),  # they overlap
        header(b"[" * 200000),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        SourceError, match=r"model\.safetensors' is truncated, or not a safetensors file"
    ):
        SafetensorsFiles(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../outside.safetensors"}},
            "tensor 'a' is listed in '../outside.safetensors', which is not a .safetensors file in this folder",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "tensor 'a' is listed in '/etc/passwd'"),
        (
            {"weight_map": {"a": "..\\x.safetensors"}},
            "which is not a .safetensors file in this folder",
        ),
        (
            {"weight_map": {"a": "absent.safetensors"}},
            "file 'absent.safetensors', which should contain tensor 'a', is missing",
        ),
        (
            {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}},
            r"two\.safetensors': 'c' is also in another shard",
        ),
        ({"weight_map": {"a": 3}}, "weight_map must give the file name of each tensor"),
        ({}, "weight_map must give"),
        (
            b'{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}',
            "has the key 'a' twice",
        ),
        (b"[]", "is not a JSON object"),
    ],
)
def test_damaged_indices(tmp_path: Path, index: Any, message: str) -> None:
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(
        index if isinstance(index, bytes) else json.dumps(index).encode()
    )
    with pytest.raises(SourceError, match=message):
        SafetensorsFiles(tmp_path)


def test_no_files_or_pickles(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"has neither model.safetensors nor model.safetensors.index.json"
    ):
        SafetensorsFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds pytorch_model.bin, a pickle"):
        SafetensorsFiles(tmp_path)


def test_the_only_file_under_another_name_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").rename(
        tmp_path / "gptq_model-4bit-128g.safetensors.index.json"
    )
    assert same(FolderCheckpoint(tmp_path), llama())
    (tmp_path / "another.safetensors.index.json").write_text("{}")
    with pytest.raises(
        SourceError,
        match=r"another.safetensors.index.json, gptq_model-4bit-128g.safetensors.index.json\. Rename",
    ):
        SafetensorsFiles(tmp_path)
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    with pytest.raises(
        SourceError,
        match=r"has neither .* files: model-00001-of.* more\. Rename .* to model.safetensors,",
    ):
        SafetensorsFiles(tmp_path)


def test_reading_one_tensor_leaves_the_rest_on_disk(tmp_path: Path) -> None:
    """200 MB in the file; resident memory grows by what is read."""
    save_file(
        {
            "large": torch.zeros(50_000_000),
            "small": torch.arange(3),
            "half": torch.ones(2, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    files = SafetensorsFiles(tmp_path)
    assert files.read("small").tolist() == [0, 1, 2]
    assert (files.dtype("half"), files.shape("large"), sorted(files.names())) == (
        "BF16",
        (50_000_000,),
        ["half", "large", "small"],
    )
    assert files.read("half").dtype == torch.bfloat16
    mapped = files.read("large")
    assert resident_bytes() - before < 20_000_000
    assert mapped.shape == (50_000_000,)
    with pytest.raises(SourceError, match="there is no tensor 'other' in its safetensors files"):
        files.read("other")
