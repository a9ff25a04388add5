"""README.md of a bundle: what it is, how to run it, what was proven. It prints the checks of its
proofs, and judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwlora.errors import size
from qwlora.formats import manifest
from qwlora.formats.model_card import escaped, is_users_card, marked
from qwlora.system.atomic import total_bytes, write_text
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.checks import shown
from qwlora.targets.proof.folder import MODEL_CLASS, README, RECORD, ROUNDED, TEXT, WITHOUT_CACHE

# By whether adapters were trained on conversations.
_PROMPTS = {True: "What can you help me with?", False: "Once upon a time"}


@cache
def _templates() -> Environment:
    # Model cards show them too, also of a run in which nothing changed: templates instead of
    # methods of the backends, which would import torch.
    loader = PackageLoader("qwlora.targets", "usage_templates")
    return Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def usage(
    target: str,
    base: str,
    adapter: str | None,
    has_cache: bool = True,
    *more: str,
    kind: str = "",
    is_chat: bool = False,
) -> str:
    """How a program loads the files, in Markdown; empty if the target has no template in
    `targets/usage_templates`.

    Args:
        base: the folder of the base, or of all use cases.
        adapter, more: the folders of adapters; None: the base alone.
        kind: the base's class in transformers. Default: one that AutoModelForCausalLM loads.
        is_chat: whether the adapters' data were rendered with the chat template.
    """
    if (name := f"{target}.md") not in _templates().list_templates():
        return ""
    # A bundle's record names the class, which must be no other code in the README.
    is_usual = kind.endswith("ForCausalLM") or not kind.isidentifier()
    values = {"base": base, "adapter": adapter, "has_cache": has_cache, "more": [*more]}
    values["model_class"] = "AutoModelForCausalLM" if is_usual else kind
    values |= {"is_chat": is_chat, "prompt": _PROMPTS[is_chat]}
    return _templates().get_template(name).render(values).strip()


def facts(model: Any, source: str) -> dict[str, Any]:
    """What a base's record says about it for README.md; it was made from the model `source`."""
    from qwlora.formats.model_card import origin_of
    from qwlora.grid.scheme import short_name
    from qwlora.nn.packed_layer import packed_weights

    origin = origin_of(source)
    grids = Counter(short_name(layer.scheme) for layer in packed_weights(model).values())
    return {"model": origin.name, "license": origin.license, "grids": dict(grids)}


def write_readme(
    bundle: Path, chats: Mapping[str, bool], proofs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write README.md, unless the user edited it.

    Args:
        chats: the adapters that are there, and whether their data were conversations.
        proofs: the records of those that were checked.
    """
    if is_users_card(bundle / README):
        return
    record, names = manifest.read(bundle / BASE / RECORD), sorted(chats)
    if not names or "grids" not in record:
        (bundle / README).unlink(missing_ok=True)
        return
    load = partial(usage, record["target"], BASE, kind=record.get(MODEL_CLASS, ""))
    kinds = filter(None, ([n for n in names if chats[n] == is_chat] for is_chat in (False, True)))
    has_cache = WITHOUT_CACHE not in record
    text = (
        _templates()
        .get_template("README.md.template")
        .render(
            record=record,
            chats=chats,
            groups=[(k, load(k[0], has_cache, *k[1:], is_chat=chats[k[0]])) for k in kinds],
            sizes={path: size(total_bytes((bundle / path).rglob("*"))) for path in (BASE, *names)},
            proofs=proofs,
            table="\n".join(proof_table(proofs)),
            texts=sorted({proof[TEXT] for proof in proofs.values()}),
            escaped=escaped,
        )
    )
    write_text(bundle / README, marked(text))


def proof_table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures of all adapters, in Markdown."""
    lines = [
        "Each file was run in the program and compared with the model that it was made from: the "
        "trained one, or its simulation where activations are on grids. `none` is the base: with "
        "fewer tokens than an adapter's, its perplexity says nothing of what the adapter gains.",
        "",
        "| adapter | settings | tokens | perplexity, expected and here | KL | same likeliest token "
        "| log-probability off by, at most | tokens per second, prompt and new | switch |",
        f"|{'---|' * 9}",
    ]
    notes = []
    for name, record in records.items():
        if "not_run" in record:
            notes.append(f"{name}: written, not run. {escaped(record['not_run'])}")
            continue
        for settings, state in product(("exact", "shipped"), ("base", "adapter")):
            if (of := (run := record["figures"].get(settings, {})).get(state)) is None:
                continue
            is_adapter, speeds = state == "adapter", " | "
            expected = shown(of, "reference_perplexity", ".3f")
            if "trained_perplexity" in of:  # the files or the runtime round
                expected += f" ({shown(of, 'trained_perplexity', '.3f')} without rounding)"
            if is_adapter and "switch_seconds" in run:
                speeds = (
                    f"{run['prefill_tokens_per_second']:.0f}, "
                    f"{run['decode_tokens_per_second']:.1f} | {1000 * run['switch_seconds']:.2g} ms"
                )
            lines.append(
                f"| {name if is_adapter else 'none'} | {settings} | {of['tokens']:,} | "
                f"{expected}, {shown(of, 'perplexity', '.3f')} | "
                f"{shown(of, 'kl_divergence', '.2g')} | {of['top1_agreement']:.2%} | "
                f"{shown(of, 'max_log_prob_difference', '.2g')} | {speeds} |"
            )
        clients = ", ".join(f"{n} {v}" for n, v in record["client"].items())
        memory, load = (record["figures"].get(k) for k in ("peak_memory_bytes", "load_seconds"))
        cost = "" if load is None else f"; {size(memory)} of memory, loaded in {load:.2g} s"
        failed = "; ".join(["FAILED", *map(escaped, record["problems"])])
        verdict = failed if record["problems"] else "passed"
        said = "".join(f" But {escaped(note)}." for note in record.get("notes", ()))
        if rounds := ", ".join(map(escaped, record.get(ROUNDED, ()))):
            said += f" Rounded in the files, and in what they are compared with: {rounds}."
        notes.append(f"{name}: {verdict} on {record['machine']}, {clients}{cost}.{said}")
    return [*lines, "", *(f"- {note}" for note in notes)]
