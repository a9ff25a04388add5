"""The `gguf` target: a GGUF base and GGUF LoRA adapters for llama.cpp.

    llama-cli -m base/base.gguf --lora NAME/adapter.gguf

A base from a GGUF file keeps that file's metadata, tokenizer, names and orders of rows, whatever
the architecture. Tensors with the same numbers in the base are copied as they are. All others are
written: integers, and floats that tuning or a rotation changed. If all are copied, base.gguf is
the file itself, byte for byte.

From other checkpoints of `ARCHITECTURES` it is made: `gguf_metadata.py`. Float matrices, also
those of adapters, become float16 or bfloat16 where that is exact, the rest float32.

    Q4_0, Q5_0, Q8_0   symmetric, 4, 5 and 8 bits     (code - 2^(b-1)) d
    Q4_1, Q5_1         float offset, 4 and 5 bits      code d + m

Blocks have 32 weights; d and m are float16, so scales must have float16's precision (those of
`base.weights` in blocks do). Coarser grids become blocks whose d are equal.

    blk.N.attn_q.weight.lora_a [r, in], .lora_b [out, r]     rows in the file's order

Source: `ggml-common.h`, and `llama-adapter.cpp` of llama.cpp (b11739).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel, activations

from qwlora.errors import ExportError
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.grid.encoding import QuantizedTensor, spread
from qwlora.nn.packed_layer import PackedLayer
from qwlora.nn.packed_tensor import narrowest
from qwlora.system.optional_packages import require
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.proof.contents import Contents
from qwlora.targets.target import Backend, ExportedBase, Rounding, Runtime
from qwlora.targets.weights.gguf_metadata import (
    ARCHITECTURES,
    TensorNames,
    add_metadata,
    add_tokenizer,
    check_config,
    check_tokenizer,
)
from qwlora.targets.weights.weights_folder import check_layers, float_tensors, layers_to_write

gguf = require("gguf", "gguf")
BASE, ADAPTER = "base.gguf", "adapter.gguf"
BLOCK, F32 = 32, gguf.GGMLQuantizationType.F32
_FLOATS = {
    dtype: gguf.GGMLQuantizationType[name]
    for dtype, name in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16"))
}
Tensors = dict[str, tuple[Any, Any]]  # type, and values or bytes, by stored name
_GELUS = (
    nn.GELU,
    activations.GELUActivation,
    activations.GELUTanh,
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.AccurateGELUActivation,
)


class Gguf(Backend):
    """GGUF; llama.cpp runs it."""

    contents = Contents(base=(BASE,), adapter=(ADAPTER,))

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        if (source := exported.gguf_file) is None:
            _write_new(exported, folder / BASE)
            return
        checkpoint = GgufCheckpoint(source)
        layers = {
            name: layer
            for name, layer in layers_to_write(exported.model).items()
            if not _is_stored(checkpoint, name, layer.quantized)
        }
        tensors = _all_blocks(layers, checkpoint)
        for name, values in float_tensors(exported.model).items():
            if not _is_stored(checkpoint, name, values):
                stored, changed = checkpoint.stored_values(name, values)
                tensors[stored] = _float_type(changed)
        if not tensors:
            shutil.copyfile(source, folder / BASE)
            return
        reader, writer = _copying(source, folder / BASE)
        _finish(writer, {t.name: (t.tensor_type, t.data) for t in reader.tensors} | tensors)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        file = GgufFile(base / BASE)
        writer = gguf.GGUFWriter(folder / ADAPTER, file.architecture)
        is_known = file.architecture in ARCHITECTURES.values()
        names = TensorNames.of_file(file) if is_known else GgufCheckpoint(base / BASE)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        if exported.base_fingerprint is not None:
            writer.add_string("qwlora.base_fingerprint", exported.base_fingerprint)
        tensors: Tensors = {}
        for module, (a, b) in sorted(exported.factors.items()):
            name, rows = names.stored_rows(f"{module}.weight", len(b))
            if name not in file.tensors:
                raise ExportError(
                    f"{module!r} has no weight in {BASE}; train an adapter without it"
                )
            # The scale is in lora_b, and no alpha is written: llama.cpp then takes 1.
            tensors[f"{name}.lora_a"] = _float_type(a)
            tensors[f"{name}.lora_b"] = _float_type(_in_order(b, rows))
        _finish(writer, tensors)

    def open(self, folder: Path, case: str) -> LlamaRuntime:
        # llama.cpp multiplies quantized weights with activations of 8 bits, which no training knows
        # of. So it runs twice: with the same weights as float32, where only rounding may differ,
        # and as shipped, where the difference is llama.cpp's own and only reported.
        shipped = self.open_shipped(folder, case)
        with tempfile.TemporaryDirectory() as scratch:
            floats = Path(scratch, BASE)
            _copy_as_floats(folder / BASE, floats)
            # llama.cpp has mapped the file when this returns, so it may lose its name
            return LlamaRuntime(floats, shipped)

    def open_shipped(self, folder: Path, case: str) -> LlamaRuntime:
        return LlamaRuntime(folder / BASE)

    def model_problem(self, model: PreTrainedModel, tokenizer: Any) -> str | None:
        try:
            check_config(model.config)
            check_tokenizer(tokenizer)
        except ExportError as error:
            return str(error)
        return None

    def rounding(self, model: nn.Module) -> Rounding | None:
        # llama.cpp reads every GELU from a table of float16 on the CPU. In Gemma 3 270M this moves
        # logits by 2.4e-3 of the largest, and 1e-7 of noise in the embeddings by another 3.5e-4.
        modules = [m for m in model.modules() if isinstance(m, _GELUS)]
        hooks = [partial(m.register_forward_hook, _gelu_from_table) for m in modules]
        return Rounding(hooks) if hooks else None


def _write_new(exported: ExportedBase, path: Path) -> None:
    model, config = exported.model, cast("Any", exported.model.config)
    check_config(config)
    kind, heads = ARCHITECTURES[config.model_type], config.num_attention_heads
    names = TensorNames(kind, config.num_hidden_layers, (heads, config.num_key_value_heads))
    tensors = _all_blocks(layers_to_write(model), names)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    floats = add_metadata(writer, config)
    add_tokenizer(writer, exported.tokenizer, config)
    for name, values in float_tensors(model).items():
        stored, rows = names.stored_rows(name, len(values))
        floats[stored] = _in_order(names.stored_values(name, values), rows)
    tensors |= {name: _float_type(v, exported.embedding_bits) for name, v in floats.items()}
    _finish(writer, tensors)


def _is_stored(checkpoint: GgufCheckpoint, name: str, value: Tensor | QuantizedTensor) -> bool:
    """Whether the file already holds a tensor of the base: the same integers, or float values."""
    # A head that the file ties to the embedding has no name there.
    if name not in checkpoint.names():
        return False
    stored = checkpoint.read(name)
    if isinstance(value, QuantizedTensor):
        return isinstance(stored, QuantizedTensor) and stored.equals(value)
    # integers in the file, float in the base, such as an embedding of type Q8_0
    numbers = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored
    return numbers.shape == value.shape and bool((numbers == value.cpu()).all())


def _float_type(values: Tensor, bits: int = 16) -> tuple[Any, Any]:
    """GGUF type and data of a float tensor. A matrix gets the narrowest type that is exact, unless
    `bits` is 32."""
    values = values.float().cpu().contiguous()
    stored = narrowest(values) if values.ndim > 1 and bits < 32 else values
    return _FLOATS[stored.dtype], stored.view(torch.uint8).numpy()


def _all_blocks(layers: Mapping[str, PackedLayer], names: TensorNames | GgufCheckpoint) -> Tensors:
    """The blocks of each layer; an ExportError says what the format cannot hold."""
    check_layers("gguf", layers)
    blocks = Tensors()
    for name, layer in layers.items():
        stored, rows = names.stored_rows(name, layer.tensor.shape[0])
        kind, data = _blocks(layer, rows)
        blocks[stored] = gguf.GGMLQuantizationType[kind], data
    return blocks


def _copying(source: Path, target: Path) -> tuple[Any, Any]:
    """A reader of a GGUF file, and a writer that has all metadata of it and no tensors yet."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        # The reader shows the file's header as fields GGUF.*, and the writer has the architecture.
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, of_elements = field.types[0], field.types[-1]
            writer.add_key_value(field.name, field.contents(), kind, of_elements)
    return reader, writer


def _copy_as_floats(source: Path, target: Path) -> None:
    reader, writer = _copying(source, target)
    values = gguf.quants.dequantize
    _finish(writer, {t.name: (F32, values(t.data, t.tensor_type)) for t in reader.tensors})


def _finish(writer: Any, tensors: Tensors) -> None:
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_order(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of a parameter in the order in which the file stores them."""
    stored = torch.empty_like(values)
    stored[rows] = values
    return stored.cpu().contiguous()


def _blocks(layer: PackedLayer, rows: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """Type and bytes [out, bytes] of a layer in the file's order of rows."""
    scheme, codes = layer.scheme, _in_order(layer.codes, rows)
    scale, has_minimum = layer.encoding.scale, scheme.float_offset
    numbers = [scale, layer.encoding.minimum] if has_minimum else [scale]
    granularity, shape = scheme.granularity, layer.tensor.shape
    per_block = [spread(number, granularity, shape, BLOCK) for number in numbers]
    halves = [_in_order(number, rows).half() for number in per_block]
    parts = [half.unsqueeze(-1).view(torch.uint8) for half in halves]
    grouped = codes.unflatten(-1, (-1, BLOCK))
    if scheme.bitwidth == 8:
        parts.append((grouped.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
    else:
        # of 5 bits, the highest are stored first: code i of 32 in bit i of four bytes
        if scheme.bitwidth == 5:
            high, weights = grouped >> 4, 2 ** torch.arange(8, dtype=torch.uint8)
            parts.append((high.unflatten(-1, (4, 8)) * weights).sum(-1, dtype=torch.uint8))
        low = grouped & 15
        parts.append(low[..., :16] | (low[..., 16:] << 4))
    return f"Q{scheme.bitwidth}_{int(has_minimum)}", torch.cat(parts, -1).flatten(1).numpy()


def _gelu_from_table(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """GELU as llama.cpp computes it on the CPU (`GGML_GELU_FP16`):

    y = half(gelu(half(x))), with the approximation by tanh, if |x| < 10; else max(x, 0)
    """
    (x,) = inputs
    y = gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
    return torch.where(x.abs() < 10, y, x.clamp_min(0))


@cache
def _log_of_llama() -> tuple[list[str], Any]:
    """The error messages of llama.cpp, which then prints nothing; the list grows as it fails."""
    # The second value is the function that listens, of which llama.cpp has only the address: the
    # cache keeps it alive.
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, errors = get_ffi(), list[str]()

    def listen(level: int, text: Any, _: Any) -> None:
        if level == get_lib().GGML_LOG_LEVEL_ERROR:
            errors.append(ffi.string(text).decode(errors="replace").strip())

    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", listen)
    get_lib().llama_log_set(callback, ffi.NULL)
    return errors, callback


class LlamaRuntime(Runtime):
    """A GGUF file in llama.cpp, on the CPU, with its default settings; a float32 copy of a file
    with a float32 cache and without flash attention.

    Args:
        shipped: the file that `path` is a float32 copy of, opened; None if it is not a copy.
    """

    switches = True

    def __init__(self, path: Path, shipped: LlamaRuntime | None = None):
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.shipped = shipped
        self._llama, self._ffi = get_lib(), get_ffi()
        self._errors, _ = _log_of_llama()
        self._llama.llama_backend_init()
        self._adapters: dict[Path, Any] = {}
        self._active: Path | None = None
        parameters = self._llama.llama_model_default_params()
        model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if model == self._ffi.NULL:
            raise ExportError(f"llama.cpp cannot load {str(path)!r}: {self._reason()}")
        # Without this, four openings of Gemma 3 270M took 5.2 GB instead of 1.5. Freeing a model
        # frees its adapters.
        self._model = self._ffi.gc(model, self._llama.llama_model_free)
        self._context, self._tokens = self._ffi.NULL, 0
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self._vocabulary = self._llama.llama_vocab_n_tokens(vocabulary)

    def switch_to(self, adapter: Path | None) -> None:
        if self.shipped is not None:
            self.shipped.switch_to(adapter)  # first: llama.cpp refuses files that are damaged
        if adapter is not None and adapter not in self._adapters:
            with tempfile.TemporaryDirectory() as scratch:
                file = adapter / ADAPTER
                if self.shipped is not None:
                    # With factors of float16, llama.cpp rounds what it multiplies them with, too.
                    _copy_as_floats(file, file := Path(scratch, ADAPTER))
                loaded = self._llama.llama_adapter_lora_init(self._model, str(file).encode())
            if loaded == self._ffi.NULL:
                shown = repr(str(adapter / ADAPTER))
                raise ExportError(f"llama.cpp cannot load {shown}: {self._reason()}")
            self._adapters[adapter] = loaded
        self._active = adapter

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self._prefill(ids[0].tolist(), is_whole=True)

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        before, new = past or [], ids[0].tolist()
        tokens = before + new
        # A text that outgrows the context is read again.
        if not before or len(tokens) > self._tokens:
            return self._prefill(tokens), tokens
        return self._decode(new, len(before)), tokens

    def _prefill(self, tokens: list[int], is_whole: bool = False) -> Tensor:
        """`_decode` of a sequence's first tokens, with the active adapter."""
        self._make_room(len(tokens))
        active = [] if self._active is None else [self._adapters[self._active]]
        pointers = self._ffi.new("struct llama_adapter_lora *[]", active)
        scales = self._ffi.new("float[]", [1.0] * len(active))
        set_adapters = self._llama.llama_set_adapters_lora
        if status := set_adapters(self._context, pointers, len(active), scales):
            raise ExportError(f"llama.cpp cannot use {self._active} (status {status})")
        return self._decode(tokens, 0, is_whole)

    def _decode(self, tokens: list[int], position: int, is_whole: bool = False) -> Tensor:
        """Logits [1, tokens, vocabulary] of tokens that follow `position` tokens; of the last one
        unless `is_whole`."""
        llama, count = self._llama, len(tokens)
        batch = llama.llama_batch_init(count, 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.logits[i] = is_whole or i == count - 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = count
        status = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise ExportError(f"llama.cpp cannot decode {count} tokens (status {status})")
        size = 4 * self._vocabulary * (count if is_whole else 1)
        buffer = self._ffi.buffer(llama.llama_get_logits(self._context), size)
        flat = torch.from_numpy(np.frombuffer(buffer, dtype=np.float32).copy())
        return flat.view(1, -1, self._vocabulary)

    def _reason(self) -> str:
        return "; ".join(self._errors[-3:]) or "it gives no reason"

    def _make_room(self, tokens: int) -> None:
        """Provide an empty context for sequences of this length."""
        if tokens <= self._tokens:
            self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
            return
        llama, model, is_copy = self._llama, self._model, self.shipped is not None
        step = 256 if is_copy else 4096  # room for most conversations
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = room = -(-tokens // step) * step
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        if is_copy:
            parameters.type_k = parameters.type_v = 0  # float32
            parameters.flash_attn_type = 0
        # releases the former context, before memory for the new one is taken
        self._context, self._tokens = self._ffi.NULL, 0
        context = llama.llama_init_from_model(model, parameters)
        if context == self._ffi.NULL:
            raise ExportError(f"llama.cpp has no memory for {tokens} tokens")

        # The default argument keeps the model: llama.cpp must free it after its contexts. The
        # function is looked up now, since cffi cannot do so while Python ends.
        def release(context: Any, _: Any = model, free: Any = llama.llama_free) -> None:
            free(context)

        self._context, self._tokens = self._ffi.gc(context, release), room
