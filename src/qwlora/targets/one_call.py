"""Export to a target in one call, and the proof of the result in one call.

    qwlora.export(simulation, "onnx_each", folder)     one adapter: all files are in `folder`
    qwlora.export(simulations, "onnx", folder)         of `simulate_adapters`
    qwlora.export(base, "hf", folder, adapters={"first": "adapters/first"})
    rows = qwlora.verify(folder, simulation, batches)

The last two exports are bundles: base/ and a folder for each adapter, which a runtime switches.
Targets qairt and qnn hold base and adapters together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.adapter.adapter_folder import check_loadable
from qwlora.adapter.attach import adapter_names, restored_adapters
from qwlora.adapter.padded_adapters import one_rank
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, SourceError, foreign_as, listed, suggestion
from qwlora.formats import manifest
from qwlora.graph.call_arguments import check_token_ids
from qwlora.nn.temporary import evaluation_mode
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import replacing_files
from qwlora.system.device import on_cpu
from qwlora.system.parameter_names import BASE, NAME_PATTERN
from qwlora.system.regular_files import is_inside
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.proof.checks import LIMITS, Check, Limits
from qwlora.targets.proof.compare import is_language_model
from qwlora.targets.proof.contents import RECORD
from qwlora.targets.proof.folder import ROUNDED, write_files, write_record
from qwlora.targets.proof.prove import LAYER_TOKENS, Expected, expected_of, prove
from qwlora.targets.refusals import Subject, refuse
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import NONE, ExportedBase, ExportedGraph, Layout, Target, size_problems


def export(
    made: Simulation | AdapterSimulations | PreTrainedModel,
    target: str,
    folder: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | Path | None = None,
    sample: Mapping[str, Tensor] | None = None,
    graphs: Sequence[int] = (128, 1),
    context: Sequence[int] = (1024,),
    layout: str | None = None,
    opset: int | None = None,
    embedding_bits: int | None = None,
) -> None:
    """Write the files of a target. They replace an earlier export of a single simulation.

    Args:
        made: the object to export. Targets onnx_each and aimet: a calibrated `Simulation`. Targets
            onnx, qairt and qnn: the calibrated result of `simulate_adapters`. All other targets:
            the frozen base without an adapter.
        target: a name that `export.targets` of a recipe can have.
        adapters: folders of trained adapters by name, for targets that take a base. `load_adapter`
            must accept each of them on this base. An adapter that PEFT saved does not record its
            base: it is accepted with a warning.
        tokenizer: saved next to the base, or in its file.
        gguf_file: the GGUF file that the base came from, if any. Target gguf copies the rest of it.
        sample: one batch of the model's inputs. Targets aimet and qairt store it as golden inputs;
            its shapes are those of files with fixed shapes. Target qnn needs these shapes, too,
            unless the model is a causal language model.
        graphs, context: for causal language models and targets aimet, qairt and qnn. `graphs`:
            new tokens in one call; `context`: past and new tokens together. Each pair has a graph.
            All share one copy of the weights, except in aimet, where each graph has a copy.
        layout: `genie`, for targets qairt and qnn: the layout and the configuration that Qualcomm's
            Genie needs. Requires a tokenizer.
        opset: ONNX opset for targets aimet and qairt, 17 to 23. Below 23, each RMSNorm becomes
            several primitive operators. Default: 23; 21 for aimet without a cache.
        embedding_bits: 8, 16 or 32, see `export.embedding_bits` of a recipe.

    Raises:
        ExportError: the target does not exist, does not take `made`, or has files that cannot
            hold it. Or `graphs`, `context` or `opset` is out of range. Or an adapter has the name
            of another adapter or file of the export.
        SourceError, FingerprintError: `load_adapter` refuses an adapter.
        CalibrationError: the base or an adapter has changed since it was simulated.
        MissingExtraError: a package that writes the files is missing.

    Warns:
        UnverifiedWarning: an adapter does not record its base.
    """
    known = _checked_target(target, graphs, context, opset, layout, embedding_bits)
    sources = {name: Path(path) for name, path in (adapters or {}).items()}
    bits = embedding_bits or known.embedding_bits[0]
    _check_made(known, target, made, sources)
    # Checked first, because capturing and translating a graph takes half a minute.
    known.require_packages(to_write=True)
    folder = Path(folder)
    # Adapters of the old base would stay next to the new one.
    if (known.has_base or known.has_cases) and (folder / BASE).exists():
        raise ExportError(f"{str(folder)!r} already has a base. Delete it, or use another folder")
    with on_cpu(*_modules(made)):
        file = None if gguf_file is None else Path(gguf_file)
        if isinstance(made, PreTrainedModel):
            subject = Subject(model=made, tokenizer=tokenizer, source=file)
            identity = check_loadable(made, sources.values(), "accept")
        else:
            # Its grids were measured with the weights of that time.
            made.check_unchanged()
            if isinstance(made, AdapterSimulations):
                made.check_switchable()
            first = made if isinstance(made, Simulation) else made[BASE]
            identity = first.origin.base_fingerprint
            model: Any = first.origin.model
            captured = first.captured
            is_text = captured.embeddings is None and is_language_model(captured.interface)
            subject = Subject(
                model=model,
                tokenizer=tokenizer,
                layout=layout,
                takes_tokens=is_text,
                graphs=[*product(graphs, context)],
            )
        refuse([target], subject, ExportError)

        def exported(simulation: Simulation) -> ExportedGraph:
            has_cache = known.cached_graphs and is_language_model(simulation.graph().interface)
            return ExportedGraph(
                simulation,
                {"qwlora.base_fingerprint": identity},
                sample or {},
                graphs=cache_sizes(graphs, context) if has_cache else (),
                opset=opset,
                layout=layout,
                tokenizer=tokenizer,
                embedding_bits=bits,
            )

        # Written last: a folder without its record is not opened, so a killed export is harmless.
        old = [f for f in manifest.listed_files(folder, RECORD) if is_inside(folder, f)]
        with replacing_files(folder, last=RECORD, obsolete=old) as scratch:
            parts: dict[str, Any] = {}
            if isinstance(made, Simulation):
                parts[""] = exported(made)
            elif isinstance(made, PreTrainedModel):
                parts[BASE] = ExportedBase(made, tokenizer, file, bits)
                read = {name: read_canonical(path) for name, path in sources.items()}
                if bits == 8 and known.rounds_adapters:
                    read = {name: adapter.rounded() for name, adapter in read.items()}
                ranks = [adapter.ranks for adapter in read.values()]
                common = one_rank(ranks) if known.has_one_shape and read else {}
                parts |= {name: replace(adapter, common=common) for name, adapter in read.items()}
            else:
                parts[BASE] = replace(exported(made[BASE]), updatable=made.base_activations)
                parts |= {name: exported(made[name]) for name in made if name != BASE}
            if known.has_cases:
                base = parts.pop(BASE)
                # The zero adapter is a use case, too: a runtime switches to it, not back to a base.
                known.backend.write_cases(base, {**parts, NONE: base}, scratch)
                if tokenizer is not None:
                    tokenizer.save_pretrained(scratch)
                write_record(scratch, target, identity, use_cases=[*parts, NONE])
                return
            for name, part in parts.items():
                (scratch / name).mkdir(exist_ok=True)
                of = scratch / BASE if known.has_base and name != BASE else None
                write_files(target, part, identity, scratch / name, of)


def _checked_target(
    target: str,
    graphs: Any,
    context: Any,
    opset: int | None,
    layout: Any,
    embedding_bits: int | None,
) -> Target:
    if target not in TARGETS:
        raise ExportError(f"there is no target {target!r}{suggestion(target, TARGETS)}")
    if problems := list(size_problems(graphs, context)):
        raise ExportError(f"graphs, context: {'; '.join(problems)}")
    known = TARGETS[target]
    choices: dict[str, Any] = {"opset": (opset, known.opsets)}
    choices |= {
        "layout": (layout, known.graph_layouts),
        "embedding_bits": (embedding_bits, known.embedding_bits),
    }
    for key, (asked, has) in choices.items():
        if asked not in (None, *has):
            problem = f"target {target} has no {key} {asked!r} (it has: {listed(has, 9)})"
            raise ExportError(f"{problem}. Leave it out")
    return known


def _check_made(known: Target, target: str, made: Any, adapters: Collection[str]) -> None:
    kind: type = PreTrainedModel
    wanted = "the frozen base, without an adapter"
    if known.is_simulated:
        kind, wanted = AdapterSimulations, "what simulate_adapters returns"
    if known.layout is Layout.EACH:
        kind, wanted = Simulation, "one simulation"
    if not isinstance(made, kind):
        raise ExportError(f"target {target} takes {wanted}, not {type(made).__name__}")
    if isinstance(made, PreTrainedModel) and (attached := adapter_names(made)):
        raise ExportError(
            f"the base has adapters: {listed(attached)}. Save them with qwlora.save_adapter, "
            "remove them with model.unload(), and pass their folders as adapters="
        )
    if adapters and known.is_simulated:
        raise ExportError(f"target {target} takes simulations, which hold adapters; omit adapters=")
    names = made.keys() - {BASE} if isinstance(made, AdapterSimulations) else set(adapters)
    # By default, file systems of macOS and Windows ignore case.
    lower = [*known.taken_names, *map(str.lower, names)]
    taken = {name for name in names if lower.count(name.lower()) > 1}
    if wrong := sorted(taken | {name for name in names if not re.fullmatch(NAME_PATTERN, name)}):
        raise ExportError(
            f"adapters cannot be called {listed(map(repr, wrong))}. Use letters, digits, - and _, "
            "and no name of another adapter or file of the export: "
            f"{listed(sorted(known.taken_names), 9)}"
        )


def _modules(made: Any) -> list[nn.Module]:
    return list(made.values()) if isinstance(made, AdapterSimulations) else [made]


def verify(
    folder: str | Path,
    made: Simulation | AdapterSimulations | PeftModel,
    batches: Collection[Mapping[str, Any]] | Int64[Tensor, "count tokens"],
    limits: Limits = LIMITS,
    layer_tokens: int = LAYER_TOKENS,
) -> list[Check]:
    """Run the files of `export` in their runtime, and compare them with the model or simulation
    that was exported.

    Compares logits and perplexity of language models, all outputs of other models, and every layer
    whose value the runtime returns. Adapters that are not in the folder are skipped.

    Args:
        folder: the folder that `export` wrote.
        made: the exported simulations; or a model with the adapters, if the target took a base.
        batches: token ids [sequences, tokens], or arguments of the model by name; all tokens count.
        layer_tokens: number of tokens for the comparison layer by layer.

    Returns:
        One `Check` per row of the comparison. The files are correct if every check passed.

    Raises:
        SourceError: the folder has no files of `export`, or no adapter of `made`; or
            `batches` are not token ids of one length, where they have to be.
        MissingExtraError: the runtime is not installed.
        VerificationError, ExportError: the files contradict each other, or the runtime refuses
            them.
    """
    folder = Path(folder)
    record = manifest.read(folder / RECORD) or manifest.read(folder / BASE / RECORD)
    if not record:
        raise SourceError(f"{str(folder)!r} has no {RECORD}; write it with qwlora.export")
    if (name := str(record.get("target"))) not in TARGETS:
        raise SourceError(f"{str(folder)!r} is for target {name!r}, which is unknown; export again")
    target, rows = TARGETS[name], list[Check]()
    target.require_packages()
    with on_cpu(*_modules(made)):
        expected = _expected(target, folder, made, batches, layer_tokens)
        for adapter, of_adapter in expected.items():
            parity = prove(target, folder, adapter, of_adapter, limits)
            named = f"{adapter}: " if adapter else ""
            rows += [replace(row, what=f"{named}{row.what}") for row in parity.checks]
    if not rows:
        names: Any = made.peft_config if isinstance(made, PeftModel) else made
        known = listed(names)
        raise SourceError(f"{str(folder)!r} has no adapter {known}; give them the folder's names")
    return rows


def _expected(
    target: Target, folder: Path, made: Any, batches: Any, layer_tokens: int
) -> dict[str, Expected]:
    expected = dict[str, Expected]()
    if isinstance(made, PeftModel):
        text = as_sequences(_ids(batches))
        rounding = manifest.read(folder / BASE / RECORD).get(ROUNDED, ())
        check_token_ids({"input_ids": text.input_ids}, made, SourceError)
        # Dropout would make the files look wrong. The caller's mode and adapter come back.
        with evaluation_mode(made), restored_adapters(made):
            made.base_model.enable_adapter_layers()
            for name in filter(lambda name: (folder / name).is_dir(), made.peft_config):
                made.set_adapter(name)
                expected[name] = expected_of(target, made, [text], rounding=rounding)
        return expected
    # The files of a single simulation are in `folder` itself: "" for `Target.open`.
    for name, simulation in (made if isinstance(made, AdapterSimulations) else {"": made}).items():
        if name == BASE or not (target.has_cases or (folder / name).is_dir()):
            continue
        if is_language_model(simulation.graph().interface):
            # No reference of the base, for which `prove` decodes: BERT has logits, too, but cannot.
            text, schemes = as_sequences(_ids(batches)), simulation.origin.schemes
            expected[name] = expected_of(target, simulation, [text], schemes, None, layer_tokens)
        else:
            expected[name] = Expected([], simulation, list(batches))
    return expected


def _ids(batches: Any) -> Tensor:
    with foreign_as(SourceError, "batches are not token ids [count, tokens] of one length"):
        ids = [batches] if isinstance(batches, Tensor) else [b["input_ids"] for b in batches]
        return torch.cat(ids).cpu()
