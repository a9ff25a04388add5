"""The table of comparisons. Does not import AIMET, so pytest can collect it anywhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Comparison:
    """One row of the table."""

    name: str = "?"
    tensors: int = 0
    scales: int = 0
    values: int = 0
    scales_differ: int = 0
    worst_ulps: int = 0
    offsets_differ: int = 0
    values_differ: int = 0
    shortcut_differ: int = 0


# Columns of the table of guides, by the cell's name.
GUIDE = {
    "case": "model, workflow",
    "weights": "codes of the base that differ",
    "losses": "losses of training: largest relative difference",
    "parameters": "encodings of adapters and norms that differ",
    "activations": "encodings of activations that differ",
    "logits": "logits of base, first, second: largest difference relative to the largest logit",
    "shortcut": "under `no_grad`, dB",
    "own": "our policy: AIMET's encodings that differ; encodings of activations in all",
    "own_logits": "our policy: logits to AIMET's, dB",
}
GUIDE_HEAD = """
## AIMET's guides to QW-LoRA and QWA-LoRA

`tests/aimet/guide_theirs.py` takes the steps of AIMET's `apply_qwlora.py` and `apply_qwalora.py`,
and says where it differs from them; `tests/aimet/write_guide.py` takes them here, in Python. Both
start from the same float model, adapters and text: OPT of two layers with random weights, 4 bits
per tensor as in the guide; activations of 16 bits in QW-LoRA and 8 in QWA-LoRA; two adapters of
rank 4, 8 bits per channel. AIMET trains the adapters too, and its losses are compared; then it
calibrates and evaluates the base, and the base with the adapters that were trained here.

AIMET quantizes what modules compute. Rules keep everything else float here too, up to "our policy":
there our policy `npu` places the quantizers, also for what functions compute and for biases, which
changes what is observed after them.

"Under `no_grad`": AIMET's logits with reciprocal scales, to ours; infinite if they are equal.
Decibels are 10 log10 of signal over noise, for base, first and second adapter.
"""

BY_NAME = """
Encodings of activations by name: QW-LoRA of OPT, first adapter, what is outside of the
second layer. AIMET's scale and offset; ours are equal where nothing else is said.

| AIMET's quantizer | our name | min | max | scale | offset | here |
|---|---|--:|--:|--:|--:|---|"""


@dataclass
class Table:
    """Every row of a run."""

    rows: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guide: list[dict[str, str]] = field(default_factory=list)
    encodings: list[str] = field(default_factory=list)  # rows of the guide's table by name

    def to_markdown(self) -> str:
        head = (
            "| what | tensors | scales | values | scales that differ | by at most | offsets that "
            "differ | values that differ | under `no_grad` |"
        )
        lines = ["", head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for row in self.rows:
            cells = (asdict(row) | {"worst_ulps": f"{row.worst_ulps} ulp"}).values()
            words = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
            lines.append(f"| {' | '.join(words)} |")
        lines += [f"\n{note}" for note in self.notes]
        if self.guide:
            lines += [
                GUIDE_HEAD,
                f"| {' | '.join(GUIDE.values())} |",
                "|---" * len(GUIDE) + "|",
            ]
            lines += [f"| {' | '.join(row.get(key, '') for key in GUIDE)} |" for row in self.guide]
        if self.encodings:
            lines += [BY_NAME, *self.encodings]
        return "\n".join(lines) + "\n"
