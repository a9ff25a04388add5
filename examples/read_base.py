"""A base read without QWLoRA (docs/fingerprint.md): python examples/read_base.py out/base"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

PARTS = ("packed", "scale", "block_scale", "zero_point", "minimum")
KINDS = {"F16": "float32", "BF16": "float32", "F32": "float32", "F64": "float64", "BOOL": "bool"}
KINDS |= {"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}


def stored_tensors(file):
    """Name, kind, shape and values of each tensor in a safetensors file."""
    size = int.from_bytes(np.fromfile(file, np.uint8, 8).tobytes(), "little")
    content = np.memmap(file, np.uint8, "r", offset=8)
    header = json.loads(content[:size].tobytes())
    for name in header.keys() - {"__metadata__"}:
        dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
        values = content[size + begin : size + end]
        if dtype == "F16":
            values = values.view("<f2").astype("<f4")
        elif dtype == "BF16":
            values = values.view("<u2").astype("<u4") << 16
        yield name, f"torch.{KINDS[dtype]}", header[name]["shape"], values


def tensor_digest(name, grid, kind, shape, values):
    start = f"{name}\0{grid}\0{kind}\0{shape}\0".encode()
    return hashlib.sha256(start + values.tobytes()).hexdigest()


def fingerprint(folder):
    record, grids, digests = json.loads(Path(folder, "base.json").read_bytes()), {}, {}
    for path, layer in record["layers"].items():
        grid = json.dumps({k: v for k, v in layer.items() if k != "shape"}, sort_keys=True)
        grids |= {f"{path}.{part}": grid for part in PARTS}
    for file in Path(folder).glob("base*.safetensors"):
        for name, *tensor in stored_tensors(file):
            digests[name] = tensor_digest(name, grids.get(name, ""), *tensor)
    entries = "".join(f"\0{name}\0{digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256((record["configuration"] + entries).encode()).hexdigest()


def codes(packed, bitwidth, count):
    """Codes [*rows, count] from bytes [*rows, bytes]."""
    planes, begin, place = [], 0, 0
    for width in (w for w in (8, 4, 2, 1) if bitwidth & w):
        end = begin + packed.shape[-1] * width // bitwidth
        shifts = range(0, 8, width) if width > 1 else range(7, -1, -1)
        fields = (packed[..., begin:end, None] >> np.array(shifts)) & (2**width - 1)
        planes.append(fields.reshape(*packed.shape[:-1], -1)[..., :count] << place)
        begin, place = end, place + width
    return sum(planes)


if __name__ == "__main__":
    print(fingerprint(sys.argv[1]))
