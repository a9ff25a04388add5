"""All export targets by the name that recipes use, and what their formats can hold. Imports no
torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from qwlora.errors import listed
from qwlora.formats import MLX_BITWIDTHS
from qwlora.grid.scheme import Bf16Block, Blocks, PerChannel, Scheme
from qwlora.targets.npu.htp_limits import table_problem, weight_problem
from qwlora.targets.target import OPSETS, LayerKind, Layout, Target

MLX_GROUPS = (128, 64, 32)
NBITS_BLOCKS = (256, 128, 64, 32, 16)  # of ONNX Runtime's MatMulNBits
WEB_LIBRARY = "onnxruntime-web@^1.30"
_ANY = range(2, 17)


@dataclass(frozen=True, kw_only=True)
class FormatLimits:
    """What a format holds.

    Args:
        name: the format's, in messages.
        symmetric, zero_point, float_offset: bitwidths of grids that are symmetric, or have an
            integer or a float offset.
        block: blocks are multiples of it.
        refused: kinds of layers, and why they are.
    """

    name: str
    symmetric: Collection[int] = _ANY
    zero_point: Collection[int] = _ANY
    float_offset: Collection[int] = _ANY
    block: int = 1
    refused: Mapping[LayerKind, str] = field(default_factory=dict)

    def problem(self, scheme: Scheme) -> str | None:
        """Why it cannot hold integers of a scheme; None if it can."""
        bits, kind = self.symmetric, "symmetric grids"
        if scheme.float_offset:
            bits, kind = self.float_offset, "float offsets"
        elif not scheme.symmetric:
            bits, kind = self.zero_point, "integer zero points"
        if not bits:
            return f"{scheme}: {self.name} has no {kind}"
        if scheme.bitwidth not in bits:
            return f"{scheme}: {self.name} has {listed(bits, 9)} bits with {kind}"
        match scheme.granularity:
            case Blocks(size) if size % self.block:
                return f"{scheme}: {self.name} has blocks of {self.block} and multiples of it"
        return None

    def kind_problem(self, kind: LayerKind) -> str | None:
        """Why it cannot hold a kind of layer; None if it can."""
        return f"{self.name} {self.refused[kind]}" if kind in self.refused else None


_LINEAR_ONLY = {
    LayerKind.OTHER: "has integers of Linear layers and embeddings only",
    LayerKind.CONV1D: "has no integers for transformers' Conv1D",
}
AIMET_ENCODINGS = FormatLimits(name="an AIMET encodings file", float_offset=())
AIMET_WEIGHTS = replace(AIMET_ENCODINGS, refused=_LINEAR_ONLY)  # of a checkpoint, not of a graph
COMPRESSED_TENSORS = FormatLimits(name="compressed-tensors", float_offset=(), refused=_LINEAR_ONLY)
GGUF = FormatLimits(
    name="GGUF",
    symmetric=(4, 5, 8),
    zero_point=(),
    float_offset=(4, 5),
    block=32,
    refused={
        LayerKind.CONV1D: "holds transformers' Conv1D in a form that no adapter can be added to"
    },
)
MLX = FormatLimits(
    name="MLX",
    symmetric=MLX_BITWIDTHS,
    zero_point=MLX_BITWIDTHS,
    float_offset=MLX_BITWIDTHS,
    block=MLX_GROUPS[-1],
    refused=_LINEAR_ONLY,
)
NBITS = FormatLimits(
    name="MatMulNBits",
    symmetric=range(2, 9),
    zero_point=range(2, 9),
    float_offset=range(2, 5),
    block=NBITS_BLOCKS[-1],
)
OPENVINO = FormatLimits(
    name="OpenVINO", symmetric=range(2, 9), zero_point=range(2, 9), float_offset=range(2, 9)
)
XNNPACK = FormatLimits(
    name="XNNPACK",
    symmetric=range(2, 9),
    zero_point=(),
    float_offset=(),
    block=32,
    refused={LayerKind.OTHER: "has integers of linear layers and embeddings only"},
)
VLLM = FormatLimits(name="vLLM", symmetric=(4, 8), zero_point=(4,), float_offset=())


def xnnpack_problem(scheme: Scheme) -> str | None:
    """Why XNNPACK (of ExecuTorch 1.5) does not hold a scheme; None if it does: tried with one layer
    of each."""
    if (problem := XNNPACK.problem(scheme)) or not isinstance(scheme.granularity, Blocks):
        return problem
    if scheme.bitwidth > 4:
        return f"{scheme}: XNNPACK has 4 bits in blocks; more have one scale for each channel"
    if not isinstance(scheme.granularity, Bf16Block):
        return f"{scheme}: XNNPACK rounds scales of blocks to bfloat16, which bf16block has"
    return None


def vllm_problem(schemes: Collection[Scheme]) -> str | None:
    """Why vLLM computes no Linear layers of these schemes from a folder of `hf`; None if it does.
    Read in vLLM 0.33: its kernels of compressed-tensors weights with float activations."""
    for scheme in schemes:
        if problem := VLLM.problem(scheme):
            return problem
        match scheme.granularity:
            case PerChannel() | Blocks(32 | 64 | 128):
                continue
        return f"{scheme}: vLLM takes scales per channel or of blocks of 32, 64, 128"
    if len(schemes) > 1:
        return "several schemes: vLLM fuses q, k and v, and gate and up, which need one scheme"
    return None


def transformers_conflict(schemes: Collection[Scheme]) -> str | None:
    """Why transformers cannot read layers of these schemes from one folder; None if it can."""
    if len(schemes) < 2 or all(scheme.symmetric for scheme in schemes):
        return None
    return (
        f"{listed(sorted(map(str, schemes)))} together: transformers reads an asymmetric scheme "
        "only if all layers have it"
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

TARGETS: dict[str, Target] = {
    "onnx": _simulated(
        backend_class="qwlora.targets.onnx.onnx:Onnx",
        runtime="ONNX Runtime",
        embedding_bits=(16, 32),
    ),
    "onnx_each": _simulated(
        backend_class="qwlora.targets.onnx.onnx:OnnxEach",
        runtime="ONNX Runtime",
        layout=Layout.EACH,
        has_proof=False,
        model_files="model.onnx*",
        embedding_bits=(16, 32),
    ),
    "aimet": _simulated(
        backend_class="qwlora.targets.npu.float_targets:Aimet",
        layout=Layout.EACH,
        cached_graphs=True,
        opsets=OPSETS,
        model_files="*.aimet/*",
        is_for_htp=True,
        scheme_problem=AIMET_ENCODINGS.problem,
    ),
    "qairt": _simulated(
        backend_class="qwlora.targets.npu.float_targets:Qairt",
        layout=Layout.CASES,
        cached_graphs=True,
        graph_layouts=("genie",),
        opsets=OPSETS,
        reserved=frozenset({"none", "base", "model", "host"}),
        is_for_htp=True,
        scheme_problem=AIMET_ENCODINGS.problem,
    ),
    "qnn": _simulated(
        backend_class="qwlora.targets.npu.qnn:Qnn",
        runtime="HTP emulator",
        compilers=("onnxruntime_qnn", "qnn"),
        layout=Layout.CASES,
        cached_graphs=True,
        graph_layouts=("genie",),
        has_proof=False,
        reserved=frozenset({"none", "base", "zero"}),
        is_for_htp=True,
        scheme_problem=weight_problem,
        embedding_problem=table_problem,
    ),
    "qairt_pipeline": Target(
        backend_class="qwlora.targets.npu.qairt_pipeline:QairtPipeline",
        runtime="transformers",
        extra="hf",
        packages=("transformers", "peft"),
        writes_floats=True,
        is_for_htp=True,
        scheme_problem=AIMET_WEIGHTS.problem,
        kind_problem=AIMET_WEIGHTS.kind_problem,
    ),
    "genai": Target(
        backend_class="qwlora.targets.onnx.genai:Genai",
        runtime="ONNX Runtime GenAI",
        extra="genai",
        packages=(*_ONNX, "onnxruntime_genai"),
        writers=_ONNX,
        embedding_bits=(16, 32),
        scheme_problem=NBITS.problem,
    ),
    "web": Target(
        backend_class="qwlora.targets.onnx.web:Web",
        runtime="ONNX Runtime Web",
        extra="web",
        packages=("onnx",),
        writers=_ONNX,
        node_packages=(WEB_LIBRARY,),
        embedding_bits=(16, 32),
        scheme_problem=NBITS.problem,
    ),
    "executorch": Target(
        backend_class="qwlora.targets.weights.executorch:Executorch",
        runtime="ExecuTorch",
        extra="executorch",
        packages=("executorch",),
        writers=("executorch",),
        embedding_bits=(16, 32),
        scheme_problem=xnnpack_problem,
        kind_problem=XNNPACK.kind_problem,
    ),
    "hf": Target(
        backend_class="qwlora.targets.weights.hf:Hf",
        runtime="transformers",
        extra="hf",
        packages=("compressed_tensors",),
        writes_float_embeddings=True,
        holds_invocation=True,
        embedding_bits=(16, 32),
        scheme_problem=COMPRESSED_TENSORS.problem,
        conflict=transformers_conflict,
        kind_problem=COMPRESSED_TENSORS.kind_problem,
    ),
    "gguf": Target(
        backend_class="qwlora.targets.weights.gguf:Gguf",
        runtime="llama.cpp",
        extra="llamacpp",
        packages=("gguf", "llama_cpp_py_sync"),
        writers=("gguf",),
        source_suffix=".gguf",
        has_float16_scales=True,
        holds_invocation=True,
        embedding_bits=(16,),
        scheme_problem=GGUF.problem,
        kind_problem=GGUF.kind_problem,
    ),
    "mlx": Target(
        backend_class="qwlora.targets.weights.mlx:Mlx",
        runtime="MLX",
        extra="mlx",
        packages=("mlx.core", "mlx_lm"),
        scheme_problem=MLX.problem,
        kind_problem=MLX.kind_problem,
    ),
    "openvino": Target(
        backend_class="qwlora.targets.onnx.openvino:Openvino",
        runtime="OpenVINO",
        extra="openvino",
        packages=("openvino", "openvino_genai", "openvino_tokenizers"),
        writers=(*_ONNX, "openvino", "openvino_tokenizers"),
        embedding_bits=(16, 32),
        scheme_problem=OPENVINO.problem,
    ),
}
