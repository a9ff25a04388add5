"""The `hf` target: a compressed-tensors folder and PEFT directories, for transformers, vLLM and
SGLang.

    transformers   AutoModelForCausalLM.from_pretrained("base")
                   PeftModel.from_pretrained(model, "NAME")
    vLLM           vllm serve base --enable-lora --lora-modules NAME=NAME

Imports torch and transformers only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.export.format_limits import (
    compressed_tensors_problem,
    layer_kind_problem,
    transformers_conflict,
)
from qwlora.export.proof.contents import (
    MODEL_FILES,
    OTHER_KEYS,
    PEFT_FILES,
    PEFT_FORM,
    PLAIN,
    TOKENIZER,
    Contents,
)
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.format_limits import LayerKind
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme


_GROUP = {
    "targets": [PLAIN],
    "weights": {
        "num_bits": int,
        "type": "int",
        "symmetric": bool,
        "dynamic": False,
        "strategy": frozenset({"group", "channel", "tensor"}),
        "group_size": int,
    },
}
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": [PLAIN],
    "config_groups": {OTHER_KEYS: _GROUP},
    "dequantize": True,
}


class HfTarget(WeightsTarget):
    """`write_compressed_tensors` and `write_peft` as a target; transformers and PEFT run it."""

    extra = "hf"
    packages = ("compressed_tensors",)
    writes_float_embeddings = True
    contents = Contents(
        base=(*MODEL_FILES, *TOKENIZER),
        adapter=PEFT_FILES,
        forms={"adapter_config.json": PEFT_FORM},
        settings={"quantization_config": _QUANTIZATION},
    )

    def loading(self, base: str, adapter: str | None) -> str:
        needs = "Needs `pip install compressed-tensors`. vLLM and SGLang read the same files."
        return loading_in_transformers(needs, base, adapter, runs_first=True)

    def problem(self, scheme: Scheme) -> str | None:
        return compressed_tensors_problem(scheme)

    def conflict(self, schemes: Collection[Scheme]) -> str | None:
        return transformers_conflict(schemes)

    def kind_problem(self, kind: LayerKind) -> str | None:
        return layer_kind_problem(kind, "compressed-tensors")

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.weights.compressed_tensors_folder import write_compressed_tensors

        write_compressed_tensors(base.model, base.tokenizer, folder)

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.canonical_adapter import write_peft

        write_peft(adapter, folder)

    def open(self, folder: Path) -> TransformersRuntime:
        import torch

        runtime = TransformersRuntime(load(folder))
        runtime.logits(torch.zeros(1, 1, dtype=torch.int64))  # see loading_in_transformers
        return runtime


def load(folder: Path, **arguments: Any) -> Any:
    """The folder in transformers, in float32. Code in the folder is not run.

    Args:
        arguments: passed on to `from_pretrained`.

    Raises:
        ExportError: transformers refuses the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with foreign_as(ExportError, f"transformers cannot load {str(folder)!r}"):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, **arguments
        ).eval()


def loading_in_transformers(
    needs: str, base: str, adapter: str | None, runs_first: bool = False
) -> str:
    """`Target.loading` of a folder that transformers and vLLM read.

    Args:
        needs: a sentence about what must be installed.
        runs_first: whether the base must compute something before PEFT can add an adapter:
            compressed-tensors unpacks layers of several schemes only then.
    """
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
    ]
    serve = f"vllm serve {base}"
    if adapter is not None:
        lines.insert(1, "from peft import PeftModel")
        if runs_first:
            lines.insert(1, "import torch")
            lines.append("model(torch.tensor([[0]]))  # unpacks all layers")
        lines.append(f'model = PeftModel.from_pretrained(model, "{adapter}")')
        serve += f" --enable-lora --lora-modules adapter={adapter}"
    lines += [
        'ids = tokenizer("Hello", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))",
    ]
    return "\n".join([needs, "", *lines, "```", "", "```shell", serve, "```"])


class TransformersRuntime:
    """A model in transformers; adapters by PEFT.

    Args:
        model: the base.
        shipped: the same with the program's own settings; None if `model` has these.
    """

    def __init__(self, model: Any, shipped: TransformersRuntime | None = None):
        self.shipped = shipped
        self._model = model  # a PeftModel from the first adapter on
        self._known: dict[Path, str] = {}

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none. Adapters stay loaded.

        Raises:
            SourceError: its configuration cannot be read, or a pattern in it takes too long.
            ExportError: PEFT refuses it.
        """
        from peft import PeftModel

        from qwlora.adapter.peft_support import check_pattern_times, read_config

        if adapter is not None and adapter not in self._known:
            check_pattern_times(self._model, read_config(adapter), f"adapter {str(adapter)!r}")
            name = str(len(self._known))
            with foreign_as(ExportError, f"PEFT cannot load {str(adapter)!r}"):
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(adapter, name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, adapter, name)
            self._model.eval()
            self._known[adapter] = name
        if adapter is not None:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(self._known[adapter])
        elif isinstance(self._model, PeftModel):
            self._model.base_model.disable_adapter_layers()
        if self.shipped is not None:
            self.shipped.use(adapter)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        import torch

        with torch.no_grad():
            logits: Tensor = self._model(input_ids=ids).logits
        return logits.float()

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""
        import torch

        found: list[int] = []
        cache: Any = None
        with torch.no_grad():
            while len(found) < count:
                result = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
                found.append(int(ids))
        return found
