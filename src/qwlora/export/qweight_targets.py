"""The `gptq` and `awq` targets: folders for programs that read these formats, and PEFT directories.

    vLLM           vllm serve base --enable-lora --lora-modules NAME=NAME
    transformers   AutoModelForCausalLM.from_pretrained("base"), with GPTQModel installed

GPTQModel computes weights in float16. So the folder is run twice: exact, with the weights that
GPTQModel unpacks in float32, and as shipped. Both use its kernels in PyTorch and do not compile
them, which takes seconds for each layer; its kernels in C++ are compiled for minutes.

Imports torch and transformers only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.held_schemes import (
    awq_problem,
    gptq_problem,
    layer_kind_problem,
    one_layout_conflict,
)
from qwlora.export.hf_target import TransformersRuntime, load, loading_in_transformers
from qwlora.export.proof.contents import (
    MODEL_FILES,
    OTHER_KEYS,
    PEFT_FILES,
    PEFT_FORM,
    TOKENIZER,
    Contents,
)
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import nn

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.held_schemes import LayerKind
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme


class QweightTarget(WeightsTarget):
    """What both formats share."""

    extra = "gptq"
    packages = ("gptqmodel", "optimum")
    has_float16_scales = True
    contents = Contents(
        base=(*MODEL_FILES, "quantize_config.json", *TOKENIZER),
        adapter=PEFT_FILES,
        forms={"adapter_config.json": PEFT_FORM},
        settings={"quantization_config": {OTHER_KEYS: object}},
    )
    writes_float_embeddings = True

    def loading(self, base: str, adapter: str | None) -> str:
        needs = "In transformers, needs `pip install gptqmodel optimum`. vLLM reads the same files."
        return loading_in_transformers(needs, base, adapter)

    def conflict(self, schemes: Collection[Scheme]) -> str | None:
        return one_layout_conflict(schemes)

    def kind_problem(self, kind: LayerKind) -> str | None:
        return layer_kind_problem(kind, "GPTQ or AWQ")

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.canonical_adapter import write_peft

        write_peft(adapter, folder)

    def open(self, folder: Path) -> TransformersRuntime:
        exact, shipped = self.load(folder), self.load(folder)
        self.in_float32_(exact)
        return TransformersRuntime(exact, TransformersRuntime(shipped))

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The folder in transformers, with GPTQModel's kernels in PyTorch."""

    @abstractmethod
    def in_float32_(self, model: nn.Module) -> None:
        """Let a loaded model compute weights in float32."""


class GptqTarget(QweightTarget):
    """`write_gptq` as a target."""

    def problem(self, scheme: Scheme) -> str | None:
        return gptq_problem(scheme)

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.qweight_folder import write_gptq

        write_gptq(base.model, base.tokenizer, folder)

    def load(self, folder: Path) -> nn.Module:
        from transformers import GPTQConfig

        return _load(folder, GPTQConfig(bits=4, backend="torch"))  # its bits have no effect

    def in_float32_(self, model: nn.Module) -> None:
        for module in model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            if "qzeros" in buffers:
                module.register_buffer("scales", buffers["scales"].float())


class AwqTarget(QweightTarget):
    """`write_awq` as a target."""

    def problem(self, scheme: Scheme) -> str | None:
        return awq_problem(scheme)

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.qweight_folder import write_awq

        write_awq(base.model, base.tokenizer, folder)

    def load(self, folder: Path) -> nn.Module:
        from transformers import AwqConfig
        from transformers.utils.quantization_config import AwqBackend

        return _load(folder, AwqConfig(backend=AwqBackend.TORCH_AWQ))

    def in_float32_(self, model: nn.Module) -> None:
        import torch
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        for path, module in list(model.named_modules()):
            buffers = dict(module.named_buffers(recurse=False))
            if "qzeros" not in buffers:
                continue
            words, zeros, scales = (buffers[part] for part in ("qweight", "qzeros", "scales"))
            group = len(words) // len(scales)
            weight = dequantize_gemm(words, zeros, scales.float(), 4, group).t().contiguous()
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], "bias" in buffers)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if "bias" in buffers:
                layer.bias = torch.nn.Parameter(buffers["bias"].float(), requires_grad=False)
            model.set_submodule(path, layer)


def _load(folder: Path, settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns that the folder has settings too
        model = load(folder, quantization_config=settings)
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)  # its class has the same, not compiled
    return model
