"""What commands show of a simulation: `qwlora simulate` its placement log, its perplexity cost
(--costs), and mixed precision under a limit (--suggest), and writes nothing; `qwlora dump-layers`
every layer's output, as files to compare with a device:

    inputs/NAME.npy        every input of the files
    simulated/TENSOR.npy   what the simulation computes
    runtime/TENSOR.npy     what ONNX Runtime computes from the files, in one run
    layers.json            the model, and for each tensor: its name, type, shape and SHA-256

Values are real numbers on their grids, after quantization and dequantization. A tensor that only
moves values of another one, or that only graphs with a key-value cache have, is not in the
simulation. Of such graphs it is the first call of the one that reads the prompt; its scores reach
over the whole context, so the simulation has none of their shape.

The first three take a job as `open_job` opens it, with the name of one of its adapters, and raise:

    DirectoryError      see `JobModels.is_calibrated`
    CalibrationError    a rule has no effect
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from qwlora.analysis.quantization_costs import cumulative_costs, layer_sqnr, sensitivities, suggest
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.data.sequences import Sequences
from qwlora.errors import CalibrationError, DirectoryError, SourceError
from qwlora.pipeline.commands.open_job import JobModels, ModelName
from qwlora.pipeline.job.output_path import check_target, new_folder
from qwlora.pipeline.stages.job_context import JobContext, one_row
from qwlora.simulation.placement import Placement
from qwlora.simulation.simulation import Simulation
from qwlora.system import strict_json
from qwlora.system.progress import Track, untracked
from qwlora.targets.npu.kv_cache_graphs import write_array
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Runtime

LISTED = 10
SENSITIVITY_TOKENS = 128  # first tokens of a sequence; all their activations are in memory at once
SEARCHED_SEQUENCES = 4  # measured dozens of times during a search
NARROW_BITS, WIDE_BITS = 8, 16
KINDS = ("simulated", *(name for name, target in TARGETS.items() if target.is_simulated))


def explain_placement(job: JobModels, name: str) -> Placement:
    """The adapter's placement log: which values are quantized, and why.

    Includes calibration results if the job is calibrated and its recipe was not changed.
    """
    context, is_known = job.new_context(), job.is_calibrated(name)
    simulation = context.simulation(name) if is_known else context.new_simulation(name)
    return simulation.explain()


def measure_costs(job: JobModels, name: str) -> dict[str, Any]:
    """Measure the perplexity cost of each part of the simulation.

    Returns:
        `perplexity`: with the parts of the simulation enabled one after another.
        `sensitivity`: the most expensive activations, cost in nats per token.
        `layer_sqnr_db`: the layers that differ most from the float graph.
    """
    context, is_known = job.new_context(), job.is_calibrated(name)
    simulation = context.simulation(name) if is_known else _calibrated(context, name)
    evaluation = context.text(name).evaluation
    base = score_tokens(logits_of(context.base().eval()), evaluation, "perplexity")
    perplexities = {"base": base.perplexity} | cumulative_costs(
        simulation, lambda: _simulated(simulation, evaluation), context.track
    )
    batches = _sensitivity_batches(context, name)
    tokens = sum(batch["input_ids"].numel() - 1 for batch in batches)
    ranking = sensitivities(simulation, batches, track=context.track)[:LISTED]
    sqnr = layer_sqnr(simulation, batches[:1], context.track)
    return {
        "adapter": name,
        "perplexity": perplexities,
        "sensitivity": [{**asdict(s), "cost": s.cost / tokens} for s in ranking],
        "layer_sqnr_db": dict(sorted(sqnr.items(), key=lambda item: item[1])[:LISTED]),
        **({} if is_known else _unshared(context)),
    }


def suggest_bitwidths(job: JobModels, name: str, share: float) -> dict[str, Any]:
    """Find the fewest activations at 16 bits, the others at 8, that keep perplexity under a limit.

    The limit is (1 + share) * perplexity with float activations.

    Args:
        job: opened with activations of `NARROW_BITS` bits.

    Returns:
        `sequences`: number of evaluation sequences used for the search; `measured`, `limit` and
            `float_activations` are perplexities on these.
        `fresh`: perplexities on the other evaluation sequences; None if there are none.
        `kept`: number of activations that the recipe's rules decide; these are not searched.
        `rules`: rules that give the result, starting with those of the recipe.

    Raises:
        CalibrationError: the limit is exceeded even with 16 bits for all; or the adapter was
            trained through quantized activations (workflow qwa-lora).
    """
    context = job.new_context()
    if context.recipe.workflow == "qwa-lora":
        raise CalibrationError(
            f"adapter {name!r} was trained through quantized activations (workflow qwa-lora), so "
            "other grids need another training, which --suggest does not do. Find the rules with "
            "workflow qw-lora, add them to the recipe, and train again"
        )
    simulation = _calibrated(context, name)
    searched, others = context.text(name).evaluation.spread(SEARCHED_SEQUENCES)
    with simulation.only():
        reference = _simulated(simulation, searched)
    limit = (1 + share) * reference
    result = suggest(
        simulation,
        _sensitivity_batches(context, name),
        lambda: _simulated(simulation, searched),
        limit,
        NARROW_BITS,
        WIDE_BITS,
        track=context.track,
    )
    fresh: dict[str, float] | None = None
    if len(others):
        fresh = {"sequences": len(others), "measured": _simulated(simulation, others)}
        with simulation.only():
            fresh["float_activations"] = _simulated(simulation, others)
    rules = context.recipe.simulation.rules
    figures = ("narrow", "kept", "measured", "all_narrow", "all_wide")
    return {
        "adapter": name,
        **{figure: getattr(result, figure) for figure in figures},
        "limit": limit,
        "float_activations": reference,
        "sequences": len(searched),
        "fresh": fresh,
        "wide": list(result.wide),
        "rules": [
            *(rule.model_dump(exclude_defaults=True, mode="json") for rule in rules),
            *({"match": rule.match, "bitwidth": rule.bitwidth} for rule in result.rules),
        ],
        **_unshared(context),
    }


def _unshared(context: JobContext) -> dict[str, str]:
    """What the recipe shares among adapters, if anything; simulations calibrated here share
    nothing."""
    shares = context.recipe.simulation.base_activations
    return {} if shares == "all" else {"unshared": shares}


def _calibrated(context: JobContext, name: str) -> Simulation:
    simulation = context.new_simulation(name)
    context.calibrate(simulation, name)
    return simulation


def _sensitivity_batches(context: JobContext, name: str) -> list[dict[str, Any]]:
    """The first tokens of each calibration sequence."""
    return [one_row(ids) for ids in context.text(name).calibration_ids[:, :SENSITIVITY_TOKENS]]


def _simulated(simulation: Simulation, evaluation: Sequences) -> float:
    return score_tokens(simulation.logits, evaluation, "perplexity, simulated").perplexity


def dump_layers(
    folder: Path,
    model: str | None = None,
    ids_file: Path | None = None,
    out: Path | None = None,
    track: Track = untracked,
) -> tuple[Path, dict[str, Any]]:
    """Write the layers of one model of a job.

    Args:
        model: its name, of one of `KINDS`. Default: the first of the recipe's targets that is one
            of them, or `simulated`, and of it the first adapter or use case.
        ids_file: a .npy file of token ids. Default: the first held-out sequence.
        out: a new or empty folder. Default: layers/MODEL in the job.

    Returns:
        the folder, and what layers.json holds.

    Raises:
        DirectoryError: the job lacks the model, its files are out of date, or `out` is not empty.
        SourceError: the ids cannot be read, or are none of this model.
        CalibrationError: no activation is quantized.
    """
    job, runtime = JobModels(folder, track=track, device="cpu"), None  # where the runtimes run
    targets = (target for target in job.recipe.export.targets if target in KINDS)
    name = job.one_named(model or next(targets, "simulated"))
    if name.kind not in KINDS:
        raise DirectoryError(
            f"{str(name)!r} has no quantized activations; choose a model of {', '.join(KINDS)}"
        )
    job.check(name)
    out = out or folder / "layers" / str(name)
    check_target(out)
    ids = None if ids_file is None else _read_ids(ids_file)
    job.require(name.made_by)
    context, adapter = job.new_context(), [*name.adapters, job.recipe.adapters[0].name][0]
    if name.kind != "simulated":
        runtime = TARGETS[name.kind].open(folder / "export" / name.kind, name.adapter)
    batch = _batch(context, adapter, ids, None if runtime is None else runtime.call_tokens)
    if name.is_use_case:
        simulation = context.use_cases[str(name.adapter)]
    else:
        simulation = context.simulation(str(name.adapter))
    with new_folder(out) as scratch:
        return out, _write(simulation, runtime, name, batch, scratch)


def _read_ids(path: Path) -> npt.NDArray[np.int64]:
    """Token ids [tokens]."""
    try:
        array = np.asarray(np.load(path, allow_pickle=False))
        if array.dtype.kind not in "iu" or array.ndim == 0 or array.size != array.shape[-1]:
            raise ValueError(f"it holds {array.dtype} {list(array.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(
            f"{str(path)!r}: {error}. Give a .npy file of integers [tokens]"
        ) from error
    return array.astype(np.int64).reshape(-1)


def _batch(
    context: JobContext, adapter: str, given: npt.NDArray[np.int64] | None, length: int | None
) -> dict[str, Tensor]:
    """Ids and mask of one sequence, padded on the right to `length`, that of the files."""
    if given is None:
        ids = context.sample(adapter)["input_ids"][:, :length]
    else:
        if not given.size or (length is not None and given.size > length):
            wanted = "at least one" if length is None else f"1 to {length}"
            raise SourceError(f"--ids holds {given.size} token ids; the model takes {wanted}")
        vocabulary = context.skeleton().config.get_text_config().vocab_size
        if given.min() < 0 or given.max() >= vocabulary:
            raise SourceError(
                f"--ids holds ids from {given.min()} to {given.max()}; the model has 0 to "
                f"{vocabulary - 1}. Use the model's own tokenizer"
            )
        ids = torch.from_numpy(given)[None]
    missing = 0 if length is None else length - ids.shape[1]
    return {
        "input_ids": pad(ids, (0, missing)),
        "attention_mask": pad(torch.ones_like(ids), (0, missing)),
    }


def _write(
    simulation: Simulation,
    runtime: Runtime | None,
    name: ModelName,
    batch: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, Any]:
    from qwlora.targets.onnx.onnx_model import OF_INPUT

    simulated = simulation.values(batch)
    if not simulated:
        raise CalibrationError(
            "no activation of the simulation is quantized, so there is no layer to compare. Set "
            "simulation.policy: npu and calibrate again"
        )
    inputs: Mapping[str, Tensor] = simulation.bind(batch)
    computed: dict[str, Tensor] = {}
    if runtime is not None:
        inputs, layers = runtime.layers(inputs)
        computed = {name.removesuffix(OF_INPUT): value for name, value in layers.items()}
    for part in ("inputs", "simulated", "runtime"):
        (folder / part).mkdir(parents=True)
    entries = []
    for tensor in computed or simulated:
        expected, value = simulated.get(tensor), computed.get(tensor)
        if expected is not None and value is not None and expected.shape != value.shape:
            expected = None
        entry: dict[str, Any] = {"tensor": tensor}
        for part, array in (("simulated", expected), ("runtime", value)):
            written = None if array is None else write_array(folder / part, tensor, array)
            entry[part] = written and {k: v for k, v in written.items() if k != "name"}
        entries.append(entry)
    record = {
        "model": str(name),
        "tokens": int(batch["attention_mask"].sum()),
        "inputs": [write_array(folder / "inputs", key, value) for key, value in inputs.items()],
        "layers": entries,
    }
    (folder / "layers.json").write_text(strict_json.dumps(record, indent=1) + "\n")
    return record
