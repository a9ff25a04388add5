"""Run exported files, with everything that a proof compares.

    base        without an adapter, if the runtime can switch
    adapter     with it
    decoded     tokens one by one, with the key-value cache: the likeliest for the whole sequence
    off again   without the adapter once more: bit for bit what it was before
    switched    the same bits again after other adapters were active, also between the steps of a
                sequence that has a cache

Speeds are of one run on this machine, one sequence at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.export.proof.checks import Check, Limits, Parity, Part, at_least, is_so
from qwlora.export.proof.compare import (
    LogitsFigures,
    compare_logits,
    is_same,
    is_told_apart,
    tracked,
)
from qwlora.export.proof.reference import Logits, check_ids, check_reference
from qwlora.export.runtime import Runtime
from qwlora.export.target import BASE, Target
from qwlora.system.atomic import total_bytes
from qwlora.system.compute_precision import processor_name
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss
from qwlora.system.progress import Track, untracked

DECODED = 16  # tokens
SWITCHES = 3  # measured; the fastest counts
DECODE_AGREEMENT = 0.9  # one of 16 may be as likely as another, up to rounding
SAME = "the base alone would pass as this adapter: its effect is below what is compared here"
OFF = "after the adapter is switched off, logits have the bits of before"
_OTHERS = 2  # states that run between the steps


def measure(
    target: Target,
    bundle: Path,
    name: str,
    reference: Mapping[str, Tensor],
    track: Track = untracked,
) -> tuple[Parity, Runtime]:
    """Run the files of an adapter, a use case or the base.

    Where the runtime switches adapters: the base without, with and without the adapter, with exact
    settings and as shipped. Figures are then `exact`, and `shipped` where it differs, each with
    figures of `base` and `adapter`, whether switching the adapter off gives the bits of before,
    seconds and tokens per second. Also the seconds to load the base and the growth of this
    process's memory, of both together, and bytes of files. Only exact settings are checked.

    Returns:
        what was measured, and the open runtime.

    Raises:
        MissingExtraError, VerificationError, ExportError: see `Target.open`.
        SourceError: the reference proves nothing, or is of another vocabulary.
    """
    check_reference(reference)
    reset_peak_rss()
    before, began = peak_rss_bytes(), time.perf_counter()
    runtime = target.open(bundle, None if target.has_base else name)
    load_seconds = time.perf_counter() - began
    if not runtime.switches or name == BASE:
        parity = runtime.parity(reference)
        logits = partial(runtime.logits, steps=DECODED)
        return parity or measure_logits(logits, reference, track), runtime
    parity = measure_runtime(runtime, bundle / name, reference, track)
    cost = {
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak_rss_bytes() - before,
        "bytes": {
            "base": total_bytes((bundle / BASE).rglob("*")),
            "adapter": total_bytes((bundle / name).rglob("*")),
        },
    }
    return parity.extended(cost), runtime


def measure_runtime(
    runtime: Runtime,
    adapter: Path,
    reference: Mapping[str, Tensor],
    track: Track = untracked,
) -> Parity:
    """`measure` of an open runtime that switches adapters, without what loading it costs."""
    check_ids(reference["ids"], runtime.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    parts: list[Part] = []
    figures = {"exact": _run(runtime, adapter, reference, parts, track)}
    if runtime.shipped is not None:
        figures["shipped"] = _run(runtime.shipped, adapter, reference, [], untracked)
        parts.append(is_so(f"{OFF} (shipped)", figures["shipped"]["off_is_equal"]))
    return Parity(figures, tuple(parts))


def measure_logits(
    logits: Logits, reference: Mapping[str, Tensor], track: Track = untracked
) -> Parity:
    """`measure` of files that hold base and adapter together: figures of `adapter` only."""
    check_reference(reference)
    run = tracked(logits, track, len(reference["ids"]))
    figures = compare_logits(run, reference)
    return Parity({"exact": {"adapter": figures.to_json()}}, (figures,))


def proven(
    target: Target, parity: Parity, reference: Mapping[str, Tensor], limits: Limits
) -> dict[str, Any]:
    """What a proof records: figures and checks, program and machine."""
    measured = parity.to_json(limits)
    checks = {key: measured.pop(key) for key in ("passed", "problems", "checks")}
    return {
        "client": client(target),
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads",
        "figures": measured,
        **checks,
        "notes": [] if is_told_apart(reference, limits) else [SAME],
    }


def client(target: Target) -> dict[str, str]:
    """Versions of the target's packages."""
    versions = {}
    for package in target.packages:
        name = package.partition(".")[0].replace("_", "-")
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def decoded(agreement: float, floor: float) -> Check:
    """Tokens that were decoded one by one.

    Args:
        agreement: share that is the likeliest for the whole sequence.
        floor: share of tokens that two correct runtimes agree on.
    """
    least = min(DECODE_AGREEMENT, _least_of_sample(floor, DECODED))
    what = "tokens decoded one by one that are the likeliest for the whole sequence"
    return at_least(what, agreement, least, "share")


def _least_of_sample(share: float, count: int) -> float:
    """The share that 97.5 % of samples of `count` cases reach if it is `share` of all cases."""
    below = 0.0
    for cases in range(count):
        below += math.comb(count, cases) * share**cases * (1 - share) ** (count - cases)
        if below > 0.025:
            return cases / count
    return 1.0


def _run(
    runtime: Runtime,
    adapter: Path,
    reference: Mapping[str, Tensor],
    parts: list[Part],
    track: Track,
) -> dict[str, Any]:
    """Figures of one runtime; what is checked is added to `parts`."""
    first = reference["ids"][:1]
    runtime.use(None)
    base = compare_logits(runtime.logits, reference, "base", " without the adapter")
    before = runtime.logits(first)
    runtime.use(adapter)
    run = tracked(runtime.logits, track, len(reference["ids"]))
    whole = compare_logits(run, reference, where=" with the adapter")
    prompt = first[:, : max(1, first.shape[1] - DECODED)]
    began = time.perf_counter()
    runtime.logits(prompt)
    prefill = time.perf_counter() - began
    tokens = runtime.decode(prompt, DECODED)  # some runtimes load more for the first of all
    sequence = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    likeliest = runtime.logits(sequence)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    agreement = float((likeliest == sequence[0, prompt.shape[1] :]).float().mean())
    decode_tokens_per_second = decode_speed(runtime, first[:, :1])
    runtime.use(None)
    off_is_equal = is_same(runtime.logits(first), before)
    has_floor = "adapter.other_same" in reference
    parts += [
        base,
        whole,
        decoded(agreement, whole.floor_top1_agreement if has_floor else 1.0),
        is_so(OFF, off_is_equal),
    ]
    return {
        "base": base.to_json(),
        "adapter": whole.to_json(),
        "decode_agreement": agreement,
        "prefill_tokens_per_second": prompt.shape[1] / prefill,
        "decode_tokens_per_second": decode_tokens_per_second,
        "off_is_equal": off_is_equal,
        "switch_seconds": switch_seconds(runtime, adapter, first[:, :1]),
    }


def decode_speed(runtime: Runtime, token: Tensor) -> float:
    """Tokens per second, one by one with a cache, that follow one token [1, 1]."""
    began = time.perf_counter()
    runtime.decode(token, DECODED)
    return DECODED / (time.perf_counter() - began)


def switch_seconds(runtime: Runtime, adapter: Path, token: Tensor) -> float:
    """How much longer a token takes after a switch, to the adapter or off, whichever is slower;
    the runtime is left without an adapter.

    Some runtimes switch when they are told to, others when the next token is computed. The adapter
    has been read by now, where a runtime keeps adapters.
    """
    seconds: dict[tuple[Path | None, bool], list[float]] = {}
    for _ in range(SWITCHES):
        for state in (adapter, None):
            for is_switch in (True, False):
                began = time.perf_counter()
                if is_switch:
                    runtime.use(state)
                runtime.decode(token, 1)
                seconds.setdefault((state, is_switch), []).append(time.perf_counter() - began)
    least = {key: min(durations) for key, durations in seconds.items()}
    return max(0.0, *(least[state, True] - least[state, False] for state in (adapter, None)))


def switching(
    runtime: Runtime, adapter: Path | None, others: Sequence[Path], ids: Tensor
) -> Iterator[Check]:
    """Whether each state gives the same bits after other adapters were active.

    Args:
        adapter: folder of an adapter; None: the base.
        others: folders of further adapters.
        ids: token ids [1, tokens].
    """
    before: dict[Path | None, Tensor] = {}
    for state in (None, adapter, *others, None, adapter):
        runtime.use(state)
        logits = runtime.logits(ids)
        if state in before:
            name = "without an adapter" if state is None else f"with adapter {state.name}"
            what = f"logits {name} have the same bits after other adapters were active"
            yield is_so(what, is_same(before[state], logits))
        before[state] = logits
    runtime.use(None)


def compare_cache(
    runtime: Runtime,
    reference: Mapping[str, Tensor],
    adapter: Path | None,
    others: Sequence[Path],
) -> tuple[LogitsFigures, Check]:
    """Run the first sequence as a prefill and then token by token: compare the logits of these
    tokens, and their bits while other adapters and the base run between the steps, each with a
    cache of its own.

    Args:
        adapter: folder of an adapter; None: the base.
        others: folders of further adapters.
    """
    ids = reference["ids"][:1]
    count = min(DECODED, ids.shape[1] - 1)
    logits = _stepwise(runtime, adapter, [], ids, count)
    states = [state for state in (None, *others) if state != adapter]
    switched = _stepwise(runtime, adapter, states[:_OTHERS], ids, count)
    runtime.use(None)
    one = {name: tensor[:1] for name, tensor in reference.items()}
    where = f" of {count} tokens, one by one with the cache"
    figures = compare_logits(lambda _: logits, one, where=where, last=count)
    what = "with the cache, logits have the same bits if other adapters run between the steps"
    return figures, is_so(what, is_same(logits, switched))


def _stepwise(
    runtime: Runtime,
    adapter: Path | None,
    between: Sequence[Path | None],
    ids: Tensor,
    count: int,
) -> Tensor:
    """Logits of the last `count` tokens, run one by one.

    Args:
        between: states that run the same tokens between the steps.
    """
    states = (adapter, *between)
    caches: list[dict[str, Tensor]] = [{} for _ in states]
    steps = []
    for part in (ids[:, :-count], *ids[:, -count:].split(1, dim=1)):
        for number, state in enumerate(states):
            runtime.use(state)
            logits, caches[number] = runtime.extend(part, caches[number])
            if number == 0:
                steps.append(logits)
    return torch.cat(steps[1:], dim=1)
