"""What is known about one adapter of a job: settings, text, losses, perplexities, size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, size, suggestion
from qwlora.pipeline.results.job_report import read_job

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def adapter_card(folder: Path, name: str) -> dict[str, Any]:
    """The parts of a job's results that concern an adapter, and the bytes of its weights.

    Raises:
        DirectoryError, RecipeError, SourceError: see `read_job`; or there is no such adapter.
    """
    results = read_job(folder).results
    train = results.get("train", {})
    if name not in train:
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}{suggestion(name, list(train))}"
        )
    perplexity = results.get("perplexity", {})
    weights = folder / "adapters" / name / "adapter_model.safetensors"
    return {
        "name": name,
        "base": results.get("base", {}).get("fingerprint"),
        "train": train[name],
        "data": results.get("texts", {}).get(name, results.get("data")),
        "perplexity": {
            **{k: perplexity[k] for k in ("float", "base") if k in perplexity},
            **{
                kind: perplexity[kind][name]
                for kind in ("adapted", "simulated")
                if name in perplexity.get(kind, {})
            },
        },
        "on": {
            text: measured["adapted"][name]
            for text, measured in perplexity.get("on", {}).items()
            if name in measured.get("adapted", {})
        },
        "bytes": weights.stat().st_size if weights.is_file() else None,
    }


def card_lines(card: dict[str, Any]) -> list[str]:
    """The card as text."""
    train, lines = card["train"], [card["name"]]
    rows: list[tuple[str, str]] = [("base", (card["base"] or "unknown")[:16])]
    rows += [
        (key, json.dumps(value) if isinstance(value, dict | list) else str(value))
        for key, value in train.get("settings", {}).items()
    ]
    if card["data"]:
        counts = card["data"]["train"]
        rows.append(
            ("text", f"{counts['documents']:,} documents, {counts['tokens']:,} tokens to train on")
        )
    rows.append(("steps", f"{train['steps']}, {train['step_seconds']:.2f} s each"))
    if losses := train.get("losses"):
        rows.append(("loss", f"{losses[0]:.3f} to {losses[-1]:.3f}  {sparkline(losses)}"))
    rows += [(f"perplexity, {kind}", f"{v:.3f}") for kind, v in card["perplexity"].items()]
    rows += [(f"on the text of {text}", f"{value:.3f}") for text, value in card["on"].items()]
    parameters = f"{train['trainable_parameters']:,} parameters"
    rows.append(
        ("size", parameters if card["bytes"] is None else f"{parameters}, {size(card['bytes'])}")
    )
    width = max(len(key) for key, _ in rows)
    return [*lines, *(f"  {key:{width}}  {value}" for key, value in rows)]


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The course of `values` as one line of block characters, at most `width` of them."""
    groups = min(width, len(values))
    ends = [len(values) * i // groups for i in range(groups + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(ends)]
    low, high = min(means), max(means)
    top = len(_BARS) - 1
    return "".join(_BARS[round((m - low) / (high - low) * top) if high > low else 0] for m in means)
