"""The model cards (README.md) of a job's base and adapters, with the metadata that the hub reads.

    base_model, base_model_relation    what it was made from, if it has a hub id
    license                            as the model's files state it, otherwise `unknown`
    datasets                           the text, if it has a hub id
    library_name, pipeline_tag, tags
    model-index                        perplexities, divergence from the float model

`qwlora run` rewrites a card when it changes. A card without the comment at its end (`MARK`) belongs
to the user and is left alone. Cards name no path of this machine: folders are relative to the
job's directory, or, in an uploaded card, to where the reader downloads the files.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from qwlora.errors import QwloraError, QwloraWarning
from qwlora.export.proof.folder import WITHOUT_CACHE
from qwlora.export.registry import TARGETS
from qwlora.export.target import BASE
from qwlora.formats.card_mark import as_code, escaped, marked
from qwlora.formats.model_origin import UNKNOWN, ModelCardInfo, origin_of
from qwlora.pipeline.job.directory import Directory
from qwlora.recipe import Data, Recipe
from qwlora.report.number_format import finite
from qwlora.report.results_view import Job, runtime

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FLOAT, BASE_ALONE = "Perplexity, float model", "Perplexity, base alone"  # what to compare with
_TEMPLATES = Path(__file__).parent / "cards"
_known_origin = cache(origin_of)


@dataclass(frozen=True)
class Places:
    """Where the reader of a card finds the files.

    Args:
        base, adapter: folders of the base and of the adapter.
        exported_base, exported: folders of a target's files, `{target}` for its name.
        use_cases: folder of a target that holds base and adapters together; None if the reader does
            not have it.
        hub_base, hub_adapter: hub ids, if the files are on the hub.
        license: as the user states it; overrides that of the model.
    """

    base: str = "base"
    adapter: str = "adapters/{name}"
    exported_base: str = "export/{target}/base"
    exported: str = "export/{target}/{name}"
    use_cases: str | None = "export/{target}"
    hub_base: str | None = None
    hub_adapter: str | None = None
    license: str | None = None


def write_cards(directory: Directory, recipe: Recipe, job: Job) -> None:
    """Write the cards of all folders whose stages are current, if they changed.

    Raises:
        DirectoryError: a card cannot be written.
    """
    cards = dict[str, str]()
    try:
        if job.section("base"):
            cards["base"] = card_text(job, recipe, None)
        for name in (a.name for a in recipe.adapters if job.section("train", a.name)):
            cards[f"adapters/{name}"] = card_text(job, recipe, name)
    except QwloraError:
        raise
    except Exception as error:  # a bug, and no reason to stop a job of hours
        warnings.warn(
            f"a model card was not written ({type(error).__name__}: {error}). The job is not "
            "affected; report this as a bug",
            QwloraWarning,
            stacklevel=2,
        )
    for artifact, text in cards.items():
        directory.write_card(artifact, text)


def card_text(job: Job, recipe: Recipe, adapter: str | None, places: Places = Places()) -> str:
    """The card of an adapter; None: of the base."""
    from huggingface_hub import ModelCard, ModelCardData

    origin = _known_origin(recipe.model.source)
    fields = _of_base(job, recipe) if adapter is None else _of_adapter(job, recipe, adapter, places)
    metadata, shown = _license(origin, places.license, inherits=adapter is None)
    title = f"{origin.name}, QWLoRA base" if adapter is None else adapter
    text, numbers = fields.pop("text"), fields.pop("numbers")
    data = ModelCardData(
        **metadata,
        **fields.pop("metadata"),
        base_model=(places.hub_base if adapter else None) or origin.repository,
        base_model_relation=_relation(origin, places, adapter),
        pipeline_tag="text-generation",
        model_name=title,
        eval_results=_measured(numbers, text),
    )
    wanted = {"base": places.hub_base}
    if adapter is not None:
        wanted[PurePath(fields["adapter"]).name] = places.hub_adapter
    fields |= {
        "title": escaped(title),
        "model": _linked(origin),
        "numbers": _table(numbers, text),
        "fingerprint": job.get("base", "fingerprint"),
        "download": _download(wanted),
        "base": places.base,
        "runtimes": list(_runtimes(job, places, adapter)),
        "license_words": shown,
    }
    template = _TEMPLATES / ("base.md" if adapter is None else "adapter.md")
    card = ModelCard.from_template(data, template_path=str(template), **fields)
    return marked(re.sub(r"\n{3,}", "\n\n", str(card)))


def _of_base(job: Job, recipe: Recipe) -> dict[str, Any]:
    layers = job.section("base", "layers").values()
    schemes = Counter(str(layer.get("scheme")) for layer in layers)
    grids = ", ".join(scheme for scheme, _ in schemes.most_common(3))
    return {
        "grids": grids or "packed integers",
        "bits": f"{job.get('base', 'bits_per_weight'):.2f}",
        "numbers": {
            FLOAT: job.get("perplexity", "float"),
            "Perplexity": job.get("perplexity", "base"),
            "KL divergence from the float model, nats": job.get("kl", "base", "mean"),
            "Same likeliest token as the float model": job.get("top1", "base", "share"),
        },
        "text": recipe.base_text(),
        "metadata": {"library_name": "qwlora", "tags": ["qwlora", "quantized"]},
    }


def _of_adapter(job: Job, recipe: Recipe, name: str, places: Places) -> dict[str, Any]:
    adapter, text = next(a for a in recipe.adapters if a.name == name), recipe.data_of(name)
    return {
        "rank": adapter.rank,
        "alpha": f"{adapter.alpha:g}",
        "adapter": places.adapter.format(name=name),
        "training": _training(job, name, text),
        "numbers": {
            FLOAT: job.perplexity("float", name),
            BASE_ALONE: job.perplexity("base", name),
            "Perplexity": job.perplexity("adapted", name),
            "Perplexity with activations as integers": job.perplexity("simulated", name),
        },
        "text": text,
        "metadata": {
            "library_name": "peft",
            "tags": ["qwlora", "lora"],
            "datasets": text.source if is_hub_dataset(text) else None,
        },
    }


def _relation(origin: ModelCardInfo, places: Places, adapter: str | None) -> str | None:
    if adapter is None:
        return "quantized" if origin.repository else None
    return "adapter" if places.hub_base or origin.repository else None


def _runtimes(job: Job, places: Places, adapter: str | None) -> Iterator[tuple[str, ...]]:
    """For each target: its runtime, how to load the files, and of an adapter their proof."""
    for target in job.targets:
        kind = TARGETS[target]
        folder = places.use_cases if kind.has_cases else places.exported_base
        exported = adapter and places.exported.format(target=target, name=adapter)
        if folder is not None:
            has_cache = job.get("export", target, BASE, WITHOUT_CACHE) is None
            if usage := kind.backend.usage(folder.format(target=target), exported, has_cache):
                yield runtime(target), usage, _check(job, target, adapter) if adapter else ""


def is_hub_dataset(data: Data) -> bool:
    """Whether a recipe's text is a dataset on the hub: `owner/name`, and no local path."""
    source = data.source or ""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not Path(source).exists()


def shown_text(data: Data) -> str:
    """The text without folders of this machine."""
    source = data.source or ""
    if is_hub_dataset(data):
        return f"[{source}](https://huggingface.co/datasets/{source})"
    return as_code(source if source.startswith("python:") else PurePath(source).name)


def _license(
    origin: ModelCardInfo, stated: str | None, *, inherits: bool
) -> tuple[dict[str, Any], str]:
    """The metadata, and a sentence: a base has its model's license; an adapter's must be stated."""
    model = (
        f"The model's license is {escaped(origin.license)} ({origin.stated_in})."
        if origin.license
        else "The model's license is unknown: its files do not state one."
    )
    if stated is not None:
        return {"license": stated}, f"This one's license is {escaped(stated)}. {model}"
    if not inherits:
        unknown = "Whoever trained this adapter has not stated its license"
        return {"license": UNKNOWN}, f"{unknown} (`qwlora push --license`). {model}"
    metadata = {
        "license": origin.license or UNKNOWN,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
    }
    return metadata, model


def _table(numbers: Mapping[str, Any], text: Data | None) -> str:
    rows = [(what, value) for what, value in numbers.items() if finite(value) is not None]
    if not rows:
        return ""
    lines = [f"| {what} | {_shown(value)} |" for what, value in rows]
    head = f"| on held-out text{'' if text is None else f' of {shown_text(text)}'} | |"
    return "\n".join([head, "|---|--:|", *lines])


def _shown(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _measured(numbers: Mapping[str, Any], text: Data | None) -> list[EvalResult] | None:
    """The numbers of this model, without those of the models that it is compared with."""
    from huggingface_hub import EvalResult

    kinds = {"Perplexity": "perplexity", "KL": "kl", "Same": "accuracy"}
    on_hub = text is not None and is_hub_dataset(text)
    source = "" if text is None else text.source or ""
    name = source if source.startswith("python:") or on_hub else PurePath(source).name
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source if on_hub else "text",
            dataset_name=name or "text",
            dataset_split="held-out",
            metric_type=kinds[what.replace(",", " ").split()[0]],
            metric_name=what,
            metric_value=round(float(value), 4),
        )
        for what, value in numbers.items()
        if finite(value) is not None and what not in (FLOAT, BASE_ALONE)
    ]
    return found or None


def _training(job: Job, name: str, text: Data) -> str:
    counts = job.section("texts", name) or job.section("data")
    amount = counts.get("train", {})
    documents, tokens = amount.get("documents"), amount.get("loss_tokens")
    size = f" ({documents:,} documents, {tokens:,} loss tokens)" if documents and tokens else ""
    steps = job.get("train", name, "steps")
    if not steps:
        return "Imported: it was trained elsewhere."
    return f"Trained for {steps} steps on {shown_text(text)}{size}."


def _download(wanted: Mapping[str, str | None]) -> str:
    """How to download folders from the hub, by where they should be."""
    on_hub = [f"hf download {hub} --local-dir {folder}" for folder, hub in wanted.items() if hub]
    if not on_hub:
        return "Folders are relative to the job's directory."
    return "\n".join(["```shell", *on_hub, "```"])


def _check(job: Job, target: str, name: str) -> str:
    found = job.section("parity", target, name)
    if not found or "not_run" in found:
        return "These files have not been run yet."
    passed, tokens = found.get("passed"), found.get("tokens")
    on = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
    if passed:
        return f"Run{on} and compared with what was trained: all limits hold."
    return (
        f"**The check of these files failed**{on}: {escaped('; '.join(found.get('problems', ())))}"
    )


def _linked(origin: ModelCardInfo) -> str:
    if origin.repository is None:
        return as_code(origin.name)
    return f"[{origin.repository}](https://huggingface.co/{origin.repository})"
