"""The `gguf` target: a GGUF base and GGUF LoRA adapters for llama.cpp.

    llama-cli -m base/base.gguf --lora NAME/adapter.gguf

llama.cpp multiplies quantized weights with activations of 8 bits, which no training knows of. So it
is verified twice: with the same weights as float32, where only rounding may differ, and as shipped,
where the difference is llama.cpp's own and only reported. On the CPU it reads every GELU from a
table of float16, exact settings or not; what that does to the trained model is allowed.

Imports torch, gguf and llama.cpp only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError
from qwlora.export.format_limits import LayerKind, gguf_problem
from qwlora.export.proof.contents import Contents
from qwlora.export.target import WeightsTarget

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.target import ExportedBase
    from qwlora.grid.scheme import Scheme


@cache
def _errors_of_llama() -> list[str]:
    """The error messages of llama.cpp, which then prints nothing; the list grows as it fails."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, errors = get_ffi(), list[str]()

    def listen(level: int, text: Any, _: Any) -> None:
        if level == get_lib().GGML_LOG_LEVEL_ERROR:
            errors.append(ffi.string(text).decode(errors="replace").strip())

    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", listen)
    get_lib().llama_log_set(callback, ffi.NULL)
    _CALLBACKS.append(callback)  # llama.cpp has its address only
    return errors


_CALLBACKS: list[Any] = []


class GeluFromTable:
    """While it is open, `modules` compute GELU as llama.cpp does on the CPU (`GGML_GELU_FP16`):

    y = half(gelu(half(x))), with the approximation by tanh, if |x| < 10; else max(x, 0)
    """

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [module.register_forward_hook(self._read) for module in self._modules]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _read(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import gelu

        (x,) = inputs
        y = gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x.abs() < 10, y, x.clamp_min(0))


def _gelus(model: nn.Module) -> list[nn.Module]:
    from torch import nn
    from transformers import activations

    kinds = (
        nn.GELU,
        activations.GELUActivation,
        activations.GELUTanh,
        activations.NewGELUActivation,
        activations.FastGELUActivation,
        activations.AccurateGELUActivation,
    )
    return [module for module in model.modules() if isinstance(module, kinds)]


class GgufTarget(WeightsTarget):
    """`write_gguf` and `write_gguf_adapter` as a target; llama.cpp runs it."""

    extra = "llamacpp"
    packages = ("gguf", "llama_cpp_py_sync")
    has_float16_scales = True
    contents = Contents(base=("base.gguf",), adapter=("adapter.gguf",))

    def source_problem(self, source: Path) -> str | None:
        return None if self.keeps(source) else "the model must come from a GGUF file"

    def keeps(self, source: Path) -> bool:
        return source.suffix == ".gguf"

    def loading(self, base: str, adapter: str | None) -> str:
        with_adapter = "" if adapter is None else f" --lora {adapter}/adapter.gguf"
        return f"```shell\nllama-cli -m {base}/base.gguf{with_adapter} -p Hello\n```"

    def problem(self, scheme: Scheme) -> str | None:
        return gguf_problem(scheme)

    def kind_problem(self, kind: LayerKind) -> str | None:
        if kind is LayerKind.CONV1D:
            return "GGUF files hold transformers' Conv1D in a form that no adapter can be added to"
        return None

    def rounding(self, model: nn.Module) -> AbstractContextManager[None] | None:
        modules = _gelus(model)
        return GeluFromTable(modules) if modules else None

    def write_base(self, base: ExportedBase, folder: Path) -> None:
        from qwlora.export.weights.gguf_folder import write_gguf

        write_gguf(base.model, base.gguf_file, folder)

    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        from qwlora.export.weights.gguf_folder import BASE, write_gguf_adapter

        write_gguf_adapter(adapter, base / BASE, folder)

    def open(self, folder: Path) -> LlamaRuntime:
        from qwlora.export.weights.gguf_folder import BASE, float_copy

        shipped = LlamaRuntime(folder / BASE)
        with tempfile.TemporaryDirectory() as scratch:
            floats = Path(scratch, BASE)
            float_copy(folder / BASE, floats)
            return LlamaRuntime(floats, shipped)  # which has mapped the file, and needs no name


class LlamaRuntime:
    """A GGUF file in llama.cpp, on the CPU, with a float32 cache.

    Args:
        path: the file.
        shipped: the file that `path` is a float32 copy of, opened; None if it is no copy.

    Raises:
        ExportError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, shipped: LlamaRuntime | None = None):
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.shipped = shipped
        self._llama, self._ffi = get_lib(), get_ffi()
        self._errors = _errors_of_llama()
        self._llama.llama_backend_init()
        self._adapters: dict[Path, Any] = {}
        self._active: Path | None = None
        parameters = self._llama.llama_model_default_params()
        model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if model == self._ffi.NULL:
            raise ExportError(f"llama.cpp cannot load {str(path)!r}: {self._reason()}")
        self._model = self._ffi.gc(model, self._llama.llama_model_free)  # with its adapters
        self._context, self._tokens = self._ffi.NULL, 0
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self._vocabulary = self._llama.llama_vocab_n_tokens(vocabulary)

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter's folder, or to none."""
        from qwlora.export.weights.gguf_folder import ADAPTER

        if adapter is not None and adapter not in self._adapters:
            file = str(adapter / ADAPTER)
            found = self._llama.llama_adapter_lora_init(self._model, file.encode())
            if found == self._ffi.NULL:
                raise ExportError(f"llama.cpp cannot load {file!r}: {self._reason()}")
            self._adapters[adapter] = found
        self._active = adapter
        if self._context != self._ffi.NULL:
            self._switch()
        if self.shipped is not None:
            self.shipped.use(adapter)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [1, tokens, vocabulary] of token ids [1, tokens]."""
        import torch

        tokens = ids[0].tolist()
        self._make_room(len(tokens))
        self._clear()
        found = torch.from_numpy(self._decode(tokens, 0))
        return found.view(1, len(tokens), self._vocabulary)

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""
        tokens, position, found = ids[0].tolist(), 0, list[int]()
        self._make_room(len(tokens) + count)
        self._clear()
        while len(found) < count:
            logits = self._decode(tokens, position)[-self._vocabulary :]
            position += len(tokens)
            tokens = [int(logits.argmax())]
            found += tokens
        return found

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], position: int) -> Any:
        """Logits of tokens that follow `position` tokens, float32 [tokens * vocabulary]."""
        import numpy as np

        llama = self._llama
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.logits[i] = 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(tokens)
        status = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise ExportError(f"llama.cpp cannot decode {len(tokens)} tokens (status {status})")
        size = 4 * len(tokens) * self._vocabulary
        buffer = self._ffi.buffer(llama.llama_get_logits(self._context), size)
        return np.frombuffer(buffer, dtype=np.float32).copy()

    def _reason(self) -> str:
        return "; ".join(self._errors[-3:]) or "it gives no reason"

    def _make_room(self, tokens: int) -> None:
        """A context for sequences of this length."""
        if tokens <= self._tokens:
            return
        llama, model, room = self._llama, self._model, -(-tokens // 256) * 256
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = room
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = 0  # float32
        parameters.flash_attn_type = 0
        self._context, self._tokens = self._ffi.NULL, 0  # releases the former one
        context = llama.llama_init_from_model(model, parameters)
        if context == self._ffi.NULL:
            raise ExportError(f"llama.cpp has no memory for {tokens} tokens")

        def release(context: Any, _: Any = model) -> None:  # before the model, which it keeps
            llama.llama_free(context)

        self._context, self._tokens = self._ffi.gc(context, release), room
        self._switch()

    def _switch(self) -> None:
        active = [] if self._active is None else [self._adapters[self._active]]
        pointers = self._ffi.new("struct llama_adapter_lora *[]", active) if active else None
        status = self._llama.llama_set_adapters_lora(
            self._context,
            pointers if pointers is not None else self._ffi.NULL,
            len(active),
            self._ffi.new("float[]", [1.0]) if active else self._ffi.NULL,
        )
        if status:
            raise ExportError(f"llama.cpp cannot use {self._active} (status {status})")
