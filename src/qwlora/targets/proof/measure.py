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

from qwlora.system.atomic import total_bytes
from qwlora.system.machine import peak_rss_bytes, processor_name, reset_peak_rss
from qwlora.system.optional_packages import node_package
from qwlora.system.parameter_names import BASE
from qwlora.system.progress import Track, untracked
from qwlora.targets.proof.checks import (
    LIMITS,
    Check,
    Limits,
    Parity,
    at_least,
    is_so,
    only_finite,
    verdict,
)
from qwlora.targets.proof.reference import (
    Logits,
    check_ids,
    check_reference,
    compare_first,
    compare_logits,
    is_same,
    is_told_apart,
)
from qwlora.targets.target import Runtime, Target

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
    limits: Limits = LIMITS,
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
        parity = runtime.parity(partial(compare_first, reference), limits)
        logits = partial(runtime.logits, steps=DECODED)
        return parity or measure_logits(logits, reference, limits, track), runtime
    parity = measure_runtime(runtime, bundle / name, reference, limits, track)
    cost = {
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak_rss_bytes() - before + runtime.process_bytes,
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
    limits: Limits = LIMITS,
    track: Track = untracked,
) -> Parity:
    """`measure` of an open runtime that switches adapters, without what loading it costs."""
    check_ids(reference["ids"], runtime.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    exact = _run(runtime, adapter, reference, limits, track)
    parity = Parity({"exact": exact.figures}, exact.checks)
    if runtime.shipped is None:
        return parity
    shipped = _run(runtime.shipped, adapter, reference, limits, untracked).figures
    return parity.extended({"shipped": shipped}, is_so(f"{OFF} (shipped)", shipped["off_is_equal"]))


def measure_logits(
    logits: Logits,
    reference: Mapping[str, Tensor],
    limits: Limits = LIMITS,
    track: Track = untracked,
) -> Parity:
    """`measure` of files that hold base and adapter together: figures of `adapter` only."""
    check_reference(reference)
    run = compare_logits(logits, reference, limits, track=track)
    return Parity({"exact": {"adapter": run.figures}}, run.checks)


def proven(
    target: Target, parity: Parity, reference: Mapping[str, Tensor], limits: Limits
) -> dict[str, Any]:
    """What a proof records: figures and checks, program and machine."""
    return {
        "client": client(target),
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads",
        "figures": only_finite(parity.figures),
        **verdict(parity.checks),
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
    return versions | {p.rpartition("@")[0]: node_package(p)[1] for p in target.node_packages}


def decoded(agreement: float, floor: float) -> Check:
    """Tokens that were decoded one by one.

    Args:
        agreement: share that is the likeliest for the whole sequence.
        floor: share of tokens that two correct runtimes agree on. Of samples of `DECODED` tokens,
            97.5 % reach the limit.
    """
    below, cases = 0.0, 0
    while below <= 0.025 and cases < DECODED:
        below += math.comb(DECODED, cases) * floor**cases * (1 - floor) ** (DECODED - cases)
        cases += 1
    least = (cases - 1) / DECODED if below > 0.025 else 1.0
    what = "tokens decoded one by one that are the likeliest for the whole sequence"
    return at_least(what, agreement, min(DECODE_AGREEMENT, least), "share")


def _run(
    runtime: Runtime,
    adapter: Path,
    reference: Mapping[str, Tensor],
    limits: Limits,
    track: Track,
) -> Parity:
    """Figures and checks of one runtime."""
    first = reference["ids"][:1]
    runtime.use(None)
    base = compare_logits(runtime.logits, reference, limits, "base", " without the adapter")
    before = runtime.logits(first)
    runtime.use(adapter)
    where = " with the adapter"
    whole = compare_logits(runtime.logits, reference, limits, where=where, track=track)
    prompt = first[:, : max(1, first.shape[1] - DECODED)]
    began = time.perf_counter()
    runtime.logits(prompt)
    prefill = time.perf_counter() - began
    tokens = runtime.decode(prompt, DECODED)  # some runtimes load more for the first of all
    sequence = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    likeliest = runtime.logits(sequence)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    agreement = float((likeliest == sequence[0, prompt.shape[1] :]).float().mean())
    began = time.perf_counter()
    runtime.decode(first[:, :1], DECODED)
    decoding = time.perf_counter() - began
    runtime.use(None)
    off_is_equal = is_same(runtime.logits(first), before)
    has_floor = "adapter.other_same" in reference
    floor = whole.figures["floor_top1_agreement"] if has_floor else 1.0
    figures = {
        "base": base.figures,
        "adapter": whole.figures,
        "decode_agreement": agreement,
        "prefill_tokens_per_second": prompt.shape[1] / prefill,
        "decode_tokens_per_second": DECODED / decoding,
        "off_is_equal": off_is_equal,
        "switch_seconds": switch_seconds(runtime, adapter, first[:, :1]),
    }
    checks = (decoded(agreement, floor), is_so(OFF, off_is_equal))
    return Parity(figures, (*base.checks, *whole.checks, *checks))


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
    limits: Limits = LIMITS,
) -> Parity:
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
    run = compare_logits(lambda _: logits, one, limits, where=where, last=count)
    what = "with the cache, logits have the same bits if other adapters run between the steps"
    return run.extended({}, is_so(what, is_same(logits, switched)))


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
