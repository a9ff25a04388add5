"""The `qairt_pipeline` target: step 1 of AIMET's QW-LoRA guide and PEFT directories, for the
pipeline of QAIRT (`LLMPipeline` of qairt-dev), which calibrates activations, splits and compiles.

    base/                      float32 checkpoint of transformers, every weight on its grid
        model.encodings        AIMET encodings of the weights, 1.0.0; `open_checkpoint` reads it
        model_torch.encodings  the same grids in 0.6.1, for `sim.load_encodings` of aimet-torch
    NAME/                      an adapter, as PEFT saves it
        qairt_recipe.yaml      a recipe of the pipeline, in which the adapter is a use case

    W = (codes + offset) scale, rounded to float32: float16 and bfloat16 hold few of these products

The pipeline names activations after a graph of its own: these have no encodings.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from qwlora.errors import VerificationError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.aimet_encodings import EncodingsFile, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.model_card import marked
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import Blocks, PerChannel
from qwlora.nn.packed_layer import PackedLinear
from qwlora.targets.canonical_adapter import PEFT_FILES, PEFT_FORM, CanonicalAdapter, write_peft
from qwlora.targets.proof.contents import MODEL_FILES, TOKENIZER, Contents
from qwlora.targets.target import ExportedBase
from qwlora.targets.weights import weights_folder as files
from qwlora.targets.weights.hf import Hf, TransformersRuntime

ENCODINGS = {"model.encodings": "1.0.0", "model_torch.encodings": "0.6.1"}
RECIPE = "qairt_recipe.yaml"
_TEMPLATES = resources.files("qwlora.targets.npu") / "qairt_templates"


class QairtPipeline(Hf):
    """A float checkpoint with encodings, and PEFT; transformers and PEFT run it."""

    contents = Contents(
        base=(*MODEL_FILES, *TOKENIZER, *ENCODINGS),
        adapter=(*PEFT_FILES, RECIPE),
        forms={"adapter_config.json": PEFT_FORM},
        settings=files.ROPE_FORM,
        scripts={RECIPE: f"npu/qairt_templates/{RECIPE}.template"},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        model, layers = exported.model, files.layers_to_write(exported.model)
        files.check_layers("qairt_pipeline", layers)
        tensors, changed, codes = dict[str, Tensor](), 0, 0
        for name, layer in layers.items():
            tensors[name] = values = layer.tensor.dequantize()
            # QAIRT's pipeline takes scales from the least and greatest weight, which gives the same
            # codes if one of them is an end of the grid. README.md counts those that differ.
            again = measure(values, layer.scheme).quantize(values)
            changed, codes = changed + int((again != layer.codes).sum()), codes + again.numel()
        for name, tensor in files.float_tensors(model).items():
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        # The pipeline pins transformers 4.57.1, which would read rope_parameters as nothing.
        changes = {"dtype": "float32", **files.rope_settings(model)}
        files.write_folder(exported, folder, tensors, changes)
        linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear)]
        excluded = tuple(path for path in linear if f"{path}.weight" not in layers)
        by = {"package": "qwlora", "version": version("qwlora"), "block_order": "channel"}
        for file, form in ENCODINGS.items():
            entries = (
                entry_of(name, _listed(layer.encoding, form), form, block_order="channel")
                for name, layer in layers.items()
            )
            content = EncodingsFile(form, (*entries,), frozenset(layers), excluded, producer=by)
            write_encodings(content, folder / file)
        text = (_TEMPLATES / "README.pipeline.md.template").read_text(encoding="utf-8")
        text = text.replace("@CHANGED@", f"{changed:,}").replace("@CODES@", f"{codes:,}")
        (folder / "README.md").write_text(marked(text))

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        # The pipeline reads r, lora_alpha and target_modules, no patterns, and finds modules by the
        # ends of their names, since it renames layers. So all modules have one rank, and layers
        # without an adapter have one of zeros. All adapters of a bundle have one shape.
        changed, factors = (*exported.factors, *exported.common), {**exported.factors}
        ends = {path.split(".")[-1] for path in changed}
        checkpoint = AimetCheckpoint(base, base / "model.encodings")
        for path, module in checkpoint.model.named_modules():
            if isinstance(module, nn.Linear) and path.split(".")[-1] in ends:
                empty = torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)
                factors.setdefault(path, empty)
        write_peft(replace(exported, factors=factors).padded(), folder, ends)
        bitwidths = [scheme.bitwidth for scheme, _ in checkpoint.schemes().values()]
        text = (_TEMPLATES / f"{RECIPE}.template").read_text(encoding="utf-8")
        common = max(bitwidths, key=bitwidths.count)
        (folder / RECIPE).write_text(text.replace("@BITWIDTH@", str(common)))

    def open(self, folder: Path, case: str) -> TransformersRuntime:
        integers = AimetCheckpoint(folder, folder / "model.encodings")
        floats, problems = FolderCheckpoint(folder), list[str]()
        for name in integers.schemes():
            stored = floats.read(name)
            assert isinstance(stored, Tensor), "a float checkpoint has floats"
            off = integers.read(name).dequantize() != stored
            if count := int(off.sum()):
                problems.append(f"{name}: {count:,} of {off.numel():,} values are off the grid")
        if problems:
            raise VerificationError(f"{folder}: the files contradict each other", problems)
        return super().open(folder, case)


def _listed(encoding: Encoding, form: str) -> Encoding:
    encoding = encoding.with_positive_scales()
    # aimet-torch loads the grids of blocks in 0.6.1 from one flat list.
    if form != "0.6.1" or not isinstance(encoding.scheme.granularity, Blocks):
        return encoding
    scheme = replace(encoding.scheme, granularity=PerChannel())
    return Encoding(scheme, encoding.scale.flatten(), encoding.offset.flatten())
