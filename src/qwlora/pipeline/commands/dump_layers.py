"""Every layer's output of an exported model, as files to compare with a device, layer by layer.

    inputs/NAME.npy        every input of the files
    simulated/TENSOR.npy   what the simulation computes
    runtime/TENSOR.npy     what ONNX Runtime computes from the files, in one run
    layers.json            stage, use case, and for each tensor: its name, type, shape and SHA-256

Values are real numbers on their grids, after quantization and dequantization. A tensor that only
moves values of another one, or that only graphs with a key-value cache have, is not in the
simulation. Of such graphs it is the first call of the one that reads the prompt; its scores reach
over the whole context, so the simulation has none of their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwlora.errors import CalibrationError, DirectoryError, SourceError
from qwlora.export.registry import TARGETS
from qwlora.pipeline.commands.open_job import JobModels, ModelName
from qwlora.pipeline.job.output_path import check_target, new_folder
from qwlora.system import strict_json
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.target import Runtime
    from qwlora.pipeline.running.loaded_models import JobContext
    from qwlora.simulation.simulation import Simulation

STAGES = ("simulated", *(name for name, target in TARGETS.items() if target.is_simulated))


def dump_layers(
    folder: Path,
    stage: str | None = None,
    case: str | None = None,
    ids_file: Path | None = None,
    out: Path | None = None,
    track: Track = untracked,
) -> tuple[Path, dict[str, Any]]:
    """Write the layers of one model of a job.

    Args:
        stage: one of `STAGES`. Default: the first of the recipe's targets that is one of them, or
            `simulated`.
        case: adapter or use case. Default: the first.
        ids_file: a .npy file of token ids. Default: the first held-out sequence.
        out: a new or empty folder. Default: layers/STAGE/CASE in the job.

    Returns:
        the folder, and what layers.json holds.

    Raises:
        DirectoryError: the job lacks the model, its files are out of date, or `out` is not empty.
        SourceError: the ids cannot be read, or are none of this model.
        CalibrationError: no activation is quantized.
    """
    job, runtime = JobModels(folder, track=track), None
    if stage is None:
        targets = (name for name in job.recipe.export.targets if name in STAGES)
        stage = next(targets, "simulated")
    if stage not in STAGES:
        raise DirectoryError(
            f"stage {stage!r} has no quantized activations; choose one of {', '.join(STAGES)}"
        )
    name = job.name(stage, case)
    job.check(name)
    out = out or folder / "layers" / stage / str(name.adapter)
    check_target(out)
    ids = None if ids_file is None else _read_ids(ids_file)
    job.require(name.made_by)
    context, adapter = job.new_context(), [*name.adapters, job.recipe.adapters[0].name][0]
    if stage != "simulated":
        runtime = TARGETS[stage].open(folder / "export" / stage, name.adapter)
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
    import torch
    from torch.nn.functional import pad

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
    from qwlora.export.npu.kv_cache_graphs import write_array
    from qwlora.export.onnx.onnx_model import OF_INPUT

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
        "stage": name.stage,
        "use_case": name.adapter,
        "tokens": int(batch["attention_mask"].sum()),
        "inputs": [write_array(folder / "inputs", key, value) for key, value in inputs.items()],
        "layers": entries,
    }
    (folder / "layers.json").write_text(strict_json.dumps(record, indent=1) + "\n")
    return record
