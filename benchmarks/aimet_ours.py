"""QWLoRA's side of `aimet.py`, which runs it: the same steps as `aimet_theirs.py`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_steps import train_
from machine import machine_line
from phases import Phases
from qwlora import Rule, Scheme, SimulationSchemes, quantize_
from qwlora.export.npu.aimet_folder import write_aimet
from qwlora.export.npu.qnn_bundle import export_qnn
from qwlora.export.target import ExportedGraph
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.frozen import packed_layers
from qwlora.simulation.adapter_simulations import simulate_adapters

SCHEMES = SimulationSchemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=16,
    adapter_weights=Scheme(8),
)


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    phases, texts = Phases(), load_file(folder / "texts.safetensors")
    out = folder / "qwlora"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "float", attn_implementation="eager")
    rules = [Rule("*embed_tokens", Scheme(8)), Rule("lm_head", Scheme(8))]
    with phases("quantize"):
        quantize_(model, parse_scheme(settings["weights"]), "rtn", rules=rules)
    rounded = {
        f"{n}.weight": layer.weight.detach().clone() for n, layer in packed_layers(model).items()
    }
    save_file(rounded, folder / "rounded.safetensors")
    del rounded
    adapted = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    training, compared = texts["training"].split(1), settings["compared_steps"]
    with phases("train"):
        losses = train_(adapted, training[:compared])
    train_(adapted, training[compared:])
    adapted.save_pretrained(folder / "trained")

    adapted.requires_grad_(False).eval()
    ids = texts["evaluation"][:1, : settings["graph_tokens"]]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with phases("simulate"):
        simulations = simulate_adapters(adapted, example, SCHEMES, "none")
    own = simulations["default"]
    with phases("calibrate"):
        simulations.calibrate([{"input_ids": each} for each in texts["calibration"].split(1)])
    with phases("evaluate"):
        simulated = {
            name: torch.cat([simulations[each].logits(ids) for ids in texts["evaluation"].split(1)])
            for name, each in (("adapter", "default"), ("base", "base"))
        }
    save_file(simulated, folder / "qwlora-logits.safetensors")
    with phases("export"):
        write_aimet(ExportedGraph(own, {}, example), out / "aimet")
    graphs = {"prefill": settings["graph_tokens"]}
    with phases("export for the HTP"):
        export_qnn({"first": own}, graphs, 2 * settings["graph_tokens"], out / "qnn")
    result = {
        "machine": machine_line(),
        "phases": phases.found,
        "losses": losses,
        "activation_quantizers": len(own.quantizers),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
