"""The `web` target: a folder for ONNX Runtime Web, in a browser, and a page that answers with it.

    base/model.onnx, model.onnx.data    the graph of target genai, adapter inputs without defaults
    base/none.safetensors               ranks of 0, to switch back to the base
    base/index.html, model.mjs          a page with a prompt and a choice of adapters
    base/tokenizer.json, config.json
    NAME/adapter.safetensors            M.lora_A [in, r], M.lora_B [r, out] of every linear layer M

All factors are inputs that each call gives, of rank 0 where an adapter has none. lora_A is
transposed, and the scale is in lora_B. `verify` runs the files with the page's own code,
`model.mjs`, and ONNX Runtime Web's WebAssembly in node.
"""

from __future__ import annotations

import json
import math
import subprocess
import weakref
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from qwlora.errors import ExportError, size
from qwlora.system.atomic import write_text
from qwlora.system.optional_packages import node_package
from qwlora.targets.adapter_branches import adapter_inputs
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.onnx_model import DATA_FILE, MODEL_FILE, save_graph
from qwlora.targets.onnx.switchable_graph import defaults, switchable_graph
from qwlora.targets.proof.contents import SETTINGS, TOKENIZER, Contents
from qwlora.targets.registry import WEB_LIBRARY
from qwlora.targets.target import Backend, ExportedBase, Runtime
from qwlora.targets.weights.weights_folder import write_settings

ADAPTER, NO_ADAPTER = "adapter.safetensors", "none.safetensors"
PAGE = ("index.html", "model.mjs")
_FILES = "onnx/web_files"
_LARGEST = 2**31 - 1  # bytes of a file that browsers (ArrayBuffer) and node (readFile) read whole


class Web(Backend):
    """MatMulNBits; ONNX Runtime Web runs it."""

    contents = Contents(
        base=(MODEL_FILE, DATA_FILE, NO_ADAPTER, *PAGE, *SETTINGS, *TOKENIZER),
        adapter=(ADAPTER,),
        scripts={name: f"{_FILES}/{name}" for name in PAGE},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        graph = switchable_graph(exported)
        save_file(none := defaults(graph), folder / NO_ADAPTER)
        # ONNX Runtime Web 1.30 does not list inputs that have a default and cannot set them, and it
        # reads no `.onnx_adapter`.
        for name in none:
            graph.graph.initializers.pop(name).const_value = None
        save_graph(graph, folder / MODEL_FILE)
        if (data := (folder / DATA_FILE).stat().st_size) > _LARGEST:
            raise ExportError(
                f"{DATA_FILE} has {size(data)}, and browsers read files up to {size(_LARGEST)}. "
                "Quantize to fewer bits, or remove web from export.targets"
            )
        write_settings(exported, exported.model.config.get_text_config(), folder)
        for name in PAGE:
            write_text(folder / name, _script(name).read_text(encoding="utf-8"))

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        none = load_file(base / NO_ADAPTER)
        save_file(adapter_inputs(exported.factors, none), folder / ADAPTER)

    def open(self, folder: Path, case: str) -> WebRuntime:
        return WebRuntime(folder)


def _script(name: str) -> Any:
    return resources.files("qwlora.targets").joinpath(_FILES, name)


class WebRuntime(Runtime):
    """The folder in ONNX Runtime Web, in a process of node."""

    switches = True

    def __init__(self, folder: Path):
        self._none = self._adapter = folder.absolute() / NO_ADAPTER
        library, pipe = node_package(WEB_LIBRARY)[0], subprocess.PIPE
        command = ["node", _script("run.mjs"), library, folder, str(torch.get_num_threads())]
        self._node: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        # node ends when its input is closed.
        weakref.finalize(self, self._node.communicate)
        # ONNX Runtime Web loads the folder with the first question: a refusal belongs here.
        self._ask(torch.zeros(1, 1, dtype=torch.int64), count=1)

    def switch_to(self, adapter: Path | None) -> None:
        self._adapter = self._none if adapter is None else adapter.absolute() / ADAPTER

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        # A bytearray, since torch warns of buffers that it cannot write to.
        answer, content = self._ask(ids, count=0, follows=bool(past))
        return torch.frombuffer(content, dtype=torch.float32).view(answer["shape"]), True

    def decode(self, ids: Tensor, count: int) -> list[int]:
        return self._ask(ids, count=count)[0]["tokens"]

    def _ask(self, ids: Tensor, **how: int) -> tuple[dict[str, Any], bytearray]:
        """The answer of `run.mjs` as JSON, and the bytes of logits."""
        question = {"adapter": str(self._adapter), "ids": ids[0].tolist(), **how}
        answer, content = dict[str, Any](), b""
        try:
            self._node.stdin.write(json.dumps(question).encode() + b"\n")
            self._node.stdin.flush()
            answer = json.loads(self._node.stdout.readline())
            content = self._node.stdout.read(4 * math.prod(answer.get("shape", [0])))
        except (OSError, ValueError):  # node ended: there is no line
            answer = {"error": self._node.stderr.read()[-2000:].decode(errors="replace")}
        if "error" in answer:
            raise ExportError(
                f"ONNX Runtime Web cannot run {str(self._adapter.parent)!r}: {answer['error']}"
            )
        self.process_bytes = answer["peak_bytes"]
        return answer, bytearray(content)
