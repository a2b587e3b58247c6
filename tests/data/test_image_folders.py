"""Folders of images: right values, labels, the cache, broken files, defaults, the command line."""

import io
import json
import os
import shutil
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_helpers import command, is_png, read
from data_helpers import flat_images
from PIL import Image

from pyro_vae import UsageError, load_data
from pyro_vae.data import image_decoding, sizes
from pyro_vae.data.split import part_of

TINY = "--epochs 1 --num-eval-samples 2 --engine eager --latent-dim 2 --hidden 8 --no-report"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of a test's own."""
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder, arrays, kind="png", **options):
    """Write arrays (height, width) or (height, width, 3) as images 00, 01, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}.{kind}", **options)
    return folder


def in_order(data):
    """All images of a folder, in the order of the files."""
    return part_of(data, "all").x.numpy()


def only(tmp_path, image, name="one.png", **options):
    """The pixels of one image, which is saved among ten gray images of the size 4 x 6."""
    folder = write(tmp_path / "images", np.zeros((10, 4, 6), np.uint8))
    image.save(folder / name)
    data = load_data(folder, image_size=(4, 6), **options)
    return in_order(data)[data.files.index(name)]


COLOR = flat_images(12, 4, 6, 3)

GRAY = flat_images(12, 4, 6)


# Values


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "PNG"])
def test_lossless_images_of_the_size_keep_their_pixels(tmp_path, kind):
    data = load_data(write(tmp_path / "a", COLOR, kind))
    assert data.shape == (3, 4, 6)
    assert data.train.x.dtype == torch.uint8
    assert np.array_equal(in_order(data), COLOR.transpose(0, 3, 1, 2))
    assert [len(part.x) for part in (data.train, data.validation, data.test)] == [8, 1, 3]


def test_gray_images_have_one_channel_also_if_they_are_stored_in_color(tmp_path):
    for name, arrays in {"a": GRAY, "b": np.repeat(GRAY[..., None], 3, 3)}.items():
        data = load_data(write(tmp_path / name, arrays))
        assert np.array_equal(in_order(data), GRAY[:, None])
    assert load_data(tmp_path / "a", color=True).shape == (3, 4, 6)


def test_one_image_in_color_makes_all_color_unless_gray_is_asked(tmp_path):
    folder = write(tmp_path / "a", GRAY)
    Image.fromarray(COLOR[0]).save(folder / "99.png")
    x = in_order(load_data(folder))
    assert np.array_equal(x[:12], np.repeat(GRAY[:, None], 3, 1))
    assert np.array_equal(x[12], COLOR[0].transpose(2, 0, 1))
    gray = in_order(load_data(folder, color=False))
    luma = COLOR[0] @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert gray.shape == (13, 1, 4, 6)
    assert np.abs(gray[12, 0] - luma).max() <= 1


def test_sixteen_bit_gray_keeps_its_proportions(tmp_path):
    values = np.array([[0, 257, 32768, 65535, 128, 129]] * 4, np.uint16)
    expected = [[0, 1, 128, 255, 0, 1]] * 4  # value / 257, rounded
    assert only(tmp_path, Image.fromarray(values))[0].tolist() == expected


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray((np.arange(24).reshape(4, 6) % 3).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 250, 0, 9])
    pixels = only(tmp_path, image)
    assert pixels[:, 0, :3].T.tolist() == [[10, 20, 30], [40, 50, 60], [250, 0, 9]]


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.full((4, 6, 4), (200, 0, 100, 255), np.uint8)
    pixels[0, 0, 3] = 0
    found = only(tmp_path, Image.fromarray(pixels))
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    assert found[:, 1, 1].tolist() == [200, 0, 100]


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    found = only(tmp_path, image, "one.tiff")
    assert found[:, 2, 2].tolist() == [255, 0, 0]


def test_a_jpeg_is_close_to_its_source(tmp_path):
    found = only(tmp_path, Image.new("RGB", (6, 4), (30, 100, 200)), "one.jpg")
    assert np.abs(found[:, 2, 2].astype(int) - [30, 100, 200]).max() <= 4


def test_a_rotated_photo_is_turned_upright_also_for_the_default_size(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    for i, array in enumerate(COLOR):
        Image.fromarray(array).save(folder / f"{i:02d}.png", exif=exif)
    expected = np.rot90(COLOR, -1, (1, 2)).transpose(0, 3, 1, 2)
    assert np.array_equal(in_order(load_data(folder)), expected)


def test_the_first_picture_of_an_animation_is_taken(tmp_path):
    folder = write(tmp_path / "a", np.zeros((10, 4, 6), np.uint8))
    frames = [Image.new("L", (6, 4), value) for value in (200, 100)]
    frames[0].save(folder / "z.gif", save_all=True, append_images=frames[1:])
    assert (in_order(load_data(folder))[10] == 200).all()


# Sizes


def striped():
    """A 4 x 12 image: its thirds are black, gray and white."""
    return np.repeat(np.array([0, 100, 255], np.uint8), 4)[None].repeat(4, 0)


def test_crop_keeps_the_center_and_no_crop_stretches(tmp_path):
    folder = write(tmp_path / "a", [striped()] * 10)
    assert (in_order(load_data(folder, image_size=4)) == 100).all()
    # The same as resizing the whole image, and then cutting.
    whole = np.asarray(Image.fromarray(striped()).resize((6, 2), Image.Resampling.BILINEAR))
    assert np.array_equal(in_order(load_data(folder, image_size=2))[0, 0], whole[:, 2:4])
    stretched = in_order(load_data(folder, image_size=(4, 3), crop=False))[0, 0, 0]
    assert stretched[0] < 30
    assert stretched[1] == pytest.approx(110, abs=15)
    assert stretched[2] > 225


def test_an_extremely_long_image_needs_little_memory(tmp_path):
    long = Image.new("L", (2_000_000, 1), 77)  # scaled to 64 rows: eight gigabytes
    folder = write(tmp_path / "a", np.zeros((10, 4, 6), np.uint8))
    long.save(folder / "long.png")
    assert (in_order(load_data(folder, image_size=64))[10] == 77).all()


def test_the_default_size_is_that_of_most_images_or_the_median(tmp_path):
    most = write(tmp_path / "most", [*flat_images(9, 5, 7), *flat_images(3, 90, 80)])
    data = load_data(most)
    assert data.shape == (1, 5, 7)
    assert data.summary == (
        "12 gray images of 5 x 7 (height x width), scaled and cropped; the files have 5 x 7 to "
        "90 x 80"
    )
    each = [np.zeros((size, 20), np.uint8) for size in range(10, 31)]
    assert load_data(write(tmp_path / "median", each)).shape == (1, 20, 20)


def test_sizes_without_a_sensible_default_are_refused(tmp_path):
    folder = write(tmp_path / "a", [np.zeros((size, 9), np.uint8) for size in range(4, 24)])
    with pytest.raises(UsageError, match=r"image_size is needed: .* 4 x 9 to 23 x 9"):
        load_data(folder)
    assert load_data(folder, image_size=8).shape == (1, 8, 8)


@pytest.mark.parametrize("size", [0, -1, (1, 2, 3), (), 2.5, True])
def test_a_wrong_size_is_refused(tmp_path, size):
    with pytest.raises(UsageError, match="image_size must be one positive number"):
        load_data(write(tmp_path / "a", GRAY), image_size=size)


def test_too_much_memory_or_disk_is_refused_before_decoding(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", GRAY)
    with pytest.raises(UsageError, match=r"image_size must be smaller: 20000 x 20000 pixels"):
        load_data(folder, image_size=20_000)
    monkeypatch.setattr(sizes, "available_memory", lambda: 100)
    with pytest.raises(UsageError, match=r"the images of .* needs .* GiB of memory"):
        load_data(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UsageError, match=r"need 2\.1 GiB in .*, whose disk has 1\.0 GiB left"):
        load_data(folder, image_size=8000)


def test_options_of_images_are_refused_for_other_data():
    for options in ({"image_size": 8}, {"color": True}, {"crop": False}):
        with pytest.raises(UsageError, match=f"{next(iter(options))} applies only to a folder"):
            load_data("digits", **options)


# Labels


def test_sub_folders_are_labels_and_rows_keep_their_paths(tmp_path):
    for name, arrays in {"dogs": GRAY[:5], "cats/old": GRAY[5:8], "cats": GRAY[8:]}.items():
        write(tmp_path / "a" / name, arrays)
    data = load_data(tmp_path / "a")
    whole = part_of(data, "all")
    assert data.classes == ("cats", "dogs")
    assert data.num_classes == 2
    assert data.files[:5] == tuple(
        f"cats/{name}.png" for name in ("00", "01", "02", "03", "old/00")
    )
    assert whole.labels.tolist() == [0] * 7 + [1] * 5
    for part in (data.train, data.validation, data.test):
        for row, x, label in zip(part.rows.tolist(), part.x, part.labels, strict=True):
            path = tmp_path / "a" / data.files[row]
            assert np.array_equal(x[0], np.asarray(Image.open(path)))
            assert data.files[row].startswith(data.classes[int(label)])


def test_one_sub_folder_does_not_make_a_label(tmp_path):
    write(tmp_path / "a" / "images", GRAY)
    (tmp_path / "a" / "notes.txt").write_text("hidden files and other files are ignored")
    (tmp_path / "a" / "images" / "._00.png").write_bytes(b"metadata of a Mac")
    data = load_data(tmp_path / "a")
    assert data.train.labels is None
    assert data.classes is None
    assert len(data.files) == 12
    assert data.summary.endswith("1 other files ignored")


def test_a_link_that_leads_back_ends(tmp_path):
    folder = write(tmp_path / "a" / "b", GRAY)
    (folder / "back").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(load_data(tmp_path / "a").files) == 12


def refused(folder, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_data(folder)
    assert "\n" not in str(caught.value)


def test_layouts_without_a_meaning_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "must hold images .* it has no files")
    (tmp_path / "empty" / "a.txt").write_text("a")
    refused(tmp_path / "empty", "it has 1 files, none with such an ending")
    write(tmp_path / "mixed", GRAY)
    write(tmp_path / "mixed" / "cats", GRAY)
    refused(tmp_path / "mixed", r"images beside sub-folders of images \(cats\)")
    write(tmp_path / "parts" / "train", GRAY)
    write(tmp_path / "parts" / "Training", GRAY)
    refused(tmp_path / "parts", "sub-folders Training, train, which are parts and not labels")
    refused(write(tmp_path / "few", GRAY[:9]), "few has 9 readable images")


# Broken files


def bomb():
    """A small file that claims to be a PNG image of 30000 x 30000 pixels."""
    image = io.BytesIO()
    Image.new("1", (6, 4)).save(image, "PNG")
    content = bytearray(image.getvalue())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def cut():
    image = io.BytesIO()
    Image.fromarray(flat_images(1, 40, 60, 3)[0]).save(image, "PNG")
    return image.getvalue()[:2000]


BROKEN = {
    "nonsense": (b"nonsense", "not a PNG, JPEG"),
    "empty": (b"", "not a PNG, JPEG"),
    "cut": (cut(), "truncated"),
    "bomb": (bomb(), "pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 6\n", "not a PNG, JPEG"),
}


@pytest.mark.parametrize("options", [{}, {"image_size": (4, 6)}])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_skipped_and_named(tmp_path, name, options):
    content, why = BROKEN[name]
    folder = write(tmp_path / "a", GRAY)
    (folder / "05b.png").write_bytes(content)
    for _ in range(2):  # also from the cache
        with pytest.warns(
            UserWarning, match=rf"skipped 1 unreadable image of .*\n  05b.png: .*{why}"
        ):
            data = load_data(folder, **options)
        assert "05b.png" not in data.files
        assert np.array_equal(in_order(data), GRAY[:, None])


def test_floats_are_not_guessed(tmp_path):
    folder = write(tmp_path / "a", GRAY)
    Image.fromarray(np.ones((4, 6), np.float32)).save(folder / "f.tiff")
    with pytest.warns(UserWarning, match="f.tiff: its intensities are floats"):
        load_data(folder)


def test_more_broken_files_than_the_limit_are_refused_in_one_line(tmp_path):
    folder = write(tmp_path / "a", flat_images(57, 4, 6))
    for name in ("x", "y", "z"):
        (folder / f"{name}.png").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="3 unreadable images"):  # 3 of 60 are 5 %
        load_data(folder)
    (folder / "w.png").write_bytes(b"nonsense")
    refused(folder, r"at most 3 of 61 images may be unreadable, .*w.png \(not a PNG, JPEG")


# The cache


def counted(monkeypatch):
    """The names of the files that are opened from now on."""
    opened, real = [], image_decoding.open_image
    monkeypatch.setattr(
        image_decoding, "open_image", lambda path, use: opened.append(path.name) or real(path, use)
    )
    return opened


def test_a_second_load_decodes_nothing_and_changes_are_noticed(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", COLOR)
    first = load_data(folder, image_size=3)
    opened = counted(monkeypatch)
    second = load_data(folder, image_size=3)
    assert opened == []
    assert second.files == first.files
    assert second.summary == first.summary
    assert np.array_equal(in_order(second), in_order(first))
    Image.fromarray(255 - COLOR[3]).save(folder / "03.png")
    changed = in_order(load_data(folder, image_size=3))
    assert len(opened) == 12
    assert not np.array_equal(changed[3], in_order(first)[3])
    (folder / "04.png").rename(folder / "99.png")
    assert load_data(folder, image_size=3).files[-1] == "99.png"
    assert len(load_data(folder, image_size=3, color=False).shape) == 3
    assert len(opened) == 36


@pytest.mark.parametrize("damage", ["bit", "cut", "pickle", "empty"])
def test_a_damaged_cache_is_decoded_again(tmp_path, cache, monkeypatch, damage):
    folder = write(tmp_path / "a", COLOR)
    load_data(folder)
    (path,) = cache.rglob("*.npz")
    content = bytearray(path.read_bytes())
    content[-400 - COLOR.nbytes // 2] ^= 1
    pickled = io.BytesIO()
    np.savez(pickled, key=np.array([{}], dtype=object))
    kinds = {"bit": content, "cut": content[:700], "pickle": pickled.getvalue(), "empty": b""}
    path.write_bytes(kinds[damage])
    opened = counted(monkeypatch)
    assert np.array_equal(in_order(load_data(folder)), COLOR.transpose(0, 3, 1, 2))
    assert len(set(opened)) == 12
    opened.clear()
    load_data(folder)
    assert opened == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_named_and_the_data_are_right(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the decoded images cannot be kept"):
        data = load_data(write(tmp_path / "a", COLOR))
    assert np.array_equal(in_order(data), COLOR.transpose(0, 3, 1, 2))


# The command line


@pytest.mark.filterwarnings("default:skipped 1 unreadable")
def test_train_sample_encode_and_score_a_folder(tmp_path, capsys):
    for name, few in (("cats", COLOR[:6]), ("dogs", COLOR[6:])):
        write(tmp_path / "pets" / name, few)
    (tmp_path / "pets" / "cats" / "bad.png").write_bytes(b"nonsense")
    run = tmp_path / "run"
    line = "train {pets} --out {run} --image-size 4 --batch-size 4 --condition label " + TINY
    command(line, pets=tmp_path / "pets", run=run)
    shown = capsys.readouterr()
    assert "likelihood          discretized-logistic, for color images" in shown.out
    assert "labels              0 cats, 1 dogs" in shown.out
    assert "12 color images of 4 x 4" in shown.out
    assert "binarized" not in shown.out
    assert "skipped 1 unreadable image" in shown.err
    assert "bad.png" in shown.err
    options = read(run / "config.json")["train"]
    assert options["likelihood"] == "discretized-logistic"
    assert options["classes"] == [
        "cats",
        "dogs",
    ]

    command("sample {run} --num 3", run=run)
    assert np.load(run / "samples.npy").shape == (3, 3, 4, 4)
    assert is_png(run / "figures" / "samples.png")
    command("encode {run} --part all", run=run)
    codes = np.load(run / "codes.npz")
    files = [f"{name}/{i:02d}.png" for name in ("cats", "dogs") for i in range(6)]
    assert codes["files"].tolist() == files
    assert codes["rows"].tolist() == list(range(12))
    command("encode {run} --part all --out {out}", run=run, out=tmp_path / "codes.csv")
    assert (tmp_path / "codes.csv").read_text().splitlines()[1].startswith('"cats/00.png",')
    command("score {run} --num-samples 25", run=run)
    assert set(np.load(run / "scores.npz")["files"]) < set(files)
    command(line.replace("--epochs 1", "--resume --epochs 2"), pets=tmp_path / "pets", run=run)


def test_another_folder_is_read_at_the_size_and_color_of_the_run(tmp_path):
    write(tmp_path / "a", COLOR)
    write(tmp_path / "b", flat_images(10, 9, 9))
    command("train {a} --out {run} --batch-size 4 " + TINY, a=tmp_path / "a", run=tmp_path / "run")
    line = "encode {run} --data {b} --out {out}"
    command(line, run=tmp_path / "run", b=tmp_path / "b", out=tmp_path / "codes.npz")
    assert np.load(tmp_path / "codes.npz")["z_mean"].shape == (10, 2)


def trained(tmp_path, options=""):
    command(f"train {{x}} --out {{run}} --batch-size 4 {options} {TINY}", **tmp_path)
    return json.loads((tmp_path["run"] / "config.json").read_text())["train"]["likelihood"]


@pytest.mark.parametrize(
    ("x", "options", "likelihood", "binarized"),
    [
        (COLOR, "", "discretized-logistic", False),
        (COLOR, "--likelihood bernoulli", "bernoulli", True),
        (COLOR, "--likelihood gaussian", "gaussian", False),
        (GRAY, "", "bernoulli", True),
        (GRAY, "--binarize fixed", "bernoulli", True),
        ((GRAY > 127) * np.uint8(255), "", "bernoulli", False),
        (COLOR % 2, "--likelihood bernoulli", "bernoulli", False),
        (COLOR / 255, "", "bernoulli", True),
    ],
)
def test_the_default_likelihood_of_arrays(tmp_path, capsys, x, options, likelihood, binarized):
    np.save(tmp_path / "x.npy", x)
    paths = {"x": tmp_path / "x.npy", "run": tmp_path / "run"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x is uint8 with only the values 0 and 1")
        assert trained(paths, options) == likelihood
    out = capsys.readouterr().out
    assert ("binarized           intensities become 0 or 1" in out) == binarized
    chosen = "discretized-logistic, for color images" in out
    assert chosen == (not options and likelihood != "bernoulli")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--image-size 4 4 4", "--image-size must be one positive number"),
        (
            "--binarize fixed",
            "--binarize applies only with --likelihood bernoulli; got --likelihood",
        ),
        ("--columns c.toml", "--columns applies only to tables"),
        ("--group g --model multilevel", "--group needs a table or a .npz file"),
        ("--length 20", "--length applies only to text"),
        ("--image-size 100000", "--image-size must be smaller"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, words):
    write(tmp_path / "a", COLOR)
    with pytest.raises(SystemExit) as caught:
        command(f"train {{a}} --out {{run}} {options}", a=tmp_path / "a", run=tmp_path / "run")
    shown = capsys.readouterr().err
    assert caught.value.code == 2
    assert words in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_folder_that_one_is_in_can_be_trained_on(tmp_path, monkeypatch):
    write(tmp_path / "photos", COLOR)
    monkeypatch.chdir(tmp_path / "photos")
    command(f"train . --out {{run}} --batch-size 4 {TINY}", run=tmp_path / "run")
    assert load_data(".").name == "photos"
    assert os.path.isfile(tmp_path / "run" / "config.json")
