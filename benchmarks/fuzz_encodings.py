"""Fuzz the reader of encodings files: mutated files must end in a value or in the project's own error, in bounded time and memory.

    python benchmarks/fuzz_encodings.py [SECONDS [SEED]]       600 seconds by default; writes benchmarks/results/fuzz_encodings.json

Starts from the files that AIMET wrote (tests/encodings/files) and breaks them at the level of bytes and of JSON: bits, cut ends, repeated pieces, values of
other types, absurd numbers, keys renamed, dropped and added, deep nesting. What reads well is also written back in every version that holds it.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import machine_line
from qwlora.encodings import convert, read_encodings, validate, write_encodings
from qwlora.errors import QwloraError

ROOT = Path(__file__).parent.parent
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    -1e-320,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "int4",
    "é\0",
    [],
    {},
    [[]],
    [[1], [2, 3]],
    {"a": 1},
    [1e99] * 100,
]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value."""
    yield path
    for key, child in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        yield from places(child, (*path, key))


def break_json(content: Any, chance: random.Random) -> Any:
    """One to four changes of values, keys or structure."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 4)):
        *parents, last = chance.choice([p for p in places(content) if p])
        node = content
        for key in parents:
            node = node[key]
        match chance.randrange(5):
            case 0:
                node[last] = copy.deepcopy(chance.choice(ODD))
            case 1:
                del node[last]
            case 2 if isinstance(node, dict):
                node[
                    chance.choice(
                        ["name", "scale", "offset", "block_size", "axis", "y_scale", "x" * 50]
                    )
                ] = node.pop(last)
            case 3 if isinstance(node[last], int | float):
                node[last] = node[last] * chance.choice([-1, 0, 2, 1e30, 0.5])
            case _:
                node[last] = [copy.deepcopy(node[last])] * chance.randint(0, 3)
        if not any(places(content)) or not [p for p in places(content) if p]:
            break
    return content


def break_bytes(text: bytes, chance: random.Random) -> bytes:
    """Bits, cut ends, repeated pieces, deep nesting."""
    data = bytearray(text)
    match chance.randrange(4):
        case 0:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case 1:
            del data[chance.randrange(len(data)) :]
        case 2:
            at, length = chance.randrange(len(data)), chance.randint(1, 200)
            data[at:at] = data[at : at + length] * chance.randint(1, 50)
        case _:
            at = chance.randrange(len(data))
            data[at:at] = b"[" * chance.randint(1, 20000)
    return bytes(data)


def use(path: Path) -> str:
    """Read, validate and convert one file; the kind of ending."""
    try:
        validate(path)
        file = read_encodings(path)
    except QwloraError:
        return "refused"
    for version in VERSIONS:
        try:
            write_encodings(convert(file, version, lossy=True), path.with_suffix(".out"))
        except QwloraError:
            continue
        read_encodings(path.with_suffix(".out"))
    return "read"


def main(seconds: float = 600, seed: int = 0) -> None:
    chance = random.Random(seed)
    originals = [
        p.read_bytes()
        for p in sorted((ROOT / "tests" / "encodings" / "files").glob("*"))
        if p.suffix in (".json", ".encodings")
    ]
    contents = [json.loads(text) for text in originals]
    endings: Counter[str] = Counter()
    slowest, began = 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.encodings"
        while time.perf_counter() - began < seconds:
            mutated = (
                break_bytes(chance.choice(originals), chance)
                if chance.random() < 0.4
                else json.dumps(break_json(chance.choice(contents), chance)).encode()
            )
            path.write_bytes(mutated)
            start = time.perf_counter()
            try:
                endings[use(path)] += 1
            except Exception as error:
                (ROOT / "fuzz-failure.encodings").write_bytes(mutated)
                raise SystemExit(
                    f"{type(error).__name__}: {error}; the file is kept as fuzz-failure.encodings"
                ) from error
            slowest = max(slowest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = {
        "machine": machine_line(),
        "seconds": seconds,
        "seed": seed,
        "files": dict(endings),
        "slowest_seconds": round(slowest, 3),
        "peak_rss_bytes": peak,
    }
    print(record)
    (ROOT / "benchmarks" / "results" / "fuzz_encodings.json").write_text(
        json.dumps(record, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
