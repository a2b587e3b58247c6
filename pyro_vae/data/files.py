"""Read data from files: .npy and .npz arrays, text and music."""

import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import disk
from pyro_vae.data.disk import DiskArray, rows_of
from pyro_vae.data.groups import in_groups
from pyro_vae.data.music import Piece, piano_rolls, read_pieces
from pyro_vae.data.sizes import require_memory
from pyro_vae.data.split import Data, Split, three_ways, with_validation
from pyro_vae.data.text import as_tokens, vocabulary_of
from pyro_vae.errors import UsageError, nearest
from pyro_vae.pairs.arrays import as_tensor


def load_music(path: Path) -> Data:
    """Music as piano rolls (n, steps, 88) with their lengths; see `pyro_vae.data.music`."""
    pieces = read_pieces(path)
    steps = max(len(piece) for part in pieces.values() for piece in part)
    splits = {name: Split(*_rolls(part, steps)) for name, part in pieces.items()}
    return Data(path.stem, splits["train"], splits["validation"], splits["test"])


def _rolls(pieces: Sequence[Piece], steps: int) -> tuple[Tensor, None, None, Tensor]:
    return piano_rolls(pieces, steps), None, None, torch.tensor([len(piece) for piece in pieces])


def load_text(name: str, lines: list[str], length: int, vocabulary: str | None) -> Data:
    """Lines of text as rows of tokens (n, width), with the vocabulary."""
    if length < 2:
        raise UsageError(f"must be at least 2, got {length}", argument="length")
    if vocabulary is None:
        vocabulary, length = vocabulary_of(lines), min(length, 1 + max(map(len, lines), default=0))
    # Lines that differ only beyond the cut would be the same row in several parts.
    lines = list(dict.fromkeys(line[:length] for line in lines))
    data = three_ways(name, Split(as_tokens(lines, vocabulary, length)))
    return replace(data, vocabulary=vocabulary)


# What torchvision raises for files that are missing, cut short or of another kind.
UNREADABLE = (
    *(RuntimeError, OSError, ValueError, EOFError),
    *(IndexError, KeyError, TypeError, AssertionError),
)


def load_file(path: Path, group: str | None = None) -> Data:
    """The arrays of a .npy or .npz file; see `pyro_vae.load_data` for their names."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix not in (".npy", ".npz"):
        raise UsageError(f"{path} must be a .npy, .npz, .txt or .json file")
    try:
        if group is None and (large := _on_disk(path)) is not None:
            return _in_blocks(path, large)
        with open(path, "rb") as file:
            _require_declared(file, path)
            loaded: Any = np.load(file, allow_pickle=False)
            plain = isinstance(loaded, np.ndarray)
            arrays = {"x": loaded} if plain else {key: loaded[key] for key in loaded.files}
    except UsageError:
        raise
    except (*UNREADABLE, *_DAMAGED) as error:
        raise UsageError(
            f"{path} is not a {path.suffix} file of plain arrays without pickles "
            f"({' '.join(str(error).split())[:90]})"
        ) from error
    if "x" in arrays:
        x = _images(arrays["x"], path, missing=True)
        rows = {"": _split(arrays, x, "", path)}
        if group is None:
            return three_ways(path.stem, rows[""])
        own = _ids(arrays, rows, group, path)
        found = three_ways(path.stem, in_groups(rows, own)[""], "groups")
        return replace(found, group_ids=own[""].tolist())
    if "x_train" not in arrays or "x_test" not in arrays:
        raise UsageError(
            f"{path} must hold the array 'x' (and optionally 'y'), or 'x_train' and 'x_test'; "
            f"it holds {', '.join(arrays) or 'no arrays'}"
        )
    splits = {}
    for key in ("train", "validation", "test"):
        if f"x_{key}" in arrays:
            x = _images(arrays[f"x_{key}"], path, missing=True)
            splits[key] = _split(arrays, x, f"_{key}", path)
            if x.shape[1:] != splits["train"].x.shape[1:]:
                raise UsageError(
                    f"{path}: the rows of x_{key} have shape {tuple(x.shape[1:])} but those of "
                    f"x_train have shape {tuple(splits['train'].x.shape[1:])}; they must match"
                )
            if _row(splits[key].context) != _row(splits["train"].context):
                raise UsageError(
                    f"{path}: the rows of context_{key} have shape {_row(splits[key].context)} but "
                    f"those of context_train have shape {_row(splits['train'].context)}; they must "
                    "match"
                )
    ids = None if group is None else _ids(arrays, splits, group, path)
    if ids is not None:
        splits = in_groups(splits, ids)
    if "validation" not in splits:
        splits["train"], splits["validation"] = with_validation(splits["train"])
    parts = (splits["train"], splits["validation"], splits["test"])
    return Data(path.stem, *parts, group_ids=None if ids is None else ids["train"].tolist())


def _on_disk(path: Path) -> DiskArray | None:
    """The rows or images of a large .npy file, which stay on disk; None for other files."""
    if path.suffix != ".npy" or path.stat().st_size < disk.LEAST_BYTES:
        return None
    with open(path, "rb") as file:
        _declared(file, path.stat().st_size, path)
    found = rows_of(np.load(path, mmap_mode="r", allow_pickle=False))
    if found is None:
        return None
    if not len(found):
        raise UsageError(f"{path} is empty: it holds an array of shape {tuple(found.shape)}")
    if len(found.row) == 1:
        return found
    if len(found.row) == 2:
        return replace(found, row=(1, *found.row))
    if len(found.row) == 3 and found.row[0] in (1, 3, 4):
        return found
    if len(found.row) == 3 and found.row[2] in (1, 3, 4):
        return replace(found, row=(found.row[2], *found.row[:2]), last=True)
    raise _odd_shape(path, found.shape)


def _in_blocks(path: Path, x: DiskArray) -> Data:
    """Split an array on disk 70 : 10 : 20 by its blocks, so that each part is read in blocks.

    Rows that follow each other stay together in one part, as far as blocks go.
    """
    parts = [Split(cast(Any, part)) for part in x.shared((7, 1, 2), str(path))]
    return Data(path.stem, parts[0], parts[1], parts[2])


_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, SyntaxError, TokenError, MemoryError)
"""What NumPy raises for damaged headers and archives."""


def declared_shape(path: Path) -> tuple[int, ...] | None:
    """The shape of the array, or of the array x or x_train, of a file; None if it has none."""
    if not path.is_file():  # to open a pipe would wait
        return None
    try:
        with open(path, "rb") as file:
            if path.suffix == ".npy":
                return _header(file)[0]
            with zipfile.ZipFile(file) as archive:
                names = [name for name in ("x.npy", "x_train.npy") if name in archive.namelist()]
                with archive.open(names[0]) as content:
                    return _header(content)[0]
    except (*UNREADABLE, *_DAMAGED, IndexError):  # `load_file` says what is wrong
        return None


def _require_declared(file: BinaryIO, path: Path) -> None:
    """Compare what the headers of a file declare with its size and the memory."""
    if path.suffix == ".npy" or not zipfile.is_zipfile(file):
        file.seek(0)
        require_memory(_declared(file, path.stat().st_size, path), str(path))
    else:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            require_memory(sum(member.file_size for member in members), f"{path}, unpacked,")
            for member in members:
                with archive.open(member) as content:
                    _declared(content, member.file_size, path)
    file.seek(0)


def _header(content: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type of an array, from the head of its file."""
    version = np.lib.format.read_magic(content)
    one = version == (1, 0)  # later versions differ only in the letters of names
    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    shape, _, kind = read(content)
    return shape, kind


def _declared(content: Any, size: int, path: Path) -> int:
    """The bytes that the header of an array declares, which the rest of its file must hold."""
    shape, kind = _header(content)
    need, held = math.prod(shape) * kind.itemsize, size - content.tell()
    if need > held and not kind.hasobject:  # NumPy rejects objects, which are pickles
        raise UsageError(
            f"{path} is cut short or damaged: its header declares {need} bytes of shape {shape}, "
            f"but the file holds {held}"
        )
    return need


def _ids(
    arrays: dict[str, np.ndarray], parts: Mapping[str, Split], group: str, path: Path
) -> dict[str, np.ndarray]:
    """The ids of the groups of the rows of each part."""
    names = {part: f"{group}_{part}" if part else group for part in parts}
    for name in names.values():
        if name not in arrays:
            raise UsageError(f"{path} has no array '{name}'; {nearest(name, arrays)}")
    return {part: arrays[name] for part, name in names.items()}


def _split(arrays: dict[str, np.ndarray], x: Tensor, suffix: str, path: Path) -> Split:
    """One part of the data: the rows x with their labels, context and lengths."""
    labels = read_labels(arrays.get(f"y{suffix}"), len(x), path)
    context = read_context(arrays, suffix, len(x), path)
    return Split(x, labels, context, read_lengths(arrays.get(f"lengths{suffix}"), x, path))


def read_lengths(array: np.ndarray | None, x: Tensor, path: Path) -> Tensor | None:
    """The number of steps of each row (n,)."""
    lengths = read_labels(array, len(x), path, "lengths")
    if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[-2]:
        raise UsageError(
            f"{path}: lengths must be from 1 to {x.shape[-2]}, got {int(lengths.min())} to "
            f"{int(lengths.max())}"
        )
    return lengths


def read_context(arrays: dict[str, np.ndarray], suffix: str, n: int, path: Path) -> Tensor | None:
    """The context of each row as floats, 8-bit intensities in [0, 1]."""
    array = arrays.get(f"context{suffix}")
    if array is None:
        return None
    context = _images(array[:, None] if array.ndim == 1 else array, path)
    if len(context) != n:
        raise UsageError(
            f"{path}: context{suffix} has {len(context)} rows but x{suffix} has {n}; they must "
            "match"
        )
    if context.dtype != torch.uint8:
        return context.float()
    # If all parts of the file have only 0 and 1, these are not intensities.
    parts = [part for name, part in arrays.items() if name.startswith("context")]
    greatest = max(int(part.max()) for part in parts if part.dtype == np.uint8)
    return context.float() / (255 if greatest > 1 else 1)


def _row(context: Tensor | None) -> tuple[int, ...] | None:
    return None if context is None else tuple(context.shape[1:])


def _images(array: np.ndarray, path: Path, missing: bool = False) -> Tensor:
    """Rows (n, d) as they are; images as (n, channels, height, width), one channel if gray."""
    x = as_tensor(array, str(path), missing=missing)
    require_observed_rows(x, path)
    if x.dim() == 2:
        return x
    if x.dim() == 3:
        return x[:, None]
    if x.dim() == 4 and x.shape[1] in (1, 3, 4):
        return x
    if x.dim() == 4 and x.shape[3] in (1, 3, 4):
        return x.permute(0, 3, 1, 2).contiguous()
    raise _odd_shape(path, x.shape)


def _odd_shape(path: Path, shape: Sequence[int]) -> UsageError:
    return UsageError(
        f"{path}: expected rows (n, d), gray images (n, height, width) or images (n, channels, "
        f"height, width), got an array of shape {tuple(shape)}"
    )


def require_observed_rows(x: Tensor, path: Path, start: int = 0) -> None:
    """Raise `UsageError` for a row whose entries are all missing; rows count from ``start``."""
    empty = x.reshape(len(x), -1).isnan().all(1)
    if bool(empty.any()):
        row = start + int(empty.int().argmax())
        raise UsageError(
            f"{path} holds values that are not finite (NaN) in all of row {row}: remove rows "
            "without an observed entry"
        )


def read_labels(
    array: np.ndarray | None, n: int, path: Path, what: str = "labels"
) -> Tensor | None:
    """Whole numbers from 0, one for each row (n,); ``what`` are these numbers."""
    if array is None:
        return None
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{path}: {what} must be whole numbers, got {array.dtype}")
    flat = array.reshape(-1)
    wrong = flat[(flat < 0) | (flat != np.floor(flat)) | (flat.astype(float) >= 2.0**63)]
    if len(wrong):
        raise UsageError(
            f"{path}: {what} must be whole numbers from 0 to {2**63 - 1}, got {wrong[0]}"
        )
    if len(flat) != n:
        raise UsageError(f"{path} has {len(flat)} {what} but {n} rows; they must match")
    return torch.from_numpy(flat.astype(np.int64))
