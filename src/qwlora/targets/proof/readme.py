"""README.md of a bundle: contents, how to run it, and the checks of its proofs as recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwlora.errors import size
from qwlora.formats import manifest
from qwlora.formats.model_card import escaped, is_users_card, marked
from qwlora.system.atomic import total_bytes, write_text
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.checks import shown
from qwlora.targets.proof.contents import RECORD
from qwlora.targets.proof.folder import MODEL_CLASS, README, TEXT, WITHOUT_CACHE

# By whether adapters were trained on conversations.
_PROMPTS = {True: "What can you help me with?", False: "Once upon a time"}


@cache
def _templates() -> Environment:
    # Model cards use them too, even in runs that skip all stages. Methods of the backends would
    # import torch, so these are templates.
    loader = PackageLoader("qwlora.targets", "usage_templates")
    made = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals |= {"escaped": escaped, "size": size, "shown": shown}
    made.filters["escaped"] = escaped
    return made


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
    # The class name comes from a bundle's record. It must not bring other code into the README.
    is_usual = kind.endswith("ForCausalLM") or not kind.isidentifier()
    values = {"base": base, "adapter": adapter, "has_cache": has_cache, "more": [*more]}
    values["model_class"] = "AutoModelForCausalLM" if is_usual else kind
    values |= {"is_chat": is_chat, "prompt": _PROMPTS[is_chat]}
    return _templates().get_template(name).render(values).strip()


def facts(model: Any, source: str) -> dict[str, Any]:
    """Entries of a base's record for README.md. `source`: the model that the base was made from."""
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
        chats: for each adapter in the bundle, whether its data were conversations.
        proofs: the records of the checked adapters.
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
        )
    )
    write_text(bundle / README, marked(text))


def proof_table(proofs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures of all adapters, in Markdown."""
    return _templates().get_template("proof.template").render(proofs=proofs).splitlines()
