"""Parts of a model that are quantized, in a folder, so that a call that was killed goes on behind
the last of them.

A part is found again by the same call only. Its key is a digest of what it was made from: the
batches, the revision of the solvers, whether moments are wanted, and of this part and each one
before it the floats and their assignments. A part whose moments were wanted and are not there any
more is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from qwlora import strict_json
from qwlora.atomic import write_tensors
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.grid.second_moments import Moments
from qwlora.nn.fingerprint import take_in
from qwlora.parameter_names import canonical_name
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.quantize_tensor import LayerReport
from qwlora.quantize.solvers import SOLVERS
from qwlora.revisions import revision

QuantizedBlock = tuple[dict[str, QuantizedTensor], dict[str, LayerReport]]


class BlockCache:
    """See the module's text. `begin` each part in order; then `read` it, and `write` it if that
    found nothing. Without a folder nothing is kept.
    """

    def __init__(
        self, folder: Path | None, batches: Sequence[Mapping[str, Any]], moments: Moments | None
    ):
        self.folder, self.moments = folder, moments
        self._digest, self._file = hashlib.sha256(), Path()
        if folder is not None:
            take_in(
                self._digest,
                [
                    str(revision("quantize.layer_statistics")),
                    moments is not None and str(revision("grid.second_moments")),
                    *named_inputs(batches),
                ],
            )

    def begin(
        self, part: str, floats: Mapping[str, Tensor], plan: Mapping[str, Assignment]
    ) -> None:
        """The next part, and its tensors before they are quantized."""
        if self.folder is None:
            return
        for name, tensor in floats.items():
            later = SOLVERS[plan[name].solver].later_revisions
            take_in(self._digest, [name, plan[name], *map(str, later), tensor])
        self._file = self.folder / f"{canonical_name(part)}.safetensors"

    def read(self) -> QuantizedBlock | None:
        """Codes and reports of the part that was begun; None if it must be made."""
        if self.folder is None:
            return None
        try:
            with safe_open(self._file, "pt") as opened:
                metadata = opened.metadata()
                if metadata["key"] != self._digest.hexdigest():
                    return None
                records = json.loads(metadata["layers"])
                quantized = {}
                for name, record in records.items():
                    codes, scale, offset = (
                        opened.get_tensor(f"{name}/{part}") for part in ("codes", "scale", "offset")
                    )
                    quantized[name] = QuantizedTensor(
                        codes, Encoding(Scheme.from_json(record["scheme"]), scale, offset)
                    )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None
        reports = {name: LayerReport(**record["report"]) for name, record in records.items()}
        observed = {
            canonical_name(name).removesuffix(".weight")
            for name, report in reports.items()
            if report.error is not None
        }
        return (
            None
            if self.moments is not None and not observed <= set(self.moments)
            else (quantized, reports)
        )

    def write(
        self, quantized: Mapping[str, QuantizedTensor], reports: Mapping[str, LayerReport]
    ) -> None:
        """Keep the part that was begun."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        records = {}
        for name, q in quantized.items():
            assert isinstance(q.encoding, Encoding)
            tensors |= {
                f"{name}/codes": q.codes,
                f"{name}/scale": q.encoding.scale,
                f"{name}/offset": q.encoding.offset,
            }
            records[name] = {"scheme": q.encoding.scheme.to_json(), "report": asdict(reports[name])}
        write_tensors(
            self._file,
            tensors,
            {"layers": strict_json.dumps(records), "key": self._digest.hexdigest()},
        )


def named_inputs(batches: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Each batch's inputs, every one behind its name."""
    for batch in batches:
        for path, value in tree_flatten_with_path(dict(batch))[0]:
            yield from (keystr(path), value)
