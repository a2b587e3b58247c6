"""Data sets by name."""

import hashlib
import pickle
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from data_helpers import flat_images, rows
from PIL import Image

from pyro_vae.data.datasets import load_data
from pyro_vae.errors import UsageError

# digits, which scikit-learn includes


def test_digits_are_the_images_of_scikit_learn_each_in_one_part():
    from sklearn.datasets import load_digits

    loaded = load_data("digits")
    parts = (loaded.train, loaded.validation, loaded.test)
    assert [len(part.x) for part in parts] == [1257, 180, 360]
    assert loaded.shape == (1, 8, 8)
    assert loaded.num_classes == 10
    assert all(part.x.dtype == torch.uint8 and len(part.labels) == len(part.x) for part in parts)
    images = torch.from_numpy(np.rint(load_digits().images * 255 / 16).astype(np.uint8))[:, None]
    assert rows(torch.cat([part.x for part in parts])) == rows(images)
    assert len(set(rows(images))) == 1797


def test_digits_keep_their_labels():
    from sklearn.datasets import load_digits

    truth = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    test = load_data("digits").test
    assert [truth[x.numpy().tobytes()] for x in test.x] == test.labels.tolist()


def test_the_split_neither_uses_nor_changes_the_global_generator():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), load_data("digits")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_data("digits")
    for one, other in zip(first.__dict__.values(), second.__dict__.values(), strict=True):
        assert one == other if isinstance(one, str | None) else torch.equal(one.x, other.x)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, folder="MNIST", names=("train", "t10k"), n=(12, 4), classes=10):
    """Write two parts of a data set like MNIST; return their images and labels."""
    parts = []
    for seed, (name, size) in enumerate(zip(names, n, strict=True)):
        images, labels = flat_images(size, 28, 28, seed=seed), np.arange(size) % classes
        write_idx(root / folder / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{name}-labels-idx1-ubyte", labels)
        parts.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels)))
    return parts


def check_loaded(loaded, train, test):
    """A sixth of the training rows becomes validation data; the test part does not change."""
    kept = len(train[0]) * 5 // 6
    assert (len(loaded.train.x), len(loaded.validation.x)) == (kept, len(train[0]) - kept)
    assert rows(torch.cat([loaded.train.x, loaded.validation.x])) == rows(train[0])
    assert torch.equal(loaded.test.x, test[0])
    assert torch.equal(loaded.test.labels, test[1])
    label = {x.numpy().tobytes(): int(y) for x, y in zip(*train, strict=True)}
    for part in (loaded.train, loaded.validation):
        assert [label[x.numpy().tobytes()] for x in part.x] == part.labels.tolist()
        assert part.x.dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "folder", "parts"),
    [
        ("mnist", "MNIST", ("train", "t10k")),
        ("fashion-mnist", "FashionMNIST", ("train", "t10k")),
        ("kmnist", "KMNIST", ("train", "t10k")),
        ("emnist", "EMNIST", ("emnist-balanced-train", "emnist-balanced-test")),
    ],
)
def test_idx_files(name, folder, parts, tmp_path):
    train, test = write_mnist(tmp_path, folder, parts)
    if name == "emnist":  # EMNIST stores its images transposed
        train, test = ((x.transpose(-1, -2).contiguous(), y) for x, y in (train, test))
    loaded = load_data(name, tmp_path)
    check_loaded(loaded, train, test)
    assert loaded.shape == (1, 28, 28)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = flat_images(24, 3, 32, 32), np.arange(24) % 10
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for i, name in enumerate(names):
        part = slice(4 * i, 4 * i + 4)
        content = {"data": images[part].reshape(4, -1), "labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    loaded = load_data("cifar10", tmp_path)
    check_loaded(loaded, (x[:20], y[:20]), (x[20:], y[20:]))
    assert loaded.shape == (3, 32, 32)


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    parts, sums = [], dict(SVHN.split_list)
    for seed, (split, n) in enumerate((("train", 12), ("test", 4))):
        images, labels = flat_images(n, 3, 32, 32, seed=seed), np.arange(n) % 10
        path = tmp_path / f"{split}_32x32.mat"
        stored = np.where(labels == 0, 10, labels)  # the files of SVHN label the digit 0 as 10
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored[:, None].astype(np.uint8)})
        sums[split] = [SVHN.split_list[split][0], path.name, md5(path)]
        parts.append((torch.from_numpy(images), torch.from_numpy(labels)))
    monkeypatch.setattr(SVHN, "split_list", sums)
    loaded = load_data("svhn", tmp_path)
    check_loaded(loaded, *parts)
    assert loaded.shape == (3, 32, 32)
    assert loaded.num_classes == 10


def write_omniglot(root, monkeypatch):
    """Write three training characters and one test character, with four drawings each.

    The ink is black on white.
    """
    from torchvision.datasets import Omniglot

    sums = {}
    for name, characters in (("images_background", 3), ("images_evaluation", 1)):
        archive = root / "omniglot-py" / f"{name}.zip"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive, "w") as file:
            for character in range(characters):
                for drawing in range(4):
                    ink = Image.new("1", (105, 105), 1)
                    ink.paste(0, (20 * character + 10, 20 * drawing + 10, 50, 100))
                    path = root / "omniglot-py" / name / "Runes" / f"character{character:02}"
                    path.mkdir(parents=True, exist_ok=True)
                    ink.save(path / f"{character:04}_{drawing:02}.png")
                    file.write(path / f"{character:04}_{drawing:02}.png")
        sums[name] = md5(archive)
    monkeypatch.setattr(Omniglot, "zips_md5", sums)


def test_omniglot(tmp_path, monkeypatch):
    write_omniglot(tmp_path, monkeypatch)
    loaded = load_data("omniglot", tmp_path)
    assert [len(part.x) for part in (loaded.train, loaded.validation, loaded.test)] == [10, 2, 4]
    assert loaded.shape == (1, 28, 28)
    assert loaded.train.x.dtype == torch.uint8
    assert int(loaded.train.x[:, :, :2].max()) == 0  # dark paper and bright ink, as in MNIST
    assert int(loaded.train.x.max()) > 200
    assert loaded.test.labels is None  # its characters are not in the training part


def test_data_dir_has_priority_over_the_environment_variable(tmp_path, monkeypatch):
    _, (first, _) = write_mnist(tmp_path / "a", n=(12, 4))
    _, (second, _) = write_mnist(tmp_path / "b", n=(12, 6))
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "a"))
    assert torch.equal(load_data("mnist").test.x, first)
    assert torch.equal(load_data("mnist", tmp_path / "b").test.x, second)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(load_data("mnist", "~/b").test.x, second)


@pytest.fixture
def offline(monkeypatch):
    """Every connection fails, because it uses a proxy that does not exist."""
    for name in ("http_proxy", "https_proxy", "ftp_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte"]),
        ("fashion-mnist", ["FashionMNIST/raw/train-images-idx3-ubyte"]),
        ("kmnist", ["KMNIST/raw/train-images-idx3-ubyte"]),
        ("emnist", ["EMNIST/raw/emnist-balanced-train-images-idx3-ubyte"]),
        # torchvision reads the folders, but also needs the archives next to them.
        ("omniglot", ["omniglot-py/images_background", "images_evaluation", ".zip"]),
        ("cifar10", ["cifar-10-batches-py/data_batch_1"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
    ],
)
def test_a_download_that_fails_explains_where_to_put_the_files(name, files, tmp_path):
    with pytest.raises(UsageError) as caught:
        load_data(name, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"'{name}'" in message
    assert str(tmp_path) in message
    assert "place" in message
    assert "'digits'" in message
    assert all(word in message for word in files)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("length", [0, 3, 10, 1000])
def test_an_idx_file_that_is_cut_short_is_a_usage_error(length, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UsageError, match="mnist"):
        load_data("mnist", tmp_path)
