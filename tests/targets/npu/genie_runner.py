"""A program that does what Qualcomm's Genie does with a bundle, Genie itself, and the tokens of a
simulation to compare both with."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora.targets.npu.genie import angles
from qwlora.targets.npu.qnn import open_graph

from . import genie_program


def greedy(logits: Callable[[Tensor], Tensor], prompt: Tensor, count: int) -> list[int]:
    """The likeliest tokens after a prompt, one by one."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, prompt.shape[1] :].tolist()


def compile_separately(
    folder: Path, into: Path, sizes: Collection[int] | None = None
) -> dict[str, Path]:
    """Each graph of a bundle compiled into a binary of its own, by name; the emulator cannot load
    one that graphs share. `sizes`: only graphs of so many new tokens."""
    compiled = {}
    for name, graph in json.loads((folder / "base" / "graphs.json").read_text())["graphs"].items():
        if sizes is not None and graph["tokens"] not in sizes:
            continue
        compiled[name] = into / f"{name}_ctx.onnx"
        if compiled[name].exists():
            continue
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(compiled[name]),
        }
        open_graph(folder / "base" / f"{name}.onnx", True, None, entries)
    return compiled


class Runner:
    """What Genie's HTP engine does with a bundle, from its configuration and files alone.

    The cache is filled from the left. Cosines and sines are rounded down to codes; in the mask, 0
    is masked and the largest code is not. Weights of adapters are rounded down, too.

    Args:
        compiled: graphs for the HTP emulator, by name; default: the bundle's, on the CPU.
    """

    def __init__(self, folder: Path, compiled: Mapping[str, Path] | None = None):
        self.folder = folder
        dialog = json.loads((folder / "genie_config.json").read_text())["dialog"]
        self.model = dialog["engine"]["model"]
        self.context = dialog["context"]["size"]
        graphs = json.loads((folder / "base" / "graphs.json").read_text())["graphs"]
        self.grids = {graph["tokens"]: graph["encodings"] for graph in graphs.values()}
        files = compiled or {name: folder / "base" / f"{name}.onnx" for name in graphs}
        self.sessions = {
            graphs[name]["tokens"]: open_graph(file, bool(compiled)) for name, file in files.items()
        }
        self.inputs = next(iter(self.sessions.values())).get_inputs()
        self.turned = angles(self.model["positional-encoding"], self.context).numpy()
        self.weights: dict[str, Any] = {}

    def apply(self, name: str, alpha: float) -> None:
        """Switch to an adapter of the configuration, at a strength."""
        lora = self.model["binary"]["lora"]
        (path,) = (a["path"] for a in lora["adapters"] if a["name"] == name)
        for value in self.inputs:
            if "lora" in value.name:
                array = np.array([alpha], np.float32)
                if value.name != lora["alpha-tensor-name"]:
                    file = self.folder / path / f"{value.name}.raw"
                    array = np.fromfile(file, np.float32).reshape(value.shape)
                self.weights[value.name] = self.codes(value.name, array)

    def codes(self, name: str, array: Any) -> Any:
        """Values of an input, rounded down to its grid."""
        grid = self.grids[1][name]
        codes = np.floor(np.float64(array) / grid["scale"] - grid["offset"])
        return codes.clip(0, 2 ** grid["bitwidth"] - 1).astype(f"uint{grid['bitwidth']}")

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The likeliest tokens after a prompt, one by one."""
        cache, past, tokens, waiting = self.empty_cache(), 0, list[int](), ids
        while len(tokens) < count:
            size = max(self.sessions) if len(waiting) > 1 else 1
            now, waiting = waiting[:size], waiting[size:]
            logits = self.call(size, now, past, cache)
            past += len(now)
            if not waiting:
                tokens.append(int(logits[0, len(now) - 1].argmax()))
                waiting = tokens[-1:]
        return tokens

    def empty_cache(self) -> dict[str, Any]:
        """Codes of no token, and the axis of tokens, by input name."""
        cache = {}
        for value in self.inputs:
            if value.name.startswith("past_"):
                axis = 3 if "_key_" in value.name else 2
                shape = [self.context if i == axis else n for i, n in enumerate(value.shape)]
                cache[value.name] = axis, np.zeros(shape, np.uint8)
        return cache

    def call(self, size: int, ids: list[int], past: int, cache: dict[str, Any]) -> Any:
        """Codes of the logits; keys and values of the new tokens are put into the cache."""
        session, room = self.sessions[size], self.context - size
        mask = np.zeros((1, 1, size, self.context), np.uint16)
        rows = np.zeros((1, 1, size, self.turned.shape[1]))
        for row in range(len(ids)):
            mask[0, 0, row, :past] = mask[0, 0, row, room : room + row + 1] = 65535
            rows[0, 0, row] = self.turned[past + row]
        feed = {
            "input_ids": np.array([ids + [0] * (size - len(ids))], np.int32),
            "attention_mask": mask,
            "position_ids_cos": self.codes("position_ids_cos", np.cos(rows)),
            "position_ids_sin": self.codes("position_ids_sin", np.sin(rows)),
            **{name: array.take(range(room), axis) for name, (axis, array) in cache.items()},
            **self.weights,
        }
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        for name, (axis, array) in cache.items():
            new = outputs[name.replace("_in", "_out")].take(range(len(ids)), axis)
            np.moveaxis(array, axis, 0)[past : past + len(ids)] = np.moveaxis(new, axis, 0)
        return outputs["logits"]


def in_genie(config: Path, request: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
    """What `genie_program.py` answers."""
    program = [sys.executable, genie_program.__file__, str(config)]
    text = json.dumps(request)
    done = subprocess.run(program, input=text, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
