"""A safetensors file written one tensor at a time; the package would want all of them at once.

Source: https://github.com/huggingface/safetensors (the format: eight bytes of length, a JSON header
that says where each tensor is, the tensors).
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from swe_prune.errors import InputError
from swe_prune.interop.placing import Stored
from swe_prune.interop.safetensors_folder import DTYPES

_ALIGNED = 8  # the header's length, and so where the data begins, is a multiple of this


def write_weights(
    path: Path,
    tensors: Sequence[tuple[Stored, np.dtype]],
    values: Callable[[Stored], np.ndarray],
) -> None:
    """Writes a safetensors file.

    Args:
        path: of the file.
        tensors: what is to be in it, and of which dtype.
        values: gives the numbers of one of them; asked for each once, in their order.

    Raises:
        InputError: a dtype that checkpoints do not have.
    """
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one, dtype in tensors:
        if dtype.name not in names:
            raise InputError(
                f"{one.name!r} is {dtype.name}, which is not written; "
                f"convert the parameters to one of {', '.join(names)}"
            )
        start, end = end, end + math.prod(one.shape) * dtype.itemsize
        header[one.name] = {
            "dtype": names[dtype.name],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for one, dtype in tensors:
            array = np.ascontiguousarray(values(one), dtype.newbyteorder("<"))
            file.write(array.view(np.uint8).data if array.size else b"")
