"""Folders whose decoded images stay on disk have the images and labels of those in memory."""

import json

import numpy as np
import pytest
import torch
from cli_helpers import command
from data_helpers import flat_images
from PIL import Image

from pyro_vae import UsageError, load_data
from pyro_vae.data import disk, image_decoding
from pyro_vae.data.disk import DiskArray

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "BLOCK_BYTES", 60)
    return tmp_path / "cache" / "image-folders"


def write(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:03d}.png")
    return folder


def both(folder, monkeypatch, **options):
    """The same folder on disk and in memory."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    large = load_data(folder, **options)
    monkeypatch.setattr(disk, "LEAST_BYTES", 2**40)
    for path in folder.parent.glob("cache/image-folders/*/about.json"):
        path.unlink()  # so that it is decoded again
    return large, load_data(folder, **options)


def by_file(data):
    """Each image and its label, by the name of its file; each file is in one part."""
    found = {}
    for name in PARTS:
        part = getattr(data, name)
        labels = part.labels if part.labels is not None else torch.zeros(len(part.x))
        for row, image, label in zip(part.rows.tolist(), part.x[:], labels.tolist(), strict=True):
            assert data.files[row] not in found
            found[data.files[row]] = (image.tolist(), label)
    return found


@pytest.mark.parametrize("color", [None, True, False])
@pytest.mark.parametrize("pictures", [flat_images(80, 4, 6), flat_images(80, 4, 6, 3)])
def test_images_and_labels_are_those_of_a_folder_in_memory(pictures, color, tmp_path, monkeypatch):
    for i in range(2):
        write(tmp_path / "images" / f"class{i}", pictures[i::2])
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 unreadable image"):
        large, small = both(tmp_path / "images", monkeypatch, color=color)
    assert isinstance(large.train.x, DiskArray)
    assert isinstance(small.train.x, torch.Tensor)
    assert by_file(large) == by_file(small)
    assert len(by_file(large)) == 80
    assert (large.classes, large.files) == (small.classes, small.files)
    assert (large.summary, large.shape) == (small.summary, small.shape)
    assert 50 <= len(large.train.x) <= 62


def test_gray_images_that_need_color_to_be_large_are_loaded(tmp_path, monkeypatch):
    folder = write(tmp_path / "images", flat_images(80, 4, 6))
    large, small = both(folder, monkeypatch)
    monkeypatch.setattr(disk, "LEAST_BYTES", 2 * 80 * 4 * 6)  # three channels have more bytes
    for path in tmp_path.glob("cache/image-folders/*.npz"):
        path.unlink()
    found = load_data(folder)
    assert isinstance(found.train.x, torch.Tensor)
    assert by_file(found) == by_file(small) == by_file(large)


def test_a_part_without_readable_images_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "images" / "train", flat_images(60, 4, 6))
    (tmp_path / "images" / "test").mkdir()
    (tmp_path / "images" / "test" / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    refused = pytest.raises(UsageError, match="has too few readable test images")
    with pytest.warns(UserWarning, match="skipped 1"), refused:
        load_data(tmp_path / "images")


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val", "test")])
def test_folders_that_are_parts_stay_so(parts, tmp_path, monkeypatch):
    for i, part in enumerate(parts):
        write(tmp_path / "images" / part / "a", flat_images(60, 4, 6)[i::3])
        write(tmp_path / "images" / part / "b", flat_images(60, 5, 6)[i::3])
    large, small = both(tmp_path / "images", monkeypatch, image_size=(4, 6))
    assert by_file(large) == by_file(small)
    for data in (large, small):
        tops = {part: {data.files[i][:3] for i in getattr(data, part).rows} for part in PARTS}
        held = "val" if "val" in parts else "tra"
        assert tops == {"train": {"tra"}, "validation": {held}, "test": {"tes"}}


def test_images_are_decoded_once_and_changes_are_noticed(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "images", flat_images(80, 4, 6))
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    opened, one = [], image_decoding.open_image

    def counted(path, use):
        opened.append(path)
        return one(path, use)

    monkeypatch.setattr(image_decoding, "open_image", counted)
    first = by_file(load_data(folder))
    assert len(opened) == 160  # for the sizes and for the images
    assert by_file(load_data(folder)) == first
    assert len(opened) == 160
    write(folder, [np.full((4, 6), 7, np.uint8)])
    changed = by_file(load_data(folder))
    assert len(opened) == 320
    assert {name for name in first if first[name] != changed[name]} == {"000.png"}
    (file,) = cache.glob("*/x.raw")
    file.write_bytes(file.read_bytes()[:-1])
    assert by_file(load_data(folder)) == changed
    assert len(opened) == 480


def test_a_full_disk_is_no_unreadable_image(tmp_path, monkeypatch):
    folder = write(tmp_path / "images", flat_images(80, 4, 6))
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setenv("PYRO_VAE_DATA", "/dev/full/cache")
    with pytest.raises(UsageError, match="name a folder on another disk with --data-dir"):
        load_data(folder)


def test_commands_take_a_large_folder(tmp_path, monkeypatch):
    for i in range(2):
        write(tmp_path / "images" / f"class{i}", flat_images(60, 4, 6)[i::2])
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    run, words = tmp_path / "run", "--epochs 1 --num-eval-samples 2 --engine eager --latent-dim 2"
    command(f"train {tmp_path}/images --out {run} {words} --hidden 8 --diagnosis-seconds 1")
    assert json.loads((run / "metrics.json").read_text())["num_examples"] > 5
    command(f"encode {run} --out {tmp_path}/codes.npz")
    codes = np.load(tmp_path / "codes.npz")
    data = load_data(tmp_path / "images")
    assert codes["files"].tolist() == [data.files[i] for i in data.test.rows.tolist()]
    assert codes["labels"].tolist() == data.test.labels.tolist()
    command(f"score {run} --num-samples 30 --out {tmp_path}/scores.csv")
