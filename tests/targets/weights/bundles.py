"""Bases packed on given grids, and the folders of their bundles: base, trained, adapters."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from conftest import byte_tokenizer
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Scheme
from qwlora.nn import pack_at_
from qwlora.targets.canonical_adapter import CanonicalAdapter, read_canonical
from qwlora.targets.target import Backend, ExportedBase


def quantized(weight: Tensor, scheme: Scheme, half: bool = False) -> QuantizedTensor:
    """By minimum and maximum; `half`: with a scale and offset that are float16."""
    encoding = measure(weight, scheme)
    if half:
        offset = encoding.minimum.half().float() if scheme.float_offset else encoding.offset
        encoding = Encoding(scheme, encoding.scale.half().float(), offset)
    return QuantizedTensor(encoding.quantize(weight), encoding)


def pack_linears(model: nn.Module, schemes: Iterable[Scheme], half: bool = False) -> None:
    """Give each matrix the next scheme, but for the head."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    matrices = [(name, module.weight) for name, module in linears if name != "lm_head"]
    for (name, weight), scheme in zip(matrices, schemes, strict=False):
        pack_at_(model, f"{name}.weight", quantized(weight.detach(), scheme, half))


def write_base(backend: Backend, model: Any, bundle: Path, source: Path | None = None) -> None:
    """Write `bundle`/base."""
    (bundle / "base").mkdir()
    backend.write_base(ExportedBase(model, byte_tokenizer(), source), bundle / "base")


def write_adapter(backend: Backend, bundle: Path, name: str) -> CanonicalAdapter:
    """Write `bundle`/name from what was trained, `bundle`/trained/name."""
    canonical = read_canonical(bundle / "trained" / name)
    (bundle / name).mkdir(exist_ok=True)
    backend.write_adapter(canonical, bundle / "base", bundle / name)
    return canonical


def read_base(folder: Path) -> Any:
    """The model in a base that this package reads: of hf, mlx, gguf and qairt_pipeline."""
    file, encodings = folder / "base.gguf", folder / "model.encodings"
    if file.exists():
        return load_precomputed(open_checkpoint(file))
    return load_precomputed(open_checkpoint(folder, encodings if encodings.exists() else None))
