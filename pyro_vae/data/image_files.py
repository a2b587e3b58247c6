"""Single images: open them safely, and make arrays of them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""The formats that Pillow may open. Others, such as EPS, would start another program."""

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

MOST_PIXELS = 80_000_000
"""An image with more pixels is skipped: a small file may claim to be huge."""


def open_image(path: Path, use: Callable[[Any], _T]) -> _T:
    """What a function finds in an image, which is upright but may not be decoded yet."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}"
                )
            return use(image)


def upright_size(image: Any) -> tuple[int, int]:
    """Height and width of an image after the rotation that its metadata ask for."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def as_array(image: Any, size: tuple[int, int], color: bool, crop: bool) -> np.ndarray:
    """An image as an array (channels, height, width), uint8, of this height and width."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    plain = _eight_bit(image).convert("RGB" if color else "L")
    height, width = size
    box = _center(plain.size, (width, height)) if crop else None
    # `box` cuts while it resizes, so that a very long image is never stored at a larger size.
    small = plain.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(small)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _center(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest central box of an image (width, height) with the shape of the target."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return max(left, 0), max(top, 0), min(left + width, size[0]), min(top + height, size[1])


def _eight_bit(image: Any) -> Any:
    """An image of 8 bits for each channel, on white where it is transparent.

    Raises `ValueError` for intensities that are floats or have more than 16 bits.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its intensities have more than 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its intensities are floats without a known range")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)
