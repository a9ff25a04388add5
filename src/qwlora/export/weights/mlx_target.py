"""The `mlx` target: an affine-quantized folder and adapters for mlx-lm.

    mlx_lm.generate --model base --adapter-path NAME --prompt "..."

Imports torch and MLX only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.export.format_limits import layer_kind_problem, mlx_problem
from qwlora.export.proof.contents import MODEL_FILES, NUMBER, OTHER_KEYS, PLAIN, TOKENIZER, Contents
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.format_limits import LayerKind
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme


_GRID = {"group_size": int, "bits": int, "mode": "affine"}
_QUANTIZATION = {**_GRID, OTHER_KEYS: _GRID}  # by module path


class MlxTarget(WeightsTarget):
    """`write_mlx` and `write_mlx_adapter` as a target; mlx-lm runs it."""

    extra = "mlx"
    packages = ("mlx.core", "mlx_lm")
    contents = Contents(
        base=(*MODEL_FILES, *TOKENIZER),
        adapter=("adapter_config.json", "adapters.safetensors"),
        forms={
            "adapter_config.json": {
                "fine_tune_type": "lora",
                "num_layers": 0,
                "lora_parameters": {
                    "rank": int,
                    "scale": NUMBER,
                    "dropout": NUMBER,
                    "keys": [PLAIN],
                },
            }
        },
        settings={
            "quantization": _QUANTIZATION,
            "quantization_config": _QUANTIZATION,
            "rope_theta": NUMBER,
            "rope_scaling": {"rope_type": PLAIN, OTHER_KEYS: object},
        },
    )

    def loading(self, base: str, adapter: str | None) -> str:
        with_adapter = "" if adapter is None else f" --adapter-path {adapter}"
        return f'```shell\nmlx_lm.generate --model {base}{with_adapter} --prompt "Hello"\n```'

    def problem(self, scheme: Scheme) -> str | None:
        return mlx_problem(scheme)

    def kind_problem(self, kind: LayerKind) -> str | None:
        return layer_kind_problem(kind, "mlx-lm")

    def architecture_problem(self, model_type: str) -> str | None:
        if self.missing():
            return None
        from mlx_lm.utils import MODEL_REMAPPING

        module = f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}"
        return None if find_spec(module) else f"mlx-lm has no model type {model_type}"

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.weights.mlx_folder import write_mlx

        write_mlx(base.model, base.tokenizer, folder)

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.weights.mlx_folder import write_mlx_adapter

        write_mlx_adapter(adapter, folder)

    def open(self, folder: Path) -> MlxRuntime:
        return MlxRuntime(folder)


class MlxRuntime:
    """The folder in mlx-lm.

    Raises:
        ExportError: mlx-lm refuses the folder.
    """

    shipped = None  # what is verified is what is shipped

    def __init__(self, folder: Path):
        from mlx_lm.utils import load_model

        with foreign_as(ExportError, f"mlx-lm cannot load {str(folder)!r}"):
            self._model: Any = load_model(folder)[0]

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none."""
        from mlx_lm.tuner.utils import load_adapters, remove_lora_layers

        self._model = remove_lora_layers(self._model)
        if adapter is not None:
            with foreign_as(ExportError, f"mlx-lm cannot load {str(adapter)!r}"):
                self._model = load_adapters(self._model, str(adapter))

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        import mlx.core as mx
        import numpy as np
        import torch

        self._model.eval()
        found = self._model(mx.array(ids.numpy().astype(np.int32)))
        return torch.from_numpy(np.array(found.astype(mx.float32)))

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""
        import mlx.core as mx
        import numpy as np
        from mlx_lm.models.cache import make_prompt_cache

        cache, tokens = make_prompt_cache(self._model), mx.array(ids.numpy().astype(np.int32))
        found: list[int] = []
        while len(found) < count:
            tokens = mx.argmax(self._model(tokens, cache=cache)[:, -1:], axis=-1)
            found.append(int(tokens.item()))
        return found
