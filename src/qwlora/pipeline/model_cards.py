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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from qwlora.errors import QwloraError, QwloraWarning
from qwlora.export.proof.folder import BASE, WITHOUT_CACHE
from qwlora.export.registry import TARGETS
from qwlora.export.target import UseCasesTarget
from qwlora.formats.card_mark import as_code, escaped, marked
from qwlora.formats.model_origin import UNKNOWN, Origin, origin_of
from qwlora.pipeline.directory import Directory
from qwlora.recipe import Data, Recipe
from qwlora.report.job import Job, finite, runtime

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

FLOAT, BASE_ALONE = "Perplexity, float model", "Perplexity, base alone"  # what to compare with
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
            cards["base"] = base_card(job, recipe)
        for name in (a.name for a in recipe.adapters if job.section("train", a.name)):
            cards[f"adapters/{name}"] = adapter_card_text(job, recipe, name)
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


def base_card(job: Job, recipe: Recipe, places: Places = Places()) -> str:
    """The card of the base."""
    from huggingface_hub import ModelCardData

    origin = _known_origin(recipe.model.source)
    license = _license(origin, places.license, inherits=True)
    schemes = Counter(str(layer.get("scheme")) for layer in job.section("base", "layers").values())
    kinds = ", ".join(scheme for scheme, _ in schemes.most_common(3)) or "packed integers"
    numbers = {
        FLOAT: job.get("perplexity", "float"),
        "Perplexity": job.get("perplexity", "base"),
        "KL divergence from the float model, nats": job.get("kl", "base", "mean"),
        "Same likeliest token as the float model": job.get("top1", "base", "share"),
    }
    text = recipe.base_text()
    name = f"{origin.name}, QWLoRA base"
    parts = [
        f"The weights of {_linked(origin)}, frozen to integers ({kinds}; "
        f"{job.get('base', 'bits_per_weight'):.2f} bits per weight, scales included) by QWLoRA. "
        "LoRA adapters for it are trained on exactly these integers.",
        _table(numbers, text),
        _identity(job, "Adapters name it; one with another fingerprint does not fit."),
        "## Load it",
        *_download(("base", places.hub_base)),
        _python(places.base, None),
    ]
    for target in job.targets:
        if loading := _loading(job, places, target, None):
            parts += [f"### {runtime(target)}", loading]
    data = ModelCardData(
        license=license.license,
        license_name=license.name,
        license_link=license.link,
        base_model=origin.repository,
        base_model_relation="quantized" if origin.repository else None,
        library_name="qwlora",
        pipeline_tag="text-generation",
        tags=["qwlora", "quantized"],
        model_name=name,
        eval_results=_measured(numbers, text),
    )
    parts += _license_words(origin, places.license, inherits=True)
    return _card(data, name, parts)


def adapter_card_text(job: Job, recipe: Recipe, name: str, places: Places = Places()) -> str:
    """The card of an adapter."""
    from huggingface_hub import ModelCardData

    origin = _known_origin(recipe.model.source)
    license = _license(origin, places.license, inherits=False)
    adapter = next(a for a in recipe.adapters if a.name == name)
    text = recipe.data_of(adapter)
    numbers = {
        FLOAT: _own(job, "perplexity", "float", name),
        BASE_ALONE: _own(job, "perplexity", "base", name),
        "Perplexity": job.get("perplexity", "adapted", name),
        "Perplexity with activations as integers": job.get("perplexity", "simulated", name),
    }
    base, folder = places.base, places.adapter.format(name=name)
    parts = [
        f"A LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g}), trained with QWLoRA on "
        f"the frozen integers of {_linked(origin)}. It fits that one base and no other.",
        _table(numbers, text),
        _identity(job, "Loading it onto another base is refused."),
        _training(job, name, text),
        "## Load it",
        *_download(("base", places.hub_base), (PurePath(folder).name, places.hub_adapter)),
        _python(base, folder),
    ]
    for target in job.targets:
        exported = places.exported.format(target=target, name=name)
        if loading := _loading(job, places, target, exported):
            parts += [f"### {runtime(target)}", loading, _check(job, target, name)]
    data = ModelCardData(
        license=license.license,
        license_name=license.name,
        license_link=license.link,
        base_model=places.hub_base or origin.repository,
        base_model_relation="adapter" if places.hub_base or origin.repository else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["qwlora", "lora"],
        datasets=text.source if is_hub_dataset(text) else None,
        model_name=name,
        eval_results=_measured(numbers, text),
    )
    parts += _license_words(origin, places.license, inherits=False)
    return _card(data, name, parts)


def _loading(job: Job, places: Places, target: str, exported: str | None) -> str:
    kind = TARGETS[target]
    folder = places.use_cases if isinstance(kind, UseCasesTarget) else places.exported_base
    if folder is None:
        return ""
    has_cache = job.get("export", target, BASE, WITHOUT_CACHE) is None
    loading = kind.loading if has_cache else kind.loading_without_cache
    return loading(folder.format(target=target), exported)


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


def _card(data: ModelCardData, title: str, parts: Sequence[str]) -> str:
    from huggingface_hub import ModelCard

    body = "\n\n".join([f"# {escaped(title)}", *(part for part in parts if part)])
    text = marked(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return str(ModelCard(text))  # parses the metadata, and so checks them


@dataclass(frozen=True)
class _License:
    """What the metadata say: a base has its model's license; an adapter's must be stated."""

    license: str = UNKNOWN
    name: str | None = None
    link: str | None = None


def _license(origin: Origin, stated: str | None, *, inherits: bool) -> _License:
    if stated is not None:
        return _License(stated)
    if not inherits or origin.license is None:
        return _License()
    return _License(origin.license, origin.license_name, origin.license_link)


def _license_words(origin: Origin, stated: str | None, *, inherits: bool) -> list[str]:
    model = (
        f"The model's license is {escaped(origin.license)} ({origin.stated_in})."
        if origin.license
        else "The model's license is unknown: its files do not state one."
    )
    if stated is not None:
        return ["## License", f"This one's license is {escaped(stated)}. {model}"]
    if inherits:
        return ["## License", model]
    unknown = "Whoever trained this adapter has not stated its license (`qwlora push --license`)."
    return ["## License", f"{unknown} {model}"]


def _own(job: Job, kind: str, stage: str, name: str) -> Any:
    """A measurement of the float model or the base on the text of an adapter."""
    text = job.get("train", name, "text")
    on_own = job.get(kind, "on", text, stage) if isinstance(text, str) else None
    return on_own if on_own is not None else job.get(kind, stage)


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


def _identity(job: Job, meaning: str) -> str:
    return f"Fingerprint of the base: `{job.get('base', 'fingerprint')}`. {meaning}"


def _training(job: Job, name: str, text: Data) -> str:
    counts = job.section("texts", name) or job.section("data")
    amount = counts.get("train", {})
    documents, tokens = amount.get("documents"), amount.get("loss_tokens")
    size = f" ({documents:,} documents, {tokens:,} loss tokens)" if documents and tokens else ""
    steps = job.get("train", name, "steps")
    if not steps:
        return "Imported: it was trained elsewhere."
    return f"Trained for {steps} steps on {shown_text(text)}{size}."


def _download(*wanted: tuple[str, str | None]) -> list[str]:
    on_hub = [f"hf download {hub} --local-dir {folder}" for folder, hub in wanted if hub]
    if not on_hub:
        return ["Folders are relative to the job's directory."]
    return ["\n".join(["```shell", *on_hub, "```"])]


def _python(base: str, adapter: str | None) -> str:
    lines = ["```python", "import qwlora", "", f'model = qwlora.load_base("{base}")']
    if adapter is not None:
        lines.append(f'model = qwlora.load_adapter(model, "{adapter}").eval()')
    return "\n".join([*lines, "```"])


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


def _linked(origin: Origin) -> str:
    if origin.repository is None:
        return as_code(origin.name)
    return f"[{origin.repository}](https://huggingface.co/{origin.repository})"
