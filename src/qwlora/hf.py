"""`import qwlora.hf`: transformers' `from_pretrained` loads QWLoRA bases in this process.

For programs that only use transformers and PEFT. `qwlora.load_base` and `save_base` do the same.
"""

from __future__ import annotations

from qwlora.formats.base_folder import register_with_transformers

register_with_transformers()
