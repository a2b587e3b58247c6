"""Data sets by name or from a file, in three parts that share no row."""

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.arrays import as_labels, as_tensor
from pyro_vae.errors import UsageError, nearest
from pyro_vae.music import Piece, piano_rolls, read_pieces
from pyro_vae.shapes import draw
from pyro_vae.text import as_tokens, docstrings, read_lines, vocabulary_of


class Split(NamedTuple):
    """One part of a data set: ``x`` of shape (n, *data_shape), and what comes with its rows."""

    x: Tensor
    labels: Tensor | None = None
    """Integers (n,)."""
    context: Tensor | None = None
    """What a conditional pair is given, floats (n, *context_shape)."""
    lengths: Tensor | None = None
    """How many steps of each row count, integers (n,), where rows are sequences."""
    factors: Tensor | None = None
    """The index of each factor's value that a drawn datum was made from, integers (n, factors)."""


@dataclass(frozen=True)
class Data:
    """A data set in three parts that share no row."""

    name: str
    train: Split
    validation: Split
    test: Split
    vocabulary: str | None = None
    """What each token stands for, where the data are text."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """One more than the greatest label, 0 without labels."""
        labels = [split.labels for split in (self.train, self.validation, self.test)]
        return max((int(part.max()) + 1 for part in labels if part is not None), default=0)


def load_data(
    data: str | Path,
    data_dir: str | Path | None = None,
    length: int = 60,
    vocabulary: str | None = None,
) -> Data:
    """A data set by name, or from a file, split into three parts.

    Arguments:
        data: ``digits`` (embedded), ``shapes`` (drawn, with factors; see `pyro_vae.shapes`), a
            torchvision name (``mnist``, ``fashion-mnist``, ``kmnist``,
            ``emnist``, ``omniglot``, ``cifar10``, ``svhn``), or a path. A ``.npz`` holds ``x`` and
            maybe labels ``y`` and ``context``, or ``x_train``, ``x_test``, maybe ``x_validation``,
            and ``y_`` and ``context_`` likewise. Context is rows or images; 8-bit context becomes
            floats in [0, 1]. Sequences are rows (n, steps, d), with their ``lengths`` beside them
            where these differ. A ``.json`` holds music (see `pyro_vae.music`), a ``.txt``
            a datum in each line; ``docstrings`` are sentences of the same kind, from Python's
            standard library (see `pyro_vae.text.docstrings`).
        data_dir: where torchvision's files are; else the environment variable ``PYRO_VAE_DATA``,
            else ``~/.cache/pyro_vae``.
        length: of text, the greatest width of a row of tokens, the end counted.
        vocabulary: of text, what the tokens stand for, so that rows have just this length; by
            default the characters that there are.

    A data set that comes with a test set keeps it, and a sixth of its training set, drawn with a
    fixed seed, becomes the validation set; other data are split 70 : 10 : 20 with a fixed seed.

    >>> load_data("digits").train.x.shape
    torch.Size([1257, 1, 8, 8])
    """
    path, name = Path(data), str(data)
    if name == "docstrings":
        return _text(name, docstrings(length), length, vocabulary)
    if path.suffix == ".json" and path.is_file():
        return _music(path)
    if path.suffix == ".txt" and path.is_file():
        return _text(path.stem, read_lines(path), length, vocabulary)
    if name not in NAMES and (path.suffix in (".npy", ".npz") or path.is_file()):
        return _load_file(path)
    if name == "digits":
        return _digits()
    if name == "shapes":
        images, factors = draw()
        return _three_ways("shapes", Split(images, factors[:, 0], factors=factors))
    if name in _TORCHVISION:
        root = data_dir or os.environ.get("PYRO_VAE_DATA") or Path.home() / ".cache" / "pyro_vae"
        return _torchvision(name, Path(root).expanduser())
    raise UsageError(
        f"'{name}' is no data set and no file; {nearest(name, NAMES)} "
        "(or give the path of a .npy, .npz, .txt or .json file)"
    )


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Integer labels (n,) as float rows (n, num_classes), to be a pair's context.

    >>> one_hot(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.], [1., 0., 0.]])
    """
    labels = as_labels(labels)
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UsageError(
            f"labels must be 0 to {num_classes - 1}, {int(labels.min())} to {int(labels.max())} "
            "came"
        )
    return nn.functional.one_hot(labels, num_classes).float()


def _music(path: Path) -> Data:
    pieces = read_pieces(path)
    steps = max(len(piece) for part in pieces.values() for piece in part)
    splits = {name: Split(*_rolls(part, steps)) for name, part in pieces.items()}
    return Data(path.stem, splits["train"], splits["validation"], splits["test"])


def _rolls(pieces: Sequence[Piece], steps: int) -> tuple[Tensor, None, None, Tensor]:
    return piano_rolls(pieces, steps), None, None, torch.tensor([len(piece) for piece in pieces])


def _text(name: str, lines: list[str], length: int, vocabulary: str | None) -> Data:
    if length < 2:
        raise UsageError(f"length must be 2 or more, {length} came")
    if vocabulary is None:
        vocabulary, length = vocabulary_of(lines), min(length, 1 + max(map(len, lines), default=0))
    data = _three_ways(name, Split(as_tokens(lines, vocabulary, length)))
    return replace(data, vocabulary=vocabulary)


def hide_labels(labels: Tensor, num_labels: int, seed: int = 0) -> Tensor:
    """Labels (n,) of which so many are kept, as many of each class, and the others are -1.

    Arguments:
        num_labels: how many to keep, one of each class at least; 0 hides them all. Where they do
            not divide evenly, the greatest labels keep one more.
        seed: of the draw of those that are kept.

    Raises `UsageError` for fewer labels than classes, and for more of a class than there are.

    >>> hide_labels(torch.tensor([0, 1, 0, 1]), 2, seed=1).sort().values
    tensor([-1, -1,  0,  1])
    """
    if num_labels < 0:
        raise UsageError(f"num_labels must be 0 or more, {num_labels} came")
    labels = as_labels(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[labels >= 0].unique().tolist()
    if 0 < num_labels < len(classes):
        raise UsageError(
            f"num_labels is 0, or {len(classes)} or more, one for each class: {num_labels} came"
        )
    counts = [(num_labels + i) // len(classes) for i in range(len(classes))]
    hidden = torch.full_like(labels, -1)
    for label, count in zip(classes, counts, strict=True):
        rows = order[labels[order] == label]
        if len(rows) < count:
            raise UsageError(
                f"num_labels is {num_labels}, {count} of each class; class {label} has {len(rows)}"
            )
        hidden[rows[:count]] = label
    return hidden


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return _three_ways("digits", Split(torch.from_numpy(images), torch.from_numpy(bunch.target)))


def _mnist_like(kind: str, **options: Any) -> Callable[[Path, bool, bool], Split]:
    def get(root: Path, train: bool, download: bool) -> Split:
        from torchvision import datasets

        data = getattr(datasets, kind)(str(root), train=train, download=download, **options)
        x = torch.as_tensor(data.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        if kind == "EMNIST":
            x = x.transpose(2, 3).contiguous()  # its files hold the images lying on their side
        return Split(x, torch.as_tensor(data.targets))

    return get


def _svhn(root: Path, train: bool, download: bool) -> Split:
    from torchvision import datasets

    data = datasets.SVHN(str(root), split="train" if train else "test", download=download)
    return Split(torch.as_tensor(data.data), torch.as_tensor(data.labels).long())


def _omniglot(root: Path, train: bool, download: bool) -> Split:
    from torchvision import datasets

    data = datasets.Omniglot(str(root), background=train, download=download)
    images = [255 - np.asarray(image.convert("L").resize((28, 28))) for image, _ in data]
    # No labels: the characters of the test part are none of the training part's.
    return Split(torch.from_numpy(np.stack(images))[:, None], None)


_TORCHVISION: dict[str, tuple[Callable[[Path, bool, bool], Split], str]] = {
    "mnist": (_mnist_like("MNIST"), "MNIST/raw/train-images-idx3-ubyte and the like"),
    "fashion-mnist": (
        _mnist_like("FashionMNIST"),
        "FashionMNIST/raw/train-images-idx3-ubyte and the like",
    ),
    "kmnist": (_mnist_like("KMNIST"), "KMNIST/raw/train-images-idx3-ubyte and the like"),
    "emnist": (
        _mnist_like("EMNIST", split="balanced"),
        "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte and the like",
    ),
    "omniglot": (
        _omniglot,
        "omniglot-py/images_background and images_evaluation, and their .zip files,",
    ),
    "cifar10": (_mnist_like("CIFAR10"), "cifar-10-batches-py/data_batch_1 and the like"),
    "svhn": (_svhn, "train_32x32.mat and test_32x32.mat"),
}

TORCHVISION = tuple(_TORCHVISION)

NAMES = ("digits", "shapes", "docstrings", *TORCHVISION)


# What torchvision raises where files are absent, cut short, or of something else.
_UNREADABLE = (
    *(RuntimeError, OSError, ValueError, EOFError),
    *(IndexError, KeyError, TypeError, AssertionError),
)


def _torchvision(name: str, root: Path) -> Data:
    get, files = _TORCHVISION[name]
    try:
        train, test = get(root, True, False), get(root, False, False)
    except _UNREADABLE:
        try:
            train, test = get(root, True, True), get(root, False, True)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UsageError(
                f"'{name}' is not in {root} and cannot be downloaded ({reason}); place "
                f"{files} there, or use the embedded 'digits'"
            ) from error
    part, validation = _shuffled(train, (5, 1))
    return Data(name, part, validation, test)


def _load_file(path: Path) -> Data:
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
        return _three_ways(path.stem, _split(arrays, x, "", path))
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
        splits["train"], splits["validation"] = _shuffled(splits["train"], (5, 1))
    return Data(path.stem, splits["train"], splits["validation"], splits["test"])


def _split(arrays: dict[str, np.ndarray], x: Tensor, suffix: str, path: Path) -> Split:
    """Rows with the labels and the context that a file holds for them."""
    labels = _labels(arrays.get(f"y{suffix}"), len(x), path)
    context = _context(arrays, suffix, len(x), path)
    return Split(x, labels, context, _lengths(arrays.get(f"lengths{suffix}"), x, path))


def _lengths(array: np.ndarray | None, x: Tensor, path: Path) -> Tensor | None:
    lengths = _labels(array, len(x), path)  # whole numbers of 0 or more, as labels are
    if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[-2]:
        raise UsageError(
            f"{path}: lengths must be 1 to {x.shape[-2]}, {int(lengths.min())} to "
            f"{int(lengths.max())} came"
        )
    return lengths


def _context(arrays: dict[str, np.ndarray], suffix: str, n: int, path: Path) -> Tensor | None:
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


def _labels(array: np.ndarray | None, n: int, path: Path) -> Tensor | None:
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


def _three_ways(name: str, whole: Split) -> Data:
    if len(whole.x) < 10:
        raise UsageError(
            f"{name} has {len(whole.x)} rows: 10 or more are expected, to split in three"
        )
    train, validation, test = _shuffled(whole, (7, 1, 2))
    return Data(name, train, validation, test)


def _shuffled(split: Split, shares: Sequence[int]) -> list[Split]:
    """Cut a split by shares, after a permutation with a fixed seed."""
    n = len(split.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    edges = [n * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
    return [
        Split(split.x[rows], *(None if part is None else part[rows] for part in split[1:]))
        for rows in (order[a:b] for a, b in pairwise(edges))
    ]
