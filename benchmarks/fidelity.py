"""How much perplexity a frozen base loses, and how much of it 60 LoRA steps recover.

    python benchmarks/fidelity.py [--model smollm2|gemma3|smollm2-scaled|smollm2-code|smollm2-added]
                                  [--only SUBSTRING ...]

Rows: solver x bitwidth x granularity x initialization of the adapter, with and without tuning. Also
bitsandbytes' NF4, the helper of AIMET's guide (per-tensor int4), and the float model with LoRA. All
are trained on the same sequences in the same order.

    svd, qera      half of the ranks carry the correction, or all of them
    3 seeds        means over three seeds of the adapter and of the order of its text
    recovery       60 steps of recovery first, twice as many in all; the float model has a row too
    mixed          the base (as with `base.calibration: [job, model]`) and recovery also see what
                   the float model writes, in turn with the text, at most 128 sequences
    own N          qera with moments of N sequences of the adapter's text; otherwise of the text
                   that the base was calibrated on
    qera-inputs    qera as published: all outputs of a layer count equally, and the adapter also
                   corrects what tuning changed. In these rows R was damped by 0.01, and B was as
                   long as A L everywhere

Columns: stored bits per weight; perplexity of the base, of the adapter before the first step
("start") and after the last ("end"); the end over that of float LoRA; the same on all held-out
text, if it was measured; seconds on one thread. Training computes in bfloat16 (autocast),
everything else in float32. A base with a perplexity above 1,000 is not trained.

A finished row is in the result file and is not computed again. Delete the file to start over. The
table is next to it, as Markdown. SmolLM2 has a width of 576, which 128 does not divide, so its
blocks have 192 weights where others have 128.

smollm2-scaled computes what SmolLM2 does with weights that lie on no grid, see `scale_channels_`;
SmolLM2's own come from a Q4_1 file. smollm2-code is calibrated, trained and measured on code;
smollm2-added is calibrated on the documentation, then adapters are trained and measured on code.

`reference: float` in a recipe compares one adapter in the same way; here, rows share the moments
and the bases that a job would compute for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from measuring import SMOLLM2, machine_line, markdown
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.initialize import initialize_
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.analysis.generate_text import sample_sequences
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.data.document import Documents, Text, split_documents, without_repeated
from qwlora.data.read_source import load_documents
from qwlora.data.sequences import in_turn
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import Scheme
from qwlora.grid.second_moments import LayerMoments
from qwlora.nn import weight_out_in
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.quantize.quantize_model import base_size, quantize_
from qwlora.quantize.tune_scales import HELD_OUT_SEQUENCES, TuningSettings, tune_
from qwlora.system.device import onednn_float32_matmul
from sources import concatenated_ids, gemma_file

TEXT = "python:pydoc_data.topics:topics"
HELD_OUT_TOKENS, CALIBRATION_TOKENS = 16 * 256, 64 * 256
COMPUTE = "bfloat16"
QERA = ("qera-inputs", "qera")
STARTS = ("svd", *QERA)
# grids whose best base and adapter are trained with three seeds
BEST = ("w4-block32", "w4-channel", "w3-block64", "w3-channel", "w2-block32-asymmetric")
UNUSABLE = 1000.0  # a base of a perplexity above this is not trained
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One base and one initialization."""

    solver: str  # rtn, search, gptq; nf4; seed; float
    scheme: str = "float"
    init: str = "zero"
    recovery: bool = False
    share: float = 0.5  # of the ranks, which init corrects with
    tuned: int = 0  # steps
    seeds: int = 1  # of the adapter and of the order of its text
    mixed: bool = False
    own: int = 0  # sequences of the adapter's own text for the moments of init

    @property
    def base(self) -> str:
        words = [self.solver, self.scheme]
        words += ["mixed"] * self.mixed + [f"tuned {self.tuned}"] * (self.tuned > 0)
        return " ".join(words)

    @property
    def name(self) -> str:
        words = [self.base, self.init]
        if self.share == 1:
            words.append("in all ranks")
        if self.own:
            words.append(f"own {self.own}")
        if self.recovery:
            words.append("recovery")
        if self.seeds > 1:
            words.append(f"{self.seeds} seeds")
        return " ".join(words)


class Subject(NamedTuple):
    """A model, and the rows that are run on it. A row that is added here has to be run.

    Args:
        tokens: length of sequences.
        plain: granularities whose rows have no initialization.
        solvers: of the rows without an initialization.
        all_ranks: grids of 3 and 4 bits on which the initialization takes all ranks too.
        tuned: initializations by steps of tuning, by grid.
        also: further rows.
        without: names of rows that were not run.
        is_code: the text is Python's asyncio, not Python's documentation.
        is_added: the base's text is the documentation all the same.
        is_scaled: see `scale_channels_`.
    """

    source: str
    tokens: int
    granularities: tuple[str, ...] = ("block32", "block64", "channel")
    plain: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ("gptq",)
    all_ranks: tuple[str, ...] = ()
    tuned: dict[str, dict[int, tuple[str, ...]]] = {}
    also: tuple[Row, ...] = ()
    without: tuple[str, ...] = ()
    is_code: bool = False
    is_added: bool = False
    is_scaled: bool = False


def best(scheme: str, seeds: int = 1, mixed: bool = False) -> Row:
    """The best base and adapter of a grid."""
    return Row("gptq", scheme, "qera", True, 1.0 if scheme[1] == "2" else 0.5, 512, seeds, mixed)


SUBJECTS = {
    "smollm2": Subject(
        SMOLLM2,
        tokens=256,
        granularities=("block32", "block64", "block192", "channel"),
        plain=("block192",),
        solvers=("rtn", "search", "gptq"),
        all_ranks=("w4-channel", "w3-block64"),
        tuned={
            "w4-block32": {512: QERA},
            "w4-channel": {256: QERA[:1], 512: QERA},
            "w3-block64": {256: QERA[:1], 512: QERA},
        },
        also=(
            Row("seed", "w4-tensor"),
            Row("gptq", "w4-block32-asymmetric", "qera-inputs", share=1.0),
            Row("gptq", "w2-block32-asymmetric", "qera-inputs"),
            *(Row("gptq", "w2-block32-asymmetric", init, True, 1.0) for init in QERA),
            Row("float", seeds=3),
            Row("float", recovery=True, seeds=3),  # what the steps of recovery teach by themselves
            *(best(scheme, seeds=3) for scheme in BEST),
            replace(best("w2-block32-asymmetric"), tuned=1024),
            Row("search", "w4-signed32"),
            Row("gptq", "w4-signed32", "qera"),
            Row("gptq", "w4-signed32", "qera", tuned=512),
            Row("gptq", "w4-signed32", "qera", tuned=512, mixed=True),
            *(best("w4-signed32", mixed=mixed) for mixed in (False, True)),
            *(Row("gptq", f"w3-signed{size}", "qera") for size in (32, 64)),
            Row("gptq", "w3-signed64", "qera", tuned=512),
        ),
    ),
    "smollm2-scaled": Subject(
        SMOLLM2,
        tokens=256,
        granularities=(),
        also=(
            *(Row("float", recovery=recovery) for recovery in (False, True)),
            *(best(scheme) for scheme in ("w4-block32", "w3-block64")),
        ),
        is_scaled=True,
    ),
    "smollm2-code": Subject(
        SMOLLM2,
        tokens=256,
        granularities=(),
        also=(
            *(Row("float", recovery=recovery) for recovery in (False, True)),
            *(Row("gptq", s, "qera") for s in ("w4-block32", "w4-signed32", "w3-block64")),
            *(best(scheme) for scheme in ("w4-signed32", "w3-block64")),
        ),
        is_code=True,
    ),
    "smollm2-added": Subject(
        SMOLLM2,
        tokens=256,
        granularities=(),
        also=(
            Row("float"),
            Row("gptq", "w4-signed32"),
            *(Row("gptq", "w4-signed32", "qera", own=own) for own in (0, 16, 32, 64)),
            *(Row("gptq", "w3-block64", "qera", own=own) for own in (0, 32)),
        ),
        is_code=True,
        is_added=True,
    ),
    # sequences half as long, since its vocabulary is five times as large
    "gemma3": Subject(
        gemma_file(),
        tokens=128,
        all_ranks=("w4-block32", "w4-block64", "w4-channel", "w3-block32"),
        without=(
            "gptq w2-block64-asymmetric qera-inputs in all ranks",
            "gptq w2-channel-asymmetric qera-inputs in all ranks",
        ),
    ),
}


def rows(subject: Subject) -> list[Row]:
    """Those of one base one after another. The initialization takes half of the ranks, and at 2
    bits all of them."""
    made = [Row("float"), Row("nf4", "nf4-block64")] if subject.granularities else []
    for bitwidth, tail in ((4, ""), (3, ""), (2, "-asymmetric")):
        for granularity in subject.granularities:
            scheme = f"w{bitwidth}-{granularity}{tail}"
            made += [Row(solver, scheme) for solver in subject.solvers]
            if granularity in subject.plain:
                continue
            share = 1.0 if bitwidth == 2 else 0.5
            made += [Row("gptq", scheme, init, share=share) for init in STARTS]
            if scheme in subject.all_ranks:
                made += [Row("gptq", scheme, init, share=1.0) for init in STARTS[:2]]
            for steps, inits in subject.tuned.get(scheme, {}).items():
                made += [Row("gptq", scheme, init, tuned=steps) for init in ("zero", *inits)]
    named = {row.name: row for row in (*made, *subject.also) if row.name not in subject.without}
    order = list(dict.fromkeys(row.base for row in named.values()))
    return sorted(named.values(), key=lambda row: order.index(row.base))


class Bench:
    """Model and text, and what rows share."""

    def __init__(self, subject: Subject, steps: int, learning_rate: float):
        self.reference = load_model(subject.source)
        if subject.is_scaled:
            scale_channels_(self.reference)
        self.tokenizer = tokenizer = load_tokenizer(subject.source)
        documentation = load_documents(TEXT, 0.2, 0)
        documents = code() if subject.is_code else documentation
        self.training = concatenated_ids(documents.train, tokenizer, subject.tokens, "training")
        self.base_text = self.training
        if subject.is_added:
            self.base_text = concatenated_ids(
                documentation.train, tokenizer, subject.tokens, "training"
            )
        self.calibration_count = CALIBRATION_TOKENS // subject.tokens
        self.all_held_out = concatenated_ids(
            documents.held_out, tokenizer, subject.tokens, "held-out"
        )
        self.held_out = self.all_held_out[: HELD_OUT_TOKENS // subject.tokens]
        self.steps, self.learning_rate = steps, learning_rate
        self.base_key = ""

    def run(self, row: Row) -> dict[str, Any]:
        self.base(row)
        began = time.perf_counter()
        result: dict[str, Any] = {
            **asdict(row),
            "bits_per_weight": self.bits,
            "quantize_seconds": self.quantize_seconds,
            "base": self.base_perplexity,
        }
        result["layers_worse_than_rtn"] = self.worse
        if self.base_perplexity > UNUSABLE and row.init == "zero" and row.solver != "seed":
            return result
        runs = [self.adapter(row, seed) for seed in range(row.seeds)]
        for key in runs[0]:
            result[key] = sum(run[key] for run in runs) / len(runs)
        if row.seeds > 1:
            result["runs"] = runs
        return result | {"seconds": time.perf_counter() - began}

    def adapter(self, row: Row, seed: int) -> dict[str, float]:
        """Perplexities of an adapter of `row` on the row's base."""
        base = copy.deepcopy(self.base(row))
        text = self.training[: row.own] if row.own else self.base_text[: self.calibration_count]
        moments = dict(observe_moments(base, text) if row.init in QERA else {}).items()
        adapted = attach(base, LoraShape(rank=16, alpha=32.0), seed=seed)
        of_inputs = row.init == "qera-inputs"
        initialize_(
            adapted,
            "qera" if of_inputs else row.init,  # type: ignore[arg-type]
            self.weight,
            # all outputs of a layer are alike
            ((path, LayerMoments(m.input)) for path, m in moments) if of_inputs else moments,
            share=row.share,
            solver_scales=None if of_inputs else self.solver_scales,
        )
        result = {"start": self.base_perplexity if row.init == "zero" else self.perplexity(adapted)}
        if row.recovery:
            texts = self.texts(row, self.steps) if row.mixed else self.training
            self.train(adapted, seed, texts, teacher=self.reference)
            result["recovered"] = self.perplexity(adapted)
        self.train(adapted, seed, self.training)
        result["end"] = self.perplexity(adapted)
        result["end_all"] = self.perplexity(adapted, self.all_held_out)
        return result

    def texts(self, row: Row, count: int) -> Tensor:
        """Sequences that the base of a row is made on, `count` at most."""
        if not row.mixed:
            return self.base_text[:count]
        return torch.stack([*islice(in_turn([self.base_text, self.sampled]), count)])

    @cached_property
    def sampled(self) -> Tensor:
        """What the float model writes."""
        return sample_sequences(self.reference, self.tokenizer, 128, self.training.shape[1])

    def weight(self, path: str) -> Tensor:
        return weight_out_in(self.reference.get_submodule(path)).detach()

    def base(self, row: Row) -> nn.Module:
        """A row's base. The last one is kept, for rows that differ in their initialization, and to
        be tuned."""
        if self.base_key != row.base:
            if row.tuned:
                model = self.base(replace(row, tuned=0))
                began = time.perf_counter() - self.quantize_seconds
                texts = self.texts(row, row.tuned + HELD_OUT_SEQUENCES)
                self.solver_scales = tune_(
                    model, self.reference, texts, TuningSettings(row.tuned, compute=COMPUTE)
                ).solver_scales
            else:
                model, began = copy.deepcopy(self.reference), time.perf_counter()
                self.round_(model, row)
            self.quantize_seconds = time.perf_counter() - began
            self.kept, self.base_perplexity, self.base_key = model, self.perplexity(model), row.base
        return self.kept

    def round_(self, model: nn.Module, row: Row) -> None:
        """Make the row's base of the float model, in place."""
        self.bits, self.worse = 32.0, 0
        self.solver_scales: dict[str, Tensor] = {}
        if row.solver == "nf4":
            self.bits = nf4_(model)
        elif row.solver == "seed":
            self.bits = seed_(model)
        elif row.solver != "float":
            gptq = row.solver == "gptq"
            report = quantize_(
                model,
                row.scheme,
                row.solver,
                calibration=self.texts(row, self.calibration_count) if gptq else None,
            )
            self.bits = base_size(model).bits_per_weight
            self.worse = sum(
                layer.error is not None and layer.error > (layer.rtn_error or 0)
                for layer in report.layers.values()
            )

    def train(
        self, model: PeftModel, seed: int, texts: Tensor, teacher: nn.Module | None = None
    ) -> None:
        order = seed if teacher is None else 100 + seed  # recovery sees them in another order
        settings = TrainingSettings(
            self.steps, self.learning_rate, 1, 5, "cosine", self.steps, order, compute=COMPUTE
        )
        work, copied = Path(tempfile.mkdtemp()), copy.deepcopy(teacher)
        try:
            train_adapter(model, texts, settings, work, teacher=copied)  # type: ignore[arg-type]
        finally:
            shutil.rmtree(work)

    def perplexity(self, model: nn.Module, text: Any = None) -> float:
        held_out = self.held_out if text is None else text
        return score_tokens(logits_of(model.eval()), held_out, "").perplexity


def code() -> Documents:
    """The source of Python's asyncio, a document for each file."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))
    texts = [Text(file.read_text(), file.name) for file in files]
    return without_repeated(*split_documents(texts, 0.2, 0))


@torch.no_grad()
def scale_channels_(model: nn.Module) -> None:
    """Multiply every input of a Llama's layers by a random factor in 0.8 to 1.25 that the norm or
    the layer before divides by, in place. The function stays, and no block of weights is on the
    grid of the file that it was read from."""
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> Tensor:
        return 1.25 ** torch.empty(count).uniform_(-1, 1, generator=generator)

    for block in model.model.layers:  # type: ignore[union-attr, operator]
        attention, mlp = block.self_attn, block.mlp  # type: ignore[union-attr]
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_proj, mlp.up_proj]
        for norm, layers in (
            (block.input_layernorm, qkv),  # type: ignore[union-attr]
            (block.post_attention_layernorm, gate_up),  # type: ignore[union-attr]
        ):
            factor = factors(len(norm.weight))  # type: ignore[arg-type]
            norm.weight /= factor
            for layer in layers:
                layer.weight *= factor
        heads = factors(len(attention.v_proj.weight)).view(-1, attention.head_dim)
        attention.v_proj.weight /= heads.view(-1, 1)
        groups = attention.num_key_value_groups  # query heads that share a value head
        attention.o_proj.weight *= heads.repeat_interleave(groups, 0).flatten()
        factor = factors(len(mlp.up_proj.weight))
        mlp.up_proj.weight /= factor[:, None]
        mlp.down_proj.weight *= factor


def nf4_(model: nn.Module) -> float:
    """Round as bitsandbytes does (NF4, blocks of 64, float32 scales); returns bits a weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        codes, state = quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
        module.weight.data = dequantize_4bit(codes, state).to(module.weight.dtype)
    model.requires_grad_(False)
    return 4 + 32 / 64


def seed_(model: nn.Module) -> float:
    """Round as the helper of AIMET's guide does: every parameter, 4 bits per tensor; returns bits a
    weight. Our min-max grid is AIMET's (tests/aimet)."""
    for parameter in model.parameters():
        parameter.data = measure(parameter.data, Scheme(4)).fake_quantize(parameter.data)
    model.requires_grad_(False)
    return 4.0


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def table(results: dict[str, Any]) -> str:
    """All rows, in Markdown."""
    rows = []
    for name, row in results.items():
        of_seeds = f" {row['seeds']} seeds" if row.get("seeds", 1) > 1 else ""
        reference = results.get(f"float float zero{of_seeds}", {})
        cells = [name, f"{row['bits_per_weight']:.2f}", f"{row['base']:.2f}"]
        if "end" in row:
            ratios = [
                f"{row[end] / reference[end]:.4f}" if end in row and end in reference else ""
                for end in ("end", "end_all")
            ]
            cells += [f"{row['start']:.2f}", f"{row['end']:.2f}", *ratios, f"{row['seconds']:.0f}"]
        else:
            cells += ["", "not trained", "", "", ""]
        rows.append(cells)
    head = ["solver, grid, init", "bits a weight", "base", "start", "end"]
    return markdown([*head, "of float LoRA", "on all held-out text", "seconds"], rows) + "\n"


def fill(file: Path, subject: Subject, given: argparse.Namespace) -> None:
    """Compute what is asked for and not there."""
    bench = None
    for row in rows(subject):
        if row.name in read(file).get("rows", {}) or (
            given.only and not any(part in row.name for part in given.only)
        ):
            continue
        bench = bench or Bench(subject, given.steps, given.learning_rate)
        result = bench.run(row)
        content = {"machine": machine_line(), "steps": given.steps, "compute": COMPUTE, "rows": {}}
        content = read(file) or content
        content["rows"][row.name] = result
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(row.name, json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=SUBJECTS)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    file, subject = RESULTS / f"fidelity-{given.model}.json", SUBJECTS[given.model]
    with onednn_float32_matmul():
        fill(file, subject, given)
    found = read(file).get("rows", {})
    in_order = {row.name: found[row.name] for row in rows(subject) if row.name in found}
    file.with_suffix(".md").write_text(table(in_order))
    print(table(in_order))


if __name__ == "__main__":
    main()
