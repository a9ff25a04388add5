"""Damaged and hostile GGUF files give one clear error each, without large allocations."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from formats.gguf_models import metadata_of, stored_shapes, write_file
from qwlora.errors import SourceError
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.formats.model_source import load_model, load_tokenizer

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=16,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file of a few kilobytes."""
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "Q8_0",
        "ffn_up": "Q4_1",
        "ffn_down": "Q5_0",
        "ffn_gate": "Q5_1",
    }
    path = write_file(
        tmp_path_factory.mktemp("good") / "good.gguf",
        "llama",
        metadata_of("llama", CONFIG, "llama"),
        stored_shapes("llama", CONFIG),
        lambda name, shape: next(
            (kind for part, kind in kinds.items() if f".{part}." in name), "F32"
        ),
        tokens=16,
    )
    assert len(GgufCheckpoint(path).names()) == 11
    return path.read_bytes()


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", 8, string("llama"))


def file_of(
    pairs: list[bytes],
    tensors: list[bytes],
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    return (
        struct.pack("<4sIQQ", b"GGUF", version, tensor_count, pair_count)
        + b"".join(pairs)
        + b"".join(tensors)
        + bytes(data)
    )


HUGE = 2**60
HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too short for a GGUF file"),
    "magic": (b"GGML" + bytes(60), r"begins with b'GGML', but a GGUF file"),
    "version": (file_of([], [], version=1), "GGUF version 1 is not supported, 2 and 3 are"),
    "big-endian": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
        "the file is big-endian, convert it with gguf_convert_endian.py",
    ),
    "tensor count": (
        file_of([ARCHITECTURE], [], counts=(HUGE, 1)),
        rf"claims {HUGE} tensors, more than its \d+ bytes can hold",
    ),
    "pair count": (
        file_of([ARCHITECTURE], [], counts=(0, 2**63)),
        rf"claims {2**63} metadata pairs, more than",
    ),
    "count off by some": (
        file_of([ARCHITECTURE], [], data=256, counts=(3, 1)),
        r"is not a valid tensor name|asks for \d+ more bytes",
    ),
    "key length": (
        file_of([struct.pack("<Q", HUGE)], []),
        rf"a key of {HUGE} bytes at byte \d+; at most 65535",
    ),
    "string length": (
        file_of([pair("a", 8, struct.pack("<Q", HUGE))], []),
        rf"asks for {HUGE} more bytes, but the file has",
    ),
    "array length": (
        file_of([pair("a", 9, struct.pack("<IQ", 12, HUGE))], []),
        rf"asks for {8 * HUGE} more bytes",
    ),
    "string array length": (
        file_of([pair("a", 9, struct.pack("<IQ", 8, HUGE))], []),
        rf"asks for {8 * HUGE} more bytes",
    ),
    "array of arrays": (
        file_of([pair("a", 9, struct.pack("<IQ", 9, 2))], []),
        "array 'a' holds values of type 9, but only numbers and strings",
    ),
    "type of value": (
        file_of([pair("a", 77, b"")], []),
        "value of 'a' is of type 77, which GGUF does not have",
    ),
    "key twice": (
        file_of([ARCHITECTURE, ARCHITECTURE], []),
        "metadata key 'general.architecture' occurs twice",
    ),
    "key not UTF-8": (
        file_of([string(b"\xff\xfe") + struct.pack("<II", 4, 1)], []),
        r"a key at byte \d+ is not UTF-8",
    ),
    "no architecture": (
        file_of([pair("a", 4, struct.pack("<I", 1))], []),
        "general.architecture does not name the model",
    ),
    "alignment": (
        file_of([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 24))], []),
        "general.alignment is 24, not a power of two",
    ),
    "alignment zero": (
        file_of([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 0))], []),
        "general.alignment is 0, not a power of two",
    ),
    "split": (
        file_of([ARCHITECTURE, pair("split.count", 2, struct.pack("<H", 3))], []),
        r"one of 3 files .* join them first \(llama-gguf-split --merge\)",
    ),
    "shape": (
        file_of([ARCHITECTURE], [tensor("a", (HUGE, HUGE))]),
        rf"tensor 'a' has the invalid shape \[{HUGE}, {HUGE}\]",
    ),
    "shape beyond the file": (
        file_of([ARCHITECTURE], [tensor("a", (HUGE,))]),
        r"tensor 'a' \(F32, shape .* but the file has \d+ and its tensors start",
    ),
    "empty shape": (
        file_of([ARCHITECTURE], [tensor("a", (0, 4))]),
        r"tensor 'a' has the invalid shape \[4, 0\]",
    ),
    "axes": (
        file_of([ARCHITECTURE], [string("a") + struct.pack("<I", 2**31)]),
        rf"tensor 'a' has {2**31} axes; 1 to 4 are allowed",
    ),
    "offset": (
        file_of([ARCHITECTURE], [tensor("a", (4,), 0, 2**63)]),
        rf"would be at bytes {2**63 + 128} to",
    ),
    "offset unaligned": (
        file_of([ARCHITECTURE], [tensor("a", (4,), 0, 4)]),
        "its tensors start at multiples of 32",
    ),
    "type of tensor": (
        file_of([ARCHITECTURE], [tensor("a", (32,), 999)]),
        "tensor 'a' is of type 999, which the installed gguf package does not know",
    ),
    "rows and blocks": (
        file_of([ARCHITECTURE], [tensor("a", (33, 2), 2)]),
        r"tensor 'a' has rows of 33 values, which blocks of 32 \(Q4_0\) do not divide",
    ),
    "tensor twice": (
        file_of([ARCHITECTURE], [tensor("a", (4,)), tensor("a", (4,))]),
        "tensor 'a' occurs twice",
    ),
    "name with a path": (
        file_of([ARCHITECTURE], [tensor("../../etc/passwd", (4,))]),
        r"'../../etc/passwd' is not a valid tensor name",
    ),
    "name with a backslash": (
        file_of([ARCHITECTURE], [tensor("a\\b", (4,))]),
        "is not a valid tensor name",
    ),
    "name with a zero": (
        file_of([ARCHITECTURE], [tensor("a\0b", (4,))]),
        "is not a valid tensor name",
    ),
    "name empty": (file_of([ARCHITECTURE], [tensor("", (4,))]), "is not a valid tensor name"),
    "name too long": (
        file_of([ARCHITECTURE], [tensor("a" * 65, (4,))]),
        "a tensor name of 65 bytes",
    ),
    "block count": (
        file_of(
            [ARCHITECTURE, pair("llama.block_count", 4, struct.pack("<I", 2**31))],
            [tensor("a", (4,))],
        ),
        rf"llama.block_count is {2**31}, but the file has 1 tensors",
    ),
    "head size": (
        file_of(
            [ARCHITECTURE, pair("llama.rope.dimension_count", 10, struct.pack("<Q", 2**40))], []
        ),
        rf"dimension_count is {2**40}, but",
    ),
    "nan": (
        file_of([ARCHITECTURE, pair("llama.rope.freq_base", 6, struct.pack("<f", np.nan))], []),
        "llama.rope.freq_base is nan",
    ),
    "unknown model": (
        file_of([pair("general.architecture", 8, string("perceptron"))], [tensor("a", (4,))]),
        r"architecture 'perceptron'",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        GgufCheckpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "opening",
    [GgufCheckpoint, lambda path: load_model(str(path)), lambda path: load_tokenizer(str(path))],
)
def test_counts_are_checked_before_transformers_reads_them(
    tmp_path: Path, good: bytes, opening: Callable[[Path], object]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        good.replace(
            b"llama.block_count" + struct.pack("<II", 4, 1),
            b"llama.block_count" + struct.pack("<II", 4, 10**6),
        )
    )
    with pytest.raises(
        SourceError, match=r"llama.block_count is 1000000, but the file has 11 tensors"
    ):
        opening(path)


def test_every_truncation_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, 1500, 7), *range(1500, len(good) - 64, 211)]:
        path.write_bytes(good[:length])
        with pytest.raises(SourceError, match=r"truncated or damaged|too short|more than its"):
            GgufFile(path)


def test_tensors_that_are_not_the_models(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    cases: list[tuple[Callable[[bytes], bytes], str]] = [
        (
            lambda content: content.replace(b"blk.0.attn_v.weight", b"blk.0.attn_w.weight"),
            "blk.0.attn_w.weight: not in LlamaForCausalLM",
        ),
        (
            lambda content: content.replace(b"blk.0.attn_v.weight", b"blk.7.attn_v.weight"),
            "blk.7.attn_v.weight: not in LlamaForCausalLM",
        ),
        (
            lambda content: content.replace(
                b"llama.attention.head_count_kv" + struct.pack("<II", 4, 1),
                b"llama.attention.head_count_kv" + struct.pack("<II", 4, 2),
            ),
            r"parameter 'model.layers.0.self_attn.k_proj.weight' is \[32, 32\], but its tensors \(blk.0.attn_k.weight\) have 512 values",
        ),
        (
            lambda content: content.replace(
                b"llama.block_count" + struct.pack("<II", 4, 1),
                b"llama.block_count" + struct.pack("<II", 4, 2),
            ),
            r"missing from the file",
        ),
    ]
    for change, message in cases:
        assert change(good) != good
        path.write_bytes(change(good))
        with pytest.raises(SourceError, match=message):
            GgufCheckpoint(path)


def test_a_damaged_scale_is_found_when_its_tensor_is_read(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    start = GgufFile(path).tensors["blk.0.ffn_down.weight"].start
    path.write_bytes(good[:start] + struct.pack("<e", np.nan) + good[start + 2 :])
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(
        SourceError,
        match=r"tensor 'blk.0.ffn_down.weight' \(Q5_0, parameter 'model.layers.0.mlp.down_proj.weight'\): 1 of 64 scales are nan",
    ):
        checkpoint.read("model.layers.0.mlp.down_proj.weight")
    checkpoint.read("model.layers.0.mlp.up_proj.weight")


extremes = st.sampled_from(
    [0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 1600), extremes | st.integers(0, 255), st.sampled_from([1, 4, 8])),
        min_size=1,
        max_size=3,
    ),
    cut=st.booleans(),
)
@example(places=[(8, 2**63, 8)], cut=False)
def test_damaged_files_are_read_or_refused(
    tmp_path: Path, good: bytes, places: list[tuple[int, int, int]], cut: bool
) -> None:
    content, path = bytearray(good), tmp_path / "m.gguf"
    for place, value, width in places:
        content[place : place + width] = (value % 256**width).to_bytes(width, "little")
    path.write_bytes(content[: -places[0][0]] if cut and places[0][0] else content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        checkpoint = GgufCheckpoint(path)
        for name in checkpoint.names():
            checkpoint.read(name)
    except SourceError:
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, (
        "kilobytes for a file of a few"
    )
    assert time.monotonic() - began < 20
