"""The `genai` target: a folder and adapters for onnxruntime-genai, on the CPU.

    base/model.onnx, model.onnx.data    the base with a key-value cache, and places for an adapter
    base/model-fast.onnx                the same with activations of 8 bits
    base/genai_config.json              from the model's configuration, for any architecture
    base/tokenizer.json, ...
    base/none.onnx_adapter              ranks of 0, to switch a running generation back to the base
    NAME/adapter.onnx_adapter

The folder also runs in ONNX Runtime alone, where `RunOptions.add_active_adapter` switches. An
adapter is a `.onnx_adapter` file with its factors; see `switchable_graph.py` for the graph.

model.onnx computes with activations of float32, as training does. model-fast.onnx reads the same
data and rounds them to 8 bits before each product, as llama.cpp does: `model.decoder.filename` in
genai_config.json, or `Config.overlay`, chooses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from qwlora.errors import ExportError, foreign_as
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.targets.adapter_branches import adapter_inputs
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.onnx_model import (
    DATA_FILE,
    MODEL_FILE,
    load_graph,
    save_graph,
    write_adapter_file,
)
from qwlora.targets.onnx.runtime_operators import ATTENTION
from qwlora.targets.onnx.switchable_graph import defaults, fast_, switchable_graph
from qwlora.targets.proof.contents import ADAPTER_FILE, SETTINGS, TOKENIZER, Contents
from qwlora.targets.target import Backend, ExportedBase, Runtime
from qwlora.targets.weights.weights_folder import write_settings

CONFIG_FILE, FAST_FILE = "genai_config.json", "model-fast.onnx"
NO_ADAPTER = "none.onnx_adapter"  # switches a running generation back to the base
_ID = (int, type(None))
_FIXED = {  # what genai_config.json says of every model's decoder
    "filename": MODEL_FILE,
    "session_options": {"provider_options": list[Any]()},
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
}
_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_size",
)
# GroupQueryAttention writes into a cache of `max_length` tokens, which onnxruntime-genai allocates
# and clears at the start: 30 ms for 1,000 tokens of SmolLM2.
_SHARES, _LONGEST, _ROOM = "past_present_share_buffer", 4096, 128
_FORM = {
    "model": {
        # onnxruntime-genai chooses by it how it feeds a model. All captured graphs are fed alike,
        # whatever the architecture: tokens, mask, positions, keys and values.
        "type": "llama",
        "context_length": int,
        "vocab_size": int,
        "bos_token_id": _ID,
        "eos_token_id": (int, list),
        "pad_token_id": _ID,
        "decoder": {**_FIXED, **dict.fromkeys(_SIZES, int)},
    },
    "search": {"do_sample": False, _SHARES: bool, "max_length": int},
}


class Genai(Backend):
    """MatMulNBits; onnxruntime-genai runs it."""

    contents = Contents(
        base=(MODEL_FILE, FAST_FILE, DATA_FILE, NO_ADAPTER, CONFIG_FILE, *SETTINGS, *TOKENIZER),
        adapter=(ADAPTER_FILE,),
        forms={CONFIG_FILE: _FORM},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        graph = switchable_graph(exported)
        save_graph(graph, folder / MODEL_FILE)
        fast_(fast := load_graph(folder / MODEL_FILE))  # its tensors stay in the data file
        save_graph(fast, folder / FAST_FILE, data=None)
        write_adapter_file(defaults(graph), folder / NO_ADAPTER)
        config = _config(exported, graph)
        write_text(folder / CONFIG_FILE, strict_json.dumps(config, indent=2) + "\n")
        write_settings(exported, exported.model.config.get_text_config(), folder)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        # Every file has all layers: onnxruntime-genai 0.18 keeps the factors of an earlier adapter
        # where the next one of a generation has none.
        inputs = adapter_inputs(exported.factors, defaults(load_graph(base / MODEL_FILE)))
        write_adapter_file(inputs, folder / ADAPTER_FILE)

    def open(self, folder: Path, case: str) -> GenaiRuntime:
        return GenaiRuntime(folder, MODEL_FILE, self.open_shipped(folder, case))

    def open_shipped(self, folder: Path, case: str) -> GenaiRuntime:
        return GenaiRuntime(folder, FAST_FILE)


def _config(exported: ExportedBase, graph: Any) -> dict[str, Any]:
    """genai_config.json. The token that ends a text also begins or pads one, if no other does."""
    shapes = {value.name: value.shape for value in graph.graph.inputs}
    shares = any(node.op_type == ATTENTION for node in graph.graph)
    text: Any = exported.model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        raise ExportError(
            f"genai needs a longest sequence, but the configuration of {text.model_type} has no "
            "max_position_embeddings. Set it in config.json, or remove genai from export.targets"
        )
    keys, layers = shapes["past_key_values.0.key"], sum(n.endswith(".key") for n in shapes)
    sizes = (layers, text.num_attention_heads, keys[1], text.hidden_size, keys[3])
    tokenizer, settings = exported.tokenizer, exported.model.generation_config

    def token(key: str) -> Any:
        chosen = getattr(settings, key, None)
        return getattr(text, key, None) if chosen is None else chosen

    end = token("eos_token_id")
    if end is None:
        end = 0 if tokenizer is None else tokenizer.eos_token_id or 0
    first = end[0] if isinstance(end, list) else end
    begin, pad = token("bos_token_id"), token("pad_token_id")
    return {
        "model": {
            "type": "llama",
            "context_length": positions,
            "vocab_size": text.vocab_size,
            "bos_token_id": first if begin is None else begin,
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "decoder": {**_FIXED, **dict(zip(_SIZES, sizes, strict=True))},
        },
        "search": {
            "do_sample": False,
            _SHARES: shares,
            "max_length": min(positions, _LONGEST) if shares else positions,
        },
    }


class GenaiRuntime(Runtime):
    """The folder in onnxruntime-genai."""

    switches = True

    def __init__(self, folder: Path, file: str, shipped: GenaiRuntime | None = None):
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        self.shipped = shipped
        with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(folder)!r}"):
            config = self._genai.Config(str(folder))
            options = {"intra_op_num_threads": torch.get_num_threads()}
            decoder = {"filename": file, "session_options": options}
            config.overlay(strict_json.dumps({"model": {"decoder": decoder}}))
            self._model = self._genai.Model(config)
            self._adapters = self._genai.Adapters(self._model)
        settings = strict_json.read_object(folder / CONFIG_FILE)
        self._positions = settings["model"]["context_length"]
        self._known: dict[Path, str] = {}
        self._active: Path | None = None

    def switch_to(self, adapter: Path | None) -> None:
        if self.shipped is not None:
            self.shipped.switch_to(adapter)
        if adapter is not None and adapter not in self._known:
            name = f"{len(self._known)}"
            with foreign_as(ExportError, f"onnxruntime-genai cannot load {str(adapter)!r}"):
                self._adapters.load(str(adapter / ADAPTER_FILE), name)
            self._known[adapter] = name
        self._active = adapter

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        generator, room = past or (cast("Any", None), 0)
        new = ids[0].numpy().astype(np.int32)
        known = generator.get_sequence(0) if past else new[:0]
        total = len(known) + len(new)
        if total > room:  # a larger cache is another generator, which reads the text again
            room = min(2 * max(total, _ROOM), self._positions)
            generator, new = self._generator(max_length=room), np.concatenate([known, new])
        with foreign_as(ExportError, "onnxruntime-genai cannot run the model"):
            generator.append_tokens(new)
        logits = torch.from_numpy(np.array(generator.get_output("logits"), np.float32))
        return logits.view(1, len(new), -1)[:, -ids.shape[1] :], (generator, room)

    def decode(self, ids: Tensor, count: int) -> list[int]:
        # With a least length, a token that ends a text does not end the decoding.
        length = ids.shape[1] + count
        generator = self._generator(max_length=length, min_length=length)
        self.extend(ids, (generator, length))
        while len(generator.get_sequence(0)) < length:
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[ids.shape[1] :]]

    def _generator(self, **lengths: int) -> Any:
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(**lengths, do_sample=False, batch_size=1)
        generator = self._genai.Generator(self._model, options)
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._known[self._active])
        return generator
