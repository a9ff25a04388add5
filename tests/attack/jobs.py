"""The jobs that are attacked: tiny, and between them every stage and every kind of file.

Only one of them goes all the way, since capturing its graph is most of what a job costs.

tuned     gptq, tuning, an adapter that starts from qera; activations after training
qwa       workflow qwa-lora
shared    two adapters, one set of encodings for both
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .victims import command, counting_changes, inside, start

VERBS = {
    "tuned": ("quantize", "train"),
    "qwa": ("quantize", "train", "calibrate", "export", "verify", "evaluate"),
    "shared": ("quantize", "train", "calibrate"),
}
_FIRST = {"name": "first", "rank": 4, "steps": 4, "warmup_steps": 0, "checkpoint_steps": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    "tuned": {
        "base": {"solver": "gptq", "tuning": {"steps": 3}, "calibration_sequences": 4},
        "adapters": [{**_FIRST, "init": "qera", "steps": 6, "warmup_steps": 1}],
    },
    "qwa": {"workflow": "qwa-lora", "adapters": [_FIRST]},
    "shared": {
        "simulation": {"base_activations": "none"},
        "adapters": [
            {"name": name, "rank": 4, "steps": 2, "warmup_steps": 0} for name in ("first", "second")
        ],
    },
}
CACHE = ".qwlora/seen.json"  # may be there or not: files younger than two seconds are not in it
# measured in this process, and so different where a run resumed
_MEASURED = {"seconds", "step_seconds", "peak_rss_bytes", "resumed_from_step"}
_MEASURED |= {"load_seconds", "switch_seconds", "peak_memory_bytes", "prefill_tokens_per_second"}
_MEASURED |= {"decode_tokens_per_second", "parts", "run", "error", "timing"}
PROOF = "proof.json"  # lists its own digest, too
STAGE = "stage.json"


@dataclass(frozen=True)
class Job:
    """A finished job and what it was after each verb.

    Args:
        after: a copy of its directory by verb; `""` is before the first.
        seconds: how long each verb took.
        changes: how many changes to the disk each verb made.
    """

    name: str
    recipe: Path
    after: Mapping[str, Path]
    seconds: Mapping[str, float]
    changes: Mapping[str, int]

    @property
    def finished(self) -> Path:
        return self.after[VERBS[self.name][-1]]

    def before(self, verb: str) -> Path:
        verbs = ("", *VERBS[self.name])
        return self.after[verbs[verbs.index(verb) - 1]]


def fresh(source: Path, place: Path) -> Path:
    """A copy of a folder that replaces what is there."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(source, place))


def write_recipe(path: Path, model: Path, corpus: Path, **sections: Any) -> Path:
    """A small recipe; keyword arguments replace whole sections."""
    data = {"sequence_tokens": 32, "evaluation_sequences": 2, "calibration_sequences": 2}
    content = {
        "name": "tiny",
        "model": {"source": str(model)},
        "data": {"source": str(corpus), **data},
        "adapters": [{"name": "first", "rank": 4, "steps": 2, "warmup_steps": 0}],
        "verify": {"sequences": 2},
        **sections,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def build(name: str, folder: Path, model: Path, corpus: Path) -> Job:
    """Run a job verb by verb."""
    folder.mkdir(parents=True)
    recipe = write_recipe(folder / "recipe.yaml", model, corpus, **SECTIONS[name])
    work, after = folder / "work", {"": folder / "after-" / "job"}
    seconds: dict[str, float] = {}
    changes: dict[str, int] = {}
    work.mkdir()
    for verb in VERBS[name]:
        action = inside(work, command(verb, recipe, "--out", "job"))
        counted = counting_changes(action, work, folder / "changes")
        ended = start(counted, folder / "logs").wait(timeout=900)
        assert ended.code == 0, f"{name}: {verb}: {ended.err}"
        seconds[verb], changes[verb] = ended.seconds, int((folder / "changes").read_text())
        after[verb] = folder / f"after-{verb}" / "job"
        shutil.copytree(work / "job", after[verb])
    return Job(name, recipe, after, seconds, changes)


def artifacts(job: Path) -> dict[str, dict[str, str]]:
    """The artifact folders of a directory: SHA-256 by file."""
    folders = [job / "base", job / "base_simulation"]
    for parent in ("adapters", "simulation", "export/onnx"):
        if (job / parent).is_dir():
            folders += [path for path in (job / parent).iterdir() if path.is_dir()]
    return {str(f.relative_to(job)): digests(f) for f in folders if f.is_dir()}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by relative path, without what was measured.

    Not of model cards, which follow the results of later stages.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name not in (PROOF, STAGE):
        return content
    try:
        record = without_times(json.loads(content))
        record["files"].pop(PROOF, None)
        record.pop("sha256", None)
    except (ValueError, KeyError, AttributeError):
        return content  # it is damaged
    return json.dumps(record).encode()


def state(job: Path) -> dict[str, Any]:
    """What is the same in two equal jobs: artifacts bit for bit, other files by name, results."""
    names = {str(p.relative_to(job)) for p in job.rglob("*") if p.is_file()}
    results = job / "results.json"
    return {
        "artifacts": artifacts(job),
        "files": sorted(names - {CACHE}),
        "results": without_times(json.loads(results.read_text())) if results.exists() else None,
        "recipe": (job / "recipe.yaml").read_text() if job.exists() else None,
    }


def without_times(results: Any) -> Any:
    if isinstance(results, dict):
        return {
            key: without_times(value)
            for key, value in results.items()
            if key not in _MEASURED and "/proof/" not in key  # the size of a proof
        }
    return [without_times(item) for item in results] if isinstance(results, list) else results


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ, at most a few places."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in sorted({*one, *other}):
            found += differences(one.get(key), other.get(key), f"{where}/{key}")
        return found[:8]
    if isinstance(one, list) and isinstance(other, list) and where == "/files":
        return [f"more: {sorted({*one} - {*other})}, less: {sorted({*other} - {*one})}"] * (
            one != other
        )
    return [] if one == other else [f"{where}: {one!r:.80} is not {other!r:.80}"]


def half_written(job: Path, *whole: Path) -> list[str]:
    """What is visible in a directory and is not what it is in one of the directories in `whole`.

    Names that begin with a dot are scratch and not visible, inside artifacts too.
    """

    def visible(folder: Path) -> dict[str, dict[str, str]]:
        return {
            name: {file: d for file, d in files.items() if not Path(file).name.startswith(".")}
            for name, files in artifacts(folder).items()
        }

    if not job.exists():
        return []
    known = [visible(folder) for folder in whole if folder.exists()]
    found = [
        f"{name} is half-written"
        for name, content in visible(job).items()
        if not any(other.get(name) == content for other in known)
    ]
    expected = {p.name for folder in whole if folder.exists() for p in folder.iterdir()}
    found += [
        f"{path.name} is not of the job"
        for path in job.iterdir()
        if path.name not in expected and not path.name.startswith(".")
    ]
    for file in (job / "results.json", *(job / ".qwlora" / "stages").rglob("*.json")):
        if file.exists():
            try:
                json.loads(file.read_text(), parse_constant=_no_number)
            except ValueError as error:
                found.append(f"{file.name}: {error}")
    if (job / "recipe.yaml").exists():
        texts = {(f / "recipe.yaml").read_text() for f in whole if f.exists()}
        if (job / "recipe.yaml").read_text() not in texts:
            found.append("recipe.yaml is another")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
