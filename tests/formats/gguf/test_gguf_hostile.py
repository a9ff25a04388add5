"""Damaged and hostile GGUF files give one clear error each, without large allocations."""

import contextlib
import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from formats.gguf_models import metadata_of, stored_shapes, write_file
from formats.models import llama
from qwlora.errors import SourceError
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.formats.model_source import load_model, load_tokenizer

CONFIG = llama(vocab_size=16, num_hidden_layers=1, tie_word_embeddings=True).config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file of a few kilobytes."""
    kinds = {"attn_q": "Q4_0", "attn_k": "Q8_0", "ffn_up": "Q4_1"}
    kinds |= {"ffn_down": "Q5_0", "ffn_gate": "Q5_1"}
    kind_of = lambda name, _: kinds.get(name.split(".")[-2], "F32")  # noqa: E731
    path, metadata = tmp_path_factory.mktemp("a") / "a.gguf", metadata_of("llama", CONFIG, "llama")
    write_file(path, "llama", metadata, stored_shapes("llama", CONFIG), kind_of, tokens=16)
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
PERCEPTRON = pair("general.architecture", 8, string("perceptron"))


def number(key: str, kind: int, layout: str, value: float) -> bytes:
    return pair(key, kind, struct.pack(f"<{layout}", value))


def file_of(pairs: list[bytes], tensors: list[bytes], version: int = 3, counts: Any = ()) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(pairs))))
    return b"".join([head, *pairs, *tensors, bytes(4096)])


HUGE = 2**60
# By what is said about them: whole files; pairs of a file without tensors; pairs that come after
# the architecture; tensors of a llama.
FILES: dict[str, bytes] = {
    "too short for a GGUF file": b"",
    "begins with b'GGML', but a GGUF file": b"GGML" + bytes(60),
    "GGUF version 1 is not supported, 2 and 3 are": file_of([], [], version=1),
    "the file is big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    r"asks for \d+ more bytes, but the file has \d+": file_of([ARCHITECTURE], [], counts=(HUGE, 1)),
    "metadata key '' occurs twice|asks for": file_of([ARCHITECTURE], [], counts=(0, 2**63)),
    r"tensor '' has the invalid shape \[\]": file_of([ARCHITECTURE], [], counts=(3, 1)),
    "architecture 'perceptron'": file_of([PERCEPTRON], [tensor("a", (4,))]),
    f"llama.block_count is {2**31}, but the file has 1 tensors": file_of(
        [ARCHITECTURE, number("llama.block_count", 4, "I", 2**31)], [tensor("a", (4,))]
    ),
}
PAIRS: dict[str, bytes] = {
    f"asks for {HUGE} more bytes, but the file has": pair("a", 8, struct.pack("<Q", HUGE)),
    f"asks for {8 * HUGE} more bytes": pair("a", 9, struct.pack("<IQ", 12, HUGE)),
    r"asks for \d+ more": pair("a", 9, struct.pack("<IQ", 8, HUGE)),  # strings
    "array 'a' holds values of type 9, but only": pair("a", 9, struct.pack("<IQ", 9, 2)),
    "value of 'a' is of type 77, which GGUF does not have": pair("a", 77, b""),
    r"a string at byte \d+ is not UTF-8": string(b"\xff\xfe") + struct.pack("<II", 4, 1),
    "general.architecture does not name the model": number("a", 4, "I", 1),
}
MORE_PAIRS: dict[str, bytes] = {
    "metadata key 'general.architecture' occurs twice": ARCHITECTURE,
    "general.alignment is 24, not a power of two": number("general.alignment", 4, "I", 24),
    r"one of 3 files .*llama-gguf-split": number("split.count", 2, "H", 3),
    f"dimension_count is {2**40}, but": number("llama.rope.dimension_count", 10, "Q", 2**40),
    "llama.rope.freq_base is nan": number("llama.rope.freq_base", 6, "f", np.nan),
}
TENSORS: dict[str, list[bytes]] = {
    rf"tensor 'a' has the invalid shape \[{HUGE}, {HUGE}\]": [tensor("a", (HUGE, HUGE))],
    r"tensor 'a' \(F32, shape .* but the file has \d+ and its": [tensor("a", (HUGE,))],
    r"tensor 'a' has the invalid shape \[4, 0\]": [tensor("a", (0, 4))],
    f"asks for {8 * 2**31 + 12} more bytes": [string("a") + struct.pack("<I", 2**31)],
    f"would be at bytes {2**63 + 128} to": [tensor("a", (4,), 0, 2**63)],
    "its tensors start at multiples of 32": [tensor("a", (4,), 0, 4)],
    "is of type 999, which the installed gguf package": [tensor("a", (32,), 999)],
    r"tensor 'a' has the invalid shape \[2, 33\]; rows of Q4_0": [tensor("a", (33, 2), 2)],
    "tensor 'a' occurs twice": [tensor("a", (4,)), tensor("a", (4,))],
}
HEADERS = {
    **FILES,
    **{message: file_of([value], []) for message, value in PAIRS.items()},
    **{message: file_of([ARCHITECTURE, value], []) for message, value in MORE_PAIRS.items()},
    **{message: file_of([ARCHITECTURE], values) for message, values in TENSORS.items()},
}


@pytest.mark.parametrize("message", HEADERS)
def test_headers(tmp_path: Path, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[message])
    with pytest.raises(SourceError, match=message) as caught:
        GgufCheckpoint(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, 1500, 7), *range(1500, len(good) - 64, 211)]:
        path.write_bytes(good[:length])
        with pytest.raises(SourceError, match=r"truncated or damaged|too short"):
            GgufFile(path)


def count(key: str, value: int) -> bytes:
    return f"llama.{key}".encode() + struct.pack("<II", 4, value)


HEADS = "attention.head_count_kv"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"0.attn_v.", b"7.attn_v.", "'blk.7.attn_v.weight' is in the files, but not in Llama"),
        (count(HEADS, 1), count(HEADS, 2), r"k_proj.weight' is \[32, 32\].* 512 values"),
        (count("block_count", 1), count("block_count", 2), "missing from the files, but needed"),
        (count("block_count", 1), count("block_count", 10**6), "block_count is 1000000, but the"),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, good, old, new, message) -> None:
    path = tmp_path / "m.gguf"
    assert good.replace(old, new) != good
    path.write_bytes(good.replace(old, new))
    readers: list[Any] = [GgufCheckpoint]
    if "1000000" in message:  # transformers must not expand it either
        readers += [lambda path: load_model(str(path)), lambda path: load_tokenizer(str(path))]
    for opening in readers:
        with pytest.raises(SourceError, match=message):
            opening(path)


def test_a_damaged_scale_is_found_when_its_tensor_is_read(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    start = GgufFile(path).tensors["blk.0.ffn_down.weight"].start
    path.write_bytes(good[:start] + struct.pack("<e", np.nan) + good[start + 2 :])
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(SourceError, match=r"'blk.0.ffn_down.weight' \(Q5_0.* 1 of 64 are not, nan"):
        checkpoint.read("model.layers.0.mlp.down_proj.weight")
    checkpoint.read("model.layers.0.mlp.up_proj.weight")


EXTREMES = [0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
VALUES = st.sampled_from(EXTREMES) | st.integers(0, 255)
PLACES = st.tuples(st.integers(0, 1600), VALUES, st.sampled_from([1, 4, 8]))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(PLACES, min_size=1, max_size=3), cut=st.booleans())
@example(places=[(8, 2**63, 8)], cut=False)
@example(places=[(467, 255, 1)], cut=False)  # an embedding of 548 GB
def test_damaged_files_are_read_or_refused(tmp_path, good, places, cut) -> None:
    content, path = bytearray(good), tmp_path / "m.gguf"
    for place, value, width in places:
        content[place : place + width] = (value % 256**width).to_bytes(width, "little")
    path.write_bytes(content[: -places[0][0]] if cut and places[0][0] else content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with contextlib.suppress(SourceError):
        checkpoint = GgufCheckpoint(path)
        for name in checkpoint.names():
            checkpoint.read(name)
    # kilobytes, for a file of a few
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.monotonic() - began < 20
