"""Mask files: safetensors with one bit per weight.

Each mask is flattened, packed with eight weights per byte, the first in the highest bit
(`numpy.packbits`), and stored as uint8 under the name of the parameter. The metadata in the header
contains the shapes, the names of the dense parameters, and a CRC-32 of the shapes' text and the
stored bytes in the order of the names.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, reading
from swe_prune.interop.optional import require
from swe_prune.interop.safetensors_header import read_header
from swe_prune.interop.stranger_files import check_file, inside, parse_json
from swe_prune.masks.fitting import check_mask
from swe_prune.runtime import storage

FILE = "masks.safetensors"
FORMAT = "swe_prune.masks.1"


def write_masks(path: Path, mask: PyTree) -> None:
    """Writes masks to a file.

    Args:
        path: Path of the file.
        mask: Bool pytree of nested dicts, None where dense.

    Raises:
        InputError: If a leaf is neither a bool array nor None.
    """
    check_mask(mask)
    safetensors = require("safetensors.numpy", "writing masks")
    shapes, packed = {}, {}
    for name, leaf in tree.named_leaves(mask):
        shapes[name] = None if leaf is None else list(leaf.shape)
        if leaf is not None:
            packed[name] = np.packbits(np.asarray(leaf, bool))
    # Written here, since the package makes a file that only its owner may read.
    about = {"format": FORMAT, "shapes": json.dumps(shapes)}
    about["checksum"] = str(storage.checksum_of(packed, about["shapes"]))
    path.write_bytes(safetensors.save(packed, about))


@checked
def read_masks(path: str | Path) -> dict[str, Any]:
    """Returns the bool pytree of a mask file, None where dense.

    Args:
        path: Path of the file, or of an exported folder that contains it.

    Raises:
        InputError: If the file does not exist, is of another kind, or is damaged.
    """
    path = Path(path)
    path = inside(path, FILE, None) if path.is_dir() else check_file(path, None)
    safetensors = require("safetensors", "reading masks")
    leaves, stored = {}, {}
    read_header(path)  # finds what the package takes memory for
    with (
        reading(path, "export it again"),
        safetensors.safe_open(path, framework="numpy") as file,
    ):
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is not a {FORMAT} mask file; give an exported {FILE}")
        for name, shape in parse_json(metadata["shapes"], path).items():
            leaves[name] = None
            if shape is not None:
                stored[name] = file.get_tensor(name)
                leaves[name] = _bits(stored[name], shape)
    found = str(storage.checksum_of(stored, metadata["shapes"]))
    if metadata.get("checksum", found) != found:
        raise InputError(
            f"{path} is damaged: it was changed after it was written; export the model again"
        )
    try:
        return tree.nested(leaves)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; export it again") from None


def _bits(packed: np.ndarray, shape: list[int]) -> Any:
    size = math.prod(shape)
    if not all(type(one) is int and one >= 0 for one in shape):
        raise ValueError(f"{shape!r} is not a shape")
    if packed.size != -(-size // 8):
        raise ValueError(f"{packed.size} bytes for {size} weights")
    return jnp.asarray(np.unpackbits(packed, count=size).reshape(shape).astype(bool))
