"""Data: names, files, tensors and data sets become prepared minibatches. No network is needed."""

import hashlib
import pickle
import urllib.request
import zipfile

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import make
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data import Arrays, Preparation, held_out, preparation, source
from pyro_vae.datasets import load_data
from pyro_vae.errors import UsageError

CPU = torch.device("cpu")


def rows(x):
    """Each row as bytes, in an order of its own."""
    return sorted(row.numpy().tobytes() for row in x)


# Names: digits, embedded


def test_digits_are_all_of_scikit_learns_images_each_in_one_part():
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


def test_the_parts_do_not_depend_on_the_global_generator_nor_touch_it():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), load_data("digits")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_data("digits")
    for one, other in zip(first.__dict__.values(), second.__dict__.values(), strict=True):
        assert one == other if isinstance(one, str | None) else torch.equal(one.x, other.x)


# Names: torchvision's data sets, from files in the layouts that torchvision reads


def flat_images(n, *shape, seed=0):
    """Images of noise, no two alike."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, folder="MNIST", names=("train", "t10k"), n=(12, 4), classes=10):
    """Two parts of an MNIST-like data set; returns their images and labels."""
    parts = []
    for seed, (name, size) in enumerate(zip(names, n, strict=True)):
        images, labels = flat_images(size, 28, 28, seed=seed), np.arange(size) % classes
        write_idx(root / folder / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{name}-labels-idx1-ubyte", labels)
        parts.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels)))
    return parts


def check_loaded(loaded, train, test):
    """A sixth of the training rows has become the validation part; the test part is as it was."""
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
    if name == "emnist":  # whose files hold the images lying on their side
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
        stored = np.where(labels == 0, 10, labels)  # SVHN's own files call the digit 0 a 10
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored[:, None].astype(np.uint8)})
        sums[split] = [SVHN.split_list[split][0], path.name, md5(path)]
        parts.append((torch.from_numpy(images), torch.from_numpy(labels)))
    monkeypatch.setattr(SVHN, "split_list", sums)
    loaded = load_data("svhn", tmp_path)
    check_loaded(loaded, *parts)
    assert loaded.shape == (3, 32, 32)
    assert loaded.num_classes == 10


def write_omniglot(root, monkeypatch):
    """Three characters of four drawings each to learn, one to test; black ink on white."""
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
    assert int(loaded.train.x[:, :, :2].max()) == 0  # paper is dark, ink bright, as in MNIST
    assert int(loaded.train.x.max()) > 200
    assert loaded.test.labels is None  # its characters are none of the training part's


def test_data_dir_comes_before_the_environment_variable(tmp_path, monkeypatch):
    _, (first, _) = write_mnist(tmp_path / "a", n=(12, 4))
    _, (second, _) = write_mnist(tmp_path / "b", n=(12, 6))
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "a"))
    assert torch.equal(load_data("mnist").test.x, first)
    assert torch.equal(load_data("mnist", tmp_path / "b").test.x, second)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(load_data("mnist", "~/b").test.x, second)


@pytest.fixture
def offline(monkeypatch):
    """Every connexion is refused: all go through a proxy that is not there."""
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
        # torchvision reads the folders, but wants the archives beside them.
        ("omniglot", ["omniglot-py/images_background", "images_evaluation", ".zip"]),
        ("cifar10", ["cifar-10-batches-py/data_batch_1"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
    ],
)
def test_a_download_that_fails_says_how_to_place_the_files(name, files, tmp_path):
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
def test_an_idx_file_that_is_cut_short_is_one_error_of_use(length, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UsageError, match="mnist"):
        load_data("mnist", tmp_path)


# Files


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float32", "float64", ">f4"])
@pytest.mark.parametrize(
    ("shape", "datum"),
    [
        ((20, 6), (6,)),
        ((20, 5, 4), (1, 5, 4)),
        ((20, 1, 5, 4), (1, 5, 4)),
        ((20, 3, 5, 4), (3, 5, 4)),
        ((20, 5, 4, 1), (1, 5, 4)),
        ((20, 5, 7, 3), (3, 5, 7)),
    ],
)
def test_npy_layouts(shape, datum, dtype, tmp_path):
    array = (np.arange(np.prod(shape)).reshape(shape) % 7).astype(dtype)
    np.save(tmp_path / "mine.npy", array)
    loaded = load_data(tmp_path / "mine.npy")
    assert loaded.name == "mine"
    assert loaded.shape == datum
    assert [len(part.x) for part in (loaded.train, loaded.validation, loaded.test)] == [14, 2, 4]
    assert loaded.train.labels is None
    assert loaded.num_classes == 0
    native = np.dtype(dtype).newbyteorder("=")
    assert loaded.train.x.numpy().dtype == native
    moved = array.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) and len(shape) == 4 else array
    expected = torch.from_numpy(np.ascontiguousarray(moved.astype(native)).reshape(20, *datum))
    parts = torch.cat([loaded.train.x, loaded.validation.x, loaded.test.x])
    assert rows(parts) == rows(expected)


def archive(path, **arrays):
    np.savez(path, **arrays)
    return load_data(path)


def test_npz_of_one_array_is_split_with_its_labels(tmp_path):
    x, y = np.arange(20.0)[:, None] * np.ones(3), np.arange(20)
    loaded = archive(tmp_path / "mine.npz", x=x, y=y)
    for part, n in ((loaded.train, 14), (loaded.validation, 2), (loaded.test, 4)):
        assert torch.equal(part.x[:, 0].long(), part.labels)
        assert len(part.x) == n
    assert loaded.num_classes == 20
    plain = archive(tmp_path / "plain.npz", x=x)
    assert plain.test.labels is None
    assert torch.equal(plain.test.x, loaded.test.x)


def test_npz_of_two_parts_keeps_its_test_set(tmp_path):
    x = {"x_train": np.arange(12.0)[:, None], "x_test": np.arange(3.0)[:, None]}
    y = {"y_train": np.arange(12), "y_test": np.arange(3)[:, None]}
    loaded = archive(tmp_path / "mine.npz", **x, **y)
    assert torch.equal(loaded.test.x[:, 0], torch.arange(3.0).double())
    assert torch.equal(loaded.test.labels, torch.arange(3))
    assert (len(loaded.train.x), len(loaded.validation.x)) == (10, 2)
    both = torch.cat([loaded.train.x, loaded.validation.x])
    assert both[:, 0].sort().values.tolist() == list(range(12))
    assert torch.equal(loaded.train.x[:, 0].long(), loaded.train.labels)


def test_npz_of_three_parts_is_taken_as_it_is(tmp_path):
    sizes = {"train": 12, "validation": 5, "test": 3}
    arrays = {f"x_{name}": np.full((n, 2, 2), n, np.uint8) for name, n in sizes.items()}
    loaded = archive(tmp_path / "mine.npz", **arrays)
    for name, n in sizes.items():
        assert torch.equal(getattr(loaded, name).x, torch.full((n, 1, 2, 2), n).byte())


@pytest.mark.parametrize(("shape", "row"), [((), (1,)), ((3,), (3,)), ((4, 5), (1, 4, 5))])
def test_npz_with_context_gives_each_row_its_own(shape, row, tmp_path):
    x = np.arange(20.0)[:, None]
    context = np.broadcast_to(x.reshape(20, *[1] * len(shape)), (20, *shape))
    for dtype, scale in ((np.uint8, 255), (np.float64, 1)):
        loaded = archive(tmp_path / "mine.npz", x=x, context=context.astype(dtype))
        for part in (loaded.train, loaded.validation, loaded.test):
            assert part.context.shape == (len(part.x), *row)
            assert part.context.dtype == torch.float32
            expected = (part.x[:, 0] / scale).float()
            assert torch.allclose(part.context.flatten(1)[:, -1], expected)


OBJECTS = np.array([[None, 1]] * 20, dtype=object)
X = np.zeros((20, 3))


REFUSED_NPY = {
    "rank 1": (np.zeros(20), ["(20,)", "expected"]),
    "rank 5": (np.zeros((20, 2, 2, 2, 2)), ["(20, 2, 2, 2, 2)", "expected"]),
    "five channels": (np.zeros((20, 5, 5, 5)), ["(20, 5, 5, 5)", "channels"]),
    "a number": (np.float64(3.0), ["empty"]),
    "no rows": (np.zeros((0, 3)), ["empty", "(0, 3)"]),
    "no columns": (np.zeros((20, 0)), ["empty", "(20, 0)"]),
    "nine rows": (np.zeros((9, 3)), ["9 rows", "10 or more"]),
    "one row": (np.zeros((1, 3)), ["1 row", "10 or more"]),
    "objects": (OBJECTS, ["pickle"]),
    "words": (np.array([["a", "b"]] * 20), ["numbers", "<U1"]),
    "complex": (np.zeros((20, 3), complex), ["real", "complex128"]),
    "nan": (np.where(np.arange(60) == 31, np.nan, 0).reshape(20, 3), ["not finite", "row 10"]),
    "infinity": (np.where(np.arange(60) == 31, np.inf, 0).reshape(20, 3), ["not finite", "row 10"]),
}


@pytest.mark.parametrize(("array", "words"), REFUSED_NPY.values(), ids=REFUSED_NPY)
def test_npy_that_is_refused(array, words, tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(UsageError) as caught:
        load_data(path)
    assert "mine" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


REFUSED_NPZ = {
    "unknown key": ({"images": X}, ["'x'", "'x_train'", "images"]),
    "no test part": ({"x_train": X}, ["'x_test'", "x_train"]),
    "nothing": ({}, ["'x'", "none"]),
    "nine rows": ({"x": X[:9]}, ["9 rows", "10 or more"]),
    "no rows": ({"x": X[:0]}, ["empty"]),
    "objects": ({"x": OBJECTS}, ["pickle"]),
    "objects as labels": ({"x": X, "y": OBJECTS[:, 0]}, ["pickle"]),
    "too few labels": ({"x": X, "y": np.zeros(19, int)}, ["19", "20"]),
    "words as labels": ({"x": X, "y": np.array(["cat"] * 20)}, ["whole numbers", "<U3"]),
    "negative labels": ({"x": X, "y": np.full(20, -1)}, ["whole numbers", "-1"]),
    "halves as labels": ({"x": X, "y": np.full(20, 0.5)}, ["whole numbers", "0.5"]),
    "too little context": ({"x": X, "context": X[:19]}, ["19 rows of context", "20"]),
    "no number in context": (
        {"x": X, "context": np.where(X == 0, np.nan, X)},
        ["not finite", "row 0"],
    ),
    "context in one part": (
        {"x_train": X, "x_test": X, "context_train": X},
        ["context_test", "None", "(3,)"],
    ),
    "no test rows": ({"x_train": X, "x_test": X[:0]}, ["empty"]),
    "parts of two shapes": ({"x_train": X, "x_test": X[:, :2]}, ["(2,)", "(3,)"]),
    "too few training labels": (
        {"x_train": X, "x_test": X, "y_train": np.zeros(3, int)},
        ["3", "20"],
    ),
}


@pytest.mark.parametrize(("arrays", "words"), REFUSED_NPZ.values(), ids=REFUSED_NPZ)
def test_npz_that_is_refused(arrays, words, tmp_path):
    with pytest.raises(UsageError) as caught:
        archive(tmp_path / "mine.npz", **arrays)
    assert "mine" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["mine.npy", "mine.npz"])
@pytest.mark.parametrize("raw", [True, False])
def test_a_pickle_in_an_array_file_is_refused_and_not_executed(raw, name, tmp_path):
    evil = Marker(tmp_path / "marker")
    with open(tmp_path / name, "wb") as file:
        if raw:
            pickle.dump(evil, file)
        else:
            save = np.save if name.endswith("npy") else lambda file, x: np.savez(file, x=x)
            save(file, np.array([[evil]] * 20, dtype=object))
    with pytest.raises(UsageError, match="mine"):
        load_data(tmp_path / name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["mine.npy", "mine.npz"])
def test_an_array_file_that_is_cut_short_is_one_error_of_use(name, share, tmp_path):
    path = tmp_path / name
    np.save(path, X) if name.endswith("npy") else np.savez(path, x=X)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UsageError, match="mine") as caught:
        load_data(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.npy", ["none.npy", "no such file"]),
        ("table.csv", ["table.csv", ".txt or .json"]),
        ("mnits", ["'mnits'", "did you mean 'mnist'?"]),
        ("zzz", ["'zzz'", "digits", "svhn", ".txt or .json"]),
    ],
)
def test_unknown_names_and_files(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("1,2\n3,4\n")
    with pytest.raises(UsageError) as caught:
        load_data(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_one_hot():
    rows = pv.one_hot(torch.tensor([2, 0], dtype=torch.uint8), 3)
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert rows.dtype == torch.float32


# Preparation


def test_intensities_reach_the_pair_in_its_own_type():
    x = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        prepared = Preparation(CPU, dtype)((x, torch.ones(1, 2), torch.tensor([3])))
        expected = torch.tensor([[0, 0.2, 1]], dtype=dtype)
        torch.testing.assert_close(prepared[0], expected)
        assert prepared[1].dtype == dtype
        assert prepared[2].dtype == torch.int64
    (drawn,) = Preparation(CPU, torch.float32)((x > 100,))
    assert drawn.tolist() == [[0, 0, 1]]
    assert drawn.dtype == torch.float32


def test_dynamic_binarisation_is_drawn_anew_with_the_intensity_as_mean():
    torch.manual_seed(0)
    x = torch.arange(256, dtype=torch.uint8).repeat(2000, 1)
    prepare = Preparation(CPU, torch.float32, binarize=True)
    (first,), (second,) = prepare((x,)), prepare((x,))
    assert first.unique().tolist() == [0, 1]
    assert not torch.equal(first, second)
    grey = torch.arange(256) / 255
    # 256 columns, 2000 draws each: five standard errors leave about one failure in 10^4.
    error = (grey * (1 - grey) / 2000).sqrt()
    assert bool(((first.mean(0) - grey).abs() <= 5 * error).all())
    assert bool((first[:, 0] == 0).all() & (first[:, 255] == 1).all())


def test_held_out_data_are_drawn_once():
    x = torch.arange(256, dtype=torch.uint8).repeat(500, 1)
    prepare = Preparation(CPU, torch.float32, binarize=True)
    before = torch.get_rng_state()
    fixed, plain = held_out(Arrays([x, torch.ones(500)]), prepare)
    again, _ = held_out(Arrays([x]), prepare)
    assert torch.equal(torch.get_rng_state(), before)
    assert fixed.tensors[0].dtype == torch.bool
    assert torch.equal(fixed.tensors[0], again.tensors[0])
    assert len(fixed.tensors) == 2
    assert not plain.binarize
    one, two = (next(fixed.batches(500)) for _ in range(2))
    assert torch.equal(plain(one)[0], plain(two)[0])
    assert float(plain(one)[0].mean()) == pytest.approx(0.5, abs=0.01)
    rescaled, _ = held_out(Arrays([x / 255]), prepare)
    assert torch.equal(rescaled.tensors[0], fixed.tensors[0])


def small(**options):
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), **options)


@pytest.mark.parametrize(
    ("x", "likelihood", "binarize", "drawn"),
    [
        (torch.rand(8, 4), pv.Bernoulli, "dynamic", True),
        (torch.rand(8, 4), pv.Bernoulli, "fixed", True),
        (torch.rand(8, 4), pv.Bernoulli, "none", False),
        (torch.rand(8, 4).mul(255).byte(), pv.Bernoulli, "dynamic", True),
        (torch.rand(8, 4).round(), pv.Bernoulli, "dynamic", False),
        (torch.rand(8, 4) > 0.5, pv.Bernoulli, "dynamic", False),
        (torch.rand(8, 4), pv.ContinuousBernoulli, "dynamic", False),
        (torch.rand(8, 4), pv.Gaussian, "dynamic", False),
        (torch.rand(8, 4).mul(255).byte(), pv.DiscretizedLogistic, "dynamic", False),
        (torch.rand(8, 4).mul(255).byte(), pv.Categorical, "dynamic", False),
    ],
)
def test_only_grey_data_under_a_binary_likelihood_are_drawn(x, likelihood, binarize, drawn):
    pair = small(likelihood=likelihood)
    assert preparation(pair, source(x), binarize).binarize is drawn


LOOKING = {"engine": "eager", "progress": False}
"""A graph would show the pair its data once."""


class Recorder(nn.Module):
    """Keeps what it observes in training, in the order of the indices that come beside it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(50))
        self.seen = []

    def model(self, x, index):
        if self.training:
            self.seen.append(x[index.argsort()])
        with pyro.plate("data", len(x), dim=-1):
            # As this library's own likelihoods do, it leaves the support to the tools to check.
            likelihood = dist.Bernoulli(logits=self.bias, validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x, index):
        pass


@pytest.mark.parametrize("binarize", ["dynamic", "fixed"])
def test_what_a_pair_sees_in_training(binarize):
    pair, x = Recorder(), torch.full((8, 50), 0.5)
    pv.fit(pair, x, torch.arange(8), epochs=2, batch_size=8, binarize=binarize, **LOOKING)
    first, second = pair.seen
    assert first.unique().tolist() == [0, 1]
    assert torch.equal(first, second) is (binarize == "fixed")


def test_grey_targets_come_only_by_name_and_with_a_warning():
    pair, x = Recorder(), torch.rand(8, 50)
    with pytest.warns(UserWarning, match="not log-likelihoods"):
        pv.fit(pair, x, torch.arange(8), epochs=1, batch_size=8, binarize="none", **LOOKING)
    assert torch.equal(pair.seen[0], x)


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "bool"])
def test_a_pair_in_double_precision(kind):
    x = (np.random.default_rng(0).random((8, 4)) * (255 if kind == "uint8" else 1)).round()
    pair, context = small(context_shapes=[(2,)]).double(), torch.rand(8, 2)
    history = pv.fit(
        pair,
        x.astype(kind),
        context,
        validation=(x.astype(kind), context),
        epochs=2,
        batch_size=4,
        progress=False,
    )
    assert np.isfinite(history["validation_elbo"]).all()
    assert {parameter.dtype for parameter in pair.parameters()} == {torch.float64}
    assert pv.encode(pair, x.astype(kind), context)["z"].dtype == torch.float64
    assert pv.sample(pair, 3, [torch.rand(3, 2)]).dtype == torch.float64


# Rows in memory


def test_rows_are_held_as_they_came():
    array = flat_images(8, 4)
    (tensor,) = source(array).tensors
    assert tensor.dtype == torch.uint8
    assert tensor.data_ptr() == array.ctypes.data
    assert source(array > 3).tensors[0].dtype == torch.bool


@pytest.mark.parametrize(
    "array",
    [
        np.ones((8, 4))[::-1],
        np.broadcast_to(np.ones(4), (8, 4)),
        np.ones((8, 4), np.float16),
        np.ones((8, 4), np.uint16),
        np.asfortranarray(np.ones((8, 4))),
    ],
    ids=["reversed", "read-only", "float16", "uint16", "fortran"],
)
def test_any_array_of_numbers_is_taken(array):
    pv.fit(small(), array, epochs=1, batch_size=4, progress=False)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size"), [(10, 5), (10, 4), (10, 10), (10, 16), (7, 1)])
@pytest.mark.parametrize("kind", ["arrays", "dataset", "loader"])
def test_batches_hold_each_row_once(kind, n, size, shuffle):
    tensors = torch.arange(n)[:, None] * torch.ones(3), torch.arange(n)
    if kind == "arrays":
        given = source(tensors[0], tensors[1:])
    else:
        dataset = TensorDataset(*tensors)
        loader = DataLoader(dataset, batch_size=size, shuffle=shuffle)
        given = source(dataset if kind == "dataset" else loader)
    assert len(given) == n
    batches = list(given.batches(size, shuffle=shuffle))
    assert [len(x) for x, _ in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    index = torch.cat([i for _, i in batches])
    assert index.sort().values.tolist() == list(range(n))
    assert all(torch.equal(x[:, 0].long(), i) for x, i in batches)
    if not shuffle:
        assert index.tolist() == list(range(n))


def test_shuffling_differs_by_epoch_and_follows_the_seed():
    arrays = Arrays([torch.arange(50)])

    def order(seed):
        torch.manual_seed(seed)
        return [torch.cat([x for (x,) in arrays.batches(7, shuffle=True)]) for _ in range(2)]

    (first, second), (again, _), (other, _) = order(0), order(0), order(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


# Data sets and loaders


class Certain(nn.Module):
    """A pair without chance: its guide is a point, so that a result depends on the rows alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def template(self, n):
        return (torch.zeros(n, 4),)


def table(n, seed=1):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def fitted(x, **options):
    pair = Certain()
    options = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "progress": False} | options
    return pair, pv.fit(pair, x, **options)


def close(pair, other, **tolerance):
    for (name, value), expected in zip(
        pair.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=name, **tolerance)


@pytest.mark.parametrize("n", [8, 10])
def test_the_last_smaller_batch_is_counted(n):
    pair, history = fitted(table(n), learning_rate=1e-30, epochs=1)
    truth = pv.evaluate(pair, table(n), num_samples=1)
    assert history["elbo"][0] == pytest.approx(truth.log_joint, rel=1e-5)
    assert history["objective"][0] == pytest.approx(truth.log_joint, rel=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.numpy(),
        lambda x: TensorDataset(x),
        lambda x: TensorDataset(x, torch.arange(len(x))),
        lambda x: DataLoader(TensorDataset(x), batch_size=len(x)),
        lambda x: DataLoader(x, batch_size=len(x), shuffle=True),
    ],
    ids=["numpy", "dataset", "labelled dataset", "loader", "shuffling loader"],
)
def test_every_source_trains_as_the_tensor_does(wrap):
    x = table(12)
    pair, history = fitted(x, batch_size=12, validation=x)
    other, same = fitted(wrap(x), batch_size=12, validation=wrap(x))
    close(other, pair, rtol=1e-4, atol=1e-6)
    for column in ("elbo", "validation_elbo", "gradient_norm"):
        assert same[column] == pytest.approx(history[column], rel=1e-4)
    for number in ("log_joint", "reconstruction", "kl"):
        measured = getattr(pv.evaluate(other, wrap(x), num_samples=2), number)
        assert measured == pytest.approx(
            getattr(pv.evaluate(pair, x, num_samples=2), number), rel=1e-4
        )
    torch.testing.assert_close(
        pv.encode(other, wrap(x))["z"].sort(0).values, pv.encode(pair, x)["z"].sort(0).values
    )


def test_a_loader_keeps_its_order_and_batch_size():
    x = table(10)
    pair, _ = fitted(DataLoader(TensorDataset(x), batch_size=4), batch_size=1)
    other = Certain()
    with pyro.get_param_store().scope():
        program = pyro.optim.Adam({"lr": 0.01})

        def model(batch):
            pyro.module("pair", other)
            other.model(batch)

        svi = SVI(model, other.guide, program, Trace_ELBO())
        for _ in range(3):
            for batch in x.split(4):
                svi.step(batch)
    close(pair, other, rtol=1e-5, atol=1e-6)


def test_labels_of_a_data_set_are_left_out_for_a_pair_without_context():
    dataset = TensorDataset(torch.rand(8, 4).round(), torch.arange(8))
    pair = small()
    history = pv.fit(pair, dataset, validation=dataset, epochs=2, batch_size=4, progress=False)
    assert np.isfinite(history["validation_elbo"]).all()
    assert pv.reconstruct(pair, dataset).shape == (8, 4)


def test_a_data_set_gives_context_to_a_conditional_pair():
    x, context = torch.rand(8, 4).round(), torch.rand(8, 2)
    pair = small(context_shapes=[(2,)])
    pv.fit(pair, TensorDataset(x, context), epochs=1, batch_size=4, progress=False)
    torch.testing.assert_close(
        pv.encode(pair, TensorDataset(x, context))["z"], pv.encode(pair, x, context)["z"]
    )


@pytest.mark.parametrize("wrap", [TensorDataset, lambda *x: DataLoader(TensorDataset(*x), 8)])
def test_grey_rows_of_a_data_set_are_drawn_as_those_of_a_tensor_are(wrap):
    pair, x = Recorder(), torch.full((8, 50), 127, dtype=torch.uint8)
    pv.fit(pair, wrap(x, torch.arange(8)), epochs=2, batch_size=8, **LOOKING)
    first, second = pair.seen
    assert first.unique().tolist() == [0, 1]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("wrap", [lambda x: x, TensorDataset, lambda x: DataLoader(x, 4)])
def test_fit_gives_the_callers_generator_back(wrap):
    pair, before = small(), torch.get_rng_state()
    pv.fit(pair, wrap(table(8) > 0), epochs=1, batch_size=4, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_a_pair_does_not_take_are_told_in_one_line():
    pair = make("plain")
    for call in (pv.evaluate, pv.log_likelihood, pv.gaps, pv.anneal, pv.predictive_check):
        with pytest.raises(UsageError, match=r"fails on a batch of shapes \(5, 7\): Runtime") as e:
            call(pair, torch.ones(5, 7))
        assert "\n" not in str(e.value)


def test_a_guide_outside_the_support_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(len(x))))
                pyro.sample("x", dist.Normal(tau[..., None], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("tau", dist.Normal(x.new_zeros(len(x)), self.scale))

    with pytest.raises(UsageError, match=r"site 'tau' cannot be scored: .*HalfNormal") as e:
        pv.log_likelihood(Half(), torch.ones(9, 2), num_samples=30)
    assert "\n" not in str(e.value)
