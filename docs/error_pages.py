"""Writes docs/errors: a page for each error class, from its docstring, a message and remedies.

    python docs/error_pages.py FOLDER        `make docs/errors/index.md` runs it

The message on a page is raised by the package when the page is written, so a changed message
changes the page, and a test compares the two.
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from qwlora import errors
from qwlora.adapter.adapter_files import check_adapter
from qwlora.adapter.attach import check_trainable
from qwlora.errors import QwloraError
from qwlora.formats.aimet_encodings import convert, read_encodings
from qwlora.formats.model_source import locate
from qwlora.nn import PackedLinear
from qwlora.nn.frozen import check_finite
from qwlora.pipeline.commands.push import Upload, send
from qwlora.pipeline.store import check_job
from qwlora.quantize.quantize_model import quantize_
from qwlora.recipe import parse_recipe
from qwlora.system import processes, strict_json
from qwlora.system.device import pick_device
from qwlora.system.optional_packages import require
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.proof.checks import Parity, at_most


def _lost_process() -> None:
    closed = mock.patch("torch.distributed.all_reduce", side_effect=RuntimeError)
    with mock.patch.dict(processes._state, group=None), closed:
        processes.summed(torch.ones(1))


class Page:
    """What the code cannot say.

    Args:
        raising: raises a typical error of the class, in an empty current directory.
        remedies: pairs of a cause and what to do.
    """

    def __init__(self, raising: Callable[[], object], *remedies: tuple[str, str]):
        self.raising, self.remedies = raising, remedies


def _folder(name: str, **files: object) -> Path:
    folder = Path(name)
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def _wrong_recipe() -> None:
    sections = {"model": {"source": "model"}, "data": {"sourc": "text.jsonl"}}
    parse_recipe(
        {**sections, "adapters": [{"name": "support", "steps": 3, "warmup_steps": 5}]},
        "recipe.yaml",
    )


def _other_base() -> None:
    files = {"qwlora": {"base_fingerprint": "0" * 64}, "adapter_config": {"peft_type": "LORA"}}
    folder = _folder("adapters/first", **files)
    (folder / "adapter_model.safetensors").touch()
    check_adapter(folder, "1" * 64)


def _dora() -> None:
    from safetensors.torch import save_file

    folder = _folder("adapters/first", adapter_config={"use_dora": True})
    save_file({}, folder / "adapter_model.safetensors")
    read_canonical(folder)


def _merged() -> None:
    layer = nn.Linear(64, 32, bias=False)
    model = nn.ModuleDict({"proj": layer})
    quantize_(model, "w4-block32")  # type: ignore[arg-type]
    assert isinstance(model["proj"], PackedLinear)
    model["proj"].weight.data += 1.0


def _in_training_mode() -> None:
    from qwlora.graph.capture import capture

    capture(nn.Linear(2, 2), {"input": torch.ones(1, 2)})


def _lossy() -> None:
    entry = {"bw": 4, "dtype": "INT", "is_sym": True, "name": "w"}
    blocks = {"enc_type": "PER_BLOCK", "block_size": 32, "scale": [0.5, 0.25], "offset": [-8, -8]}
    content: dict[str, Any] = {"version": "1.0.0", "activation_encodings": []}
    content["param_encodings"] = [{**entry, **blocks}]
    Path("model.encodings").write_text(json.dumps(content))
    convert(read_encodings("model.encodings"), "0.6.1")


def _bad_encodings() -> None:
    Path("model.encodings").write_text('{"version": "1.0.0", "param_encodings": []}')
    read_encodings("model.encodings")


def _missing_package() -> None:
    with mock.patch.dict(sys.modules, {"onnxruntime": None}):
        require("onnxruntime", "onnx")


def _wrong_layer() -> None:
    layer = "difference of layer layers.3.mlp.down_proj, the worst of 12"
    mean = at_most("largest mean difference of a layer", 0.2, 0.05, "steps")
    checks = at_most(layer, 7.0, 2.0, "steps"), mean
    what = "export/onnx/first: the exported files do not compute what was simulated"
    raise errors.VerificationError(what, Parity({}, checks).problems)


def _no_token() -> None:
    with mock.patch("huggingface_hub.get_token", return_value=None):
        send(Upload("the base", "you/base", {}, ()), Path("out"))


def _trainable_base() -> None:
    check_trainable(nn.ModuleDict({"proj": nn.Linear(8, 8)}))


PAGES = {
    errors.RecipeError: Page(
        _wrong_recipe,
        ("a key is misspelled", "take the name that the message suggests"),
        ("a key is missing", "`qwlora init --full` lists every key"),
        ("two settings exclude each other", "change one of the two that are named"),
    ),
    errors.SourceError: Page(
        lambda: locate("./models/llama"),
        ("the path is wrong", "the message shows the absolute path that was looked for"),
        ("the model is on the hub", "give `owner/name`, and check the network and the token"),
        ("a file is damaged", "download or copy it again"),
    ),
    errors.GridError: Page(
        lambda: quantize_(nn.ModuleDict({"proj": nn.Linear(50, 8)}), "w4-block32"),  # type: ignore[arg-type]
        ("a block size does not divide a layer's inputs", "choose one that does"),
        ("one layer is special", "give it a grid of its own with `base.rules`"),
        ("a layer is wrapped or patched", "undo that before you train or save"),
    ),
    errors.FingerprintError: Page(
        _other_base,
        ("the adapter is of another base", "load its own base, or train it on this one"),
        ("a file was edited or damaged", "copy it again, or run the stage that writes it"),
        ("you edited it on purpose", 'delete its entry under `"files"` in the record'),
    ),
    errors.DirectoryError: Page(
        lambda: check_job(Path("out")),
        ("the folder is of another job", "choose another `--out`"),
        ("it holds files that the job did not write", "move them out"),
        ("there is no space, or no permission", "free space, or change the permissions"),
        ("a stage has not run", "run the command that the message shows"),
    ),
    errors.MergeError: Page(
        _merged,
        ("most of the adapter is smaller than a step", "keep the adapter separate"),
        ("you need one model", "`qwlora merge DIR NAME --into float --out FOLDER`"),
    ),
    errors.DeviceError: Page(
        lambda: pick_device("xpu:7"),
        (
            "Torch cannot use the device.",
            "Install a build for it ([gpu.md](../gpu.md)), or set auto.",
        ),
    ),
    errors.ProcessError: Page(_lost_process, ("another failed", "correct what its message says")),
    errors.TrainingError: Page(
        _trainable_base,
        ("float weights of the base are trainable", "set requires_grad to False on them"),
        ("no layer has the name", "take the name of a module of the model"),
        ("the loss diverged", "lower `learning_rate`, or raise `warmup_steps`"),
    ),
    errors.CaptureError: Page(
        _in_training_mode,
        ("the model is in training mode", "call `model.eval()`"),
        ("the model branches on a value", "choose the branch when the model is built"),
        ("the model keeps state between calls", "remove the state"),
        ("another shape is needed", "capture again with an example of that shape"),
    ),
    errors.CalibrationError: Page(
        lambda: check_finite("model.norm.weight", torch.tensor([1.0, float("nan")])),
        ("a weight is NaN or infinite", "check the checkpoint"),
        ("a layer saw no data", "give it other text, or keep it float with a rule"),
    ),
    errors.ExportError: Page(
        _dora,
        ("the target cannot hold the grid", "choose another grid; `qwlora check` lists them"),
        ("the target cannot hold the adapter", "train one without DoRA and experts"),
        ("a runtime refuses a file", "check its version, then export again"),
    ),
    errors.EncodingsFileError: Page(
        _bad_encodings,
        ("fields are missing or malformed", "export the file again from its tool"),
        ("the version is wrong", "`qwlora encodings FILE` tells which it is"),
    ),
    errors.ConversionError: Page(
        _lossy,
        ("the other version has no such field", "`convert(..., lossy=True)` accepts it"),
        ("the file lacks what the other version needs", "export the model again in that version"),
    ),
    errors.VerificationError: Page(
        _wrong_layer,
        ("a layer computes something else", "do not ship the files; report the layer"),
        ("the runtime is another version", "use the versions that the exports were made for"),
        ("only the perplexity differs, barely", "raise `verify.sequences`"),
    ),
    errors.UploadError: Page(
        _no_token,
        ("there is no token, or it is not accepted", "`hf auth login`, or set HF_TOKEN"),
        ("the repository is public", "`--public`, or another `--to`"),
        ("the hub cannot be reached", "check the network and HF_ENDPOINT"),
    ),
    errors.NonFiniteError: Page(
        lambda: strict_json.dumps({"perplexity": {"base": float("nan")}}),
        ("a layer overflows in half precision", "set `compute: float32`"),
        ("the base lost too much", "more bits, smaller blocks, or solver gptq"),
    ),
    errors.MissingExtraError: Page(
        _missing_package, ("a package is not installed", "run the command in the message")
    ),
}


def message_of(page: Page) -> tuple[type[QwloraError], str]:
    """Class and message of the error that a page shows, raised in a folder `/home/you`."""
    with tempfile.TemporaryDirectory() as place, chdir(place):
        torch.manual_seed(0)
        try:
            page.raising()
        except QwloraError as error:
            return type(error), str(error).replace(str(Path.cwd()), "/home/you")
    raise AssertionError(f"{page} raised nothing")


def pages() -> dict[str, str]:
    """The content of docs/errors by file name."""
    rows = ["# Error messages\n", inspect.cleandoc(INDEX), ""]
    rows += ["| class | means |", "|---|---|"]
    found = {}
    for kind, page in PAGES.items():
        name, meaning = kind.__name__, inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        raised, message = message_of(page)
        assert raised is kind, (kind, raised, message)
        also = next(c for c in kind.__mro__ if c.__module__ == "builtins")
        rows.append(f"| [{name}]({name}.md) | {meaning} |")
        lines = [
            f"# {name}\n",
            f"{meaning}\n",
            f"In Python `qwlora.errors.{name}`, also a `{also.__name__}`. For example:\n",
            "```text",
            message,
            "```\n",
            "| cause | what to do |",
            "|---|---|",
            *(f"| {cause} | {remedy} |" for cause, remedy in page.remedies),
        ]
        found[f"{name}.md"] = "\n".join(lines) + "\n"
    return {"index.md": "\n".join(rows).rstrip() + "\n", **found}


INDEX = """
Every error that QWLoRA raises on purpose is a `qwlora.errors.QwloraError`. The command line prints
one message, on standard error, and ends with exit code 2 (1 if a verification failed). A message
says what was found, where, and what to do. `--debug` prints the traceback too. These pages are
written from the code (`make docs/errors/index.md`).
"""


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (target / name).write_text(text)
