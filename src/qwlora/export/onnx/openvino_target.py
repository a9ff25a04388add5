"""The `openvino` target: an IR with the base's integers and adapters for openvino-genai.

    base/openvino_model.xml, .bin    stateful, see `openvino_folder.py`; tokenizer; configuration
    NAME/adapter_model.safetensors   PEFT's names; the scale is in lora_B, since OpenVINO reads none

openvino-genai returns tokens, not logits. So logits are computed by OpenVINO from the same IR, in
which an adapter's factors are added to every product with a weight, as openvino-genai adds them:
as inputs, of rank 0 without an adapter. `decode` runs openvino-genai itself, one pipeline for all
adapters, and must give the likeliest tokens of these logits.

Run with exact settings, float32, and as shipped, where OpenVINO may round activations to 8 bits on
processors that multiply these faster.

Imports torch and OpenVINO only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.export.format_limits import openvino_problem
from qwlora.export.proof.contents import PEFT_FILES, PEFT_FORM, TOKENIZER, Contents
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme

_PEFT = "base_model.model."
_PARTS = ("model", "tokenizer", "detokenizer")
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
    contents = Contents(
        base=(
            *(f"openvino_{part}.{end}" for part in _PARTS for end in ("xml", "bin")),
            "config.json",
            "generation_config.json",
            *TOKENIZER,
        ),
        adapter=PEFT_FILES,
        forms={"adapter_config.json": PEFT_FORM},
    )

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return _LOADING.format(base=base, adapter="", given="", used="")
        line = f'adapter = og.Adapter("{adapter}/adapter_model.safetensors")\n'
        given = ", adapters=og.AdapterConfig([adapter])"
        return _LOADING.format(base=base, adapter=line, given=given, used=given)

    def problem(self, scheme: Scheme) -> str | None:
        return openvino_problem(scheme)

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.onnx.openvino_folder import write_openvino

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

        from qwlora.export.onnx.openvino_folder import IR

        self.shipped, self._folder, self._settings = shipped, folder, settings
        self._openvino: Any = openvino
        core = openvino.Core()
        with foreign_as(ExportError, f"OpenVINO cannot load {str(folder)!r}"):
            model = core.read_model(folder / IR)
            self._none = _add_factors(model)
            self._compiled = core.compile_model(model, "CPU", settings)
        self._factors: dict[Path, dict[str, Any]] = {}
        self._adapters: dict[Path, Any] = {}  # the same of openvino-genai
        self._pipeline: Any = None
        self._active: Path | None = None

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none. Adapters stay loaded.

        Raises:
            ExportError: OpenVINO cannot read it, or the model has no product for a module.
        """
        import openvino_genai as genai
        from safetensors.numpy import load_file

        if adapter is not None and adapter not in self._factors:
            file = adapter / "adapter_model.safetensors"
            with foreign_as(ExportError, f"openvino-genai cannot load {str(file)!r}"):
                tensors = load_file(file)
                loaded = genai.Adapter(str(file))
            factors = {n.removeprefix(_PEFT).removesuffix(".weight"): t for n, t in tensors.items()}
            if unknown := sorted(set(factors) - set(self._none)):
                module = unknown[0].rpartition(".")[0]
                raise ExportError(
                    f"the model multiplies by no weight of {module}, which the adapter in "
                    f"{str(adapter)!r} changes"
                )
            self._factors[adapter], self._adapters[adapter] = factors, loaded
            self._pipeline = None  # which knows its adapters from the beginning
        self._active = adapter
        if self.shipped is not None:
            self.shipped.use(adapter)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        import numpy as np
        import torch

        request = self._compiled.create_infer_request()  # with an empty state
        rows, tokens = ids.shape
        factors = {} if self._active is None else self._factors[self._active]
        found = request.infer(
            {
                "input_ids": ids.numpy(),
                "attention_mask": np.ones((rows, tokens), np.int64),
                "position_ids": np.arange(tokens)[None].repeat(rows, 0),
                "beam_idx": np.arange(rows, dtype=np.int32),
                **self._none,
                **factors,
            }
        )
        return torch.from_numpy(found["logits"].copy())

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], by openvino-genai."""
        import openvino_genai as genai

        from qwlora.export.onnx.openvino_folder import IR, WEIGHTS

        if self._pipeline is None:
            known = list(self._adapters.values())
            given = {"adapters": genai.AdapterConfig(known)} if known else {}
            # openvino-genai loads every tokenizer that is next to the model, and a damaged one can
            # kill the process. Token ids need none.
            with (
                TemporaryDirectory() as folder,
                foreign_as(ExportError, f"openvino-genai cannot load {str(self._folder)!r}"),
            ):
                for name in (IR, WEIGHTS, "config.json", "generation_config.json"):
                    Path(folder, name).symlink_to((self._folder / name).absolute())
                self._pipeline = genai.LLMPipeline(
                    folder, "CPU", ATTENTION_BACKEND="SDPA", **given, **self._settings
                )
        options = genai.GenerationConfig()
        options.max_new_tokens, options.do_sample, options.ignore_eos = count, False, True
        active = [] if self._active is None else [self._adapters[self._active]]
        given = {"adapters": genai.AdapterConfig(active)} if self._adapters else {}
        found = self._pipeline.generate(self._openvino.Tensor(ids.numpy()), options, **given)
        return [int(token) for token in found.tokens[0][-count:]]


def _add_factors(model: Any) -> dict[str, Any]:
    """Add an adapter's factors as inputs to the products with weights, in place.

    Returns:
        factors of rank 0 by the inputs' names, MODULE.lora_A [0, in] and MODULE.lora_B [out, 0].
    """
    import numpy as np
    from openvino import PartialShape, Type
    from openvino import opset13 as op

    none = {}
    for node in [n for n in model.get_ops() if n.get_type_name() == "MatMul"]:
        weight = node.input_value(1)
        if len(weight.get_partial_shape()) != 2 or _is_computed(weight.get_node()):
            continue
        columns, rows = weight.get_shape()
        if node.get_attributes()["transpose_b"]:
            rows, columns = columns, rows
        module, readers = node.get_friendly_name(), node.output(0).get_target_inputs()
        inputs = []
        for part, shape in (("lora_A", (-1, columns)), ("lora_B", (rows, -1))):
            factor = op.parameter(PartialShape(shape), Type.f32, f"{module}.{part}")
            factor.output(0).get_tensor().add_names({f"{module}.{part}"})
            none[f"{module}.{part}"] = np.zeros([max(size, 0) for size in shape], np.float32)
            inputs.append(factor)
        model.add_parameters(inputs)
        inner = op.matmul(node.input_value(0), inputs[0], False, True)
        total = op.add(node.output(0), op.matmul(inner, inputs[1], False, True))
        for reader in readers:
            reader.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()
    return none


def _is_computed(node: Any) -> bool:
    """Whether a node depends on the model's inputs or state."""
    waiting, seen = [node], set[str]()
    while waiting:
        found = waiting.pop()
        if found.get_type_name() in ("Parameter", "ReadValue"):
            return True
        sources = [value.get_node() for value in found.input_values()]
        waiting += [source for source in sources if source.get_name() not in seen]
        seen.update(source.get_name() for source in sources)
    return False
