"""Give quantizers their encodings: ranges by `grid/estimate_ranges.py`, then fixed ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.estimate_ranges import estimate_ranges, observed_ranges
from qwlora.grid.min_max import encoding_from_range
from qwlora.grid.range_estimator import Estimator
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.messages import listed
from qwlora.simulation.fake_quantizer import Quantizer


def estimate_encodings(quantizers: Sequence[Quantizer]) -> None:
    """Set the encoding of each of `quantizers`.

    Raises:
        CalibrationError: observed values were not finite, or an estimator needs a sample and none
            was kept. The message names the first few quantizers.
    """
    alike: dict[tuple[Scheme, Estimator], list[Quantizer]] = defaultdict(list)
    for quantizer in quantizers:
        alike[quantizer.scheme, quantizer.estimator].append(quantizer)
    for (scheme, estimator), group in alike.items():
        _estimate_alike(group, scheme, estimator)


def _estimate_alike(group: Sequence[Quantizer], scheme: Scheme, estimator: Estimator) -> None:
    observed = [q for q in group if not q.is_pinned]
    without = [q.name for q in observed if not q.observer.sampled]
    if estimator.needs_sample and without:
        raise CalibrationError(
            f"{without[0]} was observed without a sample, which observer {estimator.name} needs. "
            "Observe again."
        )
    _refuse_ranges_that_are_not_finite(observed)
    low, high = torch.zeros(len(group)), torch.zeros(len(group))
    rows = torch.tensor([i for i, q in enumerate(group) if not q.is_pinned], dtype=torch.long)
    low[rows], high[rows] = estimate_ranges([q.observer for q in observed], scheme, estimator)
    for i, quantizer in enumerate(group):
        if quantizer.minimum is not None:
            low[i] = quantizer.minimum
        if quantizer.maximum is not None:
            high[i] = quantizer.maximum
    many = Scheme(scheme.bitwidth, scheme.symmetric, PerChannel(0))
    together = encoding_from_range(low, high, many)
    for i, quantizer in enumerate(group):
        device = quantizer.observer.ends.device
        quantizer.encoding = Encoding(
            scheme, together.scale[i].to(device), together.offset[i].to(device)
        )


def _refuse_ranges_that_are_not_finite(quantizers: Sequence[Quantizer]) -> None:
    low, high = observed_ranges([q.observer for q in quantizers])
    bad = ~torch.isfinite(high - low)
    if not bool(bad.any()):
        return
    names = [quantizers[i].name for i in bad.nonzero().flatten().tolist()]
    is_wide = bool(torch.isfinite(low[bad]).all() and torch.isfinite(high[bad]).all())
    what = (
        "wider than float32 can hold; look for values that are masks or an overflow"
        if is_wide
        else "not finite (nan or infinity in the data)"
    )
    raise CalibrationError(f"{listed(names, 3)}: the observed range is {what}")
