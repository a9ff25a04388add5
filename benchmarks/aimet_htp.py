"""What a side of `aimet.py` exported, on Qualcomm's HTP emulator; `aimet.py` runs it.

    python aimet_htp.py FOLDER aimet|qwlora        with `pip install 'qwlora[qnn]'`

One call of the exported graph, with the adapter.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwlora.errors import ExportError
from qwlora.export.npu.qnn_runtime import QnnModel, open_graph, placement
from qwlora.grid.sqnr import sqnr_db


def run_ours(folder: Path, ids: Tensor, htp: bool) -> tuple[Tensor, dict[str, int]]:
    bundle = folder / "qwlora" / "qnn"
    with tempfile.TemporaryDirectory() as scratch:
        model = QnnModel(bundle / "base", bundle / "first", htp, profiles=Path(scratch))
        return model.logits(ids), model.placement()["prefill"]


def run_theirs(folder: Path, ids: Tensor, htp: bool) -> tuple[Tensor, dict[str, int]]:
    with tempfile.TemporaryDirectory() as scratch:
        session = open_graph(folder / "aimet" / "qdq" / "model.onnx", htp, Path(scratch) / "run")
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        names = [each.name for each in session.get_inputs()]
        (logits,) = session.run(None, {name: feed[name] for name in names})
        return torch.from_numpy(logits), placement(session, len(names) + 1)


def distance(found: Tensor, expected: Tensor) -> dict[str, float]:
    noise = (found.double() - expected.double()).square().sum()
    same = found.argmax(-1) == expected.argmax(-1)
    signal = float(expected.double().square().sum())
    return {"sqnr": sqnr_db(signal, float(noise)), "top1_agreement": float(same.float().mean())}


def main() -> None:
    folder, tool = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    run = {"aimet": run_theirs, "qwlora": run_ours}[tool]
    tokens = json.loads((folder / "settings.json").read_text())["graph_tokens"]
    ids = load_file(folder / "texts.safetensors")["evaluation"][:1, :tokens]
    simulated = load_file(folder / f"{tool}-logits.safetensors")["adapter"][:1, :tokens]

    def perplexity(logits: Tensor) -> float:
        return math.exp(float(cross_entropy(logits[0, :-1], ids[0, 1:])))

    on_cpu, _ = run(folder, ids, False)
    result: dict[str, Any] = {
        "tokens": tokens,
        "simulated_perplexity": perplexity(simulated),
        "cpu": {"perplexity": perplexity(on_cpu), **distance(on_cpu, simulated)},
    }
    began = time.perf_counter()
    try:
        on_htp, placed = run(folder, ids, True)
    except ExportError as error:
        result["refused"] = str(error)
    else:
        result["htp"] = {"perplexity": perplexity(on_htp), **distance(on_htp, simulated)}
        result |= {"htp_to_cpu": distance(on_htp, on_cpu), "placement": placed}
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
