"""Adapters are switched in one session of a runtime: each computes, bit for bit, what it computes
in a session of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.targets.onnx.openvino import EXACT
from qwlora.targets.registry import TARGETS
from targets.client_programs import with_clients
from targets.weights.bundles import write_adapter, write_base
from targets.weights.test_gguf_target import tiny_gguf
from targets.weights.test_weights_targets import adapters, base, target

WEIGHTS = [name for name, kind in TARGETS.items() if not kind.is_simulated]
IDS = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(5))
NEW_TOKENS = 8
STATES = ("first", "second", None, "first")


def written(name: str, folder: Path) -> PeftModel:
    """The files of a target: a base and adapters of different ranks and layers."""
    kind, source = target(name), None
    if name == "gguf":
        source = tiny_gguf(folder)
        model: Any = load_precomputed(open_checkpoint(source))
    else:
        scheme = "w4-bf16block32" if name == "executorch" else "w4-block32"
        model = base(scheme, solver="search" if TARGETS[name].limits.has_float16_scales else "rtn")
    write_base(kind, model, folder, source)
    adapted = adapters(model, folder / "trained")
    for adapter in ("first", "second"):
        write_adapter(kind, folder, adapter)
    return adapted


@pytest.mark.parametrize("name", with_clients(WEIGHTS))
def test_switched_adapters_compute_what_they_do_alone(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)

    def computed(session: Any, state: str | None) -> list[tuple[torch.Tensor, list[int]]]:
        session.use(None if state is None else tmp_path / state)
        settings = filter(None, (session, session.shipped))
        return [(each.logits(IDS), each.decode(IDS, NEW_TOKENS)) for each in settings]

    alone = {s: computed(TARGETS[name].open(tmp_path), s) for s in set(STATES)}
    together = TARGETS[name].open(tmp_path)
    for state in STATES:
        for (logits, tokens), (own, own_tokens) in zip(
            computed(together, state), alone[state], strict=True
        ):
            assert torch.equal(logits, own)
            assert tokens == own_tokens
    for one, other in (("first", "second"), ("first", None), ("second", None)):
        assert not torch.equal(alone[one][0][0], alone[other][0][0])


@pytest.mark.client
def test_genai_switched_within_a_generation(tmp_path: Path) -> None:
    import onnxruntime_genai as og

    written("genai", tmp_path)

    class Session:
        """A model with both adapters, and the base as a third."""

        def __init__(self) -> None:
            self.model = og.Model(str(tmp_path / "base"))
            self.adapters = og.Adapters(self.model)
            for name in ("first", "second"):
                self.adapters.load(str(tmp_path / name / "adapter.onnx_adapter"), name)
            self.adapters.load(str(tmp_path / "base" / "none.onnx_adapter"), "none")

        def generate(self, states: tuple[str | None, ...]) -> list[NDArray[np.float32]]:
            """Logits of two tokens with each adapter in turn, in one generation."""
            options = og.GeneratorParams(self.model)
            options.set_search_options(max_length=40, min_length=40, do_sample=False)
            generator, found = og.Generator(self.model, options), []
            for i, state in enumerate(states):
                generator.set_active_adapter(self.adapters, state or "none")
                if i == 0:
                    generator.append_tokens(IDS[0].numpy().astype(np.int32))
                for _ in range(2):
                    generator.generate_next_token()
                    found.append(np.array(generator.get_output("logits"), np.float32))
            return found

    used = Session()
    switched = used.generate(STATES)
    for length in range(1, len(STATES) + 1):  # each switch, reached by a generation of its own
        own = Session().generate(STATES[:length])
        assert all(map(np.array_equal, own, switched))
    for states in (("second", None, "first"), STATES, (None, "second")):  # with what was used
        assert all(map(np.array_equal, used.generate(states), Session().generate(states)))
    assert not np.array_equal(switched[-1], used.generate(("second",) * len(STATES))[-1])


@pytest.mark.client
@pytest.mark.parametrize("settings", [EXACT, {}], ids=["exact", "shipped"])
def test_one_openvino_pipeline_gives_every_adapter_the_scores_of_a_new_pipeline(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """openvino-genai gives no logits; the scores of beams are sums of log-probabilities.

    As shipped OpenVINO may compute in bfloat16, whose bits depend on the adapters that a pipeline
    is opened with. So there new pipelines know both.
    """
    import openvino
    import openvino_genai as genai

    written("openvino", tmp_path)
    loaded = {
        name: genai.Adapter(str(tmp_path / name / "adapter_model.safetensors"))
        for name in ("first", "second")
    }

    def pipeline(*names: str) -> Any:
        config = genai.AdapterConfig([loaded[name] for name in names])
        place, backend = str(tmp_path / "base"), {"ATTENTION_BACKEND": "SDPA"}
        return genai.LLMPipeline(place, "CPU", adapters=config, **backend, **settings)

    def beams(runs: Any, state: str | None) -> tuple[list[list[int]], list[float]]:
        options = genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos = NEW_TOKENS, True
        options.num_beams = options.num_return_sequences = 4
        active = genai.AdapterConfig([] if state is None else [loaded[state]])
        found = runs.generate(openvino.Tensor(IDS.numpy()), options, adapters=active)
        return [list(tokens) for tokens in found.tokens], list(found.scores)

    alone = {}
    for state in set(STATES):
        known = [name for name in loaded if state == name or not settings]
        alone[state] = beams(pipeline(*known), state)
    together = pipeline(*loaded)
    for state in STATES:
        assert beams(together, state) == alone[state]
    assert len({tuple(scores) for _, scores in alone.values()}) == 3
