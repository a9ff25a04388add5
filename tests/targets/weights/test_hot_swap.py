"""Adapters are switched in one session of a runtime: each computes, bit for bit, what it computes
in a session of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.targets.proof.readme import usage
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
    assert len({str(found[0][0].tolist()) for found in alone.values()}) == 3


@pytest.mark.parametrize("name", with_clients(["hf", "mlx", "genai", "executorch"]))
def test_the_lines_of_the_readme_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    for adapter in (None, "first"):
        lines = usage(name, "base", adapter)
        exec(lines.partition("```python\n")[2].partition("```")[0], {})
