"""All export targets by the name that recipes use."""

from __future__ import annotations

from qwlora.export.format_limits import (
    compressed_tensors_kind_problem,
    compressed_tensors_problem,
    encodings_problem,
    gguf_kind_problem,
    gguf_problem,
    htp_embedding_problem,
    htp_problem,
    mlx_kind_problem,
    mlx_problem,
    nbits_problem,
    openvino_problem,
    transformers_conflict,
)
from qwlora.export.target import Layout, Target

_ONNX = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")

TARGETS: dict[str, Target] = {
    "onnx": Target(
        backend_class="qwlora.export.onnx.onnx:Onnx",
        extra="onnx",
        packages=_ONNX,
        is_simulated=True,
        activation_bitwidths=(8, 16),  # QuantizeLinear of opset 21
    ),
    "onnx_each": Target(
        backend_class="qwlora.export.onnx.onnx:OnnxEach",
        extra="onnx",
        packages=_ONNX,
        layout=Layout.EACH,
        is_simulated=True,
        activation_bitwidths=(8, 16),
        has_proof=False,
        model_files="model.onnx*",
    ),
    "aimet": Target(
        backend_class="qwlora.export.npu.aimet:Aimet",
        extra="onnx",
        packages=_ONNX,
        layout=Layout.EACH,
        is_simulated=True,
        activation_bitwidths=(8, 16),
        cached_graphs=True,
        model_files="*.aimet/*",
        scheme_problem=encodings_problem,
    ),
    "qairt": Target(
        backend_class="qwlora.export.npu.qairt:Qairt",
        extra="onnx",
        packages=_ONNX,
        layout=Layout.CASES,
        is_simulated=True,
        activation_bitwidths=(8, 16),
        cached_graphs=True,
        reserved=frozenset({"none", "base", "model", "host"}),
        scheme_problem=encodings_problem,
    ),
    "qnn": Target(
        backend_class="qwlora.export.npu.qnn:Qnn",
        extra="onnx",
        packages=_ONNX,
        compilers=("onnxruntime_qnn", "qnn"),
        layout=Layout.CASES,
        is_simulated=True,
        activation_bitwidths=(16,),
        cached_graphs=True,
        has_proof=False,
        reserved=frozenset({"none", "base", "zero"}),
        scheme_problem=htp_problem,
        embedding_problem=htp_embedding_problem,
    ),
    "genai": Target(
        backend_class="qwlora.export.onnx.genai:Genai",
        extra="genai",
        packages=(*_ONNX, "onnxruntime_genai"),
        scheme_problem=nbits_problem,
    ),
    "hf": Target(
        backend_class="qwlora.export.weights.hf:Hf",
        extra="hf",
        packages=("compressed_tensors",),
        writes_float_embeddings=True,
        scheme_problem=compressed_tensors_problem,
        conflict=transformers_conflict,
        kind_problem=compressed_tensors_kind_problem,
    ),
    "gguf": Target(
        backend_class="qwlora.export.weights.gguf:Gguf",
        extra="llamacpp",
        packages=("gguf", "llama_cpp_py_sync"),
        source_suffix=".gguf",
        has_float16_scales=True,
        scheme_problem=gguf_problem,
        kind_problem=gguf_kind_problem,
    ),
    "mlx": Target(
        backend_class="qwlora.export.weights.mlx:Mlx",
        extra="mlx",
        packages=("mlx.core", "mlx_lm"),
        scheme_problem=mlx_problem,
        kind_problem=mlx_kind_problem,
    ),
    "openvino": Target(
        backend_class="qwlora.export.onnx.openvino:Openvino",
        extra="openvino",
        packages=("openvino", "openvino_genai", "openvino_tokenizers"),
        scheme_problem=openvino_problem,
    ),
}
