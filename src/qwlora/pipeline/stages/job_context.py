"""State that the stages of one process share: data, models and simulations.

Each is loaded on first use. Large ones are released as soon as another one replaces them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qwlora.adapter.adapter_deltas import merged_model
from qwlora.adapter.adapter_files import adapter_folder, mergeable_record
from qwlora.adapter.adapter_folder import load_adapter, reading
from qwlora.adapter.attach import (
    LoraShape,
    attach,
    attach_existing,
    check_existing,
    check_shape,
    without_dropout_,
    zeroed_,
)
from qwlora.adapter.mergeable import is_mergeable, mergeable_
from qwlora.adapter.padded_adapters import one_rank
from qwlora.analysis.generate_text import prompt_ids, sample_sequences
from qwlora.analysis.token_scores import logits_of
from qwlora.data.prepared_data import PreparedText, prepare_text
from qwlora.data.sequences import in_turn, one_row
from qwlora.errors import SourceError
from qwlora.formats.base_files import read_record
from qwlora.formats.base_folder import load_base
from qwlora.formats.checkpoint import LazyModel, empty_model
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.model_source import fetch, load_config, load_model, load_tokenizer
from qwlora.graph.capture import capture, example_of
from qwlora.nn import weight_out_in
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import (
    ADAPTER,
    BASE_SIMULATION,
    FLOAT_ADAPTERS,
    SAMPLED,
    SAMPLED_IDS,
    USE_CASES,
    ZERO_ADAPTER,
)
from qwlora.quantize.rotation import RotationReport, rotate_
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.recipe.grid_sections import JOB, Model
from qwlora.recipe.implied import is_foreign, resolve_compute, sampled_sequences, without_recovery
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.placement import Placement, place, refuse_ineffective_rules
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.saved_simulation import load_activations
from qwlora.simulation.simulation import CalibrationReport, Simulation, simulate
from qwlora.system.device import CPU, exact_device, memory_of, onednn_float32_matmul, pick_device
from qwlora.system.parameter_names import BASE, canonical_name, is_first_factor
from qwlora.system.progress import Track, one_step
from qwlora.targets.canonical_adapter import peft_names, read_canonical, use_case_model
from qwlora.targets.proof.canary import (
    CHATS,
    TEXTS,
    TOKENS,
    Canary,
    Context,
    contexts_of,
    make_canary,
)
from qwlora.targets.proof.reference import BASE_SEQUENCES, PROOF_TOKENS
from qwlora.targets.target import members


def skeleton(model: Model, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The model on the meta device, without weights: to check whether an adapter fits it."""
    config = config or load_config(model.source, model.trust_remote_code)
    return empty_model(config, model.trust_remote_code)


class JobContext:
    """The inputs of a job's stages.

    Attributes:
        rotation: what was rotated in the float model; set by `float_model`.
        why_loaded_whole: why the weights cannot be read tensor by tensor; set by `lazy`.
        on_training: called after each training step with a function that describes the progress.
    """

    def __init__(self, recipe: Recipe, sources: Sources, path: Path, track: Track):
        self.recipe, self.sources = resolve_compute(recipe), sources
        self.path, self.track = path, track
        self._prepared: dict[Data, PreparedText] = {}
        self._float_model: PreTrainedModel | None = None
        self._simulation: tuple[str, Simulation] | None = None
        self._zero_adapter: Simulation | None = None
        self._rules_are_checked = False
        self._canaries: dict[tuple[str | None, tuple[Context, ...]], Canary] = {}
        self._stage_device: torch.device | None = None
        self.rotation: RotationReport | None = None
        self.why_loaded_whole: str | None = None
        self.on_training: Callable[[Callable[[], dict[str, Any]]], None] = lambda progress: None

    @property
    def device(self) -> torch.device:
        return self._stage_device or pick_device(self.recipe.device)

    @contextmanager
    def stage(self, name: str, verb: str) -> Iterator[dict[str, Any]]:
        """Load models on the device of the stage. Yields what `memory_of` measures."""
        device = CPU if verb in ("export", "verify") else pick_device(self.recipe.device)
        # Solvers and observers compute in float64, which MPS and most XPUs lack.
        if verb not in ("train", "evaluate"):
            device = exact_device(device)
        # The graph of a simulation has the device of its model in it.
        if device != self._stage_device:
            self._stage_device, self._simulation, self._zero_adapter = device, None, None
        with memory_of(device, name) as measured, onednn_float32_matmul(device):
            yield measured

    def step(self, description: str) -> AbstractContextManager[None]:
        return one_step(self.track, description)

    @cached_property
    def configured(self) -> str:
        # A model that is gone is not needed once there is a base: that has copies of both.
        try:
            fetch(self.recipe.model.source)
        except (SourceError, OSError):
            if (self.path / "base").is_dir():
                return str(self.path / "base")
        return self.recipe.model.source

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.configured, self.recipe.model.trust_remote_code)
        if (template := self.recipe.data.read_template()) is not None:
            tokenizer.chat_template = template
        return tokenizer

    def prepared(self, data: Data) -> PreparedText:
        """The sequences of a data section that has a source."""
        if data not in self._prepared:
            tokenizer = self.tokenizer
            template = data.read_template()
            if template is not None and template != tokenizer.chat_template:
                # A copy: the base and its exports ship the template of the data section.
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.chat_template = template
            documents = self.sources.documents(data)
            try:
                self._prepared[data] = prepare_text(
                    documents, tokenizer, data.cutting(), self.track
                )
            except SourceError as error:
                if str(data.source) in str(error):
                    raise
                raise SourceError(f"data source {data.source!r}: {error}") from error
        return self._prepared[data]

    def text(self, adapter: str | None) -> PreparedText:
        data = self.recipe.base_text() if adapter is None else self.recipe.data_of(adapter)
        assert data is not None, "adapters have different texts, and the base has no text"
        return self.prepared(data)

    def all_texts(self) -> dict[str, PreparedText]:
        """All texts of the job, by adapter; the base's as `base`."""
        recipe = self.recipe
        names = {data: name for name, data in recipe.texts().items()}
        if recipe.data.source is not None:
            names.setdefault(recipe.data, "base")
        for part in recipe.base.calibration:
            for data in recipe.calibration_texts(part) if part.text != JOB else ():
                names.setdefault(data, part.text)
        texts = {}
        for data, name in names.items():
            try:
                self.sources.documents(data)
            except (SourceError, OSError):
                # In a job that was moved, only a stage that reads the text complains.
                if self.sources.is_new:
                    raise
            else:
                texts[name] = self.prepared(data)
        return texts

    def _sequences(self, texts: Iterable[Data]) -> Iterator[Tensor]:
        return in_turn([self.prepared(data).joined_ids for data in texts])

    def base_calibration_ids(self, count: int) -> list[Tensor]:
        """What weights are calibrated on: at most `count` times int64 [1, tokens]."""
        recipe, parts = self.recipe, self.recipe.base.calibration
        file = self.path / SAMPLED / SAMPLED_IDS
        sampled = load_file(file) if sampled_sequences(recipe) else {}
        texts = [self._sequences(recipe.calibration_texts(part)) for part in parts]
        for number, ids in sampled.items():
            texts[int(number)] = iter(ids)
        rows = in_turn(texts, [part.weight for part in parts])
        return [row[None] for row in islice(rows, count)]

    @cached_property
    def generated_ids(self) -> Tensor:
        """Token ids of the text in bundles."""
        recipe = self.recipe
        tokens = min(recipe.data_of(adapter).sequence_tokens for adapter in recipe.adapters)
        model = self.take_float_model() if self.sources.holds_floats else self.base()
        size = BASE_SEQUENCES, min(tokens, PROOF_TOKENS)
        return sample_sequences(model, self.tokenizer, *size, seed=recipe.seed, track=self.track)

    @cached_property
    def canary_contexts(self) -> tuple[Context, ...]:
        """What the base and all adapters are asked in canary.json."""
        recipe, tokenizer = self.recipe, self.tokenizer
        if recipe.export.canary == "held_out":
            rows = self.text(recipe.adapters[0].name).held_out.input_ids[: TEXTS + CHATS, :TOKENS]
        else:
            model = self.take_float_model() if self.sources.holds_floats else self.base()
            rows = sample_sequences(model, tokenizer, TEXTS + CHATS, TOKENS, seed=recipe.seed)
        texts, chats = rows.tolist()[:TEXTS], list[list[int]]()
        for text in rows.tolist()[TEXTS:] if tokenizer.chat_template else ():
            message = str(tokenizer.decode(text, skip_special_tokens=True))
            # Some templates want more than a user's message.
            with suppress(SourceError):
                ids = prompt_ids(tokenizer, [{"role": "user", "content": message}])
                chats.append(ids[0].tolist())
        return tuple(contexts_of(texts, chats, tokenizer))

    def canary(
        self,
        contexts: tuple[Context, ...],
        model: Callable[[], PreTrainedModel | PeftModel],
        adapter: str | None = None,
    ) -> Canary:
        # The same for every target.
        if (adapter, contexts) not in self._canaries:
            logits = logits_of(model().eval())
            self._canaries[adapter, contexts] = make_canary(logits, contexts, self.tokenizer)
        return self._canaries[adapter, contexts]

    def calibration(self, *adapters: str) -> dict[str, Any]:
        """Arguments of `Simulation.observe`, on the texts of `adapters` (default: the base's)."""
        if adapters:
            texts = dict.fromkeys(self.text(name) for name in adapters)
            rows: Iterable[Tensor] = in_turn([text.calibration_ids for text in texts])
        else:
            sequences = self._sequences(self.recipe.base_texts())
            rows = islice(sequences, self.recipe.data.calibration_sequences)
        return {
            "batches": [one_row(row) for row in rows],
            "track": self.track,
            "tokens": self.recipe.simulation.calibration_tokens,
        }

    def sample(self, adapter: str) -> dict[str, Tensor]:
        """A batch of one held-out sequence: golden inputs, and the shapes of fixed graphs."""
        return one_row(self.text(adapter).held_out.input_ids[0])

    def example_inputs(self, model: Any) -> dict[str, Tensor]:
        ids = next(self._sequences(self.recipe.base_texts()))
        return example_of(model, ids, self.recipe.simulation.inputs == "embeddings")

    def float_model(self, device: torch.device | None = None) -> PreTrainedModel:
        """The model before step 1, rotated if the recipe says so."""
        if self._float_model is None:
            model = self.recipe.model
            with self.step("loading the model"):
                loaded = load_model(model.source, model.trust_remote_code)
            if self.recipe.base.rotation is not None:
                with self.step("rotating the model"):
                    self.rotation = rotate_(loaded, self.example_inputs(loaded), self.recipe.seed)
            self._float_model = loaded
        return self._float_model.to(device or self.device)  # type: ignore[arg-type] # untyped

    def take_float_model(self, device: torch.device | None = None) -> PreTrainedModel:
        # The caller has the only reference, so that its memory is free as soon as it is done.
        model, self._float_model = self.float_model(device), None
        return model

    @property
    def holds_float_model(self) -> bool:
        return self._float_model is not None

    @cached_property
    def lazy(self) -> LazyModel | None:
        """The float model with weights left in their files, if these are read tensor by tensor."""
        model, location = self.recipe.model, fetch(self.recipe.model.source)
        if location.gguf_file or model.encodings is not None:
            return None
        if self.recipe.base.rotation is not None:
            self.why_loaded_whole = "base.rotation changes weights of all layers together"
        elif model.trust_remote_code:
            self.why_loaded_whole = "model.trust_remote_code: the model's own code loads it"
        else:
            try:
                return LazyModel(FolderCheckpoint(location.path))
            except SourceError as error:
                # transformers converts the weights while it loads them, or they are pickles.
                self.why_loaded_whole = str(error)
        return None

    def skeleton(self) -> PreTrainedModel:
        return skeleton(self.recipe.model, self._config)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        # Cached, since reading it from a GGUF file takes seconds.
        return load_config(self.configured, self.recipe.model.trust_remote_code)

    @property
    def base_fingerprint(self) -> str:
        return str(read_record(self.path / "base")["fingerprint"])

    def base(self) -> PreTrainedModel:
        self._float_model = None
        return self.load_base(self.path / "base")

    def load_base(self, folder: Path) -> PreTrainedModel:
        with self.step("loading the base"):
            trusted = self.recipe.model.trust_remote_code
            model = load_base(folder, device=self.device, trust_remote_code=trusted)
        # PEFT would write the folder into the configuration of every adapter.
        model.name_or_path = ""
        return model

    def adapter(self, name: str) -> Adapter:
        return next(a for a in self.recipe.adapters if a.name == name)

    def checked_shapes(self, adapter: Adapter) -> dict[str, tuple[int, ...]]:
        """The shapes of a new or foreign adapter's weights by name, if it fits the model."""
        if adapter.continue_from is None:
            return check_shape(self.skeleton(), adapter.lora_shape())
        return check_existing(adapter.continue_from, adapter.unknown_base, self.skeleton())

    def imported(self, name: str, is_trainable: bool = False) -> PeftModel:
        """The float model with the adapter that adapter `name` continues."""
        folder = adapter_folder(str(self.adapter(name).continue_from))
        model = self.take_float_model()
        with reading(folder, model):
            return PeftModel.from_pretrained(
                model, str(folder), is_trainable=is_trainable, torch_device="cpu"
            ).eval()

    def adapted(self, *names: str) -> PreTrainedModel | PeftModel:
        """`unmerged`; of a mergeable adapter, its merged base."""
        return _as_trained(self.unmerged(*names))

    def unmerged(self, *names: str) -> PeftModel:
        """A fresh copy of the base with trained adapters, the first of them active."""
        first, *others = (self.path / "adapters" / name for name in names)
        model = self._loaded(first)
        for number, folder in enumerate(others, 1):
            load_adapter(model, folder, adapter_name=f"{number}")
        return model.eval()

    def untrained(self, adapter: Adapter, reference: bool = False) -> PeftModel:
        """A fresh copy of the base with a new adapter, or with the one that this one continues; as
        a `reference`, the float model with the same start, never mergeable."""
        start = without_recovery(self.recipe, adapter) if reference else adapter
        seed, first = self.recipe.seed, self.recipe.predecessor(start)
        if reference and is_foreign(self.recipe, start):
            # `attach` seeds by itself. Without it, dropout would depend on the stages before.
            torch.manual_seed(seed)
            model = self.imported(start.name, is_trainable=True)
        else:
            folder = FLOAT_ADAPTERS if reference else "adapters"
            source = str(self.path / folder / first.name) if first else start.continue_from
            whole = self.take_float_model() if reference else self.base()
            merges = adapter.mergeable and not reference
            weight = self.float_weight() if merges else None
            if source is None:
                model = attach(whole, start.lora_shape(), seed)
            else:
                model = attach_existing(whole, source, start.unknown_base, seed, weight)
            if merges:
                mergeable_(model, weight=weight)
        if self.recipe.workflow == "qwa-lora" and adapter.steps:
            without_dropout_(model)
        return model

    def reference(self, name: str) -> PeftModel:
        return load_adapter(self.take_float_model(), self.path / FLOAT_ADAPTERS / name).eval()

    def float_weight(self) -> Callable[[str], Tensor] | None:
        """The float weights [out, in] by the path of their layer; None if there are none."""
        if self.recipe.base.solver == "keep" and self.recipe.model.encodings is None:
            return None
        floats = self.take_float_model(CPU)
        return lambda path: weight_out_in(floats.get_submodule(path)).detach()

    def _loaded(self, folder: Path) -> PeftModel:
        base, record = self.base(), mergeable_record(folder)
        # A mergeable adapter counts from what quantization left of each float weight
        # (docs/log/training.md). Its folder has only a digest of that.
        needs_floats = record is not None and record["remainders"] is not None
        return load_adapter(base, folder, weight=self.float_weight() if needs_floats else None)

    @property
    def schemes(self) -> Schemes:
        # They allow rules without an effect, which may have one in another graph (`check_rules`).
        return self.recipe.simulation.schemes()

    @property
    def allow_unseen(self) -> bool:
        return self.recipe.simulation.unseen == "float"

    def simulate(self, model: nn.Module) -> Simulation:
        """A simulation that is not calibrated yet, of adapters padded to one shape if they share
        all encodings; in workflow qwa-lora, with the encodings of the base's activations."""
        known = None
        if self.recipe.workflow == "qwa-lora" and isinstance(model, PeftModel):
            known = load_activations(self.path / BASE_SIMULATION)
        with self.step("capturing the graph"):
            example = self.example_inputs(model)
            return simulate(model, example, self.schemes, known, self._common_ranks)

    @cached_property
    def _common_ranks(self) -> dict[str, int]:
        adapters = self.recipe.adapters
        if self.recipe.simulation.base_activations != "none" or any(
            adapter.dora or adapter.target_parameters for adapter in adapters
        ):
            return {}
        return one_rank([self.ranks(adapter) for adapter in adapters])

    def calibrate(self, simulation: Simulation, *adapters: str) -> CalibrationReport:
        return simulation.calibrate(**self.calibration(*adapters), allow_unseen=self.allow_unseen)

    def new_simulation(self, name: str, model: nn.Module | None = None) -> Simulation:
        """Capture base and adapter (`model`; default: a fresh copy). It is not calibrated yet."""
        # Both are released before the capture: each has a base of its own.
        self._simulation = self._zero_adapter = None
        simulation = self.simulate(model or self.adapted(name))
        self.check_rules(simulation.placement)
        self._simulation = (name, simulation)
        return simulation

    def simulation(self, name: str) -> Simulation:
        if self._simulation is not None and self._simulation[0] == name:
            return self._simulation[1]
        folder = self.path / "simulation" / name
        model = _as_trained(self._loaded(folder / ADAPTER).eval())
        simulation = self.new_simulation(name, model)
        shares_weights = self.recipe.simulation.base_activations == "none"
        simulation.restore_from(folder, shares_weights)
        return simulation

    def new_zero_adapter(self) -> Simulation:
        """Capture a zero adapter on every layer that an adapter changes: what a runtime that can
        switch adapters computes without one. Not calibrated yet."""
        first = self.recipe.adapters[0]
        layers = {layer for adapter in self.recipe.adapters for layer in self.ranks(adapter)}
        if layers == self.ranks(first).keys():
            model = self.untrained(first).eval()
        else:
            shape = LoraShape(first.rank, first.alpha, target_modules=sorted(layers))
            model = attach(self.base(), shape, self.recipe.seed).eval()
        self._zero_adapter = self.simulate(zeroed_(model))
        return self._zero_adapter

    def zero_adapter(self) -> Simulation:
        if self._zero_adapter is None:
            self.new_zero_adapter().restore_from(self.path / ZERO_ADAPTER)
        assert self._zero_adapter is not None
        return self._zero_adapter

    def ranks(self, adapter: Adapter) -> dict[str, int]:
        """The ranks of an adapter by the path of the layer."""
        shapes = self.checked_shapes(self.recipe.root(adapter))
        names = {canonical_name(name): shape for name, shape in shapes.items()}
        return {n.partition(".lora_")[0]: s[0] for n, s in names.items() if is_first_factor(n)}

    def new_use_cases(self) -> AdapterSimulations:
        recipe = self.recipe
        adapters = {
            name: read_canonical(self.path / "simulation" / name / ADAPTER)
            for case in recipe.use_cases()
            for name in members(case)
        }
        model = use_case_model(self.base(), adapters, recipe.use_cases())
        shared = recipe.simulation.base_activations
        return simulate_adapters(model, self.example_inputs(model), self.schemes, shared)

    @cached_property
    def use_cases(self) -> dict[str, Simulation]:
        """The calibrated simulation of every use case, and of the zero adapter as `base`."""
        simulations, names = self.new_use_cases(), peft_names(self.recipe.use_cases())
        for name, simulation in simulations.items():
            simulation.restore_from(self.path / USE_CASES / name)
        return {case: simulations[name] for case, name in {**names, BASE: BASE}.items()}

    def check_rules(self, *placements: Placement) -> None:
        """Check once, before anything is trained, that every placement rule has an effect in one of
        the job's graphs: `placements` and, if these do not suffice, all others."""
        recipe, known = self.recipe, list(placements)
        if self._rules_are_checked or not (recipe.is_simulated and recipe.simulation.rules):
            return
        # An adapter that continues another one has the same layers.
        new = [adapter for adapter in recipe.adapters if recipe.predecessor(adapter) is None]
        models: list[Callable[[], nn.Module]] = [
            self.base if adapter.mergeable else partial(self.untrained, adapter) for adapter in new
        ]
        if recipe.workflow == "qwa-lora" or recipe.simulation.base_activations != "all":
            models.append(self.base)
        for build in models:
            # Every capture takes time: 2 s for a tiny model (docs/log/code.md).
            if known and not set.intersection(*(set(p.unused_rules) for p in known)):
                break
            with self.step("capturing the graph"):
                model = build().eval()
                captured = capture(model, self.example_inputs(model))
            known.append(place(captured.program, self.schemes, captured.input_names))
        refuse_ineffective_rules(known)
        self._rules_are_checked = True


def _as_trained(model: PeftModel) -> PreTrainedModel | PeftModel:
    return merged_model(model) if is_mergeable(model) else model
