"""On-disk cache of quantized blocks: an interrupted quantization resumes after the last finished
block.

One safetensors file per block holds the packed tensors and the report of each layer. A cached block
is valid only if its key matches, a SHA-256 of everything that its result depends on:

    calibration batches, revisions of layer statistics and second moments, whether these are stored,
    and for this block and every block before it: float weights, assignments, solver revisions

Blocks depend on the ones before them, because their inputs come from quantized predecessors: hence
the running hash. A block whose second moments were requested but are missing is recomputed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.grid.second_moments import MomentStore
from qwlora.nn.fingerprint import update_digest
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.quantize_tensor import LayerReport
from qwlora.quantize.revisions import REVISIONS
from qwlora.system import strict_json
from qwlora.system.atomic import read_tensors, write_tensors
from qwlora.system.parameter_names import canonical_name

QuantizedBlock = dict[str, tuple[QuantizedTensor, LayerReport]]


class BlockCache:
    """Call `begin` for each block in model order, then `read`; if that returns None, quantize the
    block and `write` it. Without a folder, nothing is stored.
    """

    def __init__(
        self, folder: Path | None, batches: Sequence[Mapping[str, Any]], moments: MomentStore | None
    ):
        self.folder, self.moments = folder, moments
        self._digest, self._file = hashlib.sha256(), Path()
        if folder is not None:
            revision = moments is not None and REVISIONS["second_moments"]
            update_digest(
                self._digest, [REVISIONS["layer_statistics"], revision, *named_inputs(batches)]
            )

    def begin(
        self, block: str, floats: Mapping[str, Tensor], plan: Mapping[str, Assignment]
    ) -> None:
        """Extend the key by this block's float tensors and their assignments."""
        if self.folder is None:
            return
        for name, tensor in floats.items():
            update_digest(self._digest, [name, plan[name], REVISIONS[plan[name].solver], tensor])
        self._file = self.folder / f"{canonical_name(block)}.safetensors"

    def read(self) -> QuantizedBlock | None:
        """The cached result of the current block, or None if it must be computed.

        A damaged or outdated file counts as missing; the next `write` replaces it.
        """
        if self.folder is None:
            return None
        if (stored := read_keyed(self._file, self._digest.hexdigest())) is None:
            return None
        tensors, metadata = stored
        block = {}
        for name, record in json.loads(metadata["layers"]).items():
            parts = Parts(*(tensors.get(f"{name}/{part}") for part in Parts._fields))  # type: ignore[arg-type]
            packed = PackedTensor(Scheme.from_json(record["scheme"]), record["count"], parts)
            block[name] = packed.quantized, LayerReport(**record["report"])
        observed = {
            canonical_name(name).removesuffix(".weight")
            for name, (_, report) in block.items()
            if report.error is not None
        }
        return None if self.moments is not None and not observed <= set(self.moments) else block

    def write(self, block: QuantizedBlock) -> None:
        """Store the result of the current block."""
        if self.folder is None:
            return
        tensors, records = dict[str, Tensor](), {}
        for name, (quantized, report) in block.items():
            packed = PackedTensor.from_quantized(quantized)
            parts = packed.parts._asdict().items()
            tensors |= {f"{name}/{key}": part for key, part in parts if part is not None}
            scheme = packed.scheme.to_json()
            records[name] = {"scheme": scheme, "count": packed.count, "report": asdict(report)}
        metadata = {"layers": strict_json.dumps(records), "key": self._digest.hexdigest()}
        write_tensors(self._file, tensors, metadata)


def read_keyed(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file whose metadata has this `key`; None if the file is missing or
    damaged, or has another key."""
    try:
        tensors, metadata = read_tensors(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return (tensors, metadata) if metadata.get("key") == key else None


def named_inputs(batches: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The inputs of each batch, each after its name."""
    for batch in batches:
        for path, value in tree_flatten_with_path(dict(batch))[0]:
            yield from (keystr(path), value)
