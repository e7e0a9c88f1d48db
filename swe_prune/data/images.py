"""Images as Phi-3-vision reads them: crops of one size that cover the image, and a global view.

An image wider than high is scaled so that as many crops as allowed cover it, padded with white
above and below to whole crops, and normalized; a higher one is handled on its side. The global view
is the padded image at the size of one crop.

Source: https://huggingface.co/microsoft/Phi-3-vision-128k-instruct (image_processing_phi3_v.py).
"""

import functools
import io
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from swe_prune.config import VisionConfig
from swe_prune.errors import InputError, first_line
from swe_prune.runtime.packages import require

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""CLIP's mean and standard deviation of red, green and blue."""

WHITE = (255, 255, 255)
MOST_PIXELS = 2**26
"""Size of an image beyond which it is refused, before memory is taken for it."""


def open_image(source: bytes | str | Path, where: str) -> Any:
    """Returns an image of Pillow in RGB, upright and on white where it was transparent.

    Args:
        source: Encoded image, or the path of its file.
        where: Description of the image for error messages.

    Raises:
        InputError: If it cannot be decoded, has no pixels or too many, or is of no 8 or 16 bits.
    """
    Image, ImageOps = _pillow()
    try:
        with warnings.catch_warnings(), _opened(source, where) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(file)
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise _too_large(where)
            image.load()
            return _rgb(Image, ImageOps.exif_transpose(image), where)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(where) from None
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise InputError(
            f"{where} cannot be read as an image ({first_line(error)}); replace it, or leave it out"
        ) from None


def _opened(source: bytes | str | Path, where: str) -> Any:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not Path(source).exists():
        raise InputError(f"{where} does not exist; correct its path")
    if not Path(source).is_file():  # a pipe would never end
        raise InputError(f"{where} is not a regular file; give the path of an image file")
    return open(source, "rb")


def _too_large(where: str) -> InputError:
    return InputError(
        f"{where} has more than the {MOST_PIXELS:,} pixels that are allowed; scale it down"
    )


def _pillow() -> tuple[Any, Any]:
    require("PIL", "reading images", "images")
    from PIL import Image, ImageOps

    return Image, ImageOps


def _rgb(Image: Any, image: Any, where: str) -> Any:
    if image.mode.startswith("I"):  # 16 bits, of which an 8-bit image has the upper ones
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() >= 2**16):
            raise InputError(f"{where} has more than 16 bits a pixel; convert it to 8")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise InputError(f"{where} has floating-point pixels; convert it to 8 bits")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        on_white = Image.new("RGBA", image.size, (*WHITE, 255))
        return Image.alpha_composite(on_white, image).convert("RGB")
    return image.convert("RGB")


def grid_of(width: int, height: int, vision: VisionConfig) -> tuple[int, int]:
    """Returns the rows and columns of the crops that cover an image.

    >>> grid_of(600, 800, VisionConfig()), grid_of(1200, 400, VisionConfig(crops=4))
    ((4, 3), (1, 3))
    """
    _, new_height, scale = _scaled(width, height, vision)
    rows = -(-new_height // vision.image)
    return (scale, rows) if width < height else (rows, scale)


def _scaled(width: int, height: int, vision: VisionConfig) -> tuple[int, int, int]:
    """Returns the new width and height of an image laid on its side, and its crops in a row."""
    longer, shorter = max(width, height), min(width, height)
    ratio = longer / shorter
    scale = 1
    while (scale + 1) * np.ceil((scale + 1) / ratio) <= vision.crops:
        scale += 1
    new_width = scale * vision.image
    return new_width, int(new_width / ratio), scale


def check_size(width: int, height: int, vision: VisionConfig, where: str) -> None:
    """Raises InputError if an image is empty, or so thin that no row of pixels is left."""
    if min(width, height) < 1 or _scaled(width, height, vision)[1] < 1:
        raise InputError(
            f"{where} is of {width} x {height} pixels, too thin to be scaled; leave it out"
        )


def tiled(image: Any, vision: VisionConfig) -> UInt8[np.ndarray, "Y X 3"]:
    """Returns an image scaled and padded to whole crops.

    Args:
        image: Image of Pillow in RGB.
        vision: Sizes of a crop, and how many are allowed.
    """
    Image, _ = _pillow()
    on_side = image.width < image.height
    if on_side:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    new_width, new_height, _ = _scaled(image.width, image.height, vision)
    scaled = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    missing = -new_height % vision.image
    above = missing // 2
    padded = np.pad(scaled, ((above, missing - above), (0, 0), (0, 0)), constant_values=WHITE[0])
    return padded.swapaxes(0, 1) if on_side else padded


def crops_of(image: Any, vision: VisionConfig) -> Float[np.ndarray, "N Y X 3"]:
    """Returns the normalized crops of an image, its global view first, then row by row.

    Args:
        image: Image of Pillow in RGB.
        vision: Sizes of a crop, and how many are allowed.
    """
    pixels = (tiled(image, vision).astype(np.float32) / 255 - MEAN) / STD
    side = vision.image
    rows, columns = (length // side for length in pixels.shape[:2])
    down, across = (resizing(length, side) for length in pixels.shape[:2])
    whole = across @ np.tensordot(down, pixels, axes=1)
    own = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([whole[None], own])


@functools.lru_cache(maxsize=64)
def resizing(length: int, to: int) -> Float[np.ndarray, "{to} {length}"]:
    """Returns the matrix that resizes an axis as torch's bicubic does without antialiasing."""
    every = np.eye(length, dtype=np.float32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        resized = jax.image.resize(every, (to, length), "cubic-pytorch", antialias=False)
        return np.asarray(resized)
