"""AIMET encodings files, versions 0.6.1, 1.0.0, 2.0.0 and 2.1.0. numpy, no torch.

    read_encodings(path)             strict; an error lists every problem
    write_encodings(file, path)      atomic
    convert(file, version)           lossless, or an error that lists what would be lost

`docs/encodings.md` shows the four versions next to each other. `grids.py`,
which needs torch, turns grids into entries and back.
"""

from __future__ import annotations

from qwlora.formats.aimet_encodings.encodings_file import convert as convert
from qwlora.formats.aimet_encodings.encodings_file import read_encodings as read_encodings
from qwlora.formats.aimet_encodings.encodings_file import write_encodings as write_encodings
from qwlora.formats.aimet_encodings.model import FLOAT_FORMATS as FLOAT_FORMATS
from qwlora.formats.aimet_encodings.model import VERSIONS as VERSIONS
from qwlora.formats.aimet_encodings.model import BlockOrder as BlockOrder
from qwlora.formats.aimet_encodings.model import EncodingsFile as EncodingsFile
from qwlora.formats.aimet_encodings.model import Entry as Entry
from qwlora.formats.aimet_encodings.model import FloatEncoding as FloatEncoding
from qwlora.formats.aimet_encodings.model import IntegerEncoding as IntegerEncoding
from qwlora.formats.aimet_encodings.model import LpbqEncoding as LpbqEncoding
