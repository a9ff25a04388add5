"""The `openvino` target: an IR with the base's integers and adapters for openvino-genai.

    base/openvino_model.xml, .bin    stateful, see `openvino_folder.py`; tokenizer; configuration
    NAME/adapter_model.safetensors   PEFT's names; the scale is in lora_B, since OpenVINO reads none

openvino-genai returns tokens, not logits. So logits with an adapter are computed by OpenVINO from
the same IR with the adapter's factors added at the layers of that name, as openvino-genai adds
them; `decode` runs openvino-genai itself, and must give the likeliest tokens of these logits.

Run with exact settings, float32, and as shipped, where OpenVINO may round activations to 8 bits on
processors that multiply these faster.

Imports torch and OpenVINO only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.export.held_schemes import openvino_problem
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
_LOADING = """\
Needs `pip install openvino-genai`.

```python
import openvino_genai as og

{adapter}pipeline = og.LLMPipeline("{base}", "CPU", ATTENTION_BACKEND="SDPA"{given})
print(pipeline.generate("Hello", max_new_tokens=32{used}))
```"""


class OpenvinoTarget(WeightsTarget):
    """`write_openvino` and `write_peft` as a target; OpenVINO and openvino-genai run it."""

    extra = "openvino"
    packages = ("openvino", "openvino_genai", "openvino_tokenizers")

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return _LOADING.format(base=base, adapter="", given="", used="")
        line = f'adapter = og.Adapter("{adapter}/adapter_model.safetensors")\n'
        given = ", adapters=og.AdapterConfig([adapter])"
        return _LOADING.format(base=base, adapter=line, given=given, used=given)

    def problem(self, scheme: Scheme) -> str | None:
        return openvino_problem(scheme)

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.openvino_folder import write_openvino

        write_openvino(base.model, base.tokenizer, folder)

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.canonical_adapter import write_peft

        write_peft(adapter, folder)

    def open(self, folder: Path) -> OpenvinoRuntime:
        return OpenvinoRuntime(folder, EXACT, OpenvinoRuntime(folder, {}))


class OpenvinoRuntime:
    """The folder in OpenVINO, on the CPU.

    Args:
        settings: properties of the compiled model.
        shipped: the same with OpenVINO's own settings; None if `settings` are these.

    Raises:
        ExportError: OpenVINO refuses the folder.
    """

    def __init__(
        self, folder: Path, settings: dict[str, str], shipped: OpenvinoRuntime | None = None
    ):
        import openvino

        self.shipped, self._folder, self._settings = shipped, folder, settings
        self._openvino: Any = openvino
        self._compiled: dict[Path | None, Any] = {}
        self._pipelines: dict[Path | None, Any] = {}
        self._active: Path | None = None
        self.use(None)

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none."""
        from qwlora.export.openvino_folder import IR

        if adapter not in self._compiled:
            core = self._openvino.Core()
            with foreign_as(ExportError, f"OpenVINO cannot load {str(self._folder)!r}"):
                model = core.read_model(self._folder / IR)
                if adapter is not None:
                    self._add(model, adapter)
                self._compiled[adapter] = core.compile_model(model, "CPU", self._settings)
        self._active = adapter
        if self.shipped is not None:
            self.shipped.use(adapter)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        import numpy as np
        import torch

        request = self._compiled[self._active].create_infer_request()  # with an empty state
        rows, tokens = ids.shape
        found = request.infer(
            {
                "input_ids": ids.numpy(),
                "attention_mask": np.ones((rows, tokens), np.int64),
                "position_ids": np.arange(tokens)[None].repeat(rows, 0),
                "beam_idx": np.arange(rows, dtype=np.int32),
            }
        )
        return torch.from_numpy(found["logits"].copy())

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], by openvino-genai."""
        import openvino_genai as genai

        adapters = {}
        if self._active is not None:
            file = str(self._active / "adapter_model.safetensors")
            with foreign_as(ExportError, f"openvino-genai cannot load {file!r}"):
                adapters = {"adapters": genai.AdapterConfig([genai.Adapter(file)])}
        if self._active not in self._pipelines:
            with foreign_as(ExportError, f"openvino-genai cannot load {str(self._folder)!r}"):
                self._pipelines[self._active] = genai.LLMPipeline(
                    str(self._folder), "CPU", ATTENTION_BACKEND="SDPA", **adapters, **self._settings
                )
        options = genai.GenerationConfig()
        options.max_new_tokens, options.do_sample, options.ignore_eos = count, False, True
        pipeline = self._pipelines[self._active]
        found = pipeline.generate(self._openvino.Tensor(ids.numpy()), options, **adapters)
        return [int(token) for token in found.tokens[0][-count:]]

    def _add(self, model: Any, adapter: Path) -> None:
        """Add an adapter's factors to the products of its modules.

        Raises:
            ExportError: the model has no product for a module.
        """
        from openvino import opset13 as op
        from safetensors.numpy import load_file

        tensors = load_file(adapter / "adapter_model.safetensors")
        products = {
            n.get_friendly_name(): n for n in model.get_ops() if n.get_type_name() == "MatMul"
        }
        for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if module not in products:
                raise ExportError(f"the model has no product of {module}, which {adapter} changes")
            node = products[module]
            readers = node.output(0).get_target_inputs()
            factors = (tensors[name], tensors[name.replace("lora_A", "lora_B")])
            inner = op.matmul(node.input_value(0), op.constant(factors[0]), False, True)
            outer = op.matmul(inner, op.constant(factors[1]), False, True)
            total = op.add(node.output(0), outer)
            for reader in readers:
                reader.replace_source_output(total.output(0))
        model.validate_nodes_and_infer_types()
