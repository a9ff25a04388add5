"""What happens to files: flipped bits, cuts, losses and swaps."""

import os
import random
import re
from pathlib import Path

PLACES = 6
HOWS = (*(f"flip {i}" for i in range(PLACES)), "cut", "empty", "delete", "swap")


def kind_of(file: Path, job: Path) -> str:
    """The path without what differs between files of one kind: adapter names, keys, numbers."""
    path = str(file.relative_to(job))
    path = re.sub(r"(?<=/)(first|second)(?=[/.])", "NAME", path)
    path = re.sub(r"(?<=-)[0-9a-f]{16}(?=/)", "KEY", path)
    path = re.sub(r"/[^/]*\.(layers|h|blocks)\.[^/]*(?=\.(safetensors|json))", "/LAYER", path)
    return re.sub(r"(?<=[-_./])\d+(?=[-_./])", "N", path)


def kinds(job: Path, inside: str = ".") -> dict[str, list[Path]]:
    """Every file of a directory, relative to it, by kind."""
    found: dict[str, list[Path]] = {}
    for file in sorted((job / inside).rglob("*")):
        if file.is_file():
            found.setdefault(kind_of(file, job), []).append(file.relative_to(job))
    return found


def damage(file: Path, how: str, generator: random.Random) -> str:
    """Damage a file; returns what was done, empty if this damage is not possible."""
    content = file.read_bytes()
    if how == "delete":
        file.unlink()
        return "deleted"
    if how == "swap":
        return _swap(file, content)
    if not content:
        return ""
    if how == "empty":
        file.write_bytes(b"")
        return "emptied"
    if how == "cut":
        length = generator.randrange(len(content))
        os.truncate(file, length)
        return f"cut to {length} of {len(content)} bytes"
    position, bit = generator.randrange(len(content)), generator.randrange(8)
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(bytes([content[position] ^ (1 << bit)]))
    if keeps_time := bool(int(how.split()[1]) % 2):
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    kept = ", modification time kept" * keeps_time
    return f"bit {bit} of byte {position} of {len(content)} flipped{kept}"


def _swap(file: Path, content: bytes) -> str:
    """Exchange a file with a neighbor, one of the same ending if there is one."""
    others = [p for p in sorted(file.parent.iterdir()) if p.is_file() and p != file]
    others += [p for p in sorted(file.parents[1].rglob(file.name)) if p != file and p.is_file()]
    others = [p for p in others if p.read_bytes() != content]
    if not others:
        return ""
    other = min(others, key=lambda p: p.suffix != file.suffix)
    theirs = other.read_bytes()
    other.write_bytes(content)
    file.write_bytes(theirs)
    return f"swapped with {other.name}"
