"""A simulation on disk: every encoding, and why each value has or has not got one.

    simulation/NAME/encodings.safetensors     NAME.scale (float32) and NAME.offset (int32; float offsets: NAME.minimum, float32) of each encoding
    simulation/NAME/simulation.json           the grids, the placement with its reasons

The graph itself is not stored: it is captured again from base and adapter in seconds, and is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.scheme import Scheme
from qwlora.simulation.place import Placed
from qwlora.simulation.simulation import Simulation

FORMAT = 1


def save_simulation(simulation: Simulation, folder: Path) -> None:
    """Write the encodings and the placement into `folder`."""
    save_encodings(simulation.encodings, folder, simulation.explanation)


def save_encodings(encodings: Mapping[str, Encoding | FloatOffsetEncoding], folder: Path, explanation: Sequence[Placed] = ()) -> None:
    """Write encodings into `folder`, with a placement if they have one."""
    tensors = {f"{name}.{part}": getattr(e, part).clone().contiguous() for name, e in encodings.items() for part in ("scale", _zero(e.scheme))}
    save_file(tensors, folder / "encodings.safetensors")
    schemes = {name: encoding.scheme.to_json() for name, encoding in encodings.items()}
    record = {"format": FORMAT, "schemes": schemes, "placement": [asdict(p) for p in explanation]}
    (folder / "simulation.json").write_text(json.dumps(record, indent=1) + "\n")


def load_encodings(folder: Path) -> Mapping[str, Encoding | FloatOffsetEncoding]:
    """The encodings that `save_simulation` wrote.

    Raises:
        CalibrationError: the folder does not hold them.
    """
    try:
        record = json.loads((folder / "simulation.json").read_text())
        tensors = load_file(folder / "encodings.safetensors")
        schemes = {name: Scheme.from_json(scheme) for name, scheme in record["schemes"].items()}
        return {
            name: (FloatOffsetEncoding if scheme.float_offset else Encoding)(scheme, tensors[f"{name}.scale"], tensors[f"{name}.{_zero(scheme)}"])
            for name, scheme in schemes.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{str(folder)!r} holds no simulation that can be read ({error}); calibrate again") from error


def _zero(scheme: Scheme) -> str:
    """The part of an encoding that says where zero is."""
    return "minimum" if scheme.float_offset else "offset"
