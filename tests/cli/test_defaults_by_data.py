"""`train` without options chooses what fits the kind of the data; options and records win."""

import numpy as np
import pytest
from cli_helpers import SHORT, command, read

from pyro_vae.cli.config_file import FEW_ROWS, TABLE_DEFAULTS
from pyro_vae.data.files import declared_shape
from pyro_vae.runs import files as run_files

ROWS = np.random.default_rng(0).normal(size=(60, 4)).astype("f4")
USUAL = {"latent_dim": [20], "hidden": [128, 64], "activation": "relu"}
FEW = {name: TABLE_DEFAULTS[name] for name in ("latent_dim", "hidden", "activation", "batch_size")}

TEXT = {"word_dropout": 0.25, "warm_up": "linear", "warm_up_epochs": 20, "batch_size": 32}


def trained(path, options=SHORT):
    run = path.parent / "run"
    command(f"train {{path}} --out {{run}} --overwrite --no-report {options}", path=path, run=run)
    return read(run / "config.json")["train"]


def saved(path, **arrays):
    np.savez(path, **arrays) if path.suffix == ".npz" else np.save(path, arrays["x"])
    return path


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("a.npy", {"x": ROWS}), ("a.npz", {"x": ROWS}), ("a.npz", {"x_train": ROWS, "x_test": ROWS})],
)
def test_few_rows_get_the_defaults_of_tables(tmp_path, name, arrays):
    given = trained(saved(tmp_path / name, **arrays))
    assert {key: given[key] for key in FEW} == FEW


def test_a_batch_is_not_larger_than_few_rows(tmp_path):
    given = trained(saved(tmp_path / "a.npy", x=ROWS[:20]))
    assert given["batch_size"] < 20


def test_typed_options_win(tmp_path):
    given = trained(saved(tmp_path / "a.npy", x=ROWS), f"{SHORT} --latent-dim 3 --batch-size 10")
    assert (given["latent_dim"], given["batch_size"], given["hidden"]) == ([3], 10, [64])


def test_images_and_many_rows_keep_the_usual_defaults(tmp_path):
    images = saved(tmp_path / "images.npy", x=(ROWS.reshape(-1, 2, 2) > 0).astype("u1"))
    given = trained(images)
    assert {key: given[key] for key in USUAL} == USUAL
    many = np.zeros((FEW_ROWS + 1, 1), dtype="u1")
    many[::2] = 1
    given = trained(saved(tmp_path / "many.npy", x=many), f"{SHORT} --batch-size 3500")
    assert {key: given[key] for key in USUAL} == USUAL


def test_text_gets_word_dropout_and_warm_up(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{a}{b}\n" for a in "abcdefg" for b in "stuvwxyz"))
    given = trained(path, f"{SHORT} --hidden 4")
    assert {key: given[key] for key in TEXT} == TEXT
    given = trained(path, f"{SHORT} --hidden 4 --warm-up none --word-dropout 0")
    assert (given["word_dropout"], given["warm_up"]) == (0, "none")


def test_few_lines_are_one_batch(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{a}{b}\n" for a in "abc" for b in "stuvwx"))
    given = trained(path, f"{SHORT} --hidden 4")
    assert "batch_size" not in given  # the default of `fit`: all rows, if they are few
    assert given["word_dropout"] == TEXT["word_dropout"]


def test_a_run_of_an_earlier_version_resumes_with_its_own_values(tmp_path):
    """Its config.json has no batch size, because the default was recorded as no value."""
    path, run = saved(tmp_path / "a.npy", x=ROWS), tmp_path / "run"
    old = "--latent-dim 20 --hidden 128 64 --activation relu --batch-size 42"
    trained(path, f"{SHORT} {old}")
    config = read(run / "config.json")
    del config["train"]["batch_size"]
    run_files.write_json(run / "config.json", config)
    command("train {path} --out {run} --resume --no-report", path=path, run=run)
    assert "batch_size" not in read(run / "config.json")["train"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04 broken", b"\x80\x04pickle"])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_a_damaged_file_declares_no_shape(tmp_path, content, ending):
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    assert declared_shape(path) is None
    assert declared_shape(tmp_path / f"none{ending}") is None


def test_a_typed_batch_larger_than_other_data_is_refused(tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{a}{b}\n" for a in "abc" for b in "stuvwx"))
    with pytest.raises(SystemExit):
        trained(path, f"{SHORT} --batch-size 32")
    assert "--batch-size must be at most" in capsys.readouterr().err
