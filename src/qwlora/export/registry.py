"""All export targets by the name that recipes use."""

from __future__ import annotations

from qwlora.export.npu.aimet_target import AimetTarget
from qwlora.export.npu.qairt_target import QairtTarget
from qwlora.export.npu.qnn_target import QnnTarget
from qwlora.export.onnx.genai_target import GenaiTarget
from qwlora.export.onnx.onnx_target import OnnxEachTarget, OnnxTarget
from qwlora.export.onnx.openvino_target import OpenvinoTarget
from qwlora.export.target import Target
from qwlora.export.weights.gguf_target import GgufTarget
from qwlora.export.weights.hf_target import HfTarget
from qwlora.export.weights.mlx_target import MlxTarget

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
