"""All export targets by the name that recipes use."""

from __future__ import annotations

from qwlora.export.aimet_target import AimetTarget
from qwlora.export.genai_target import GenaiTarget
from qwlora.export.gguf_target import GgufTarget
from qwlora.export.hf_target import HfTarget
from qwlora.export.mlx_target import MlxTarget
from qwlora.export.onnx_target import OnnxEachTarget, OnnxTarget
from qwlora.export.openvino_target import OpenvinoTarget
from qwlora.export.qairt_target import QairtTarget
from qwlora.export.qnn_target import QnnTarget
from qwlora.export.target import Target

TARGETS: dict[str, Target] = {
    "onnx": OnnxTarget(),
    "onnx_each": OnnxEachTarget(),
    "aimet": AimetTarget(),
    "qairt": QairtTarget(),
    "qnn": QnnTarget(),
    "genai": GenaiTarget(),
    "hf": HfTarget(),
    "gguf": GgufTarget(),
    "mlx": MlxTarget(),
    "openvino": OpenvinoTarget(),
}
