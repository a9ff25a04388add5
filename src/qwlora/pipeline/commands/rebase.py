"""Give the adapters of a job another base, and measure what they lose.

    old base and adapter -> new base, the adapter as it is -> corrected, and trained for N steps

All of them are measured on the same held-out text. The old job is only read.

The correction is that of `init: qera`: the factors that bring the new base closest to the old base
with its adapter, W_old + BA, on the adapter's own text. From 4 to 3 bits, 30 steps end at 18.55
after it and at 19.42 without it (docs/log/rebase.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.adapter.adapter_folder import load_adapter, save_adapter
from qwlora.adapter.attach import active_adapter
from qwlora.adapter.initialize import initialize_
from qwlora.adapter.mergeable import lora_layers
from qwlora.analysis.generate_text import sample_sequences
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.data.read_source import locate_documents
from qwlora.errors import DirectoryError, SourceError, listed
from qwlora.formats.base_folder import load_base
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.nn import weight_out_in
from qwlora.pipeline.commands.open_job import JobModels
from qwlora.pipeline.job import job_recipe
from qwlora.pipeline.results import read_job
from qwlora.pipeline.stages.model_stages import INIT_TOKENS
from qwlora.pipeline.store import check_job
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.recipe import Adapter, Recipe, parse_recipe
from qwlora.recipe.adapter_section import SHAPE
from qwlora.recipe.section import of_a_job
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.progress import Track, untracked
from qwlora.system.quiet import quiet_libraries
from qwlora.targets.proof.contents import RECORD

if TYPE_CHECKING:
    from torch import Tensor

FILE = "rebase.json"
TEXTS = 128  # that a model writes if an adapter's text is gone
KEPT = 0.01  # of the perplexity, by which the new adapter may be worse than the old one
_STAGES = "quantize", "train", "evaluate"

Run = Callable[..., Any]


def rebase(
    old: Path,
    new: Path,
    steps: int,
    run: Run,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> dict[str, dict[str, float]]:
    """Make job `new` with the adapters of job `old` on another base.

    Args:
        steps: of training on the new base, after the correction.
        run: runs stages of a recipe over a directory, as `qwlora.pipeline.run.run` does.
        changes: to the old recipe, such as `base.weights=w3-signed64`.

    Returns:
        By adapter, the perplexity on held-out text of the old base and the old adapter, and of the
        new base, the adapter `as_it_is`, and the corrected and trained one, `rebased`.

    Raises:
        DirectoryError: there is no job at `old`, or another one at `new`.
        RecipeError, SourceError: the changed recipe is not valid, or an adapter does not fit or is
            mergeable.
    """
    quiet_libraries()
    check_job(old)
    if new.resolve() == old.resolve():
        raise DirectoryError(f"{str(new)!r} is the old job; give another directory for the new one")
    before = job_recipe(old)
    adapters = [adapter for adapter in before.adapters if adapter.objective == "text"]
    if tied := [adapter.name for adapter in adapters if adapter.mergeable]:
        raise SourceError(
            f"{listed(tied)}: a mergeable adapter is tied to the integers of its base. Remove it "
            "from a copy of the job, and train it on the new base"
        )
    content = before.model_dump(mode="json", exclude_unset=True)
    content["name"] = f"{before.name}-rebased"
    content["adapters"] = [_carried(old, adapter) for adapter in adapters]
    with of_a_job():  # errors come before text is written
        _with_steps(content, old, steps, changes)
    _with_texts(content, old, new, before, track)
    recipe = _with_steps(content, old, 0, changes)
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    known = strict_json.read_object(new / FILE) if (new / FILE).exists() else {}
    if known and known["recipe"] != settings:
        raise DirectoryError(
            f"{str(new)!r} already exists with another base, text or adapters. Give another "
            "directory, or delete it"
        )
    if not known:
        run(recipe, new, _STAGES)
        found = _measured_before(old, new, [a.name for a in adapters], track)
        known = {"recipe": settings, "adapters": found}
        write_text(new / FILE, json.dumps(known, indent=1) + "\n")
    rows = known["adapters"]
    for entry in content["adapters"]:
        start = _beside(new) / entry["name"]
        if not (start / RECORD).exists():
            _correct(entry["name"], old, new, start, track)
        entry["continue_from"] = str(start)
    run(_with_steps(content, old, steps, changes), new, _STAGES, replace=tuple(rows))
    after = read_job(new)
    return {n: {**row, "rebased": after.perplexity("adapted", n) or 0} for n, row in rows.items()}


def verdict(row: dict[str, float]) -> str:
    """What an adapter lost, in words."""
    change = row["rebased"] / row["old_adapter"] - 1
    lost = row["as_it_is"] / row["old_adapter"] - 1
    if change <= KEPT:
        return "kept" if lost > KEPT else "kept without training"
    return f"{change:.1%} worse; train more steps" if change < lost else f"{change:.1%} worse"


def _carried(old: Path, adapter: Adapter) -> dict[str, Any]:
    """An entry of the new recipe. The shape comes from the adapter's own files."""
    entry = adapter.model_dump(mode="json", exclude_unset=True, exclude={*SHAPE, "epochs", "init"})
    folder = (old / "adapters" / adapter.name).resolve()
    return {**entry, "continue_from": str(folder), "unknown_base": "other"}


def _with_steps(content: dict[str, Any], old: Path, steps: int, changes: tuple[str, ...]) -> Recipe:
    adapters = [{**entry, "steps": steps} for entry in content["adapters"]]
    return parse_recipe({**content, "adapters": adapters}, str(old / "recipe.yaml"), changes)


def _with_texts(
    content: dict[str, Any], old: Path, new: Path, before: Recipe, track: Track
) -> None:
    """Replace each text that is gone by one that the old model with the adapter writes."""
    written = dict[str, str]()
    for entry in content["adapters"]:
        name = entry["name"]
        source = str(before.data_of(name).source)
        try:
            locate_documents(source)
        except SourceError:
            file = _beside(new) / f"{name}.jsonl"
            if source not in written and not file.exists():
                _write_text(file, old, before, name, track)
            written.setdefault(source, str(file))
            entry["data"] = _sizes(entry.get("data")) | {"source": written[source]}
    if (common := content.get("data", {})).get("source") in written:
        content["data"] = _sizes(common) | {"source": written[common["source"]]}


def _beside(new: Path) -> Path:
    """What the new job starts from: texts, and corrected adapters."""
    return new.resolve().with_name(f"{new.name}-start")


def _sizes(data: dict[str, Any] | None) -> dict[str, Any]:
    # The other keys say how to read the text that is gone.
    return {k: v for k, v in (data or {}).items() if k.endswith(("_tokens", "_sequences"))}


def _write_text(file: Path, old: Path, before: Recipe, name: str, track: Track) -> None:
    from peft import PeftModel

    source, folder = before.model.source, old / "adapters" / name
    # The model that the adapter was trained for: the float one if there is one.
    if before.base.solver == "keep":
        model: Any = load_adapter(load_base(old / "base"), folder)
    else:
        model = PeftModel.from_pretrained(load_model(source), str(folder)).eval()
    tokenizer, tokens = load_tokenizer(source), before.data_of(name).sequence_tokens
    rows = sample_sequences(model, tokenizer, TEXTS, tokens, seed=before.seed, track=track)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def _correct(name: str, old: Path, new: Path, start: Path, track: Track) -> None:
    """Write the adapter that brings the new base closest to the old base with the old adapter."""
    before = load_adapter(load_base(old / "base"), old / "adapters" / name)
    after = load_adapter(load_base(new / "base"), new / "adapters" / name)
    layers, adapter = dict(lora_layers(before)), active_adapter(before)

    def wanted(path: str) -> Tensor:
        return weight_out_in(layers[path].get_base_layer()) + layers[path].get_delta_weight(adapter)

    # DoRA's magnitudes depend on the weights.
    if not any(layer.use_dora[adapter] for layer in layers.values()):
        rows = JobModels(new).new_context().text(name).joined_ids
        rows = rows[: -(-INIT_TOKENS // rows.shape[1])]
        moments = observe_moments(load_base(new / "base"), rows, track=track)
        initialize_(after, "qera", wanted, moments, share=1.0, track=track)
    start.mkdir(parents=True, exist_ok=True)
    save_adapter(after, start)


def _measured_before(
    old: Path, new: Path, names: list[str], track: Track
) -> dict[str, dict[str, float]]:
    """Figures of the old models, and of the new ones before training."""
    job, context = read_job(new), JobModels(new).new_context()
    base = load_base(old / "base").eval()
    found = dict[str, dict[str, float]]()
    for name in names:
        text = context.text(name).evaluation

        def measured(model: Any, text: Any = text) -> float:
            return score_tokens(logits_of(model), text, "the old model", track).perplexity

        row = {"old_base": measured(base)}
        adapted = load_adapter(base, old / "adapters" / name).eval()
        row["old_adapter"] = measured(adapted)
        base = adapted.unload()
        row["new_base"] = job.perplexity("base", name) or 0
        found[name] = {**row, "as_it_is": job.perplexity("adapted", name) or 0}
    return found
