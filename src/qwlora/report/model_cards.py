"""The model cards (README.md) of a job's base and adapters, with the metadata that the hub reads.

`qwlora run` rewrites a card when it changes. A card without the comment at its end (`MARK`) belongs
to the user and is left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from qwlora.formats.model_card import UNKNOWN, as_code, escaped, marked, origin_of
from qwlora.formats.model_source import is_hub_id
from qwlora.recipe import Data, Recipe
from qwlora.report.number_format import finite
from qwlora.report.results_view import Job, runtime
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.folder import MODEL_CLASS, WITHOUT_CACHE
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS

# Label, value, and the hub's name for the metric (None: measured on another model).
Number = tuple[str, Any, str | None]

# What uploaded files reveal about the user's data; docs/data.md lists all places.
QUOTED = (
    "these files name the source of your text (its last path component, or its id on the hub). "
    "They hold its document and token counts, perplexities on it, your chat template, and "
    "statistics of it in weights and activation ranges. Only golden/ holds text: generated, or "
    "held-out with export.proof: held_out"
)
_TEMPLATES = Path(__file__).parent / "cards"
_known_origin = cache(origin_of)


@dataclass(frozen=True)
class Repositories:
    """Hub ids of the base and the adapter, the license that the user states, and the exported files
    to upload."""

    base: str | None = None
    adapter: str | None = None
    license: str | None = None
    exports: Collection[str] = ()


def card_text(
    job: Job, recipe: Recipe, adapter: str | None, hub: Repositories | None = None
) -> str:
    """The card of `adapter`, or of the base if it is None.

    Args:
        hub: repositories of a card for the hub. None: the card is for the job's directory.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    origin, known = _known_origin(recipe.model.source), hub or Repositories()
    base_model: str | None = origin.repository
    text = recipe.base_text() if adapter is None else recipe.data_of(adapter)
    source = (text and text.source) or ""
    dataset = source if text is not None and is_hub_dataset(text) else None
    if adapter is None:
        fields, numbers = _of_base(job)
        tags, datasets, relation = ["qwlora", "quantized"], None, "quantized"
    else:
        fields, numbers = _of_adapter(job, recipe, adapter)
        fields["adapter"] = adapter if hub else f"adapters/{adapter}"
        tags, datasets, relation = ["qwlora", "lora"], dataset, "adapter"
        base_model = known.base or base_model
    numbers = [number for number in numbers if finite(number[1]) is not None]
    stated: dict[str, Any] = {
        "license": origin.license or UNKNOWN,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
    }
    # An adapter's license is not that of the model's files, so the user must state it.
    if known.license or adapter:
        stated = {"license": known.license or UNKNOWN}
    # Cards contain no local paths.
    local_name = source if source.startswith("python:") else PurePath(source).name
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "text",
            dataset_name=dataset or local_name or "text",
            dataset_split="held-out",
            metric_type=metric,
            metric_name=what,
            metric_value=round(float(value), 4),
        )
        for what, value, metric in numbers
        if metric is not None
    ]
    title = adapter or f"{origin.name}, QWLoRA base"
    data = ModelCardData(
        **stated,
        library_name="peft" if adapter else "qwlora",
        tags=tags,
        datasets=datasets,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        pipeline_tag="text-generation",
        model_name=title,
        eval_results=measured or None,
    )
    wanted = {"base": known.base, **({adapter: known.adapter} if adapter else {})}
    fields |= {
        "title": escaped(title),
        "model": f"[{origin.repository}](https://huggingface.co/{origin.repository})"
        if origin.repository
        else as_code(origin.name),
        "numbers": [(what, f"{v:.{4 if v < 1 else 2}f}") for what, v, _ in numbers],
        "text": None if text is None else shown_text(text),
        "fingerprint": job.get("base", "fingerprint"),
        "downloads": {folder: hub_id for folder, hub_id in wanted.items() if hub_id},
        "runtimes": list(_runtimes(job, adapter, hub)),
        "license": escaped(origin.license or ""),
        "stated_in": origin.stated_in,
        "stated_license": known.license and escaped(known.license),
    }
    template = _TEMPLATES / ("adapter.md" if adapter else "base.md")
    card = ModelCard.from_template(data, template_path=str(template), **fields)
    # Parts of the template that are left out leave empty lines.
    return marked(re.sub(r"\n{3,}", "\n\n", str(card)))


def _of_base(job: Job) -> tuple[dict[str, Any], list[Number]]:
    layers = job.section("base", "layers").values()
    schemes = Counter(str(layer.get("scheme")) for layer in layers)
    grids = ", ".join(scheme for scheme, _ in schemes.most_common(3)) or "packed integers"
    return {"grids": grids, "bits": f"{job.get('base', 'bits_per_weight'):.2f}"}, [
        ("Perplexity, float model", job.get("perplexity", "float"), None),
        ("Perplexity", job.get("perplexity", "base"), "perplexity"),
        ("KL divergence from the float model, nats", job.get("kl", "base", "mean"), "kl"),
        ("Top-1 agreement with the float model", job.get("top1", "base", "share"), "accuracy"),
    ]


def _of_adapter(job: Job, recipe: Recipe, name: str) -> tuple[dict[str, Any], list[Number]]:
    # An adapter that continues another has that adapter's shape; its own settings are defaults.
    root = recipe.root(next(a for a in recipe.adapters if a.name == name))
    amount = (job.section("texts", job.text_of(name) or "") or job.section("data")).get("train", {})
    return {
        "shape": "" if root.continue_from else f" (rank {root.rank}, alpha {root.alpha:g})",
        "origin": job.origin(name),
        "steps": job.get("train", name, "steps"),
        "epochs": job.number("train", name, "epochs"),
        "documents": amount.get("documents"),
        "loss_tokens": amount.get("loss_tokens"),
    }, [
        ("Perplexity, float model", job.perplexity("float", name), None),
        ("Perplexity, base alone", job.perplexity("base", name), None),
        ("Perplexity, float model with float LoRA", job.perplexity("reference", name), None),
        ("Perplexity", job.perplexity("adapted", name), "perplexity"),
        (
            "Perplexity with activations as integers",
            job.perplexity("simulated", name),
            "perplexity",
        ),
    ]


def _runtimes(job: Job, adapter: str | None, hub: Repositories | None) -> Iterator[tuple[str, ...]]:
    """For each target: its runtime, how to load the files, and for an adapter the proof."""
    for target in job.targets:
        known = TARGETS[target]
        if hub and not any(name.startswith(f"{target}/") for name in hub.exports):
            continue
        # Readers of an uploaded card have other folders than a job.
        base = f"base/{target}" if hub else f"export/{target}/base"
        folder = f"export/{target}" if known.has_cases else base
        exported = f"{adapter}/{target}" if hub else f"export/{target}/{adapter}"
        written = job.section("export", target, BASE)
        has_cache, of_base = WITHOUT_CACHE not in written, written.get(MODEL_CLASS, "")
        data = job.section("texts", job.text_of(adapter) or "") or job.section("data")
        is_chat = bool(adapter and data.get("chat_template"))
        loaded = folder, adapter and exported, has_cache
        if lines := usage(target, *loaded, kind=of_base, is_chat=is_chat):
            yield runtime(target), lines, _check(job, target, adapter) if adapter else ""


def _check(job: Job, target: str, name: str) -> str:
    parity = job.section("parity", target, name)
    if not parity or "not_run" in parity:
        return "These files have not been run yet."
    tokens = parity.get("tokens")
    on = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
    if parity.get("passed"):
        arithmetic = job.arithmetic([target], [name])
        return f"Run{on} and compared with what was trained: all limits hold{arithmetic}."
    problems = escaped("; ".join(parity.get("problems", ())))
    return f"**The check of these files failed**{on}: {problems}"


def is_hub_dataset(data: Data) -> bool:
    """Whether a recipe's text is a dataset on the hub: `owner/name`, and no local path."""
    source = data.source or ""
    return is_hub_id(source) and not Path(source).exists()


def shown_text(data: Data) -> str:
    """The name of the text, without local folders."""
    source = data.source or ""
    if is_hub_dataset(data):
        return f"[{source}](https://huggingface.co/datasets/{source})"
    return as_code(source if source.startswith("python:") else PurePath(source).name)
