"""Where the tensors of a Hugging Face model are in a GGUF file, for architectures that are written.

    model.layers.N.self_attn.q_proj.weight  ->  blk.N.attn_q.weight, and the stored row of each row

Names are those of the `gguf` package. llama.cpp rotates neighboring values of a head in the
architectures `llama` and `smollm3`, and transformers rotates values that are half a head apart.
There, the two halves of each head of q and k are stored interleaved:

    row i of a head, i < d/2  ->  2 i            row d/2 + i  ->  2 i + 1

The norms of Gemma multiply by 1 + weight; llama.cpp multiplies by what is stored, so 1 is added.
Files of other architectures are only read, by the inverse maps of transformers.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from qwlora.errors import ExportError
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.system.optional_packages import require

gguf = require("gguf", "gguf")
_SAME = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "smollm3")
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"} | dict(zip(_SAME, _SAME, strict=True))
"""What GGUF calls the architecture of each model type of transformers."""


class TensorNames:
    """The names and orders of one architecture.

    Args:
        architecture: a value of `ARCHITECTURES`.
        blocks: the number of layers.
        heads: the heads of q, and those of k.
    """

    def __init__(self, architecture: str, blocks: int, heads: tuple[int, int]):
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(kind, blocks)
        self._architecture = architecture
        self._heads = dict(zip(("q_proj", "k_proj"), heads, strict=True))

    @classmethod
    def of_file(cls, file: GgufFile) -> TensorNames:
        """Those of a file that was written with these names."""
        kind = file.architecture
        heads = file.metadata[f"{kind}.attention.head_count"]
        kv_heads = file.metadata.get(f"{kind}.attention.head_count_kv", heads)
        return cls(kind, file.metadata[f"{kind}.block_count"], (heads, kv_heads))

    def stored_rows(self, name: str, count: int) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a parameter, and the stored row of each of its `count` rows; an
        ExportError if the architecture has no such tensor."""
        stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(
                f"llama.cpp's architecture {self._architecture} has no tensor for {name!r}; export "
                "this model to another target"
            )
        rows = torch.arange(count)
        heads = self._heads.get(name.split(".")[-2])
        if heads and self._architecture in ("llama", "smollm3"):
            rows = rows.view(heads, -1, 2).mT.flatten()
        return stored, rows

    def stored_values(self, name: str, values: Tensor) -> Tensor:
        """A float parameter as it is stored, in order of its own rows."""
        is_norm = self._architecture.startswith("gemma") and name.endswith("norm.weight")
        return values.float() + 1 if is_norm else values
