"""Data sets by name or from a file, in three parts that share no row."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.files import UNREADABLE, load_file, load_music, load_text
from pyro_vae.data.shapes import draw
from pyro_vae.data.split import Data, Split, shuffled, three_ways
from pyro_vae.data.text import docstrings, read_lines
from pyro_vae.errors import UsageError, nearest
from pyro_vae.pairs.arrays import as_labels


def load_data(
    data: str | Path,
    data_dir: str | Path | None = None,
    length: int = 60,
    vocabulary: str | None = None,
) -> Data:
    """A data set by name, or from a file, split into three parts.

    Arguments:
        data: ``digits`` (embedded), ``shapes`` (drawn, with factors; see `pyro_vae.data.shapes`), a
            torchvision name (``mnist``, ``fashion-mnist``, ``kmnist``,
            ``emnist``, ``omniglot``, ``cifar10``, ``svhn``), or a path. A ``.npz`` holds ``x`` and
            maybe labels ``y`` and ``context``, or ``x_train``, ``x_test``, maybe ``x_validation``,
            and ``y_`` and ``context_`` likewise. Context is rows or images; 8-bit context becomes
            floats in [0, 1]. Sequences are rows (n, steps, d), with their ``lengths`` beside them
            where these differ. A ``.json`` holds music (see `pyro_vae.data.music`), a ``.txt``
            a datum in each line; ``docstrings`` are sentences of the same kind, from Python's
            standard library (see `pyro_vae.data.text.docstrings`).
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
        return load_text(name, docstrings(length), length, vocabulary)
    if path.suffix == ".json" and path.is_file():
        return load_music(path)
    if path.suffix == ".txt" and path.is_file():
        return load_text(path.stem, read_lines(path), length, vocabulary)
    if name not in NAMES and (path.suffix in (".npy", ".npz") or path.is_file()):
        return load_file(path)
    if name == "digits":
        return _digits()
    if name == "shapes":
        images, factors = draw()
        return three_ways("shapes", Split(images, factors[:, 0], factors=factors))
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
        raise UsageError(f"must be at least 0, got {num_labels}", argument="num_labels")
    labels = as_labels(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[labels >= 0].unique().tolist()
    if 0 < num_labels < len(classes):
        raise UsageError(
            f"must be 0 or at least {len(classes)}, one for each class, got {num_labels}",
            argument="num_labels",
        )
    counts = [(num_labels + i) // len(classes) for i in range(len(classes))]
    hidden = torch.full_like(labels, -1)
    for label, count in zip(classes, counts, strict=True):
        rows = order[labels[order] == label]
        if len(rows) < count:
            raise UsageError(
                f"is {num_labels}, which needs {count} labels of class {label}, "
                f"but the data have only {len(rows)}",
                argument="num_labels",
            )
        hidden[rows[:count]] = label
    return hidden


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return three_ways("digits", Split(torch.from_numpy(images), torch.from_numpy(bunch.target)))


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


def _torchvision(name: str, root: Path) -> Data:
    get, files = _TORCHVISION[name]
    try:
        train, test = get(root, True, False), get(root, False, False)
    except UNREADABLE:
        try:
            train, test = get(root, True, True), get(root, False, True)
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UsageError(
                f"'{name}' is not in {root} and cannot be downloaded ({reason}); place "
                f"{files} there, or use the embedded 'digits'"
            ) from error
    part, validation = shuffled(train, (5, 1))
    return Data(name, part, validation, test)
