"""Folders of images: decode them once, at one size, into a cache."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.disk import DiskArray, rows_of
from pyro_vae.data.image_decoding import Decoded, ImageOptions, decoded, on_disk
from pyro_vae.data.image_files import ENDINGS
from pyro_vae.data.split import Data, Split, shuffled, taken, three_ways
from pyro_vae.data.stores import known
from pyro_vae.data.temporary import flush_folder, sweep, temporary
from pyro_vae.errors import UsageError, warn

_SHOWN = 5

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The parts that sub-folders of these names hold."""

_VERSION = 1
"""A cache of another version is decoded again."""


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
    found = _cached(folder, files, options, cache)
    if found.unreadable:
        warn(_listing(folder, found.unreadable))
    kept = tuple(file for file in files if file not in found.unreadable)
    labels = None
    if classes:
        labels = torch.tensor([classes.index(file.split("/")[depth]) for file in kept])
    named = [parts[file.split("/")[0]] for file in kept] if parts else []
    if isinstance(found.x, np.memmap):
        data = _on_disk(name, folder, found.x, labels, named)
    else:
        whole = Split(torch.from_numpy(found.x), labels)
        if parts:
            data = _by_folder(name, folder, whole, named)
        else:
            data = three_ways(name, whole, "readable images")
    summary = _summary(found, options, others)
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
    return _in_three(name, folder, split)


def _in_three(name: str, folder: Path, split: dict[str, Split]) -> Data:
    """The three parts of the data; raise `UsageError` if one has no image."""
    for part in ("train", "validation", "test"):
        if part not in split or not len(split[part].x):
            raise UsageError(f"{folder} has too few readable {part} images")
    return Data(name, split["train"], split["validation"], split["test"])


def _on_disk(
    name: str, folder: Path, x: np.memmap, labels: Tensor | None, parts: Sequence[str]
) -> Data:
    """Large data in the parts of their folders, or 70 : 10 : 20; whole blocks are in one part."""
    split: dict[str, Split] = {}
    for part in sorted(set(parts)) or ["all"]:
        at = np.flatnonzero(np.array(parts) == part) if parts else np.arange(len(x))
        own: Any = x[at[0] : at[-1] + 1]  # the files of a sub-folder follow each other
        rows = torch.from_numpy(at)
        known = None if labels is None else labels[rows]
        # A part may be below the size from which arrays stay on disk.
        images: Any = rows_of(own) or torch.from_numpy(np.array(own))
        split[part] = Split(images, known, rows=rows)
    if not parts:
        cut = _cut(split["all"], (7, 1, 2), folder)
        split = dict(zip(("train", "validation", "test"), cut, strict=True))
    elif "validation" not in split and "train" in split:
        split["train"], split["validation"] = _cut(split["train"], (5, 1), folder)
    return _in_three(name, folder, split)


def _cut(whole: Split, shares: Sequence[int], folder: Path) -> list[Split]:
    """Cut images into parts of these shares: whole blocks of images on disk."""
    x: Any = whole.x
    if not isinstance(x, DiskArray):
        return shuffled(whole, shares)
    found = []
    for part in x.shared(shares, str(folder)):
        others = taken(whole._replace(x=cast(Any, None)), torch.from_numpy(part.numbers()))
        found.append(others._replace(x=cast(Any, part)))
    return found


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


def _cached(folder: Path, files: Sequence[str], options: ImageOptions, cache: Path) -> Decoded:
    """The decoded images, from the cache if nothing has changed."""
    key = _key(folder, files, options)
    words = os.fsencode(os.path.realpath(folder)) + str(options).encode()
    place = cache / "image-folders" / hashlib.sha256(words).hexdigest()[:16]
    path = place.with_suffix(".npz")
    if (found := _read(path, key)) is not None:
        return found
    if (about := known(place, key)) is not None:
        return on_disk(place, about)
    found = decoded(folder, files, options, place, key)
    if not isinstance(found.x, np.memmap):
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


def _read(path: Path, key: str) -> Decoded | None:
    """The content of a cache; None if it is missing, damaged, or has another key."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            about = json.loads(str(arrays["about"]))
            return Decoded(arrays["x"], about["unreadable"], about["sizes"])
    except Exception:  # a damaged archive may raise anything, and the images are still there
        return None


def _write(path: Path, key: str, found: Decoded) -> None:
    """Write a cache, which gets its name only when it is complete."""
    about = json.dumps({"unreadable": found.unreadable, "sizes": found.sizes})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with temporary(path) as (file, part):
            np.savez(file, key=np.array(key), about=np.array(about), x=found.x)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # Windows does not rename an open file
                file.close()
            os.replace(part, path)
        flush_folder(path.parent)
    except OSError as error:
        warn(f"the decoded images cannot be kept in {path.parent} ({error.strerror or error})")


def _listing(folder: Path, unreadable: dict[str, str]) -> str:
    """A few lines that name the files that are skipped."""
    what = "1 unreadable image" if len(unreadable) == 1 else f"{len(unreadable)} unreadable images"
    lines = [f"skipped {what} of {folder}:"]
    lines += [f"  {file}: {why}" for file, why in list(unreadable.items())[:_SHOWN]]
    more = len(unreadable) - _SHOWN
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def _summary(found: Decoded, options: ImageOptions, others: int) -> str:
    """What was done to the images, in one line."""
    n, channels, height, width = found.x.shape
    kind = "gray" if channels == 1 else "color"
    words = [f"{n} {kind} images of {height} x {width} (height x width)"]
    if found.sizes != [[height, width]] * 2:
        (low, narrow), (high, wide) = found.sizes
        how = "scaled and cropped" if options.crop else "stretched"
        words.append(f"{how}; the files have {low} x {narrow} to {high} x {wide}")
    if others:
        words.append(f"{others} other files ignored")
    return ", ".join(words)
