"""Load data sets by name or from a file, as training, validation and test data."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.cell_stores import ENDINGS as CELLS
from pyro_vae.data.files import UNREADABLE, load_file, load_music, load_text
from pyro_vae.data.grouped_tables import grouped
from pyro_vae.data.image_folders import image_options, load_images
from pyro_vae.data.large_cells import load_cells
from pyro_vae.data.large_tables import is_large, load_table
from pyro_vae.data.schema import Schema
from pyro_vae.data.shapes import draw
from pyro_vae.data.split import Data, Split, three_ways, with_validation
from pyro_vae.data.table_files import FILES as TABLES
from pyro_vae.data.tables import read_table
from pyro_vae.data.text import docstrings, read_lines
from pyro_vae.errors import UsageError, nearest
from pyro_vae.pairs.arrays import as_labels


def load_data(
    data: str | Path,
    data_dir: str | Path | None = None,
    length: int = 60,
    vocabulary: str | None = None,
    columns: Any = None,
    group: str | None = None,
    image_size: int | Sequence[int] | None = None,
    color: bool | None = None,
    crop: bool = True,
    layer: str | None = None,
    batch: str | None = None,
) -> Data:
    """Load data by name, from a file or a folder, as training, validation and test data.

    A data set that has a test set keeps it, and a sixth of its training set becomes the validation
    set. Other data are split 70 : 10 : 20. Both splits are random with a fixed seed.

    Arguments:
        data: a name or a path. The names are:

            - ``digits``: gray images (1, 8, 8), included in scikit-learn;
            - ``shapes``: drawn images with known factors, see `pyro_vae.data.shapes`;
            - ``docstrings``: sentences from Python's standard library, see
              `pyro_vae.data.text.docstrings`;
            - data sets of torchvision: ``mnist``, ``fashion-mnist``, ``kmnist``, ``emnist``,
              ``omniglot``, ``cifar10``, ``svhn``.

            The files are:

            - ``.npy``: the array ``x``;
            - ``.npz``: the array ``x``, and optionally the labels ``y``, the ``context`` and the
              ``lengths``. For data that are already split: ``x_train``, ``x_test`` and optionally
              ``x_validation``, with ``y_train`` and so on. Context is rows or images; 8-bit context
              becomes floats in [0, 1]. Sequences have the shape (n, steps, d). They need
              ``lengths`` (n,) if their lengths differ;
            - ``.csv``, ``.tsv``, ``.parquet``, ``.feather``: a table, see `pyro_vae.read_table`. A
              table of 1 GiB or more is converted once, and its rows stay on disk;
            - ``.h5ad``, ``.zarr``: cells with the counts of their genes, see `pyro_vae.data.cells`.
              Counts that need 1 GiB or more as float32 are converted once, and stay on disk;
            - ``.txt``: one datum in each line;
            - ``.json``: music, see `pyro_vae.data.music`.

            A folder holds images of any size. Sub-folders, if any, are the labels; or the parts,
            if they are named train, test and optionally validation. Unreadable images are skipped
            with a warning; more than one image and 5 % raise an error. Images that need 1 GiB or
            more when decoded stay on disk.
        data_dir: the folder with the files of torchvision, the decoded images of folders, and the
            converted tables. The default is the environment variable ``PYRO_VAE_DATA``, or
            ``~/.cache/pyro_vae`` if it is not set.
        length: for text, the largest width of a row of tokens, including the end token.
        vocabulary: for text, the character of each token. Rows then have exactly the width
            ``length``. The default is all characters that occur in the text.
        columns: for a table, changes of its schema, as `pyro_vae.read_table` takes them. For a
            ``.h5ad`` file or a ``.zarr`` store, the roles of columns of its obs: context, label,
            group or split.
        group: the column of a table, or the array of a ``.npz`` file, with the id of the group of
            each row. The data are then whole groups, see `pyro_vae.data.groups.in_groups`.
        image_size: for a folder, one number, or height and width. The default is the size of most
            images, or the median height and width.
        color: for a folder, whether the images have three channels. The default is yes if any image
            has color.
        crop: for a folder, scale an image to cover the size, and cut off what is outside; False
            stretches the image instead.
        layer: for a ``.h5ad`` file or a ``.zarr`` store, the layer with the counts. The default
            is X.
        batch: for a ``.h5ad`` file or a ``.zarr`` store, the column of obs that becomes context,
            in one-hot rows.

    Raises `UsageError` for an unknown name, and for a file that cannot be read or has other arrays.

    >>> load_data("digits").train.x.shape
    torch.Size([1257, 1, 8, 8])
    """
    path, name = Path(data), str(data)
    if group is not None and (path.suffix not in (".npz", *TABLES) or name in NAMES):
        raise UsageError(
            f"needs a table or a .npz file with group ids, got {name}", argument="group"
        )
    folder = path.is_dir() and path.suffix not in CELLS
    if name not in NAMES and folder and columns is None:
        return load_images(path, image_options(image_size, color, crop), _root(data_dir))
    if image_size is not None or color is not None or not crop:
        given = "image_size" if image_size is not None else "crop" if color is None else "color"
        raise UsageError(f"applies only to a folder of images, got {name}", argument=given)
    for option, value in (("layer", layer), ("batch", batch)):
        if value is not None and path.suffix not in CELLS:
            raise UsageError(
                f"applies only to .h5ad files and .zarr stores, got {name}", argument=option
            )
    if name == "docstrings":
        return load_text(name, docstrings(length), length, vocabulary)
    if path.suffix in TABLES:
        if group is not None:
            return grouped(path, columns, group)
        if is_large(path):
            return load_table(path, columns, _root(data_dir))
        return read_table(path, columns).split()
    if path.suffix in CELLS:
        return load_cells(path, columns, layer, batch, _root(data_dir))
    if columns is not None:
        raise UsageError(f"applies only to tables; '{name}' is not a table", argument="columns")
    if path.suffix == ".json" and path.is_file():
        return load_music(path)
    if path.suffix == ".txt" and path.is_file():
        return load_text(path.stem, read_lines(path), length, vocabulary)
    if name not in NAMES and (path.suffix in (".npy", ".npz") or path.is_file()):
        return load_file(path, group)
    if name == "digits":
        return _digits()
    if name == "shapes":
        images, factors = draw()
        return three_ways("shapes", Split(images, factors[:, 0], factors=factors))
    if name in _TORCHVISION:
        return _torchvision(name, _root(data_dir))
    raise UsageError(
        f"unknown data set or file '{name}'; {nearest(name, NAMES)} "
        "(or pass a folder of images, a .zarr store, or a .csv, .parquet, .h5ad, .npy, .npz, .txt "
        "or .json file)"
    )


def load_new(path: str | Path, data_dir: str | Path | None, schema: Schema) -> Data:
    """All rows of a table as test data, for a pair that was fitted to other rows."""
    if is_large(Path(path)):
        return load_table(Path(path), schema, _root(data_dir), new=True)
    return read_table(path, schema).new()


def load_cells_of(
    path: str | Path,
    data_dir: str | Path | None,
    layer: str | None,
    recorded: dict[str, Any],
    new: bool = False,
) -> Data:
    """Cells as a run recorded them (`Cells.recorded`); with ``new``, all cells are test data."""
    return load_cells(Path(path), None, layer, None, _root(data_dir), recorded, new)


def _root(data_dir: str | Path | None) -> Path:
    root = data_dir or os.environ.get("PYRO_VAE_DATA") or Path.home() / ".cache" / "pyro_vae"
    return Path(root).expanduser()


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Integer labels (n,) as one-hot rows (n, num_classes) of floats, for the context of a pair.

    Raises `UsageError` for labels outside 0 to num_classes - 1.

    >>> one_hot(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.], [1., 0., 0.]])
    """
    labels = as_labels(labels)
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UsageError(
            f"labels must be from 0 to {num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return nn.functional.one_hot(labels, num_classes).float()


def hide_labels(labels: Tensor, num_labels: int, seed: int = 0) -> Tensor:
    """Keep the same number of labels of each class, and set all other labels to -1.

    Arguments:
        labels: integers (n,).
        num_labels: the number of labels to keep in total, at least one for each class; 0 hides all
            labels. If they do not divide evenly, the classes with the largest labels keep one more.
        seed: the seed of the random choice of the labels to keep.

    Raises `UsageError` for fewer labels than classes, and for more labels of a class than it has.

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
            x = x.transpose(2, 3).contiguous()  # EMNIST stores its images transposed
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
    # No labels: the test part and the training part have no character in common.
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
                f"{files} there, or use 'digits', which needs no download"
            ) from error
    part, validation = with_validation(train)
    return Data(name, part, validation, test)
