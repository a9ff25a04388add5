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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

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

FLOAT, BASE_ALONE = "Perplexity, float model", "Perplexity, base alone"  # what to compare with
_TEMPLATES = Path(__file__).parent / "cards"
_known_origin = cache(origin_of)


@dataclass(frozen=True)
class Repositories:
    """Where the hub has the files; in its repositories, folders have other names than in a job.

    Args:
        base, adapter: hub ids, as far as there are any.
        license: as the user states it; overrides that of the model.
    """

    base: str | None = None
    adapter: str | None = None
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


def card_text(
    job: Job, recipe: Recipe, adapter: str | None, hub: Repositories | None = None
) -> str:
    """The card of an adapter; None: of the base.

    Args:
        hub: for a card that is uploaded. Default: one in the job's directory.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin, known = _known_origin(recipe.model.source), hub or Repositories()
    wanted = {"base": known.base}
    if adapter is None:
        title, text = f"{origin.name}, QWLoRA base", recipe.base_text()
        fields, numbers = _of_base(job)
        metadata: dict[str, Any] = {"library_name": "qwlora", "tags": ["qwlora", "quantized"]}
        relation = "quantized" if origin.repository else None
    else:
        title, text = adapter, recipe.data_of(adapter)
        fields, numbers = _of_adapter(job, recipe, adapter)
        fields["adapter"] = adapter if hub else f"adapters/{adapter}"
        wanted[adapter] = known.adapter
        dataset = text.source if is_hub_dataset(text) else None
        metadata = {"library_name": "peft", "tags": ["qwlora", "lora"], "datasets": dataset}
        relation = "adapter" if known.base or origin.repository else None
    numbers = {what: value for what, value in numbers.items() if finite(value) is not None}
    license_keys, license_words = _license(origin, known.license, inherits=adapter is None)
    data = ModelCardData(
        **license_keys,
        **metadata,
        base_model=(known.base if adapter else None) or origin.repository,
        base_model_relation=relation,
        pipeline_tag="text-generation",
        model_name=title,
        eval_results=_measured(numbers, text),
    )
    downloads = [f"hf download {id} --local-dir {folder}" for folder, id in wanted.items() if id]
    table = [f"| {what} | {v:.{4 if v < 1 else 2}f} |" for what, v in numbers.items()]
    of_text = "" if text is None else f" of {shown_text(text)}"
    repository = origin.repository
    fields |= {
        "title": escaped(title),
        "model": f"[{repository}](https://huggingface.co/{repository})"
        if repository
        else as_code(origin.name),
        "numbers": "\n".join([f"| on held-out text{of_text} | |", "|---|--:|", *table])
        if table
        else "",
        "fingerprint": job.get("base", "fingerprint"),
        "download": "\n".join(["```shell", *downloads, "```"])
        if downloads
        else "Folders are relative to the job's directory.",
        "base": "base",
        "runtimes": list(_runtimes(job, adapter, hub is not None)),
        "license_words": license_words,
    }
    template = _TEMPLATES / ("base.md" if adapter is None else "adapter.md")
    card = ModelCard.from_template(data, template_path=str(template), **fields)
    return marked(re.sub(r"\n{3,}", "\n\n", str(card)))


def _of_base(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the template, and what was measured."""
    layers = job.section("base", "layers").values()
    schemes = Counter(str(layer.get("scheme")) for layer in layers)
    grids = ", ".join(scheme for scheme, _ in schemes.most_common(3)) or "packed integers"
    return {"grids": grids, "bits": f"{job.get('base', 'bits_per_weight'):.2f}"}, {
        FLOAT: job.get("perplexity", "float"),
        "Perplexity": job.get("perplexity", "base"),
        "KL divergence from the float model, nats": job.get("kl", "base", "mean"),
        "Same likeliest token as the float model": job.get("top1", "base", "share"),
    }


def _of_adapter(job: Job, recipe: Recipe, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    adapter, training = next(a for a in recipe.adapters if a.name == name), ""
    amount = (job.section("texts", name) or job.section("data")).get("train", {})
    documents, tokens = amount.get("documents"), amount.get("loss_tokens")
    if steps := job.get("train", name, "steps"):
        size = f" ({documents:,} documents, {tokens:,} loss tokens)" if documents and tokens else ""
        training = f"Trained for {steps} steps on {shown_text(recipe.data_of(name))}{size}."
    return {
        "rank": adapter.rank,
        "alpha": f"{adapter.alpha:g}",
        "training": training or "Imported: it was trained elsewhere.",
    }, {
        FLOAT: job.perplexity("float", name),
        BASE_ALONE: job.perplexity("base", name),
        "Perplexity": job.perplexity("adapted", name),
        "Perplexity with activations as integers": job.perplexity("simulated", name),
    }


def _runtimes(job: Job, adapter: str | None, on_hub: bool) -> Iterator[tuple[str, ...]]:
    """For each target: its runtime, how to load the files, and of an adapter their proof."""
    for target in job.targets:
        kind = TARGETS[target]
        if kind.has_cases and on_hub:  # base and adapters together are not uploaded
            continue
        base = f"base/{target}" if on_hub else f"export/{target}/base"
        folder = f"export/{target}" if kind.has_cases else base
        exported = f"{adapter}/{target}" if on_hub else f"export/{target}/{adapter}"
        has_cache = job.get("export", target, BASE, WITHOUT_CACHE) is None
        if usage := kind.backend.usage(folder, adapter and exported, has_cache):
            yield runtime(target), usage, _check(job, target, adapter) if adapter else ""


def _check(job: Job, target: str, name: str) -> str:
    parity = job.section("parity", target, name)
    if not parity or "not_run" in parity:
        return "These files have not been run yet."
    tokens = parity.get("tokens")
    on = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
    if parity.get("passed"):
        return f"Run{on} and compared with what was trained: all limits hold."
    problems = escaped("; ".join(parity.get("problems", ())))
    return f"**The check of these files failed**{on}: {problems}"


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


def _measured(numbers: dict[str, Any], text: Data | None) -> list[Any] | None:
    """The numbers of this model, without those of the models that it is compared with."""
    from huggingface_hub import EvalResult

    kinds = {"Perplexity": "perplexity", "KL": "kl", "Same": "accuracy"}
    on_hub = text is not None and is_hub_dataset(text)
    source = "" if text is None else text.source or ""
    name = source if source.startswith("python:") or on_hub else PurePath(source).name
    results = [
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
        if what not in (FLOAT, BASE_ALONE)
    ]
    return results or None
