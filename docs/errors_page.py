"""docs/errors.md: a section for each error class, from its docstring and usual causes.

python docs/errors_page.py     prints the page; a test compares
"""

from __future__ import annotations

import inspect

from qwlora import errors

HEAD = """\
# Error messages

Look up the class of an error to find its usual causes and what to do.

Every error that QWLoRA raises on purpose is a `qwlora.errors.QwloraError`. The command line
prints its message and ends with exit code 2, or 1 if a verification failed. The message says what
was found, where, and what to do. The class is `error.class` in results.json. `--debug` prints it
with the traceback.
"""

# A cause, and what to do. Causes that every message of the class explains are left out.
CAUSES = {
    errors.RecipeError: {"A key is missing": "`qwlora init --full` lists every key"},
    errors.SourceError: {
        "The model is on the hub": "give `owner/name`, and check the network and the token",
        "A file is damaged": "download or copy it again",
    },
    errors.GridError: {
        "A block size does not divide a layer's inputs": "choose one that does",
        "Only one layer does not fit": "give it another grid with `base.rules`",
        "A layer is wrapped or patched": "undo that before you train or save",
    },
    errors.FingerprintError: {
        "The adapter belongs to another base": "load that base, or train it on this one",
        "A file was edited or damaged": "copy it again, or run the stage that writes it",
        "You edited it on purpose": 'delete its entry under `"files"` in the record',
    },
    errors.DirectoryError: {
        "The folder belongs to another job": "choose another `--out`",
        "It holds files that the job did not write": "move them out",
    },
    errors.MergeError: {
        "Most of the adapter is smaller than a step": "keep the adapter separate",
        "You need one model": "`qwlora merge DIR NAME --into float --out FOLDER`",
    },
    errors.DeviceError: {
        "Torch cannot use the device": "install a build for it ([gpu.md](gpu.md)), or set `auto`",
    },
    errors.ProcessError: {},
    errors.TrainingError: {
        "Float weights of the base are trainable": "set `requires_grad` to False on them",
        "No layer has the name": "take the name of a module of the model",
        "The loss diverged": "lower `learning_rate`, or raise `warmup_steps`",
    },
    errors.CaptureError: {
        "The model is in training mode": "call `model.eval()`",
        "The model branches on a value": "choose the branch when the model is built",
        "The model keeps state between calls": "remove the state",
        "You need another shape": "capture again with an example of that shape",
    },
    errors.CalibrationError: {
        "A weight is NaN or infinite": "check the checkpoint",
        "A layer saw no data": "give it other text, or keep it float with a rule",
    },
    errors.ExportError: {
        "The target cannot hold the grid": "choose another; `qwlora check` lists them",
        "The target cannot hold the adapter": "train one without DoRA and experts",
        "A runtime refuses a file": "check its version, then export again",
    },
    errors.EncodingsFileError: {
        "The version is wrong": "`qwlora encodings FILE` shows which it is",
    },
    errors.ConversionError: {
        "The other version has no such field": "`convert(..., lossy=True)` accepts the loss",
        "The file lacks what the other version needs": "export the model again in that version",
    },
    errors.VerificationError: {
        "A layer computes something else": "do not ship the files; report the layer",
        "The runtime is another version": "use the versions that the exports were made for",
        "Only the perplexity differs, slightly": "raise `verify.sequences`",
    },
    errors.UploadError: {
        "There is no token, or it is not accepted": "run `hf auth login`, or set `HF_TOKEN`",
        "The repository is public": "pass `--public`, or another `--to`",
        "The hub cannot be reached": "check the network and `HF_ENDPOINT`",
    },
    errors.NonFiniteError: {
        "A layer overflows in half precision": "set `compute: float32`",
        "The base lost too much": "use more bits, smaller blocks, or solver `gptq`",
    },
    errors.MissingExtraError: {},
}


def page() -> str:
    """The whole page."""
    text = HEAD
    for kind, causes in CAUSES.items():
        meaning = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        text += f"\n## {kind.__name__}\n\n{meaning}\n"
        items = "".join(f"- {cause}: {remedy}\n" for cause, remedy in causes.items())
        text += f"\n{items}" if items else ""
    return text


if __name__ == "__main__":
    print(page(), end="")
