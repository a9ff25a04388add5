"""QWLoRA: fine-tune LoRA adapters on the exact quantized weights you deploy.

    quantize_        step 1: freeze a model's weights to packed integers, in place
    freeze_          the same on a grid that you have, without rounding anything
    assert_frozen    check that every packed layer still computes with its integers
    save_adapter     after step 2, which is PEFT with your own training loop or Trainer: save the
                     adapter with the fingerprint of its base
    simulate         step 3: capture a graph and calibrate activation and adapter encodings
    export           step 4: write the files for a runtime
    verify           step 5: run these files and compare them with what was trained

Names are imported on first use: importing this package imports neither torch nor transformers.
`import qwlora.hf` makes transformers' `from_pretrained` load the folders that `save_base` writes.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwlora.system.quiet as _quiet

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qwlora.adapter.adapter_deltas import merged_model as merged_model
    from qwlora.adapter.adapter_folder import load_adapter as load_adapter
    from qwlora.adapter.adapter_folder import save_adapter as save_adapter
    from qwlora.adapter.initialize import InitReports as InitReports
    from qwlora.adapter.initialize import initialize_ as initialize_
    from qwlora.adapter.mergeable import mergeable_ as mergeable_
    from qwlora.adapter.training_step import memory_saving as memory_saving
    from qwlora.analysis.generate_text import sample_sequences as sample_sequences
    from qwlora.analysis.token_scores import TokenScores as TokenScores
    from qwlora.analysis.token_scores import logits_of as logits_of
    from qwlora.analysis.token_scores import score_tokens as score_tokens
    from qwlora.data.document import Documents as Documents
    from qwlora.data.prepared_data import Cutting as Cutting
    from qwlora.data.prepared_data import PreparedText as PreparedText
    from qwlora.data.prepared_data import prepare_text as prepare_text
    from qwlora.data.read_source import Reading as Reading
    from qwlora.data.read_source import load_documents as load_documents
    from qwlora.data.sequences import Sequences as Sequences
    from qwlora.errors import QwloraError as QwloraError
    from qwlora.formats.aimet_encodings import EncodingsFile as EncodingsFile
    from qwlora.formats.aimet_encodings import read_encodings as read_encodings
    from qwlora.formats.aimet_encodings import write_encodings as write_encodings
    from qwlora.formats.base_folder import load_base as load_base
    from qwlora.formats.base_folder import register_with_transformers as register_with_transformers
    from qwlora.formats.base_folder import save_base as save_base
    from qwlora.formats.checkpoint import Checkpoint as Checkpoint
    from qwlora.formats.model_source import load_model as load_model
    from qwlora.formats.model_source import load_tokenizer as load_tokenizer
    from qwlora.formats.open_checkpoint import load_precomputed as load_precomputed
    from qwlora.formats.open_checkpoint import open_checkpoint as open_checkpoint
    from qwlora.graph.value_traits import Decision as Decision
    from qwlora.graph.value_traits import Trait as Trait
    from qwlora.grid.encoding import Encoding as Encoding
    from qwlora.grid.encoding import QuantizedTensor as QuantizedTensor
    from qwlora.grid.scheme import Blocks as Blocks
    from qwlora.grid.scheme import Lpbq as Lpbq
    from qwlora.grid.scheme import PerBlock as PerBlock
    from qwlora.grid.scheme import PerChannel as PerChannel
    from qwlora.grid.scheme import PerTensor as PerTensor
    from qwlora.grid.scheme import RangeEstimator as RangeEstimator
    from qwlora.grid.scheme import Scheme as Scheme
    from qwlora.grid.second_moments import LayerMoments as LayerMoments
    from qwlora.nn import PackedLinear as PackedLinear
    from qwlora.nn.fingerprint import fingerprint as fingerprint
    from qwlora.nn.frozen import assert_frozen as assert_frozen
    from qwlora.quantize.bit_budget import BitBudget as BitBudget
    from qwlora.quantize.freeze_model import freeze_ as freeze_
    from qwlora.quantize.gptq import GptqSettings as GptqSettings
    from qwlora.quantize.layer_rules import LayerRule as LayerRule
    from qwlora.quantize.quantize_blocks import observe_moments as observe_moments
    from qwlora.quantize.quantize_model import QuantizeReport as QuantizeReport
    from qwlora.quantize.quantize_model import quantize_ as quantize_
    from qwlora.quantize.rotation import RotationReport as RotationReport
    from qwlora.quantize.rotation import rotate_ as rotate_
    from qwlora.quantize.tune_scales import TuningReport as TuningReport
    from qwlora.quantize.tune_scales import TuningSettings as TuningSettings
    from qwlora.quantize.tune_scales import tune_ as tune_
    from qwlora.simulation.adapter_simulations import AdapterSimulations as AdapterSimulations
    from qwlora.simulation.adapter_simulations import load_simulation as load_simulation
    from qwlora.simulation.adapter_simulations import simulate_adapters as simulate_adapters
    from qwlora.simulation.placement import Placement as Placement
    from qwlora.simulation.placement_rules import PlacementRule as PlacementRule
    from qwlora.simulation.placement_rules import Policy as Policy
    from qwlora.simulation.placement_rules import PolicyRule as PolicyRule
    from qwlora.simulation.placement_rules import Schemes as Schemes
    from qwlora.simulation.simulated_model import SimulatedModel as SimulatedModel
    from qwlora.simulation.simulation import CalibrationReport as CalibrationReport
    from qwlora.simulation.simulation import Simulation as Simulation
    from qwlora.simulation.simulation import simulate as simulate
    from qwlora.simulation.training_graph import TrainingGraph as TrainingGraph
    from qwlora.system.progress import Track as Track
    from qwlora.targets.one_call import export as export
    from qwlora.targets.one_call import verify as verify
    from qwlora.targets.proof.checks import Check as Check
    from qwlora.targets.proof.checks import Limits as Limits
    from qwlora.targets.proof.server_check import verify_server as verify_server


# The module of each name, read from the lines above, so that the names are listed once: mypy and
# editors see these imports, and never run `__getattr__`.
_HOME = {
    alias.name: node.module
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwlora.")
    for alias in node.names
}
__all__ = list(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwlora' has no attribute {name!r}")
    with _quiet.quiet(_quiet.OF_IMPORTS):
        return getattr(importlib.import_module(_HOME[name]), name)
