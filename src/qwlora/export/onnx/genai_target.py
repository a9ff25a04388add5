"""The `genai` target: a folder and adapters for onnxruntime-genai, on the CPU.

    model.onnx, model.onnx.data    the base with MatMulNBits, see `matmul_nbits.py`
    genai_config.json              written from the model's configuration, for any architecture
    tokenizer.json, ...
    none.onnx_adapter              ranks of 0, to switch a running generation back to the base
    NAME/adapter.onnx_adapter

The folder also runs in ONNX Runtime alone, where `RunOptions.add_active_adapter` switches.

MatMulNBits' accuracy level is 1, float32 activations: the file computes what was trained. Level 4,
the default of onnxruntime-genai's own builder, rounds activations to 8 bits.

Imports torch and the packages of ONNX Runtime only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.export.format_limits import nbits_problem
from qwlora.export.onnx.onnx_adapter import ADAPTER_FILE
from qwlora.export.proof.contents import TOKENIZER, Contents
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme

_LOADING = """\
Needs `pip install onnxruntime-genai`.

```python
import onnxruntime_genai as og

model = og.Model("{base}")
tokenizer = og.Tokenizer(model)
options = og.GeneratorParams(model)
options.set_search_options(max_length=64)
generator = og.Generator(model, options){switch}
generator.append_tokens(tokenizer.encode("Hello"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""
_SWITCH = """
adapters = og.Adapters(model)
adapters.load("{adapter}/adapter.onnx_adapter", "adapter")
generator.set_active_adapter(adapters, "adapter")  # also in the middle of a generation"""


_ID = (int, type(None))
_CONFIG = {
    "model": {
        "type": "llama",
        "context_length": int,
        "vocab_size": int,
        "bos_token_id": _ID,
        "eos_token_id": (int, list),
        "pad_token_id": _ID,
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"provider_options": []},
            "num_hidden_layers": int,
            "num_attention_heads": int,
            "num_key_value_heads": int,
            "hidden_size": int,
            "head_size": int,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    },
    "search": {"do_sample": False, "max_length": int, "past_present_share_buffer": False},
}


class GenaiTarget(WeightsTarget):
    """`write_genai` and `write_onnx_adapter` as a target; onnxruntime-genai runs it."""

    extra = "genai"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime", "onnxruntime_genai")
    contents = Contents(
        base=(
            "model.onnx",
            "model.onnx.data",
            "none.onnx_adapter",
            "genai_config.json",
            "config.json",
            "generation_config.json",
            *TOKENIZER,
        ),
        adapter=(ADAPTER_FILE,),
        forms={"genai_config.json": _CONFIG},
    )

    def loading(self, base: str, adapter: str | None) -> str:
        switch = "" if adapter is None else _SWITCH.format(adapter=adapter)
        return _LOADING.format(base=base, switch=switch)

    def problem(self, scheme: Scheme) -> str | None:
        return nbits_problem(scheme)

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.onnx.genai_folder import write_genai

        write_genai(base.model, base.tokenizer, folder)

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.onnx.matmul_nbits import empty_factors, write_onnx_adapter
        from qwlora.export.onnx.onnx_model import MODEL_FILE

        write_onnx_adapter(adapter, empty_factors(base / MODEL_FILE), folder / ADAPTER_FILE)

    def open(self, folder: Path) -> GenaiRuntime:
        return GenaiRuntime(folder)


class GenaiRuntime:
    """The folder in onnxruntime-genai.

    Raises:
        ExportError: onnxruntime-genai refuses the folder.
    """

    shipped = None  # what is verified is what is shipped

    def __init__(self, folder: Path):
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(folder)!r}"):
            self._model = self._genai.Model(str(folder))
            self._adapters = self._genai.Adapters(self._model)
        self._known: dict[Path, str] = {}
        self._active: Path | None = None

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none."""
        if adapter is not None and adapter not in self._known:
            name = f"{len(self._known)}"
            with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(adapter)!r}"):
                self._adapters.load(str(adapter / ADAPTER_FILE), name)
            self._known[adapter] = name
        self._active = adapter

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [1, tokens, vocabulary] of token ids [1, tokens]."""
        import numpy as np
        import torch

        generator = self._generator(ids, 1)
        found = torch.from_numpy(np.array(generator.get_output("logits"), np.float32))
        return found.view(1, ids.shape[1], -1)

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""
        generator = self._generator(ids, count)
        while len(generator.get_sequence(0)) < ids.shape[1] + count:
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[ids.shape[1] :]]

    def _generator(self, ids: Tensor, count: int) -> Any:
        """A generator that has read `ids`."""
        import numpy as np

        options = self._genai.GeneratorParams(self._model)
        length = ids.shape[1] + count
        options.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=1
        )
        generator = self._genai.Generator(self._model, options)
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._known[self._active])
        with foreign_as(ExportError, "onnxruntime-genai cannot run the model"):
            generator.append_tokens(ids[0].numpy().astype(np.int32))
        return generator
