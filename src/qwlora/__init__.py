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
    from qwlora.adapter.initialize import InitReports, initialize_
    from qwlora.adapter.training_step import memory_saving
    from qwlora.errors import QwloraError
    from qwlora.export.one_call import export_files, verify_files
    from qwlora.export.proof.checks import Check, Limits
    from qwlora.formats.aimet_encodings import EncodingsFile, read_encodings, write_encodings
    from qwlora.formats.assemble_model import load_precomputed
    from qwlora.formats.base_folder import load_base, save_base
    from qwlora.formats.checkpoint import Checkpoint
    from qwlora.formats.hf_quantizer import register_with_transformers
    from qwlora.formats.open_checkpoint import open_checkpoint
    from qwlora.graph.value_traits import Decision, Trait
    from qwlora.grid.encoding import Encoding, QuantizedTensor
    from qwlora.grid.scheme import Blocks, PerBlock, PerChannel, PerTensor, RangeEstimator, Scheme
    from qwlora.grid.second_moments import LayerMoments, MomentStore
    from qwlora.nn import PackedLinear
    from qwlora.nn.fingerprint import fingerprint
    from qwlora.nn.frozen import assert_frozen
    from qwlora.quantize.freeze_model import freeze_
    from qwlora.quantize.layer_rules import LayerRule
    from qwlora.quantize.quantize_blocks import observe_moments
    from qwlora.quantize.quantize_model import QuantizeReport, quantize_
    from qwlora.quantize.tune_scales import TuningReport, TuningSettings, tune_
    from qwlora.simulation.adapter_simulations import (
        AdapterSimulations,
        load_simulation,
        simulate_adapters,
    )
    from qwlora.simulation.placement import Placement
    from qwlora.simulation.placement_rules import PlacementRule, Policy, PolicyRule, Schemes
    from qwlora.simulation.simulated_model import SimulatedModel
    from qwlora.simulation.simulation import CalibrationReport, Simulation, simulate
    from qwlora.simulation.training_graph import TrainingGraph
    from qwlora.system.progress import Track

__version__ = "0.1.0"

_NAMES = {
    "adapter.adapter_folder": ("load_adapter", "save_adapter"),
    "adapter.initialize": ("InitReports", "initialize_"),
    "adapter.training_step": ("memory_saving",),
    "errors": ("QwloraError",),
    "export.one_call": ("export_files", "verify_files"),
    "export.proof.checks": ("Check", "Limits"),
    "formats.aimet_encodings": ("EncodingsFile", "read_encodings", "write_encodings"),
    "formats.assemble_model": ("load_precomputed",),
    "formats.base_folder": ("load_base", "save_base"),
    "formats.checkpoint": ("Checkpoint",),
    "formats.hf_quantizer": ("register_with_transformers",),
    "formats.open_checkpoint": ("open_checkpoint",),
    "graph.value_traits": ("Decision", "Trait"),
    "grid.encoding": ("Encoding", "QuantizedTensor"),
    "grid.scheme": ("Blocks", "PerBlock", "PerChannel", "PerTensor", "RangeEstimator", "Scheme"),
    "grid.second_moments": ("LayerMoments", "MomentStore"),
    "nn": ("PackedLinear",),
    "nn.fingerprint": ("fingerprint",),
    "nn.frozen": ("assert_frozen",),
    "quantize.freeze_model": ("freeze_",),
    "quantize.layer_rules": ("LayerRule",),
    "quantize.quantize_blocks": ("observe_moments",),
    "quantize.quantize_model": ("QuantizeReport", "quantize_"),
    "quantize.tune_scales": ("TuningReport", "TuningSettings", "tune_"),
    "simulation.adapter_simulations": (
        "AdapterSimulations",
        "load_simulation",
        "simulate_adapters",
    ),
    "simulation.placement": ("Placement",),
    "simulation.placement_rules": ("PlacementRule", "Policy", "PolicyRule", "Schemes"),
    "simulation.simulated_model": ("SimulatedModel",),
    "simulation.simulation": ("CalibrationReport", "Simulation", "simulate"),
    "simulation.training_graph": ("TrainingGraph",),
    "system.progress": ("Track",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AdapterSimulations",
    "Blocks",
    "CalibrationReport",
    "Check",
    "Checkpoint",
    "Decision",
    "Encoding",
    "EncodingsFile",
    "InitReports",
    "LayerMoments",
    "LayerRule",
    "Limits",
    "MomentStore",
    "PackedLinear",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "Placement",
    "PlacementRule",
    "Policy",
    "PolicyRule",
    "QuantizeReport",
    "QuantizedTensor",
    "QwloraError",
    "RangeEstimator",
    "Scheme",
    "Schemes",
    "SimulatedModel",
    "Simulation",
    "Track",
    "TrainingGraph",
    "Trait",
    "TuningReport",
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
