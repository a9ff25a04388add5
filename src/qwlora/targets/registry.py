"""All export targets, by their names in recipes, and the limits of their formats. Does not import
torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from qwlora.formats import MLX_BITWIDTHS
from qwlora.grid.scheme import Bf16Block
from qwlora.targets.npu.htp_limits import HTP
from qwlora.targets.target import ANY_BITS, OPSETS, FormatLimits, LayerKind, Layout, Target

WEB_LIBRARY = "onnxruntime-web@^1.30"
_LINEAR_ONLY = {
    LayerKind.OTHER: "has integers of Linear layers and embeddings only",
    LayerKind.CONV1D: "has no integers for transformers' Conv1D",
}
AIMET_ENCODINGS = FormatLimits(
    name="an AIMET encodings file",
    zero_point=ANY_BITS,
    remedy="Quantize with solver gptq to w4-block32",
)
AIMET_WEIGHTS = replace(AIMET_ENCODINGS, refused=_LINEAR_ONLY)  # for a checkpoint, not a graph
COMPRESSED_TENSORS = FormatLimits(
    name="compressed-tensors",
    zero_point=ANY_BITS,
    has_float_embeddings=True,
    refused=_LINEAR_ONLY,
    same_if_asymmetric="transformers reads an asymmetric scheme only if all layers have it",
)
# Q4_0, Q5_0, Q8_0, Q4_1 and Q5_1: the types with one float16 scale for each block of 32.
GGUF = FormatLimits(
    name="GGUF",
    symmetric=(4, 5, 8),
    float_offset=(4, 5),
    block=32,
    stored_blocks=(32,),
    has_float16_scales=True,
    refused={LayerKind.CONV1D: "stores transformers' Conv1D so that no adapter can be attached"},
)
# Its kernels have groups of 32, 64 and 128 values.
MLX = FormatLimits(
    name="MLX",
    symmetric=MLX_BITWIDTHS,
    zero_point=MLX_BITWIDTHS,
    float_offset=MLX_BITWIDTHS,
    block=32,
    stored_blocks=(128, 64, 32),
    refused=_LINEAR_ONLY,
)
# Tried in ONNX Runtime 1.32: it refuses 8-bit codes with float zero points, and blocks of 8.
NBITS = FormatLimits(
    name="MatMulNBits",
    symmetric=range(2, 9),
    zero_point=range(2, 9),
    float_offset=range(2, 5),
    block=16,
    stored_blocks=(256, 128, 64, 32, 16),
)
OPENVINO = FormatLimits(
    name="OpenVINO", symmetric=range(2, 9), zero_point=range(2, 9), float_offset=range(2, 9)
)
# Tried in ExecuTorch 1.5 with one layer of each scheme: lowering fails for 8-bit blocks and for
# block sizes that 32 does not divide (docs/log/runtimes.md).
XNNPACK = FormatLimits(
    name="XNNPACK",
    symmetric=range(2, 9),
    block=32,
    block_bits=range(2, 5),
    block_kind=Bf16Block,  # it rounds scales of blocks to bfloat16
    refused={LayerKind.OTHER: "has integers of linear layers and embeddings only"},
)
# From the source of vLLM 0.33: its kernels for compressed-tensors weights and float activations.
VLLM = FormatLimits(
    name="vLLM",
    symmetric=(4, 8),
    zero_point=(4,),
    has_float_embeddings=True,
    tensor_bits=(),
    block_sizes=(32, 64, 128),
    same_scheme="vLLM fuses q, k and v, and gate and up, which need one scheme",
)

_ONNX = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
_simulated = partial(
    Target,
    extra="onnx",
    packages=_ONNX,
    writers=_ONNX,
    is_simulated=True,
    activation_bitwidths=(8, 16),  # QuantizeLinear of opset 21
)

_NPU_GRIDS = {"policy": ["npu"], "residual_adds": ["quantize"]}  # every value has a grid

TARGETS: dict[str, Target] = {
    "onnx": _simulated(
        backend_class="qwlora.targets.onnx.onnx:Onnx",
        runtime="ONNX Runtime",
    ),
    "onnx_each": _simulated(
        backend_class="qwlora.targets.onnx.onnx:OnnxEach",
        runtime="ONNX Runtime",
        layout=Layout.EACH,
        has_proof=False,
        model_files="model.onnx*",
    ),
    "aimet": _simulated(
        embedding_bits=(32,),
        backend_class="qwlora.targets.npu.float_targets:Aimet",
        layout=Layout.EACH,
        cached_graphs=True,
        opsets=OPSETS,
        model_files="*.aimet/*",
        chip=HTP,
        simulation=_NPU_GRIDS,
        limits=AIMET_ENCODINGS,
    ),
    "qairt": _simulated(
        embedding_bits=(32,),
        backend_class="qwlora.targets.npu.float_targets:Qairt",
        layout=Layout.CASES,
        cached_graphs=True,
        graph_layouts=("genie",),
        opsets=OPSETS,
        reserved=frozenset({"none", "base", "model", "host"}),
        chip=HTP,
        simulation=_NPU_GRIDS,
        limits=AIMET_ENCODINGS,
    ),
    "qnn": _simulated(
        embedding_bits=(32,),
        backend_class="qwlora.targets.npu.qnn:Qnn",
        runtime="HTP emulator",
        compilers=("onnxruntime_qnn", "qnn"),
        layout=Layout.CASES,
        cached_graphs=True,
        graph_layouts=("genie",),
        has_proof=False,
        reserved=frozenset({"none", "base", "zero"}),
        chip=HTP,
        limits=HTP,
        simulation={
            **_NPU_GRIDS,
            # The HTP needs this grid for products of two 16-bit activations.
            "symmetric_matmul_second_input": [True],
            "key_value_bitwidth": [8],
            # All adapters share one compiled graph, which holds the grids as constants.
            "base_activations": ["none"],
            "adapter_weights": ["w8-tensor", "w16-tensor"],
        },
    ),
    "qairt_pipeline": Target(
        embedding_bits=(32,),
        backend_class="qwlora.targets.npu.qairt_pipeline:QairtPipeline",
        runtime="transformers",
        extra="hf",
        packages=("transformers", "peft"),
        # QAIRT's pipeline takes no weight encodings. It finds the grids from the rounded floats.
        writes_floats=True,
        has_one_shape=True,
        chip=HTP,
        limits=AIMET_WEIGHTS,
    ),
    "genai": Target(
        backend_class="qwlora.targets.onnx.genai:Genai",
        runtime="ONNX Runtime GenAI",
        exact="model.onnx",
        shipped="model-fast.onnx",
        rounds="8-bit activations",
        extra="genai",
        packages=(*_ONNX, "onnxruntime_genai"),
        writers=_ONNX,
        embedding_bits=(8, 16, 32),
        limits=NBITS,
    ),
    "web": Target(
        backend_class="qwlora.targets.onnx.web:Web",
        runtime="ONNX Runtime Web",
        extra="web",
        packages=("onnx",),
        writers=_ONNX,
        embedding_bits=(8, 16, 32),
        node_packages=(WEB_LIBRARY,),
        limits=NBITS,
    ),
    "executorch": Target(
        backend_class="qwlora.targets.weights.executorch:Executorch",
        runtime="ExecuTorch",
        extra="executorch",
        packages=("executorch",),
        writers=("executorch",),
        limits=XNNPACK,
    ),
    "hf": Target(
        backend_class="qwlora.targets.weights.hf:Hf",
        runtime="transformers",
        extra="hf",
        packages=("compressed_tensors",),
        limits=COMPRESSED_TENSORS,
    ),
    "gguf": Target(
        backend_class="qwlora.targets.weights.gguf:Gguf",
        runtime="llama.cpp",
        exact="a float32 copy of its values",
        rounds="8-bit activations",
        extra="llamacpp",
        packages=("gguf", "llama_cpp_py_sync"),
        writers=("gguf",),
        source_suffix=".gguf",
        embedding_bits=(8, 16, 32),
        rounds_adapters=True,
        limits=GGUF,
    ),
    "mlx": Target(
        backend_class="qwlora.targets.weights.mlx:Mlx",
        runtime="MLX",
        extra="mlx",
        packages=("mlx.core", "mlx_lm"),
        # No 16-bit embeddings: MLX computes in the type of the embedding.
        embedding_bits=(8, 32),
        rounds_adapters=True,
        limits=MLX,
    ),
    "openvino": Target(
        backend_class="qwlora.targets.onnx.openvino:Openvino",
        runtime="OpenVINO",
        exact="with float32 settings",
        rounds="8-bit activations on some processors",
        extra="openvino",
        packages=("openvino_tokenizers", "openvino_genai", "openvino"),
        writers=(*_ONNX, "openvino", "openvino_tokenizers"),
        limits=OPENVINO,
    ),
}
