"""The driver that runs exported files and compares them with what they were made of.

    base        without an adapter, if the runtime can switch
    adapter     with it
    decoded     tokens one by one, with the key-value cache: the likeliest for the whole sequence
    off again   without the adapter once more: bit for bit what it was before
    layers      each on the simulation's values, if the runtime gives them
    cached      the logits of tokens that run one by one, and the same while others run in between
    switched    the same bits again after other adapters were active

A job, `qwlora.verify` and `qwlora verify FOLDER` call `prove`; only their references differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.data.sequences import Sequences
from qwlora.errors import VerificationError
from qwlora.graph.call_arguments import as_arguments
from qwlora.simulation.placement_rules import Schemes
from qwlora.system.atomic import read_tensors, total_bytes
from qwlora.system.machine import peak_rss_bytes, processor_name, reset_peak_rss
from qwlora.system.optional_packages import node_package
from qwlora.system.parameter_names import BASE
from qwlora.system.progress import Track, one_step, untracked
from qwlora.targets.npu.kv_cache_graphs import has_graphs, most_tokens
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
from qwlora.targets.proof.compare import (
    DECODED,
    compare_cache,
    compare_layers,
    compare_outputs,
    switching,
)
from qwlora.targets.proof.folder import (
    REFERENCE,
    ROUNDED,
    checked_proofs,
    is_of_base,
)
from qwlora.targets.proof.reference import (
    BASE_SEQUENCES,
    Reference,
    check_ids,
    check_reference,
    compare_first,
    compare_logits,
    is_same,
    is_told_apart,
    least_noise,
    make_reference,
    reference_of_trained,
    simulated_logits,
    trained_losses,
)
from qwlora.targets.registry import TARGETS
from qwlora.targets.rounded_floats import rounded
from qwlora.targets.target import PROOF, Runtime, Target

SWITCHES = 3  # measured; the fastest counts
LAYER_TOKENS = 128
DECODE_AGREEMENT = 0.9  # one of 16 may be as likely as another, up to rounding
SAME = "this check cannot tell the adapter from the base: its effect is too small to measure here"
OFF = "after the adapter is switched off, logits have the bits of before"
# Figures that results.json has of shipped settings, and those that only its key `proof` has.
_SHIPPED = ("perplexity", "top1_agreement", "kl_divergence", "max_log_prob_difference")
_OF_PROOF = {"exact", "shipped", "load_seconds", "peak_memory_bytes", "bytes"}


@dataclass(frozen=True)
class Expected:
    """What exported files should compute.

    Args:
        references: of texts, see `reference.py`; none for a model that is not a language model.
            The first is measured.
        simulation: to compare layers with; None where activations are floats.
        batches: inputs of a model that is not a language model, whose outputs are compared.
        layer_tokens: tokens of the first text that run layer by layer.
    """

    references: Sequence[Mapping[str, Tensor]]
    simulation: Reference | None = None
    batches: Collection[Mapping[str, Any]] = ()
    layer_tokens: int = LAYER_TOKENS


def expected_of(
    target: Target,
    made: Any,
    texts: Sequence[Sequences],
    schemes: Schemes | None = None,
    base: Reference | None = None,
    layer_tokens: int = LAYER_TOKENS,
    rounding: Collection[str] = (),
) -> Expected:
    """What the files of a language model should compute for each text.

    Args:
        made: what they were made of: a simulation with `schemes`, or a base with an adapter.
        base: the simulation of the zero adapter.
        rounding: what the record of the files says is `ROUNDED`.
    """
    if schemes is None:
        exact = [trained_losses(made, text) if rounding else {} for text in texts]
        with rounded(made, rounding):
            of_runtime = target.backend.rounding(made)
            references = [reference_of_trained(made, text, of_runtime) for text in texts]
        references = [of | losses for of, losses in zip(references, exact, strict=True)]
        return Expected(references, layer_tokens=layer_tokens)
    least, states = least_noise(schemes, target.cached_graphs), {"adapter": simulated_logits(made)}
    if base is not None:
        states["base"] = simulated_logits(base)
    logits, perturbed = ({state: both[n] for state, both in states.items()} for n in (0, 1))
    references = [make_reference(logits, text, perturbed, None, least) for text in texts]
    return Expected(references, made, layer_tokens=layer_tokens)


def prove(
    target: Target,
    bundle: Path,
    name: str,
    expected: Expected,
    limits: Limits = LIMITS,
    track: Track = untracked,
) -> Parity:
    """Run the files of an adapter, a use case or the base (`name`, see `Target.open`), and compare
    them with `expected`.

    Raises:
        MissingExtraError, ExportError: see `Target.open`.
        VerificationError: the files contradict each other, or there is nothing to compare.
        SourceError: a reference proves nothing, or is of another vocabulary.
    """
    # Before anything is opened: the cost of a bundle is what memory grows by.
    reset_peak_rss()
    before, began = peak_rss_bytes(), time.perf_counter()
    runtime = target.open(bundle, None if target.has_base else name)
    load_seconds = time.perf_counter() - began
    adapter = bundle / name if target.has_base and name != BASE else None
    if not expected.references:
        return _outputs(runtime, adapter, expected, limits)
    reference, *more = expected.references
    parity = measure(runtime, adapter, reference, limits, track)
    if adapter is not None:
        parts = target.parts(bundle, name).items()
        cost = {
            "load_seconds": load_seconds,
            "peak_memory_bytes": peak_rss_bytes() - before + runtime.process_bytes,
            "bytes": {part: total_bytes(folder.rglob("*")) for part, folder in parts},
        }
        parity = parity.extended(cost)
    ids = reference["ids"][:1, : expected.layer_tokens]
    # An adapter of another base, left from an earlier export, would fail for a reason of its own.
    folders = sorted(bundle.iterdir()) if runtime.switches else []
    others = [f for f in folders if f.name not in (BASE, name) and is_of_base(bundle, f.name)]
    if runtime.has_layers and expected.simulation is not None:
        if runtime.switches:
            runtime.use(adapter)
        with one_step(track, "comparing layers"):
            layers = compare_layers(runtime, expected.simulation, {"input_ids": ids}, limits)
        parity = parity.extended(layers.figures, *layers.checks)
    if runtime.has_cache:
        cache = compare_cache(runtime, reference, adapter, others, limits)
        parity = parity.extended({"cache": cache.figures}, *cache.checks)
    if runtime.switches and (others or target.is_simulated):
        parity = parity.extended({}, *switching(runtime, adapter, others, ids))
    for shipped in more:  # the text that others will run has to pass here, too
        rows = measure(runtime, adapter, shipped, limits).checks
        failed = [row for row in rows if not row.passed]
        named = (replace(row, what=f"on the text in proof/, {row.what}") for row in failed)
        parity = parity.extended({}, *named)
    return parity


def _outputs(runtime: Runtime, adapter: Path | None, expected: Expected, limits: Limits) -> Parity:
    simulation, batches = expected.simulation, list(expected.batches)
    if not batches or simulation is None:
        raise VerificationError("verification needs at least one batch of the model's inputs")
    inputs = simulation.graph().interface.inputs
    batches = [as_arguments(batch, inputs) for batch in batches]
    if runtime.switches:
        runtime.use(adapter)
    compare = partial(compare_outputs, simulation, batches)
    parity = runtime.parity(compare, limits) or compare(runtime, limits)
    if not runtime.has_layers:
        return parity
    layers = compare_layers(runtime, simulation, batches[0], limits)
    return parity.extended(layers.figures, *layers.checks)


def verify_bundle(bundle: Path, track: Track = untracked) -> dict[str, dict[str, Any]]:
    """Prove a bundle again. Returns what is proven by adapter, as in proof.json.

    Raises:
        FingerprintError, SourceError: see `checked_proofs`.
        MissingExtraError, ExportError, VerificationError: see `prove`.
    """
    results, records = {}, checked_proofs(bundle)
    for name, record in track(records.items(), "verifying", len(records)):
        target = TARGETS[record["target"]]
        reference, _ = read_tensors(bundle / PROOF / name / REFERENCE)
        limits = Limits(perplexity_difference=record["limits"]["perplexity_difference"])
        parity = prove(target, bundle, name, Expected([reference]), limits)
        said = {key: record[key] for key in (ROUNDED,) if key in record}
        results[name] = said | proven(target, parity, reference, limits)
    return results


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


def results_of(target: Target, measured: Mapping[str, Any], has_proof: bool) -> dict[str, Any]:
    """What results.json says of `proven`: figures of the adapter at the top."""
    if "figures" not in measured:
        return dict(measured)
    exact = measured["figures"]["exact"]
    shipped = measured["figures"].get("shipped", {}).get("adapter", {})
    results = {"of": "simulated" if target.is_simulated else "trained"}
    results |= {k: v for k, v in measured["figures"].items() if k not in _OF_PROOF}
    results |= exact["adapter"] | {f"shipped_{k}": shipped[k] for k in _SHIPPED if k in shipped}
    results |= {k: exact[k] for k in ("off_is_equal",) if k in exact}
    results |= {"proof": measured["figures"]} if has_proof else {}
    # What did not run completely did not pass, but what failed has failed.
    is_whole = "not_run" not in results or not measured["passed"]
    judged = ("passed", "problems", "checks") if is_whole else ("problems", "checks")
    return results | {key: measured[key] for key in judged}


def fitting(text: Sequences, parts: Mapping[str, Path]) -> Sequences:
    """`text` as far as the context of the graphs in `parts` goes (see `Target.parts`)."""
    for folder in (path for part in parts.values() for path in (part, part / BASE)):
        if has_graphs(folder):
            few, most = text.first(BASE_SEQUENCES), most_tokens(folder)
            return few if few.input_ids.shape[1] <= most else few.cut(most)
    return text


def measure(
    runtime: Runtime,
    adapter: Path | None,
    reference: Mapping[str, Tensor],
    limits: Limits = LIMITS,
    track: Track = untracked,
) -> Parity:
    """Run opened files on a text.

    Where the runtime switches adapters: the base without, with and without the adapter, with exact
    settings and as shipped. Figures are then `exact`, and `shipped` where it differs.

    Args:
        adapter: its folder. None: the base alone, or files that hold base and adapter together.
            Then, and without a reference of the base, `exact` has figures of `adapter` only.
    """
    check_reference(reference)
    if not runtime.switches or adapter is None or "base.top" not in reference:
        if runtime.switches:
            runtime.use(adapter)
        parity = runtime.parity(partial(compare_first, reference), limits)
        if parity is None:
            logits = partial(runtime.logits, steps=DECODED)
            run = compare_logits(logits, reference, limits, track=track)
            parity = Parity({"exact": {"adapter": run.figures}}, run.checks)
        return parity
    # One token tells the vocabulary before ids that it may lack reach the runtime.
    check_ids(reference["ids"], runtime.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    exact = _run(runtime, adapter, reference, limits, track)
    parity = Parity({"exact": exact.figures}, exact.checks)
    if runtime.shipped is None:
        return parity
    # Shipped settings may round as they like (OpenVINO: 8 bits), so figures are not checked.
    shipped = _run(runtime.shipped, adapter, reference, limits, untracked).figures
    return parity.extended({"shipped": shipped}, is_so(f"{OFF} (shipped)", shipped["off_is_equal"]))


def client(target: Target) -> dict[str, str]:
    """Versions of the target's packages."""
    versions = {}
    for package in target.packages:
        name = package.partition(".")[0].replace("_", "-")
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {p.rpartition("@")[0]: node_package(p)[1] for p in target.node_packages}


def decoded(agreement: float, floor: float) -> Check:
    """Tokens that were decoded one by one.

    Args:
        agreement: share that is the likeliest for the whole sequence.
        floor: share of tokens that two correct runtimes agree on.
    """
    # A binomial quantile: 97.5 % of samples of `DECODED` tokens reach the limit.
    below, cases = 0.0, 0
    while below <= 0.025 and cases < DECODED:
        below += math.comb(DECODED, cases) * floor**cases * (1 - floor) ** (DECODED - cases)
        cases += 1
    least = (cases - 1) / DECODED if below > 0.025 else 1.0
    what = "tokens decoded one by one that are the likeliest for the whole sequence"
    return at_least(what, agreement, min(DECODE_AGREEMENT, least), "share")


def _run(
    runtime: Runtime, adapter: Path, reference: Mapping[str, Tensor], limits: Limits, track: Track
) -> Parity:
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
    # Not timed: openvino-genai opens its pipeline for the first token of all.
    tokens = runtime.decode(prompt, DECODED)
    sequence = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    likeliest = runtime.logits(sequence)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    agreement = float((likeliest == sequence[0, prompt.shape[1] :]).float().mean())
    # After one token, since the time of a long prompt would count as that of new tokens.
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
    the runtime is left without an adapter."""
    # Some runtimes switch when they are told to, others when the next token is computed, so both
    # are timed together. The adapter is loaded by now, where a runtime keeps adapters.
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
