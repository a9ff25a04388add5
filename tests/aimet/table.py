"""The table of comparisons. Does not import AIMET, so pytest can collect it anywhere."""

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
    "case": "model, workflow, way",
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
and says where it differs from them; `tests/aimet/write_guide.py` takes them here, in Python and by
recipe. Both start from the same float model, adapters and text. Weights: OPT of two layers with
random weights, 4 bits per tensor as in the guide; the first 2 of SmolLM2-135M's 30 layers, 4 bits
per channel, with embeddings of 8 bits per tensor. Activations: 16 bits in QW-LoRA, 8 in QWA-LoRA.
Two adapters of rank 4, 8 bits per channel, on the projections of queries and values in OPT, on
every linear layer but `down_proj` in SmolLM2. In Python, AIMET trains the adapters too, and its
losses are compared; a recipe has a loop of its own. Then AIMET calibrates and evaluates the base,
and the base with the adapters that were trained here.

AIMET quantizes what modules compute. Rules keep everything else float here too, up to "our policy":
there our policy `npu` places the quantizers, and also quantizes what functions compute. A LoRA
layer of AIMET computes `lora_B(scaling * lora_A(x))`, so it never has `lora_B(lora_A(x))`, which
another rule keeps float. Quantized, it changes nothing if its grid is the scaled one divided by
`scaling`. But min-max, AIMET's and ours, widens ranges below 0.0078 at 16 bits (`eps` of float32
times the steps), and four steps of training leave values as small in SmolLM2: without the rule
logits differ by 0.0007 of the largest.

AIMET rounds what functions and norms of SmolLM2 compute at the input of each layer that reads it,
so lora_A has a quantizer of its own beside the base layer's. Here a tensor has one encoding for all
that read it, as on a device. In QWA-LoRA the base layer's is fixed before training, and that of
lora_A is measured after it: scales of 8 of the 218 encodings differ, by at most 0.8 %, and with
them the logits of one adapter. In training, lora_A of `down_proj` reads float values in AIMET, so
gradients of its lora_B differ by 5 % and 33 % in the two layers (all others are equal bit for bit);
that is why no adapter is on `down_proj`, with which QW-LoRA stays equal.

"Under `no_grad`": AIMET's logits with reciprocal scales, to ours; infinite if they are equal.
Decibels are 10 log10 of signal over noise, for base, first and second adapter.
"""

BY_NAME = """
Encodings of activations by name: QW-LoRA of OPT in Python, first adapter, what is outside of the
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
            lines += [GUIDE_HEAD, f"| {' | '.join(GUIDE.values())} |", "|---" * len(GUIDE) + "|"]
            lines += [f"| {' | '.join(row.get(key, '') for key in GUIDE)} |" for row in self.guide]
        if self.encodings:
            lines += [BY_NAME, *self.encodings]
        return "\n".join(lines) + "\n"
