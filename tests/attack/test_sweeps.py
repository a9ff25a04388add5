"""Commands that change a finished job, killed at every change of the disk that they make."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from adapter.test_mlx_adapter import write_mlx
from pipeline.fake_hub import TOKEN, fake_hub

from .jobs import Job, differences, state
from .record import Record
from .targets import Target, change_target
from .victims import Ended, command, inside, killed_at_change, start

pytestmark = [
    pytest.mark.attack,
    # of the adapters that are imported: other tools write no digests
    pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning"),
]


@pytest.fixture(scope="module")
def hub(warm: None, place: Path) -> Iterator[None]:
    """A hub in a process of its own, since this one must not have its threads when it forks."""
    address = place / "hub-address"

    def serve() -> None:
        with fake_hub() as server:
            address.with_suffix(".new").write_text(server.url)
            address.with_suffix(".new").rename(address)
            time.sleep(10_000)

    running = start(serve, place / "hub-logs")
    while not address.exists():
        assert not running.is_done()
        time.sleep(0.01)
    url = address.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        files = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield
    running.kill()
    running.wait()


@pytest.fixture(scope="module")
def changes(shared: Job, place: Path, hub: None) -> list[Target]:
    """Every command that changes adapters of a job, and the one that notes what it uploaded."""
    peft = place / "elsewhere" / "peft"
    shutil.copytree(shared.finished / "adapters" / "first", peft)
    (peft / "qwlora.json").unlink()
    mlx = write_mlx(place / "elsewhere" / "mlx")
    commands = {
        "adapters add": ("adapters", "add", "job", "--name", "third", "--set", "steps=1"),
        "adapters import, from PEFT": ("adapters", "import", "job", str(peft), "--name", "third"),
        "adapters import, from mlx-lm": ("adapters", "import", "job", str(mlx), "--name", "third"),
        "adapters rename": ("adapters", "rename", "job", "first", "one"),
        "adapters remove": ("adapters", "remove", "job", "second", "--yes"),
        "push, the base": ("push", "job", "--to", "me/base", "--yes"),
        "push, an adapter": ("push", "job", "--adapter", "first", "--to", "me/adapter", "--yes"),
    }
    return [
        change_target(shared, name, arguments, place / "changes" / name.replace(" ", "-"))
        for name, arguments in commands.items()
    ]


def _train(work: Path, logs: Path) -> Ended:
    return start(inside(work, command("train", "job")), logs).wait()


def _content(work: Path) -> Any:
    """The job's state, wherever it is. What a killed process left of a file that it wrote is
    replaced by the next one that writes the file."""
    content = state(work / "job")
    content["files"] = [name for name in content["files"] if not name.endswith(".part")]
    return json.loads(json.dumps(content).replace(str(work), "WORK"))


def test_jobs_are_sound_wherever_a_change_of_them_is_killed(
    changes: list[Target], record: Record, tmp_path: Path
) -> None:
    """The next command is, in turn, the same one and a stage of the job."""
    undone, made = [], []
    for change in changes:
        place = change.after.with_suffix(".undone")
        change.put(place)
        for work, found in ((place, undone), (change.after, made)):
            assert not (ended := _train(work, tmp_path / "logs")).code, ended.err
            found.append(_content(work))
    trials = [
        (number, moment)
        for number, change in enumerate(changes)
        for moment in range(1, change.changes + 1)
    ]

    def kill(trial: tuple[int, int], folder: Path) -> list[tuple[str, str, str]]:
        number, moment = trial
        change, work = changes[number], folder / "trial"
        shutil.rmtree(work, ignore_errors=True)
        change.put(work)
        ended = start(killed_at_change(change.action(work), work, moment), folder / "logs").wait()
        problems = [] if ended.code == -9 else [f"never killed: {ended}"]
        if is_repeated := moment % 2 == 1:
            again = start(change.action(work), folder / "logs").wait()
            if again.code and (problem := again.refused()):
                problems.append(f"the same command again: {problem}")
        if (ended := _train(work, folder / "logs")).code:
            problems.append(f"train refuses: {ended.err.strip()[-300:]}")
        else:
            content = _content(work)
            allowed = [made[number]] if is_repeated else [undone[number], made[number]]
            if content not in allowed:
                problems += [f"it is not {differences(content, other)}" for other in allowed]
        what = "the same command, then train" if is_repeated else "train"
        how = f"killed before change {moment} of {change.changes}; then {what}"
        return [(change.name, "; ".join(problems), how)]

    record.attack("changes", trials, kill, tmp_path)
    assert record.rows["changes"].keys() == {change.name for change in changes}
