"""An existing job: its recipe, its plan, what is current, and why the rest is not.

A stage is current if the record at its place has the planned inputs, needs the records that are
there, and its files are intact. Nothing else decides. Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, SourceError, suggestion
from qwlora.pipeline import VERBS
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.sources import Sources, filled
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.store import TMP, Store, check_job
from qwlora.recipe import Adapter, Recipe, load_recipe
from qwlora.recipe.section import of_a_job
from qwlora.recipe.yaml_core import flow
from qwlora.system.atomic import write_text
from qwlora.system.progress import Track, untracked
from qwlora.system.seen import Seen
from qwlora.targets.proof.folder import PROOF_RECORD, current_proofs, renamed_proof
from qwlora.targets.proof.readme import write_readme
from qwlora.targets.registry import TARGETS

_SHOWN = 5  # differences of one stage in a message
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Judge:
    """Which stages of a plan are current in a store.

    Attributes:
        stale: why each stage that is not current has to run, in the order of the plan.
        changed: stages whose result will be another one, as far as that is known.
    """

    def __init__(self, plan: Sequence[Stage], store: Store):
        self.plan, self.store = plan, store
        self._stages = {stage.name: stage for stage in plan}
        self.again()

    def again(self) -> None:
        """Judge all stages, after something was made."""
        self.stale: dict[str, str] = {}
        self.changed: set[str] = set()
        for stage in self.plan:
            differ = self.differences(stage)
            waiting = [need for need in stage.needs.values() if need in self.stale]
            # A stage whose files were damaged should write the same again. `run` checks that
            # before it replaces an adapter.
            if differ or any(need in self.changed for need in waiting):
                self.changed.add(stage.name)
            if (reason := self._reason(stage, differ, waiting)) is not None:
                self.stale[stage.name] = reason

    def versions(self, stage: Stage) -> dict[str, str]:
        places = {name: self._stages[need].place for name, need in stage.needs.items()}
        return {name: self.store.version(place) for name, place in places.items()}

    def differences(self, stage: Stage) -> list[str]:
        """Which inputs of a stage are not those of the record at its place, old and new."""
        if (record := self.store.records.get(stage.place)) is None:
            return []
        lines = [*differences(record.inputs, filled(stage.inputs, record.inputs), stage.labels)]
        for name, version in self.versions(stage).items():
            need = stage.needs[name]
            if name not in record.needs:
                lines.append(f"{need} is new")
            elif record.needs[name] != version and self._stages[need].place in self.store.records:
                lines.append(f"{need} has changed")
        more = sorted(record.needs.keys() - stage.needs.keys())
        return [*lines, *(f"{name} is no longer used" for name in more)]

    def _reason(self, stage: Stage, differ: list[str], waiting: list[str]) -> str | None:
        store, place = self.store, stage.place
        if (record := store.records.get(place)) is None:
            return f"{place}: its record is damaged" if place in store.damaged else "has not run"
        if differ:
            more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
            return "; ".join(differ[:_SHOWN]) + more
        if (problem := store.problem(place)) is not None:
            return problem
        if waiting:
            return f"reads {', '.join(waiting)}"
        if record.failed:
            return "its check failed"
        if record.not_run and stage.missing() is None:
            return f"was not run yet ({record.not_run})"
        return None

    def counts(self, stage: Stage) -> bool:
        """Whether the results of a stage are of what is there: those of a failed check, too."""
        record = self.store.records.get(stage.place)
        is_current = stage.name not in self.stale
        return is_current or (record is not None and self.stale[stage.name] == "its check failed")

    def moves(self) -> dict[str, str]:
        """Where records of the plan are under another name: place before, place after."""
        records, located = self.store.records, dict[str, str]()  # stage: where its record is
        # Of two equal records, the one that is in its place stays there.
        for is_elsewhere in (False, True):
            for stage in self.plan:
                versions = {
                    name: records[located[need]].version
                    for name, need in stage.needs.items()
                    if need in located
                }
                if stage.name in located or len(versions) < len(stage.needs):
                    continue
                places = records.keys() - located.values() if is_elsewhere else {stage.place}
                same = [
                    place
                    for place, record in records.items()
                    if place in places
                    and (record.stage, record.needs) == (stage.kind, versions)
                    and filled(stage.inputs, record.inputs) == record.inputs
                ]
                if same:
                    located[stage.name] = stage.place if stage.place in same else same[0]
        moves = {place: self._stages[name].place for name, place in located.items()}
        moves = {old: new for old, new in moves.items() if old != new}
        # Nothing moves over a trained adapter that stays where it is: nobody asked to replace it.
        while stuck := [
            old
            for old, new in moves.items()
            if new not in moves and new in records and records[new].stage == "train"
        ]:
            for old in stuck:
                del moves[old]
        return moves


def differences(old: Any, new: Any, labels: Mapping[str, str], path: str = "") -> Iterator[str]:
    """`key: old value -> new value` for every input that differs. `labels` says where the beginning
    of a path is in the recipe."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), labels, f"{path}.{key}".strip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, labels, f"{path}.{number}")
    elif old != new:
        known = [start for start in labels if f"{path}.".startswith(f"{start}.")]
        start = max(known, key=len, default="")
        name = labels[start] + path.removeprefix(start) if known else path
        before, after = (_shown(value) for value in (old, new))
        # One digest covers all of these, so which of them differs is not known.
        is_text = name.endswith(("data.source", ".text", ".calibrate_on"))
        why = " (its content, split, columns, held_out, evaluation or seed)" if is_text else ""
        yield f"{name}{why}: {before} -> {after}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:8]
    text = flow(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def upstream(plan: Sequence[Stage], *stages: str) -> list[Stage]:
    """The `stages` and all they need, directly or indirectly, in the order of the plan."""
    names = set(stages)
    for stage in reversed(plan):
        if stage.name in names:
            names |= set(stage.needs.values())
    return [stage for stage in plan if stage.name in names]


class OpenJob:
    """An existing job, to look at: texts, the model and runtimes are not touched. `changes` to the
    recipe are as for `load_recipe`."""

    def __init__(
        self,
        folder: Path,
        changes: tuple[str, ...] = (),
        track: Track = untracked,
        device: str | None = None,
    ):
        check_job(folder)
        change = () if device is None else (f"device={device}",)
        self.folder, self.changes = folder, changes
        self.recipe = job_recipe(folder, (*changes, *change))
        self.store, self.track = Store(folder), track
        self.sources = sources_of(self.recipe, self.store, track, reads=False)

    @cached_property
    def judge(self) -> Judge:
        judge = Judge(make_plan(self.recipe, self.sources), self.store)
        if not self.changes and self.store.is_writable and needs_settling(judge):
            # Something was renamed in recipe.yaml, or a command was killed. Another process that
            # holds the lock does the same.
            try:
                with self.store.locked():
                    settle(self.store, self.recipe, self.track)
            except DirectoryError:
                self.store.reload()
            judge.again()
        self.store.seen.save()
        return judge

    def require(self, stage: str, what: str = "", whatever_inputs: bool = False) -> None:
        """Check that a stage of the plan, and all that it needs, is current; with `whatever_inputs`
        only that they ran and that their files are as they were."""
        needed, stale = upstream(self.judge.plan, stage), self.judge.stale
        stale = {s.name: stale[s.name] for s in needed if s.name in stale}
        if whatever_inputs:
            finished = [s for s in needed if s.place in self.store.records]
            problems = {s.name: self.store.problem(s.place) for s in finished}
            stale = {n: r for n, r in stale.items() if n not in problems}
            stale |= {name: problem for name, problem in problems.items() if problem is not None}
        if stale:
            raise missing_error(what or stage, stale, self.folder)


def sources_of(recipe: Recipe, store: Store, track: Track, reads: bool) -> Sources:
    """The sources of a job's recipe, some of which may be gone."""
    base = store.records.get("base")
    floats = None if base is None else bool(base.inputs.get("model", {}).get("holds_floats"))
    is_new = not store.records
    return Sources(recipe, store.seen, track, reads=reads, is_new=is_new, holds_floats=floats)


def needs_settling(judge: Judge) -> bool:
    """Whether a command was killed, or something has another name in the recipe now."""
    return (judge.store.path / TMP).is_dir() or bool(judge.moves())


def settle(store: Store, recipe: Recipe, track: Track = untracked) -> None:
    """Finish what a killed command began, and move what has another name now; under the lock."""
    plan = make_plan(recipe, sources_of(recipe, store, track, reads=False))
    was_killed = (store.path / TMP).is_dir()
    store.finish([stage.place for stage in plan])
    if store.records and (was_killed or Judge(plan, store).moves()):
        # Texts are read only here: two adapters may differ in nothing else.
        plan = make_plan(recipe, sources_of(recipe, store, track, reads=True))
        move(store, plan, Judge(plan, store).moves())
    write_bundle_readmes(store)


def move(store: Store, plan: Sequence[Stage], moves: Mapping[str, str]) -> None:
    """Move what has another name in `plan`; see `Store.move`."""
    by_place = {stage.place: stage for stage in plan}
    for old, new in moves.items():
        proof = store.path / old / PROOF_RECORD
        if proof.is_file():
            # A proof belongs to the name in it. A damaged one stays as it is, and runs again.
            with contextlib.suppress(SourceError):
                write_text(proof, renamed_proof(proof, str(by_place[new].adapter)))
                digest = Seen().content(proof) or ""
                store.change(old, files=store.records[old].files | {PROOF_RECORD: digest})
    store.move(moves)


def write_bundle_readmes(store: Store, targets: Iterable[str] = TARGETS) -> None:
    """Write README.md of the bundles again."""
    made = store.records
    trained = {place: record for place, record in made.items() if place.startswith("adapters/")}
    for target in targets:
        bundle = store.path / "export" / target
        if not TARGETS[target].has_base or not bundle.is_dir():
            continue
        chats = {
            name: bool(record.results.get("data", {}).get("chat_template"))
            for place, record in trained.items()
            if f"export/{target}/{(name := place.removeprefix('adapters/'))}" in made
        }
        proofs = current_proofs(bundle).items()
        checked = {name: p for name, p in proofs if f"export/{target}/proof/{name}" in made}
        write_readme(bundle, chats, checked)


def job_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of an existing job. Texts and a model that it names may be missing."""
    with of_a_job():
        return load_recipe(folder / "recipe.yaml", changes)


def adapter_named(recipe: Recipe, name: str, folder: Path) -> Adapter:
    """An adapter of the job in `folder`."""
    adapters = {adapter.name: adapter for adapter in recipe.adapters}
    if name not in adapters:
        similar = suggestion(name, list(adapters))
        raise DirectoryError(f"{str(folder)!r} has no adapter {name!r}{similar}")
    return adapters[name]


def check_needs(
    judge: Judge, waiting: Sequence[Stage], verbs: Collection[str], asked: Sequence[str]
) -> None:
    """Check that no stage in `waiting` needs others that are neither current nor requested. `asked`
    are arguments of the command that runs: the job or the recipe, and options."""
    needed = [s for s in upstream(judge.plan, *(s.name for s in waiting)) if s.verb not in verbs]
    if missing := {s.name: judge.stale[s.name] for s in needed if s.name in judge.stale}:
        what = " and ".join(dict.fromkeys(stage.verb for stage in waiting))
        raise missing_error(what, missing, judge.store.path, asked)


def missing_error(
    what: str, reasons: Mapping[str, str], folder: Path, asked: Sequence[str] = ()
) -> DirectoryError:
    """An error that names the stages that `what` needs, why each is stale, and the commands."""
    needed = {name.partition("/")[0] for name in reasons}
    commands = [command_line(v, *(asked or [str(folder)])) for v in VERBS if v in needed]
    return DirectoryError(
        f"{what} needs {', '.join(reasons)}, missing or out of date in {str(folder)!r}:\n"
        + "".join(f"  {name}: {reason}\n" for name, reason in reasons.items())
        + f"Run first: {' && '.join(commands)}"
    )


def command_line(verb: str, *arguments: object) -> str:
    """The command line that runs `verb`."""
    return shlex.join(["qwlora", verb, *map(str, arguments)])


def check_kept(judge: Judge, waiting: Collection[str], replace: Collection[str]) -> None:
    """Check that no stage in `waiting` replaces an adapter whose settings or base have changed,
    unless the adapter is named in `replace`."""
    store, changed = judge.store, dict[str, list[str]]()
    for stage in judge.plan:
        if stage.kind != "train" or stage.adapter in replace:
            continue
        # A changed base counts, too: an adapter cannot be used on another one.
        causes = [s for s in upstream(judge.plan, stage.name) if s.name in judge.changed]
        reasons = [line for s in causes for line in judge.differences(s)]
        if stage.place in store.damaged:
            causes = [stage]
            reasons = [f"{stage.place}/stage.json is damaged"]
        is_replaced = any(cause.name in waiting for cause in causes)
        if is_replaced and (store.path / stage.place).is_dir():
            changed[str(stage.adapter)] = reasons
    if changed:
        lines = dict.fromkeys(line for reasons in changed.values() for line in reasons)
        options = " ".join(f"--replace {name}" for name in changed)
        raise DirectoryError(
            f"{str(store.path)!r}: this run would train {', '.join(changed)} again, because "
            "settings or inputs changed:\n"
            + "".join(f"  {line}\n" for line in lines)
            + f"No adapter was changed. To train again, add {options} to the command; old adapters "
            "stay until the new ones are finished. To keep both, give the new adapter another name"
        )
