"""The grid against torch's own quantizers, as ratios of the best time of each in one run.

    python benchmarks/grid.py [THREADS ...]        1 and 2 by default; prints a table and writes benchmarks/results/grid.json

Below 1 we are faster. Both sides run on the same tensors, in turn, in the same process: a 1 x 512 x 4096 activation and a 4096 x 4096 weight.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

from measuring import earlier_result, machine_line, write_result
from qwlora.grid.activation_ranges import RangeObserver, estimate_ranges
from qwlora.grid.encoding import group_range, measure
from qwlora.grid.scheme import PerBlock, PerChannel, RangeEstimator, Scheme

REPEATS = 15
SECONDS = 3.0
Case = tuple[str, str, Callable[[], object], Callable[[], object]]


def fake_quantize_cases(name: str, x: Tensor) -> list[Case]:
    """Per tensor (symmetric and not), per channel, and per block against per channel, which is the
    nearest that torch has."""
    tensor, channel = (Scheme(8), Scheme(8, False)), PerChannel(0)
    channels = (Scheme(4, True, channel), Scheme(4, False, channel), Scheme(4, True, PerBlock(32)))
    rows = x.view(-1, x.shape[-1])
    cases: list[Case] = []
    for scheme in (*tensor, *channels):
        if scheme in tensor:
            grid, against = measure(rows, scheme), "torch.fake_quantize_per_tensor_affine"
            numbers = (float(grid.scale), int(-grid.offset), 0, scheme.steps)
            theirs = partial(torch.fake_quantize_per_tensor_affine, rows, *numbers)
        else:
            grid = measure(rows, Scheme(scheme.bitwidth, scheme.symmetric, channel))
            against = "torch.fake_quantize_per_channel_affine"
            numbers = (grid.scale, -grid.offset, 0, 0, scheme.steps)
            theirs = partial(torch.fake_quantize_per_channel_affine, rows, *numbers)
        ours = partial(measure(rows, scheme).fake_quantize, rows)
        cases.append((f"fake_quantize, {name}, {scheme}", against, ours, theirs))
    return cases


def observer_cases(name: str, x: Tensor) -> list[Case]:
    """One update each. HistogramObserver is timed with a range that stays, its best case, and with
    one that grows."""
    scheme, channel = Scheme(8, False), Scheme(8, True, PerChannel(0))
    rows = x.view(-1, x.shape[-1])
    larger = 1.1 * rows
    minmax, per_channel = MinMaxObserver(), PerChannelMinMaxObserver(ch_axis=0)
    ours, theirs = RangeObserver(True), HistogramObserver()
    ours.update(rows)
    theirs(rows)

    def our_growth() -> None:
        observer = RangeObserver(True)
        observer.update(rows)
        observer.update(larger)

    def their_growth() -> None:
        observer = HistogramObserver()
        observer(rows)
        observer(larger)

    per_tensor, sampled = "MinMaxObserver", "HistogramObserver"
    read = f"one read of the tensor (sum), {name}: the least that min-max can cost"
    histogram = f"histogram (percentile, squared error, SQNR), {name}"
    group, rows_minmax = partial(group_range, rows), partial(minmax, rows)
    cases: list[Case] = [
        (read, per_tensor, rows.sum, rows_minmax),
        (f"min-max, {name}, per tensor", per_tensor, partial(group, scheme), rows_minmax),
        (
            f"min-max, {name}, per channel",
            "PerChannelMinMaxObserver",
            partial(group, channel),
            partial(per_channel, rows),
        ),
        (histogram, sampled, partial(ours.update, rows), partial(theirs, rows)),
        (f"histogram, {name}, two batches, the second wider", sampled, our_growth, their_growth),
    ]
    for estimator in ("sqnr", "squared-error", "percentile"):
        solve = partial(estimate_ranges, [ours], scheme, RangeEstimator(estimator))
        what = f"encoding from what was seen, {estimator}, {name}"
        qparams = "HistogramObserver.calculate_qparams"
        cases.append((what, qparams, solve, theirs.calculate_qparams))
    return cases


def best_milliseconds(
    functions: list[Callable[[], object]], clock: Callable[[], float]
) -> list[float]:
    """The shortest time of each, measured in turn: `REPEATS` times at least, and more while `SECONDS` have not passed, for a machine that others use."""
    best = [float("inf")] * len(functions)
    begun, turns = time.perf_counter(), 0
    while turns <= REPEATS or (time.perf_counter() - begun < SECONDS and turns < 100 * REPEATS):
        for i, function in enumerate(functions):
            start = clock()
            function()
            if turns:  # the first turn warms up
                best[i] = min(best[i], 1000 * (clock() - start))
        turns += 1
    return best


def measured(threads: int) -> list[dict[str, object]]:
    """Every case with this many threads; one is timed by the processor's clock, which does not run while others have the processor, more by the wall's."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "1x512x4096 activation": torch.randn(1, 512, 4096, generator=generator),
        "4096x4096 weight": torch.randn(4096, 4096, generator=generator),
    }
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    for name, x in tensors.items():
        for what, against, ours, theirs in fake_quantize_cases(name, x) + observer_cases(name, x):
            our_ms, their_ms = best_milliseconds([ours, theirs], clock)
            row = {
                "what": what,
                "against": against,
                "threads": threads,
                "ours_ms": round(our_ms, 3),
                "theirs_ms": round(their_ms, 3),
            }
            rows.append(
                {
                    **row,
                    "ratio": round(our_ms / their_ms, 3),
                    "load_average": round(os.getloadavg()[0], 1),
                }
            )
            print(
                f"{our_ms / their_ms:7.3f}  {our_ms:9.3f} ms  {their_ms:9.3f} ms  {threads} thread(s)  {what}  |  {against}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = "numbers of threads; rows of other numbers stay as they are"
    parser.add_argument("threads", nargs="*", type=int, default=[1, 2], help=words)
    wanted = parser.parse_args().threads
    earlier = earlier_result("grid").get("rows", [])
    rows = [row for row in earlier if row["threads"] not in wanted]
    rows += [row for threads in wanted for row in measured(threads)]
    rows.sort(key=lambda row: row["threads"])
    unit = "ratio of best times, ours over torch's"
    write_result("grid", {"machine": machine_line(), "unit": unit, "rows": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
