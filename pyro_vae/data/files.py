"""Data from files: .npy and .npz arrays, text and music."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.music import Piece, piano_rolls, read_pieces
from pyro_vae.data.split import Data, Split, shuffled, three_ways
from pyro_vae.data.text import as_tokens, vocabulary_of
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor


def load_music(path: Path) -> Data:
    pieces = read_pieces(path)
    steps = max(len(piece) for part in pieces.values() for piece in part)
    splits = {name: Split(*_rolls(part, steps)) for name, part in pieces.items()}
    return Data(path.stem, splits["train"], splits["validation"], splits["test"])


def _rolls(pieces: Sequence[Piece], steps: int) -> tuple[Tensor, None, None, Tensor]:
    return piano_rolls(pieces, steps), None, None, torch.tensor([len(piece) for piece in pieces])


def load_text(name: str, lines: list[str], length: int, vocabulary: str | None) -> Data:
    if length < 2:
        raise UsageError(f"length must be 2 or more, {length} came")
    if vocabulary is None:
        vocabulary, length = vocabulary_of(lines), min(length, 1 + max(map(len, lines), default=0))
    data = three_ways(name, Split(as_tokens(lines, vocabulary, length)))
    return replace(data, vocabulary=vocabulary)


# What torchvision raises where files are absent, cut short, or of something else.
UNREADABLE = (
    *(RuntimeError, OSError, ValueError, EOFError),
    *(IndexError, KeyError, TypeError, AssertionError),
)


def load_file(path: Path) -> Data:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix not in (".npy", ".npz"):
        raise UsageError(f"{path}: a .npy, .npz, .txt or .json file is expected")
    try:
        with open(path, "rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            plain = isinstance(loaded, np.ndarray)
            arrays = {"x": loaded} if plain else {key: loaded[key] for key in loaded.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path} is no {path.suffix} file of plain arrays without pickles "
            f"({' '.join(str(error).split())[:90]})"
        ) from error
    if "x" in arrays:
        x = _images(arrays["x"], path)
        return three_ways(path.stem, _split(arrays, x, "", path))
    if "x_train" not in arrays or "x_test" not in arrays:
        raise UsageError(
            f"{path}: arrays 'x' (and 'y'), or 'x_train' and 'x_test', are expected; it holds "
            f"{', '.join(arrays) or 'none'}"
        )
    splits = {}
    for key in ("train", "validation", "test"):
        if f"x_{key}" in arrays:
            x = _images(arrays[f"x_{key}"], path)
            splits[key] = _split(arrays, x, f"_{key}", path)
            if x.shape[1:] != splits["train"].x.shape[1:]:
                raise UsageError(
                    f"{path}: x_{key} has rows of shape {tuple(x.shape[1:])}, x_train of shape "
                    f"{tuple(splits['train'].x.shape[1:])}: they must agree"
                )
            if _row(splits[key].context) != _row(splits["train"].context):
                raise UsageError(
                    f"{path}: context_{key} has rows of shape {_row(splits[key].context)}, "
                    f"context_train of shape {_row(splits['train'].context)}: they must agree"
                )
    if "validation" not in splits:
        splits["train"], splits["validation"] = shuffled(splits["train"], (5, 1))
    return Data(path.stem, splits["train"], splits["validation"], splits["test"])


def _split(arrays: dict[str, np.ndarray], x: Tensor, suffix: str, path: Path) -> Split:
    """Rows with the labels and the context that a file holds for them."""
    labels = read_labels(arrays.get(f"y{suffix}"), len(x), path)
    context = read_context(arrays, suffix, len(x), path)
    return Split(x, labels, context, read_lengths(arrays.get(f"lengths{suffix}"), x, path))


def read_lengths(array: np.ndarray | None, x: Tensor, path: Path) -> Tensor | None:
    lengths = read_labels(array, len(x), path)  # whole numbers of 0 or more, as labels are
    if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[-2]:
        raise UsageError(
            f"{path}: lengths must be 1 to {x.shape[-2]}, {int(lengths.min())} to "
            f"{int(lengths.max())} came"
        )
    return lengths


def read_context(arrays: dict[str, np.ndarray], suffix: str, n: int, path: Path) -> Tensor | None:
    array = arrays.get(f"context{suffix}")
    if array is None:
        return None
    context = _images(array[:, None] if array.ndim == 1 else array, path)
    if len(context) != n:
        raise UsageError(f"{path}: {len(context)} rows of context came for {n} rows")
    if context.dtype != torch.uint8:
        return context.float()
    # Of 0 and 1 alone, in all parts of the file, they are no intensities.
    parts = [part for name, part in arrays.items() if name.startswith("context")]
    greatest = max(int(part.max()) for part in parts if part.dtype == np.uint8)
    return context.float() / (255 if greatest > 1 else 1)


def _row(context: Tensor | None) -> tuple[int, ...] | None:
    return None if context is None else tuple(context.shape[1:])


def _images(array: np.ndarray, path: Path) -> Tensor:
    """Rows (n, d) as they are; images with their channels first, one channel added if need be."""
    x = as_tensor(array, str(path))
    if x.dim() == 2:
        return x
    if x.dim() == 3:
        return x[:, None]
    if x.dim() == 4 and x.shape[1] in (1, 3, 4):
        return x
    if x.dim() == 4 and x.shape[3] in (1, 3, 4):
        return x.permute(0, 3, 1, 2).contiguous()
    raise UsageError(
        f"{path}: rows (n, d), grey images (n, height, width) or images (n, channels, height, "
        f"width) are expected, an array of shape {tuple(x.shape)} came"
    )


def read_labels(array: np.ndarray | None, n: int, path: Path) -> Tensor | None:
    if array is None:
        return None
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{path}: labels must be whole numbers, {array.dtype} came")
    flat = array.reshape(-1)
    wrong = flat[(flat < 0) | (flat != np.floor(flat))]
    if len(wrong):
        raise UsageError(f"{path}: labels must be whole numbers of 0 or more, {wrong[0]} came")
    if len(flat) != n:
        raise UsageError(f"{path}: {len(flat)} labels came for {n} rows")
    return torch.from_numpy(flat.astype(np.int64))
