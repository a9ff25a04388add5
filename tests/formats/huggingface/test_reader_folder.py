"""Safetensors folders: header checks, and stored names mapped to the model's parameters."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from formats.models import (
    edit_json,
    edit_tensors,
    equal,
    gpt2,
    llama,
    mixtral,
    read_integers,
    values_of,
)
from qwlora.errors import SourceError
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint, FormatReader
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.model_source import load_model
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme

FILE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def same(folder: Path, model: PreTrainedModel) -> bool:
    checkpoint = FolderCheckpoint(folder)
    expected = {name: tensor.data for name, tensor in model.named_parameters()}
    return checkpoint.names() == list(expected) and equal(values_of(checkpoint)[0], expected)


@pytest.mark.parametrize("model", [llama, mixtral, gpt2])
def test_what_transformers_saves_is_read_back(tmp_path: Path, model: Any) -> None:
    model().save_pretrained(tmp_path)
    if model is llama:  # a buffer that older versions stored
        old = "model.layers.0.self_attn.rotary_emb.inv_freq"
        edit_tensors(tmp_path / FILE, {old: torch.ones(8)})
    assert same(tmp_path, model())


def test_shards_and_a_missing_prefix(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(tmp_path / "shards", llama())
    llama().save_pretrained(tmp_path / "shards")  # removes the shards, but not their index
    assert same(tmp_path / "shards", llama())
    gpt2().transformer.save_pretrained(tmp_path / "headless")
    assert "h.0.ln_1.weight" in FolderCheckpoint(tmp_path / "headless").files
    assert same(tmp_path / "headless", gpt2())


def test_tied_weights_count_once_under_either_name(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    table = load_file(tmp_path / FILE)[EMBEDDING]
    for stored in (None, table.clone()):
        edit_tensors(tmp_path / FILE, {HEAD: table, EMBEDDING: stored})
        assert same(tmp_path, model)
    edit_tensors(tmp_path / FILE, {EMBEDDING: table + 1})
    checkpoint = FolderCheckpoint(tmp_path)
    with pytest.raises(SourceError, match=f"ties '{EMBEDDING}' and '{HEAD}', but the .* different"):
        checkpoint.read(EMBEDDING)
    with pytest.raises(SourceError, match=f"'{HEAD}' is not a parameter of LlamaForCausalLM"):
        checkpoint.read(HEAD)


class Quantized(FormatReader):
    """Stored tensors some of which are integers, on the schemes of parts of their names."""

    def __init__(self, files: SafetensorsFiles, schemes: dict[str, Scheme]):
        super().__init__(files)
        self.schemes = schemes

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = self.files.read(name)
        for part, scheme in self.schemes.items():
            if part in name:
                encoding = measure(value, scheme)
                return QuantizedTensor(encoding.quantize(value), encoding)
        return value


def quantized(folder: Path, **schemes: Scheme) -> FolderCheckpoint:
    return FolderCheckpoint(folder, lambda files: Quantized(files, schemes))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(16)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_experts_become_one_quantized_tensor(tmp_path, granularity, symmetric) -> None:
    """The values are those of each expert, quantized alone, joined as transformers joins floats."""
    mixtral(num_hidden_layers=1).save_pretrained(tmp_path)
    scheme = Scheme(4, symmetric, granularity)
    checkpoint, floats = quantized(tmp_path, experts=scheme), load_file(tmp_path / FILE)

    def expert(index: int, part: str) -> Tensor:
        value = floats[f"model.layers.0.block_sparse_moe.experts.{index}.{part}.weight"]
        return measure(value, scheme).fake_quantize(value)

    fused, down = (
        read_integers(checkpoint, f"model.layers.0.mlp.experts.{name}")
        for name in ("gate_up_proj", "down_proj")
    )
    assert fused.codes.shape == (3, 128, 32)
    for i in range(3):
        assert torch.equal(fused.dequantize()[i], torch.cat([expert(i, "w1"), expert(i, "w3")]))
        assert torch.equal(down.dequantize()[i], expert(i, "w2"))


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    down, four = "model.layers.0.mlp.experts.down_proj", Scheme(4, False, PerBlock(16))
    mixtral().save_pretrained(tmp_path / "experts")
    with pytest.raises(SourceError, match=rf"'{down}' .*0.w2.weight is float and .*experts.1"):
        quantized(tmp_path / "experts", **{"experts.1": four}).read(down)
    schemes = {"experts.1.": Scheme(8), "experts": four}
    with pytest.raises(SourceError, match=f"parameter '{down}' have different schemes"):
        quantized(tmp_path / "experts", **schemes).read(down)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / FILE
    table = load_file(file)[EMBEDDING]
    edit_tensors(file, {HEAD: table})
    read_integers(quantized(tmp_path / "tied", lm_head=four, embed=four), EMBEDDING)
    edit_tensors(file, {HEAD: table + 0.01})  # the same scales, other offsets
    with pytest.raises(SourceError, match="the files hold different values"):
        quantized(tmp_path / "tied", lm_head=four, embed=four).read(EMBEDDING)


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
EXTRA = {"model.extra": torch.ones(2)}


@pytest.mark.parametrize(
    ("read", "tensors", "config", "message"),
    [
        (open_checkpoint, {NORM: None}, {}, f"'{NORM}' is missing from the files"),
        (open_checkpoint, EXTRA, {}, "'model.extra' is in the files, but not in LlamaFor"),
        (open_checkpoint, {NORM: torch.ones(33)}, {}, rf"'{NORM}' has shape \[33\] .* but \[32\]"),
        (open_checkpoint, {}, {"model_type": "nonesuch"}, "config.json cannot be read"),
        (open_checkpoint, {}, {"vocab_size": -3}, "vocab_size is -3, but models have 1 to 100,000"),
        (open_checkpoint, {}, {"quantization_config": {"quant_method": "hqq"}}, "method 'hqq'"),
        (open_checkpoint, {}, {"quantization_config": "gptq"}, "_config must be an object"),
        # as floats in transformers, which would fill what is missing with random numbers
        (load_model, {DOWN: torch.ones(3, 3)}, {}, "tensors of other shapes"),
        (load_model, {DOWN: None}, {}, f"missing from its files: {DOWN} of Llama.*download it"),
        (load_model, EXTRA, {}, "its files hold model.extra, which LlamaForCausalLM lacks"),
        (load_model, {}, {"num_hidden_layers": 1}, r"model\.layers\.1\..* and 4 more"),
        (load_model, {}, {"quantization_config": {"quant_method": "gptq"}}, "integers.*: keep"),
    ],
)
def test_folders_that_do_not_fit_their_configuration(
    tmp_path, read, tensors, config, message
) -> None:
    llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path / FILE, tensors)
    edit_json(tmp_path / "config.json", **config)
    with pytest.raises(SourceError, match=message):
        read(str(tmp_path))


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    for content in ("[]", '{"a": ' + "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(SourceError, match=r"generation_config.json' cannot be read.*remove it"):
            load_precomputed(open_checkpoint(tmp_path))


AWQ = '{"quantization_config": {"quant_method": "awq"}}'


@pytest.mark.parametrize(
    ("path", "encodings", "config", "message"),
    [
        ("absent", None, None, "is neither a folder nor a .gguf file"),
        ("", None, None, "config.json' cannot be read"),
        ("model.gguf", "x", None, r"is quantized already \(GGUF\)"),
        ("", "x", AWQ, r"quantized already \(awq\)"),
        ("", None, "[1]", "is not a JSON object"),
    ],
)
def test_paths_that_are_no_checkpoint(tmp_path, path, encodings, config, message) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path / path, encodings)


def header(content: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [  # what safetensors refuses reaches the user with the file's name
        b"",
        header(b"{}", length=10**12),
        header({"a": ENTRY}, b"\0" * 4),
        header({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"\0" * 8),
        header({"a": ENTRY, "b": ENTRY}, b"\0" * 8),  # they overlap
        header(b"[" * 200000),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match=r"model\.safetensors' is truncated, or not a safetens"):
        SafetensorsFiles(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


OUTSIDE = "which is not a .safetensors file in this folder"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../outside.safetensors"}}', OUTSIDE),
        ('{"weight_map": {"a": "one/../../outside.safetensors"}}', OUTSIDE),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', OUTSIDE),
        ('{"weight_map": {"a": "absent.safetensors"}}', OUTSIDE),
        ('{"weight_map": {"a": "/etc/passwd"}}', f"lists '/etc/passwd', {OUTSIDE}"),
        (
            '{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}',
            "'c' is also in another",
        ),
        ('{"weight_map": {"a": 3}}', "weight_map must give the file name of each tensor"),
        ('{"weight_map": null}', "weight_map must give"),
        ('{"weight_map": {"a": "x", "a": "x"}}', "the key 'a' twice"),
        ("[]", "is not a JSON object"),
    ],
)
def test_damaged_indices(tmp_path: Path, index: str, message: str) -> None:
    llama().config.save_pretrained(tmp_path)
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    (tmp_path / f"{FILE}.index.json").write_text(index)
    for read in (SafetensorsFiles, load_model):
        with pytest.raises(SourceError, match=message):
            read(str(tmp_path))


def test_the_only_file_under_another_name_is_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has neither model.safetensors nor model.saf.*index"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds pytorch_model.bin, a pickle"):
        SafetensorsFiles(tmp_path)
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    other = tmp_path / "gptq_model-4bit-128g.safetensors.index.json"
    (tmp_path / f"{FILE}.index.json").rename(other)
    assert same(tmp_path, llama())
    (tmp_path / "another.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match=rf"another.safetensors.index.*, {other.name}"):
        SafetensorsFiles(tmp_path)
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    with pytest.raises(SourceError, match=r"has neither .* files: model-00001-of.* more"):
        SafetensorsFiles(tmp_path)


def test_reading_one_tensor_leaves_the_rest_on_disk(tmp_path: Path) -> None:
    """200 MB in the file; resident memory grows by what is read."""
    small, half = torch.arange(3), torch.ones(2, dtype=torch.bfloat16)
    tensors = {"large": torch.zeros(50_000_000), "small": small, "half": half}
    save_file(tensors, tmp_path / FILE)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    files = SafetensorsFiles(tmp_path)
    assert files.read("small").tolist() == [0, 1, 2]
    assert (files.dtype("half"), files.shape("large")) == ("BF16", (50_000_000,))
    assert sorted(files.names()) == ["half", "large", "small"]
    assert files.read("half").dtype == torch.bfloat16
    mapped = files.read("large")
    assert resident_bytes() - before < 20_000_000
    assert mapped.shape == (50_000_000,)
    with pytest.raises(SourceError, match="there is no tensor 'other' in its safetensors files"):
        files.read("other")
