"""QWLoRA: LoRA on a quantized base.

    quantize_        step 1: freeze a model's weights to packed integers, in place
    save_adapter     step 2 is PEFT's and your own loop or Trainer; adapters carry the base's fingerprint
    simulate         step 3: one captured graph with activation and adapter encodings
    export_onnx      files for a runtime
    verify_onnx      run them, and compare

Names are loaded when first used: importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwlora.adapter.initialize import initialize_adapter_
    from qwlora.adapter.lean import lean_steps
    from qwlora.adapter.loss import chunk_loss_
    from qwlora.adapter.provenance import load_adapter, save_adapter
    from qwlora.adapter.rank_budget import RankBudget, rank_by_layer
    from qwlora.base.calibrated import observe_moments
    from qwlora.base.packed import PackedLinear
    from qwlora.base.precomputed import load_precomputed
    from qwlora.base.quantize import quantize_
    from qwlora.base.readers.open_checkpoint import open_checkpoint
    from qwlora.base.rules import Rule
    from qwlora.base.storage import load_base, save_base
    from qwlora.base.tune import TuningSettings, tune_scales_
    from qwlora.errors import QwloraError
    from qwlora.export.bundle import export_onnx
    from qwlora.export.verify import verify_onnx
    from qwlora.export.verify_outputs import verify_onnx_outputs
    from qwlora.grid.encoding import Encoding
    from qwlora.grid.fingerprint import fingerprint
    from qwlora.grid.moment import Moment, Moments
    from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
    from qwlora.simulation.estimator import Estimator
    from qwlora.simulation.rules import PlacementRule
    from qwlora.simulation.simulation import Simulation, SimulationSchemes, simulate
    from qwlora.simulation.storage import load_simulation

__version__ = "0.1.0"

_HOME = {
    "initialize_adapter_": "adapter.initialize",
    "lean_steps": "adapter.lean",
    "chunk_loss_": "adapter.loss",
    "load_adapter": "adapter.provenance",
    "save_adapter": "adapter.provenance",
    "RankBudget": "adapter.rank_budget",
    "rank_by_layer": "adapter.rank_budget",
    "observe_moments": "base.calibrated",
    "PackedLinear": "base.packed",
    "load_precomputed": "base.precomputed",
    "load_simulation": "simulation.storage",
    "quantize_": "base.quantize",
    "open_checkpoint": "base.readers.open_checkpoint",
    "Rule": "base.rules",
    "load_base": "base.storage",
    "save_base": "base.storage",
    "TuningSettings": "base.tune",
    "tune_scales_": "base.tune",
    "QwloraError": "errors",
    "export_onnx": "export.bundle",
    "verify_onnx": "export.verify",
    "verify_onnx_outputs": "export.verify_outputs",
    "Encoding": "grid.encoding",
    "fingerprint": "grid.fingerprint",
    "Moment": "grid.moment",
    "Moments": "grid.moment",
    "PerBlock": "grid.scheme",
    "PerChannel": "grid.scheme",
    "PerTensor": "grid.scheme",
    "Scheme": "grid.scheme",
    "Estimator": "simulation.estimator",
    "PlacementRule": "simulation.rules",
    "Simulation": "simulation.simulation",
    "SimulationSchemes": "simulation.simulation",
    "simulate": "simulation.simulation",
}

__all__ = [
    "Encoding",
    "Estimator",
    "Moment",
    "Moments",
    "PackedLinear",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PlacementRule",
    "QwloraError",
    "RankBudget",
    "Rule",
    "Scheme",
    "Simulation",
    "SimulationSchemes",
    "TuningSettings",
    "chunk_loss_",
    "export_onnx",
    "fingerprint",
    "initialize_adapter_",
    "lean_steps",
    "load_adapter",
    "load_base",
    "load_precomputed",
    "load_simulation",
    "observe_moments",
    "open_checkpoint",
    "quantize_",
    "rank_by_layer",
    "save_adapter",
    "save_base",
    "simulate",
    "tune_scales_",
    "verify_onnx",
    "verify_onnx_outputs",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qwlora.{_HOME[name]}"), name)
