"""Data from files."""

import pickle

import numpy as np
import pytest
import torch
from data_helpers import rows

import pyro_vae as pv
from pyro_vae.data.datasets import load_data
from pyro_vae.errors import UsageError


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


def test_npz_of_three_parts_keeps_them(tmp_path):
    sizes = {"train": 12, "validation": 5, "test": 3}
    arrays = {f"x_{name}": np.full((n, 2, 2), n, np.uint8) for name, n in sizes.items()}
    loaded = archive(tmp_path / "mine.npz", **arrays)
    for name, n in sizes.items():
        assert torch.equal(getattr(loaded, name).x, torch.full((n, 1, 2, 2), n).byte())


@pytest.mark.parametrize(("shape", "row"), [((), (1,)), ((3,), (3,)), ((4, 5), (1, 4, 5))])
def test_npz_with_context_gives_each_row_its_context(shape, row, tmp_path):
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


REJECTED_NPY = {
    "rank 1": (np.zeros(20), ["(20,)", "expected"]),
    "rank 5": (np.zeros((20, 2, 2, 2, 2)), ["(20, 2, 2, 2, 2)", "expected"]),
    "five channels": (np.zeros((20, 5, 5, 5)), ["(20, 5, 5, 5)", "channels"]),
    "a number": (np.float64(3.0), ["a row for each datum", "the number 3"]),
    "no rows": (np.zeros((0, 3)), ["empty", "(0, 3)"]),
    "no columns": (np.zeros((20, 0)), ["empty", "(20, 0)"]),
    "nine rows": (np.zeros((9, 3)), ["9 rows", "at least 10"]),
    "one row": (np.zeros((1, 3)), ["1 row", "at least 10"]),
    "objects": (OBJECTS, ["pickle"]),
    "words": (np.array([["a", "b"]] * 20), ["numbers", "<U1"]),
    "complex": (np.zeros((20, 3), complex), ["real", "complex128"]),
    "infinity": (np.where(np.arange(60) == 31, np.inf, 0).reshape(20, 3), ["not finite", "row 10"]),
}


@pytest.mark.parametrize(("array", "words"), REJECTED_NPY.values(), ids=REJECTED_NPY)
def test_npy_that_is_rejected(array, words, tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(UsageError) as caught:
        load_data(path)
    assert "mine" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


REJECTED_NPZ = {
    "unknown key": ({"images": X}, ["'x'", "'x_train'", "images"]),
    "no test part": ({"x_train": X}, ["'x_test'", "x_train"]),
    "nothing": ({}, ["'x'", "no arrays"]),
    "nine rows": ({"x": X[:9]}, ["9 rows", "at least 10"]),
    "no rows": ({"x": X[:0]}, ["empty"]),
    "objects": ({"x": OBJECTS}, ["pickle"]),
    "objects as labels": ({"x": X, "y": OBJECTS[:, 0]}, ["pickle"]),
    "too few labels": ({"x": X, "y": np.zeros(19, int)}, ["19", "20"]),
    "words as labels": ({"x": X, "y": np.array(["cat"] * 20)}, ["whole numbers", "<U3"]),
    "negative labels": ({"x": X, "y": np.full(20, -1)}, ["whole numbers", "-1"]),
    "halves as labels": ({"x": X, "y": np.full(20, 0.5)}, ["whole numbers", "0.5"]),
    "too little context": ({"x": X, "context": X[:19]}, ["context has 19 rows", "20"]),
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


@pytest.mark.parametrize(("arrays", "words"), REJECTED_NPZ.values(), ids=REJECTED_NPZ)
def test_npz_that_is_rejected(arrays, words, tmp_path):
    with pytest.raises(UsageError) as caught:
        archive(tmp_path / "mine.npz", **arrays)
    assert "mine" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Marker:
    """Unpickling this object creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["mine.npy", "mine.npz"])
@pytest.mark.parametrize("raw", [True, False])
def test_a_pickle_in_an_array_file_is_rejected_and_not_executed(raw, name, tmp_path):
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
def test_an_array_file_that_is_cut_short_is_a_usage_error(name, share, tmp_path):
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
        ("table.xls", ["table.xls", ".txt or .json"]),
        ("mnits", ["'mnits'", "did you mean 'mnist'?"]),
        ("zzz", ["'zzz'", "digits", "svhn", ".txt or .json"]),
    ],
)
def test_unknown_names_and_files(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.xls").write_text("1,2\n3,4\n")
    with pytest.raises(UsageError) as caught:
        load_data(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_one_hot():
    rows = pv.one_hot(torch.tensor([2, 0], dtype=torch.uint8), 3)
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert rows.dtype == torch.float32
