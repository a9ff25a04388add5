"""QWLoRA: fine-tune LoRA adapters on the exact quantized weights you deploy.

    quantize_        step 1: freeze a model's weights to packed integers, in place
    freeze_          the same on a grid that you have, without rounding anything
    assert_frozen    check that every packed layer still computes with its integers
    save_adapter     after step 2, which is PEFT with your own training loop or Trainer: save the
                     adapter with the fingerprint of its base
    simulate         step 3: capture a graph and calibrate activation and adapter encodings
    export_files     step 4: write the files for a runtime
    verify_files     step 5: run these files and compare them with the simulation

Names are imported on first use: importing this package imports neither torch nor transformers.
`import qwlora.hf` makes transformers' `from_pretrained` load the folders that `save_base` writes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwlora.adapter.adapter_folder import load_adapter, save_adapter
    from qwlora.adapter.initialize import initialize_
    from qwlora.adapter.training_step import memory_saving
    from qwlora.errors import QwloraError
    from qwlora.export.one_call import export_files, verify_files
    from qwlora.export.proof.checks import Check, Limits
    from qwlora.formats.aimet_encodings import EncodingsFile, read_encodings, write_encodings
    from qwlora.formats.assemble_model import load_precomputed
    from qwlora.formats.base_folder import load_base, save_base
    from qwlora.formats.hf_quantizer import register_with_transformers
    from qwlora.formats.open_checkpoint import open_checkpoint
    from qwlora.grid.encoding import Encoding
    from qwlora.grid.range_estimator import RangeEstimator
    from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
    from qwlora.grid.second_moments import LayerMoments, MomentStore
    from qwlora.nn import PackedLinear
    from qwlora.nn.fingerprint import fingerprint
    from qwlora.nn.frozen import assert_frozen
    from qwlora.quantize.freeze_model import freeze_
    from qwlora.quantize.layer_rules import LayerRule
    from qwlora.quantize.quantize_blocks import observe_moments
    from qwlora.quantize.quantize_model import quantize_
    from qwlora.quantize.tune_scales import TuningSettings, tune_
    from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
    from qwlora.simulation.load_simulation import load_simulation
    from qwlora.simulation.placement_rules import PlacementRule
    from qwlora.simulation.simulation import Simulation, simulate
    from qwlora.simulation.simulation_schemes import Schemes
    from qwlora.simulation.training_graph import TrainingGraph

__version__ = "0.1.0"

_HOME = {
    "initialize_": "adapter.initialize",
    "memory_saving": "adapter.training_step",
    "load_adapter": "adapter.adapter_folder",
    "save_adapter": "adapter.adapter_folder",
    "observe_moments": "quantize.quantize_blocks",
    "PackedLinear": "nn",
    "assert_frozen": "nn.frozen",
    "load_precomputed": "formats.assemble_model",
    "load_simulation": "simulation.load_simulation",
    "quantize_": "quantize.quantize_model",
    "freeze_": "quantize.freeze_model",
    "simulate_adapters": "simulation.adapter_simulations",
    "TrainingGraph": "simulation.training_graph",
    "Limits": "export.proof.checks",
    "open_checkpoint": "formats.open_checkpoint",
    "LayerRule": "quantize.layer_rules",
    "load_base": "formats.base_folder",
    "save_base": "formats.base_folder",
    "register_with_transformers": "formats.hf_quantizer",
    "TuningSettings": "quantize.tune_scales",
    "tune_": "quantize.tune_scales",
    "QwloraError": "errors",
    "AdapterSimulations": "simulation.adapter_simulations",
    "Check": "export.proof.checks",
    "export_files": "export.one_call",
    "verify_files": "export.one_call",
    "Encoding": "grid.encoding",
    "EncodingsFile": "formats.aimet_encodings",
    "read_encodings": "formats.aimet_encodings",
    "write_encodings": "formats.aimet_encodings",
    "fingerprint": "nn.fingerprint",
    "LayerMoments": "grid.second_moments",
    "MomentStore": "grid.second_moments",
    "PerBlock": "grid.scheme",
    "PerChannel": "grid.scheme",
    "PerTensor": "grid.scheme",
    "Scheme": "grid.scheme",
    "RangeEstimator": "grid.range_estimator",
    "PlacementRule": "simulation.placement_rules",
    "Simulation": "simulation.simulation",
    "Schemes": "simulation.simulation_schemes",
    "simulate": "simulation.simulation",
}

__all__ = [
    "AdapterSimulations",
    "Check",
    "Encoding",
    "EncodingsFile",
    "LayerMoments",
    "LayerRule",
    "Limits",
    "MomentStore",
    "PackedLinear",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PlacementRule",
    "QwloraError",
    "RangeEstimator",
    "Scheme",
    "Schemes",
    "Simulation",
    "TrainingGraph",
    "TuningSettings",
    "assert_frozen",
    "export_files",
    "fingerprint",
    "freeze_",
    "initialize_",
    "load_adapter",
    "load_base",
    "load_precomputed",
    "load_simulation",
    "memory_saving",
    "observe_moments",
    "open_checkpoint",
    "quantize_",
    "read_encodings",
    "register_with_transformers",
    "save_adapter",
    "save_base",
    "simulate",
    "simulate_adapters",
    "tune_",
    "verify_files",
    "write_encodings",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qwlora.{_HOME[name]}"), name)
