"""What stages share within one process: text, models and the simulation, each loaded when first asked for and let go when it is in the way."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qwlora.adapter.provenance import load_adapter
from qwlora.base.checkpoint import Checkpoint
from qwlora.base.readers.open_checkpoint import open_checkpoint
from qwlora.base.source import load_model, load_tokenizer, locate
from qwlora.base.storage import load_base, read_record
from qwlora.data import Documents, Prepared, prepare
from qwlora.errors import SourceError
from qwlora.grid.scheme import Scheme
from qwlora.grid.sequences import Sequences
from qwlora.progress import Track
from qwlora.recipe import Adapter, Recipe
from qwlora.simulation.simulation import Simulation, SimulationSchemes, simulate
from qwlora.simulation.storage import load_activations, restore
from qwlora.simulation.training import TrainingGraph, with_scales

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


BASE_SIMULATION = "base_simulation"  # of the base alone, in workflow qwa-lora
SCALES = "activation_scales.safetensors"  # learned with an adapter, beside it


class Session:
    """Lazily loaded inputs of the stages of one directory."""

    def __init__(self, recipe: Recipe, documents: Documents, path: Path, track: Track):
        self.recipe, self.documents, self.path, self.track = recipe, documents, path, track
        self._float_model: PreTrainedModel | None = None
        self._simulation: tuple[str, Simulation] | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.recipe.model.source)
        if self.recipe.data.chat_template is not None:
            tokenizer.chat_template = Path(self.recipe.data.chat_template).read_text()
        return tokenizer

    @cached_property
    def data(self) -> Prepared:
        return prepare(self.documents, self.tokenizer, self.recipe.data.cutting())

    @property
    def evaluation(self) -> Sequences:
        """What perplexity is measured on."""
        return self.data.held_out.first(self.recipe.data.evaluation_sequences)

    @property
    def calibration_ids(self) -> Tensor:
        """What ranges and statistics of activations are measured on: int64 [count, tokens], without padding."""
        return self.data.calibration_ids[: self.recipe.data.calibration_sequences]

    def adapter(self, name: str) -> Adapter:
        return next(a for a in self.recipe.adapters if a.name == name)

    def float_model(self) -> PreTrainedModel:
        """The model before step 1; stays until `take_float_model`."""
        if self._float_model is None:
            self._float_model = load_model(self.recipe.model.source)
        return self._float_model

    def checkpoint(self) -> Checkpoint:
        """The model's files as they are, integers where they hold integers."""
        location = locate(self.recipe.model.source)
        if not location.files:
            raise SourceError(f"model {self.recipe.model.source!r} is a hub id; download it to a folder to take its integers as they are (base.solver keep)")
        return open_checkpoint(location.path, self.recipe.model.encodings)

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, on the meta device: to see whether an adapter fits it."""
        config = self._float_model.config if self._float_model is not None else self._config()
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config)

    def _config(self) -> PreTrainedConfig:
        location = locate(self.recipe.model.source)
        return AutoConfig.from_pretrained(location.pretrained, **location.arguments())

    def take_float_model(self) -> PreTrainedModel:
        """Hand the float model over to whoever changes it."""
        model, self._float_model = self.float_model(), None
        return model

    @property
    def base_fingerprint(self) -> str:
        fingerprint: str = read_record(self.path / "base")["fingerprint"]
        return fingerprint

    def base(self) -> PreTrainedModel:
        """A fresh copy of the frozen base."""
        self._float_model = None
        return load_base(self.path / "base")

    def adapted(self, name: str) -> PeftModel:
        """A fresh copy of the base with the trained adapter."""
        return load_adapter(self.base(), self.path / "adapters" / name).eval()

    def new_simulation(self, name: str) -> Simulation:
        """Capture base and adapter; nothing is calibrated yet, but what training through the base's activations fixed. Only one simulation is kept."""
        self._simulation = None
        simulation = self.simulate(self.adapted(name))
        if self.recipe.workflow == "qwa-lora":
            scales = self.path / "adapters" / name / SCALES
            simulation.take_over(with_scales(load_activations(self.path / BASE_SIMULATION), load_file(scales) if scales.exists() else {}))
        self._simulation = (name, simulation)
        return simulation

    def simulate(self, model: nn.Module) -> Simulation:
        """Capture a model as the recipe wants it simulated."""
        section = self.recipe.simulation
        schemes = SimulationSchemes(
            activations=Scheme(section.activation_bitwidth, symmetric=False),
            adapter_weights=section.adapter_weights.scheme(),
            quantize_residual_adds=section.residual_adds == "quantize",
        )
        example = self.data.calibration_ids[:1, :16].repeat(2, 1)
        return simulate(model, {"input_ids": example, "attention_mask": torch.ones_like(example)}, schemes)

    def training_graph(self, model: PeftModel, learns_ranges: bool) -> TrainingGraph:
        """Base and adapter as one graph to train through, the base's activations on the grids that were calibrated."""
        return TrainingGraph(self.simulate(model.eval()), load_activations(self.path / BASE_SIMULATION), learns_ranges)

    def simulation(self, name: str) -> Simulation:
        """The calibrated simulation, captured again if it is not in memory."""
        if self._simulation is None or self._simulation[0] != name:
            restore(self.new_simulation(name), self.path / "simulation" / name)
        assert self._simulation is not None
        return self._simulation[1]
