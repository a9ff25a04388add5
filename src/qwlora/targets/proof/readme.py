"""README.md of a bundle: what it is, how to run it, what was proven. It prints the checks of its
proofs, and judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwlora.errors import size
from qwlora.formats.model_card import escaped, is_users_card, marked
from qwlora.system.atomic import total_bytes, write_text
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.checks import shown
from qwlora.targets.proof.folder import MODEL_CLASS, README, TEXT, WITHOUT_CACHE

_AGAIN = "`qwlora verify .` runs the files on it again, on any machine that has the program."
_CONTENTS = {  # by `export.proof`
    "generated": "The figures were measured on held-out text. `proof/` contains none of it, only "
    f"text that the model generated. {_AGAIN}",
    "held_out": "The figures were measured on held-out text of the data. `proof/` contains this "
    f"text as token ids, which anyone can read. {_AGAIN}",
    "none": "The figures were measured on held-out text. `proof/` contains no text, so only the "
    "job can verify the files again.",
}


def usage(
    target: str, base: str, adapter: str | None, has_cache: bool = True, *more: str, kind: str = ""
) -> str:
    """How a program loads the files, in Markdown; empty if the target has no template in
    `targets/usage_templates`.

    Args:
        base: the folder of the base, or of all use cases.
        adapter, more: the folders of adapters; None: the base alone.
        kind: the base's class in transformers. Default: one that AutoModelForCausalLM loads.
    """
    # Model cards show it too, also of a run in which nothing changed: a template instead of a
    # method of the backend, which would import torch.
    environment = Environment(
        loader=PackageLoader("qwlora.targets", "usage_templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if (name := f"{target}.md") not in environment.list_templates():
        return ""
    # A bundle's record names the class, which must be no other code in the README.
    is_usual = kind.endswith("ForCausalLM") or not kind.isidentifier()
    values = {"base": base, "adapter": adapter, "has_cache": has_cache, "more": [*more]}
    values["model_class"] = "AutoModelForCausalLM" if is_usual else kind
    return environment.get_template(name).render(values).strip()


def facts(model: Any, source: str) -> dict[str, Any]:
    """What a README says about a packed base that was made from the model `source`."""
    from qwlora.formats.model_card import origin_of
    from qwlora.grid.scheme import short_name
    from qwlora.nn.packed_layer import packed_weights

    origin = origin_of(source)
    grids = Counter(short_name(layer.scheme) for layer in packed_weights(model).values())
    return {"model": origin.name, "license": origin.license, "grids": dict(grids)}


def write_readme(bundle: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write README.md from the records of all adapters, unless the user edited it."""
    if is_users_card(bundle / README):
        return
    # Without a record there is nothing to say.
    if not records:
        (bundle / README).unlink(missing_ok=True)
        return
    # All adapters have one base, of which any record says the same.
    names, record = sorted(records), next(iter(records.values()))
    has_cache, kind = WITHOUT_CACHE not in record, record.get(MODEL_CLASS, "")
    grids = ", ".join(f"{count} of {grid}" for grid, count in record["grids"].items())
    adapters = "one LoRA adapter" if len(names) == 1 else f"{len(names)} LoRA adapters"
    parts = [
        f"# {escaped(record['model'])} for {record['target']}",
        f"A quantized base model and {adapters} trained on exactly these integers. "
        f"Weights: {grids}. Fingerprint of the base: `{record['base_fingerprint'][:16]}`.",
        "## Run\n\nIn this folder:",
        usage(record["target"], BASE, names[0], has_cache, *names[1:], kind=kind),
    ]
    if not has_cache:
        why = "The files have no key-value cache, so every token runs the whole sequence"
        parts.append(f"{why}: {record[WITHOUT_CACHE]}")
    if activated := [name for name in names if records[name].get("alora_invocation_tokens")]:
        parts.append(
            f"Activated LoRA: {', '.join(activated)}. It acts from the last occurrence of its "
            "invocation in the text on; use a program that knows it, such as PEFT or llama-server."
        )
    sizes = {path: size(total_bytes((bundle / path).rglob("*"))) for path in (BASE, *names)}
    rows = [f"| `{p}/` | {'base' if p == BASE else 'adapter'} | {n} |" for p, n in sizes.items()]
    stated = record["license"]
    of_base = ", whose files do not state one" if stated is None else f": {escaped(stated)}"
    parts += [
        "\n".join(["| folder | what | size |", "|---|---|---|", *rows]),
        "## Proof\n\n" + "\n".join(proof_table(records)),
        *map(_CONTENTS.__getitem__, sorted({r[TEXT] for r in records.values()})),
        f"## License\n\nThat of the base model{of_base}.",
    ]
    write_text(bundle / README, marked("\n\n".join(parts)))


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
            if "trained_perplexity" in of:  # the runtime cannot compute without rounding
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
        notes.append(f"{name}: {verdict} on {record['machine']}, {clients}{cost}.{said}")
    return [*lines, "", *(f"- {note}" for note in notes)]
