"""All export targets by the name that recipes use."""

from __future__ import annotations

from functools import partial

from qwlora.export.format_limits import (
    AIMET_ENCODINGS,
    COMPRESSED_TENSORS,
    GGUF,
    MLX,
    NBITS,
    OPENVINO,
    transformers_conflict,
)
from qwlora.export.npu.htp_limits import table_problem, weight_problem
from qwlora.export.target import Layout, Target

_ONNX = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
_simulated = partial(
    Target,
    extra="onnx",
    packages=_ONNX,
    is_simulated=True,
    activation_bitwidths=(8, 16),  # QuantizeLinear of opset 21
)

TARGETS: dict[str, Target] = {
    "onnx": _simulated(backend_class="qwlora.export.onnx.onnx:Onnx"),
    "onnx_each": _simulated(
        backend_class="qwlora.export.onnx.onnx:OnnxEach",
        layout=Layout.EACH,
        has_proof=False,
        model_files="model.onnx*",
    ),
    "aimet": _simulated(
        backend_class="qwlora.export.npu.aimet:Aimet",
        layout=Layout.EACH,
        cached_graphs=True,
        model_files="*.aimet/*",
        scheme_problem=AIMET_ENCODINGS.problem,
    ),
    "qairt": _simulated(
        backend_class="qwlora.export.npu.qairt:Qairt",
        layout=Layout.CASES,
        cached_graphs=True,
        reserved=frozenset({"none", "base", "model", "host"}),
        scheme_problem=AIMET_ENCODINGS.problem,
    ),
    "qnn": _simulated(
        backend_class="qwlora.export.npu.qnn:Qnn",
        compilers=("onnxruntime_qnn", "qnn"),
        layout=Layout.CASES,
        activation_bitwidths=(16,),
        cached_graphs=True,
        has_proof=False,
        reserved=frozenset({"none", "base", "zero"}),
        scheme_problem=weight_problem,
        embedding_problem=table_problem,
    ),
    "genai": Target(
        backend_class="qwlora.export.onnx.genai:Genai",
        extra="genai",
        packages=(*_ONNX, "onnxruntime_genai"),
        scheme_problem=NBITS.problem,
    ),
    "hf": Target(
        backend_class="qwlora.export.weights.hf:Hf",
        extra="hf",
        packages=("compressed_tensors",),
        writes_float_embeddings=True,
        scheme_problem=COMPRESSED_TENSORS.problem,
        conflict=transformers_conflict,
        kind_problem=COMPRESSED_TENSORS.kind_problem,
    ),
    "gguf": Target(
        backend_class="qwlora.export.weights.gguf:Gguf",
        extra="llamacpp",
        packages=("gguf", "llama_cpp_py_sync"),
        source_suffix=".gguf",
        has_float16_scales=True,
        scheme_problem=GGUF.problem,
        kind_problem=GGUF.kind_problem,
    ),
    "mlx": Target(
        backend_class="qwlora.export.weights.mlx:Mlx",
        extra="mlx",
        packages=("mlx.core", "mlx_lm"),
        scheme_problem=MLX.problem,
        kind_problem=MLX.kind_problem,
    ),
    "openvino": Target(
        backend_class="qwlora.export.onnx.openvino:Openvino",
        extra="openvino",
        packages=("openvino", "openvino_genai", "openvino_tokenizers"),
        scheme_problem=OPENVINO.problem,
    ),
}
