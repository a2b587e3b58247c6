"""A folder with the sub-folders train and test is split as they say; labels are below them."""

import numpy as np
import pytest
import torch
from cli_helpers import QUICK, command, read
from data_helpers import flat_images
from PIL import Image

from pyro_vae import UsageError, load_data
from pyro_vae.data.split import part_of

X = flat_images(30, 4, 6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))


def write(folder, numbers):
    folder.mkdir(parents=True)
    for i in numbers:
        Image.fromarray(X[i]).save(folder / f"{i:02d}.png")


def files(data, split):
    return [data.files[row] for row in split.rows.tolist()]


def test_three_folders_are_the_three_parts_with_labels_below(tmp_path):
    folder = tmp_path / "pets"
    for part, start in (("train", 0), ("val", 10), ("test", 20)):
        write(folder / part / "cats", range(start, start + 3))
        write(folder / part / "dogs", range(start + 3, start + 7))
    data = load_data(folder)
    assert data.classes == ("cats", "dogs")
    parts = {"train": data.train, "val": data.validation, "test": data.test}
    for (name, split), start in zip(parts.items(), (0, 10, 20), strict=True):
        assert {file.split("/")[0] for file in files(data, split)} == {name}
        assert np.array_equal(split.x[:, 0].numpy(), X[start : start + 7])
        assert split.labels.tolist() == [0] * 3 + [1] * 4
    assert len(part_of(data, "all").x) == 21


@pytest.mark.parametrize("other", ["test", "Testing", "val", "validation"])
def test_two_folders_are_training_and_test_data(tmp_path, other):
    """A sixth of the training images validates."""
    write(tmp_path / "a" / "train", range(12))
    write(tmp_path / "a" / other, range(12, 16))
    data = load_data(tmp_path / "a")
    assert [len(s.x) for s in (data.train, data.validation, data.test)] == [10, 2, 4]
    assert data.classes is None
    assert data.test.labels is None
    assert np.array_equal(data.test.x[:, 0].numpy(), X[12:16])
    trained = torch.cat([data.train.rows, data.validation.rows]).sort().values
    assert [data.files[row] for row in trained] == [f"train/{i:02d}.png" for i in range(12)]


def test_a_folder_of_another_name_makes_all_of_them_labels(tmp_path):
    for name in ("train", "test", "bus"):
        write(tmp_path / "a" / name, range(5))
    assert load_data(tmp_path / "a").classes == ("bus", "test", "train")


@pytest.mark.parametrize("names", [("test", "val"), ("train", "training"), ("test", "testing")])
def test_parts_without_training_or_test_images_are_refused(tmp_path, names):
    for name in names:
        write(tmp_path / "a" / name, range(6))
    with pytest.raises(UsageError, match="name one train, one test, and optionally one validation"):
        load_data(tmp_path / "a")


def test_a_part_whose_images_are_all_unreadable_is_refused(tmp_path):
    write(tmp_path / "a" / "train", range(12))
    (tmp_path / "a" / "test").mkdir()
    (tmp_path / "a" / "test" / "one.png").write_text("no image")
    with (
        pytest.warns(UserWarning, match="skipped 1 unreadable image"),
        pytest.raises(UsageError, match="a has too few readable test images"),
    ):
        load_data(tmp_path / "a")


@pytest.mark.thorough
def test_the_report_names_the_files_of_its_worst_pictures(tmp_path):
    write(tmp_path / "a" / "train", range(12))
    write(tmp_path / "a" / "test", range(12, 16))
    paths = {"a": tmp_path / "a", "run": tmp_path / "run"}
    command(f"train {{a}} --out {{run}} --batch-size 4 {QUICK} --no-report", **paths)
    command("diagnose {run} --budget 2", **paths)
    found = read(tmp_path / "run" / "metrics.json")["diagnostics"]
    head, *lines = found["worst_data"].splitlines()
    assert head.split() == ["row", "files"]
    assert [int(line.split()[0]) for line in lines] == found["worst_rows"]
    assert all(line.split()[1] == f"test/{12 + int(line.split()[0])}.png" for line in lines)
    assert lines[0] in (tmp_path / "run" / "report.html").read_text()
