"""Folders of images: decode them once, at one size, into a cache."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_vae.data.image_files import ENDINGS, FORMATS, as_array, open_image, upright_size
from pyro_vae.data.split import Data, Split, shuffled, taken, three_ways
from pyro_vae.data.temporary import flush_folder, sweep, temporary
from pyro_vae.errors import UsageError, first_line, warn
from pyro_vae.pairs.progress import bar

MOST_BYTES = 4 * 2**30
"""The decoded images must fit into this memory."""

MOST_UNREADABLE = 0.05
"""The share of unreadable files above which a folder is refused; one file is always allowed."""

MOST_SCALES = 4
"""Sides that differ by a larger factor have no sensible default size."""

_SHOWN = 5

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The parts that sub-folders of these names hold."""

_VERSION = 1
"""A cache of another version is decoded again."""


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


class _Decoded(NamedTuple):
    """The content of a folder; each image that is not listed as unreadable has a row."""

    x: np.ndarray
    """The images (n, channels, height, width), uint8."""
    unreadable: dict[str, str]
    """Why each unreadable file cannot be read."""
    sizes: list[list[int]]
    """The least and the greatest height and width of the files; empty without a readable file."""


def image_options(size: Any, color: bool | None, crop: bool) -> ImageOptions:
    """The options of a folder, from a size that is one number or height and width.

    Raises `UsageError` for a size that is not one or two positive whole numbers.

    >>> image_options(32, None, True).size
    (32, 32)
    """
    if size is None:
        return ImageOptions(None, color, crop)
    numbers = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers)
    if len(numbers) not in (1, 2) or not whole or min(numbers) < 1:
        got = " ".join(map(str, numbers)) or "no number"
        raise UsageError(
            f"must be one positive number, or height and width, got {got}", argument="image_size"
        )
    return ImageOptions((int(numbers[0]), int(numbers[-1])), color, crop)


def load_images(folder: Path, options: ImageOptions, cache: Path) -> Data:
    """The images of a folder, with the sub-folders as parts or labels; see `pyro_vae.load_data`.

    Arguments:
        cache: the folder for the decoded images.

    Raises `UsageError` for a folder without images, with too many files that cannot be read, with
    images beside sub-folders of images, or with images too large or too different in size.
    """
    name = Path(os.path.abspath(folder)).name or "images"
    files, others = _listed(folder)
    parts = _parts(folder, files)
    # Below the folders of parts, if there are any, sub-folders are labels.
    depth = 1 if parts else 0
    classes = _classes(folder, ["/".join(file.split("/")[depth:]) for file in files])
    decoded = _cached(folder, files, options, cache)
    if decoded.unreadable:
        warn(_listing(folder, decoded.unreadable))
    kept = tuple(file for file in files if file not in decoded.unreadable)
    labels = None
    if classes:
        labels = torch.tensor([classes.index(file.split("/")[depth]) for file in kept])
    whole = Split(torch.from_numpy(decoded.x), labels)
    if parts:
        data = _by_folder(name, folder, whole, [parts[file.split("/")[0]] for file in kept])
    else:
        data = three_ways(name, whole, "readable images")
    summary = _summary(decoded, options, others)
    return replace(data, files=kept, classes=classes, summary=summary)


def _parts(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The part of each sub-folder, if all sub-folders are named after parts; empty otherwise.

    If the folder has no test part, its validation part is the test part.
    """
    tops = sorted({file.split("/")[0] if "/" in file else "" for file in files})
    found = {top: PARTS[top.lower()] for top in tops if top.lower() in PARTS}
    if len(tops) < 2 or len(found) < len(tops):
        return {}
    if "test" not in found.values():
        found = {top: part.replace("validation", "test") for top, part in found.items()}
    twice = len(set(found.values())) < len(found)
    if twice or not {"train", "test"} <= set(found.values()):
        raise UsageError(
            f"{folder} has the sub-folders {', '.join(tops)}, which are parts and not labels: name "
            "one train, one test, and optionally one validation"
        )
    return found


def _by_folder(name: str, folder: Path, whole: Split, parts: Sequence[str]) -> Data:
    """The data in the parts of their folders; a sixth of the training images may validate."""
    whole = whole._replace(rows=torch.arange(len(whole.x)))
    split = {
        part: taken(whole, torch.tensor([i for i, own in enumerate(parts) if own == part]))
        for part in set(parts)
    }
    if "validation" not in split and "train" in split:
        split["train"], split["validation"] = shuffled(split["train"], (5, 1))
    for part in ("train", "validation", "test"):
        if part not in split or not len(split[part].x):
            raise UsageError(f"{folder} has too few readable {part} images")
    return Data(name, split["train"], split["validation"], split["test"])


def _listed(folder: Path) -> tuple[list[str], int]:
    """The image files below a folder as sorted relative paths, and the number of other files."""
    images, others, seen = [], 0, set()
    for place, inner, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(place)
        inner[:] = [] if real in seen else sorted(name for name in inner if name[0] != ".")
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            # A pipe would never end.
            if path.suffix.lower() in ENDINGS and path.is_file():
                images.append(path.relative_to(folder).as_posix())
            else:
                others += 1
    if not images:
        what = f"{others} files, none with such an ending" if others else "no files"
        raise UsageError(f"{folder} must hold images ({' '.join(ENDINGS)}); it has {what}")
    return sorted(images), others


def _cannot_list(error: OSError) -> None:
    raise UsageError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _classes(folder: Path, files: Iterable[str]) -> tuple[str, ...] | None:
    """The names of the sub-folders, sorted; None if they do not distinguish the images."""
    tops = sorted({file.split("/")[0] if "/" in file else "" for file in files})
    if "" in tops and len(tops) > 1:
        raise UsageError(
            f"{folder} has images beside sub-folders of images ({', '.join(tops[1:4])}): move them "
            "into sub-folders, which are labels, or pass a folder without sub-folders"
        )
    return tuple(tops) if len(tops) > 1 else None


def _cached(folder: Path, files: Sequence[str], options: ImageOptions, cache: Path) -> _Decoded:
    """The decoded images, from the cache if nothing has changed."""
    key = _key(folder, files, options)
    words = os.fsencode(os.path.realpath(folder)) + str(options).encode()
    place = hashlib.sha256(words).hexdigest()[:16]
    path = cache / "image-folders" / f"{place}.npz"
    found = _read(path, key)
    if found is None:
        found = _decode(folder, files, options)
        _write(path, key, found)
    return found


def _key(folder: Path, files: Iterable[str], options: ImageOptions) -> str:
    """A checksum of what determines the decoded images."""
    from PIL import __version__

    state = []
    for file in files:
        found = (folder / file).stat()
        state.append((file, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    words = json.dumps([_VERSION, __version__, asdict(options), state])
    return hashlib.sha256(words.encode()).hexdigest()


def _read(path: Path, key: str) -> _Decoded | None:
    """The content of a cache; None if it is missing, damaged, or has another key."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            about = json.loads(str(arrays["about"]))
            return _Decoded(arrays["x"], about["unreadable"], about["sizes"])
    except Exception:  # a damaged archive may raise anything, and the images are still there
        return None


def _write(path: Path, key: str, decoded: _Decoded) -> None:
    """Write a cache, which gets its name only when it is complete."""
    about = json.dumps({"unreadable": decoded.unreadable, "sizes": decoded.sizes})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with temporary(path) as (file, part):
            np.savez(file, key=np.array(key), about=np.array(about), x=decoded.x)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # Windows does not rename an open file
                file.close()
            os.replace(part, path)
        flush_folder(path.parent)
    except OSError as error:
        warn(f"the decoded images cannot be kept in {path.parent} ({error.strerror or error})")


class _Failures:
    """The files that cannot be read; too many of them end the reading."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder, self.files = folder, files
        self.most = max(1, int(MOST_UNREADABLE * len(files)))
        self.found: dict[str, str] = {}

    def attempt(self, title: str, read: Callable[[str, Any], None]) -> None:
        """Call ``read`` with each readable file and its image; show a bar after two seconds."""
        with bar(True, len(self.files), title, delay=2) as shown:
            for file in self.files:
                shown.update()
                if file in self.found:
                    continue
                try:
                    open_image(self.folder / file, partial(read, file))
                except Exception as error:  # the decoders of broken files raise anything
                    self._add(file, error)

    def _add(self, file: str, error: Exception) -> None:
        from PIL import UnidentifiedImageError

        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"not a {', '.join(FORMATS)} file" if unknown else first_line(error)
        self.found[file] = " ".join(reason.split())[:100]
        if len(self.found) > self.most:
            raise UsageError(
                f"{self.folder}: at most {self.most} of {len(self.files)} images may be "
                f"unreadable, and these are more: {_named(self.found)}; remove or repair them"
            ) from error


def _decode(folder: Path, files: Sequence[str], options: ImageOptions) -> _Decoded:
    """Decode all images of a folder at one size."""
    failures, sizes = _Failures(folder, files), {}
    if options.size is None:
        failures.attempt(
            "sizes of images",
            lambda file, image: sizes.update({file: upright_size(image)}),
        )
    size = options.size or _usual_size(folder, list(sizes.values()))
    channels = 1 if options.color is False else 3
    _require_memory(folder, len(files) * channels, size)
    x = np.empty((len(files), channels, *size), np.uint8)
    rows: list[int] = []

    def read(file: str, image: Any) -> None:
        sizes[file] = upright_size(image)
        x[len(rows)] = as_array(image, size, options.color is not False, options.crop)
        rows.append(len(rows))

    failures.attempt("decoding images", read)
    x = x[: len(rows)]
    if options.color is None and not _has_color(x):
        x = np.ascontiguousarray(x[:, :1])
    used = np.array([size for file, size in sizes.items() if file not in failures.found])
    extremes = [used.min(0).tolist(), used.max(0).tolist()] if len(used) else []
    return _Decoded(x, failures.found, extremes)


def _has_color(x: np.ndarray) -> bool:
    """Whether the channels of any image differ."""
    return any(bool((image != image[:1]).any()) for image in x)


def _usual_size(folder: Path, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of most images, or the median height and width."""
    if not sizes:
        return (1, 1)  # no image can be read; the decoding reports it
    (most, count), *_ = Counter(sizes).most_common(1)
    if 2 * count > len(sizes):
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


def _require_memory(folder: Path, planes: int, size: tuple[int, int]) -> None:
    needed = planes * size[0] * size[1]
    if needed > MOST_BYTES:
        raise UsageError(
            f"must be smaller: the images of {folder} at {size[0]} x {size[1]} need "
            f"{needed / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:.0f} GiB",
            argument="image_size",
        )


def _named(unreadable: dict[str, str]) -> str:
    return ", ".join(f"{file} ({why})" for file, why in list(unreadable.items())[:3])


def _listing(folder: Path, unreadable: dict[str, str]) -> str:
    """A few lines that name the files that are skipped."""
    what = "1 unreadable image" if len(unreadable) == 1 else f"{len(unreadable)} unreadable images"
    lines = [f"skipped {what} of {folder}:"]
    lines += [f"  {file}: {why}" for file, why in list(unreadable.items())[:_SHOWN]]
    more = len(unreadable) - _SHOWN
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def _summary(decoded: _Decoded, options: ImageOptions, others: int) -> str:
    """What was done to the images, in one line."""
    n, channels, height, width = decoded.x.shape
    kind = "gray" if channels == 1 else "color"
    words = [f"{n} {kind} images of {height} x {width} (height x width)"]
    if decoded.sizes != [[height, width]] * 2:
        (low, narrow), (high, wide) = decoded.sizes
        how = "scaled and cropped" if options.crop else "stretched"
        words.append(f"{how}; the files have {low} x {narrow} to {high} x {wide}")
    if others:
        words.append(f"{others} other files ignored")
    return ", ".join(words)
