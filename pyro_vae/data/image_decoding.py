"""Decode the images of a folder at one size: into memory, or into a file if they are large."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pyro_vae.data import disk
from pyro_vae.data.image_files import FORMATS, MOST_PIXELS, as_array, open_image, upright_size
from pyro_vae.data.sizes import require_memory
from pyro_vae.data.stores import require_space, stored
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.progress import bar

MOST_UNREADABLE = 0.05
"""The share of unreadable files above which a folder is refused; one file is always allowed."""

MOST_SCALES = 4
"""Sides that differ by a larger factor have no sensible default size."""

_FILE = "x.raw"

_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageOptions:
    """How images become arrays of one shape.

    Arguments:
        size: height and width; None for the size of most images, or the median size.
        color: whether images have three channels; None for yes if any image has color.
        crop: whether an image is scaled to cover the size and its center is kept. Otherwise, it is
            stretched.
    """

    size: tuple[int, int] | None = None
    color: bool | None = None
    crop: bool = True


class Decoded(NamedTuple):
    """The content of a folder; each image that is not listed as unreadable has a row."""

    x: np.ndarray
    """The images (n, channels, height, width), uint8."""
    unreadable: dict[str, str]
    """Why each unreadable file cannot be read."""
    sizes: list[list[int]]
    """The least and the greatest height and width of the files; empty without a readable file."""


class _Reader:
    """Reads the images of a folder; too many files that cannot be read end the reading."""

    def __init__(self, folder: Path, files: Sequence[str], options: ImageOptions) -> None:
        self.folder, self.files, self.options = folder, files, options
        self.most = max(1, int(MOST_UNREADABLE * len(files)))
        self.unreadable = dict[str, str]()
        self.sizes = dict[str, tuple[int, int]]()

    def measure(self) -> list[tuple[int, int]]:
        """The height and width of each readable image."""
        self._attempt("sizes of images", upright_size, self.sizes.__setitem__)
        return list(self.sizes.values())

    def decode(self, size: tuple[int, int], put: Callable[[np.ndarray], Any]) -> None:
        """Put the pixels of each readable image, at this size, into memory or a file."""

        def read(image: Any) -> tuple[tuple[int, int], np.ndarray]:
            color, crop = self.options.color is not False, self.options.crop
            return upright_size(image), as_array(image, size, color, crop)

        def use(file: str, found: tuple[tuple[int, int], np.ndarray]) -> None:
            self.sizes[file] = found[0]
            put(found[1])

        self._attempt("decoding images", read, use)

    def extremes(self) -> list[list[int]]:
        """The least and the greatest height and width; empty without a readable image."""
        used = np.array([size for file, size in self.sizes.items() if file not in self.unreadable])
        return [used.min(0).tolist(), used.max(0).tolist()] if len(used) else []

    def _attempt(
        self, title: str, read: Callable[[Any], _T], use: Callable[[str, _T], Any]
    ) -> None:
        """Read each readable image, and use what is found; show a bar after two seconds."""
        with bar(True, len(self.files), title, delay=2) as shown:
            for file in self.files:
                shown.update()
                if file in self.unreadable:
                    continue
                try:
                    found = open_image(self.folder / file, read)
                except Exception as error:  # the decoders of broken files raise anything
                    self._add(file, error)
                else:
                    use(file, found)

    def _add(self, file: str, error: Exception) -> None:
        from PIL import UnidentifiedImageError

        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"not a {', '.join(FORMATS)} file" if unknown else first_line(error)
        self.unreadable[file] = " ".join(reason.split())[:100]
        if len(self.unreadable) > self.most:
            few = ", ".join(f"{file} ({why})" for file, why in list(self.unreadable.items())[:3])
            raise UsageError(
                f"{self.folder}: at most {self.most} of {len(self.files)} images may be "
                f"unreadable, and these are more: {few}; remove or repair them"
            ) from error


def decoded(
    folder: Path, files: Sequence[str], options: ImageOptions, place: Path, key: Any
) -> Decoded:
    """Decode all images of a folder at one size.

    Arguments:
        place: the folder for images that need 1 GiB or more, which are not loaded.
        key: plain values that determine the decoded images.
    """
    reader = _Reader(folder, files, options)
    height, width = options.size or _usual_size(folder, reader.measure())
    if height * width > MOST_PIXELS:
        raise UsageError(
            f"must be smaller: {height} x {width} pixels are more than {MOST_PIXELS:,}",
            argument="image_size",
        )
    shape = (len(files), 1 if options.color is False else 3, height, width)
    if math.prod(shape) >= disk.LEAST_BYTES:
        return on_disk(place, stored(place, key, lambda part: _written(reader, shape, part)))
    require_memory(math.prod(shape), f"the images of {folder}")
    x, rows = np.empty(shape, np.uint8), count()
    reader.decode((height, width), lambda pixels: x.__setitem__(next(rows), pixels))
    x = x[: len(files) - len(reader.unreadable)]
    if options.color is None and not _has_color(x):
        x = np.ascontiguousarray(x[:, :1])
    return Decoded(x, reader.unreadable, reader.extremes())


def _written(reader: _Reader, shape: tuple[int, ...], part: Path) -> dict[str, Any]:
    """Write the decoded images into a folder, and return what `on_disk` needs to know."""
    require_space(part, math.prod(shape))
    with open(part / _FILE, "wb") as file:
        reader.decode(
            (shape[2], shape[3]), lambda pixels: file.write(np.ascontiguousarray(pixels).data)
        )
        file.flush()
        os.fsync(file.fileno())
    shape = (shape[0] - len(reader.unreadable), *shape[1:])
    if reader.options.color is None:
        shape = _without_color(part / _FILE, shape)
    return {"shape": shape, "unreadable": reader.unreadable, "sizes": reader.extremes()}


def on_disk(place: Path, about: dict[str, Any]) -> Decoded:
    """The decoded images of a file, which are mapped and not loaded."""
    shape = tuple(about["shape"])
    x = np.memmap(place / _FILE, np.uint8, "r", 0, shape)
    return Decoded(x, about["unreadable"], about["sizes"])


def _has_color(x: np.ndarray) -> bool:
    """Whether the channels of any image differ."""
    return any(bool((image != image[:1]).any()) for image in x)


def _without_color(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Keep one channel of the images of a file if they have no color, and return their shape."""
    if not shape[0]:
        return shape
    x = np.memmap(path, np.uint8, "r", 0, shape)
    if _has_color(x):
        return shape
    gray = path.with_suffix(".gray")
    with open(gray, "wb") as file:
        for image in x:
            file.write(np.ascontiguousarray(image[:1]).data)
        file.flush()
        os.fsync(file.fileno())
    del x
    os.replace(gray, path)
    return (shape[0], 1, *shape[2:])


def _usual_size(folder: Path, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of most images, or the median height and width."""
    if not sizes:
        return (1, 1)  # no image can be read; the decoding reports it
    (most, times), *_ = Counter(sizes).most_common(1)
    if 2 * times > len(sizes):
        return most
    low, high = np.min(sizes, 0), np.max(sizes, 0)
    if (high > MOST_SCALES * low).any():
        raise UsageError(
            f"is needed: the images of {folder} are from {low[0]} x {low[1]} to {high[0]} x "
            f"{high[1]} (height x width), too different for a default",
            argument="image_size",
        )
    height, width = np.median(sizes, 0)
    return int(height), int(width)
