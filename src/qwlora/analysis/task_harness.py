"""Scores of a causal language model on the tasks of lm-eval, EleutherAI's evaluation harness.

A task is a name that lm-eval knows, or a YAML file in its format. A file with a local dataset
(`dataset_path: json`, `dataset_kwargs: {data_files: ...}`) needs no network. Such a file may name
Python functions, which are run.

The scores of a float model are those of
`lm_eval.simple_evaluate(HFLM(pretrained=model, batch_size=1))`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.errors import SourceError, foreign_as, suggestion
from qwlora.system.optional_packages import require
from qwlora.system.progress import Track, untracked

EXTRA = "lm-eval"
_SEED = 1234  # lm-eval's default


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The tasks and groups of `names`, as `lm_eval.evaluate` takes them."""
    require("lm_eval", EXTRA)
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    require("datasets", EXTRA).disable_progress_bars()
    manager = TaskManager()
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        if is_file and not Path(name).is_file():
            raise SourceError(f"task file {name!r} does not exist. Give its path")
        if not is_file and name not in manager.all_tasks:
            raise SourceError(
                f"lm-eval has no task {name!r}{suggestion(name, manager.all_tasks)} A task of your "
                "own is a YAML file: give its path"
            )
    with foreign_as(SourceError, f"tasks {', '.join(names)} cannot be loaded"):
        loaded: dict[str, Any] = manager.load(list(names))
    # Written for lm-eval 0.4.13, whose `simple_evaluate` calls these three in the same way.
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    limit: int | None = None,
    description: str = "scoring tasks",
    track: Track = untracked,
) -> dict[str, Any]:
    """Scores by task and group of `tasks` (see `load_tasks`), on the first `limit` documents.

    Returns:
        For each: `value`, `stderr` and `metric` of its first metric, `higher_is_better`, `shots`,
        `documents`, and `metrics`, all of them with `value` and `stderr`. A standard error is None
        where lm-eval has none.
    """
    from lm_eval import evaluate

    # the seeds of `simple_evaluate`
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    results = evaluate(
        lm=_harness(model, tokenizer, description, track),
        task_dict=tasks,
        limit=limit,
        bootstrap_iters=1000,  # for standard errors of metrics that are not means
        log_samples=False,
    )
    better, shots = results.get("higher_is_better", {}), results.get("n-shot", {})
    counts, report = results.get("n-samples", {}), {}
    for name, scores in results["results"].items():
        if metrics := _metrics(scores):
            metric, first = next(iter(metrics.items()))
            report[name] = {
                **first,
                "metric": metric,
                "higher_is_better": better.get(name, {}).get(metric.partition(" (")[0]),
                "shots": shots.get(name),
                "documents": counts.get(name, {}).get("effective"),
                "metrics": metrics,
            }
    return report


def _harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str, track: Track
) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """lm-eval's own model with our progress."""

        _steps: Iterator[int] = iter(())

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None
        ) -> Any:
            self._steps = track(range(len(requests)), description, len(requests))
            next(self._steps, None)
            try:
                return super()._loglikelihood_tokens(requests, True, override_bs)
            finally:
                # Requests may share a forward, so fewer steps were taken than announced.
                for _ in self._steps:
                    pass

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(*args, **kwargs)
            next(self._steps, None)
            return logits

        loglikelihood = partialmethod(HFLM.loglikelihood, disable_tqdm=True)
        loglikelihood_rolling = partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=True)
        generate_until = partialmethod(HFLM.generate_until, disable_tqdm=True)

    # one row at a time, since exported files and captured graphs take no padding
    return Harness(pretrained=model, tokenizer=tokenizer, batch_size=1)


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error of each metric; lm-eval's keys are `acc,none`, `acc_stderr,none`."""
    metrics = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or _finite(value) is None:
            continue
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        stderr = _finite(scores.get(f"{metric}_stderr,{filtered}"))
        metrics[name] = {"value": _finite(value), "stderr": stderr}
    return metrics


def _finite(value: Any) -> float | None:
    # lm-eval writes "N/A" where it has no standard error.
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None
