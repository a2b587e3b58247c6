"""Held-out rows were not used in training, or the tools report that they were."""

import json
import shutil

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data.datasets import load_data
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import held_out_rows

pytestmark = pytest.mark.filterwarnings("always:.*equal training or validation")

TRAIN = (
    "--likelihood gaussian --latent-dim 2 --hidden 8 --epochs 1 --batch-size 32 --engine eager "
    "--num-eval-samples 2 --no-report"
)
ROWS = 100


def arrays():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 4)).astype("float32")
    return {"x": x, "y": np.arange(ROWS) % 3, "context": generator.normal(size=(ROWS, 2))}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    np.savez(folder / "data.npz", **arrays())
    main(f"train {folder}/data.npz --out {folder}/run --condition label context {TRAIN}".split())
    return folder


@pytest.fixture
def here(shelf, tmp_path, monkeypatch):
    """A run, with its data at the recorded path."""
    folder = shutil.copytree(shelf, tmp_path / "here")
    config = json.loads((folder / "run/config.json").read_text())
    config["train"]["data"] = "data.npz"
    run_files.write_json(folder / "run/config.json", config)
    monkeypatch.chdir(folder)
    return folder


def metrics(folder):
    return json.loads((folder / "run/metrics.json").read_text())


def refusal(line, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def appended(data):
    more = {k: np.concatenate([v, v[:1] + (k == "x")]) for k, v in data.items()}
    return more


def reordered(data):
    order = np.random.default_rng(1).permutation(ROWS)
    return {name: value[order] for name, value in data.items()}


def with_one(name, row, data):
    data[name][row] = data[name][row] + 1
    return data


CHANGES = {
    "a row appended": appended,
    "a row removed": lambda data: {k: v[1:] for k, v in data.items()},
    "rows in another order": reordered,
    "two rows swapped": lambda data: {k: v[[1, 0, *range(2, ROWS)]] for k, v in data.items()},
    **{
        f"a {name} changed in row {row}": lambda data, name=name, row=row: with_one(name, row, data)
        for name in ("x", "y", "context")
        for row in (0, ROWS - 1)
    },
    "the last bit of a number": lambda data: data | {"x": np.nextafter(data["x"], np.float32(9))},
    "another type": lambda data: data | {"x": data["x"].astype(np.float64)},
    "other data of the same shape": lambda data: data | {"x": data["x"][::-1] * 2},
    "labels gone": lambda data: {"x": data["x"], "context": data["context"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_whose_data_have_changed_is_rejected(change, here, capsys):
    np.savez(here / "data.npz", **change(arrays()))
    before = (here / "run/metrics.json").read_bytes()
    for line in ("evaluate run", "encode run --part test", "train data.npz --out run --resume"):
        error = refusal(line, capsys)
        assert "data has changed since run was trained" in error or "labels" in error
    assert (here / "run/metrics.json").read_bytes() == before


COMMANDS = ("evaluate", "diagnose", "reconstruct", "encode", "interpolate", "traverse", "report")


@pytest.mark.parametrize("command", [*COMMANDS, "sample"])
def test_every_command_that_reads_the_data_rejects_changed_data(command, here, capsys):
    np.savez(here / "data.npz", **appended(arrays()))
    assert "train, validation, test rows differ" in refusal(f"{command} run", capsys)


def test_the_parts_that_have_changed_are_named(here, capsys):
    """A file with three parts may change in only one of them."""
    x = arrays()["x"]
    parts = {"x_train": x[:60], "x_validation": x[60:80], "x_test": x[80:]}
    np.savez(here / "parts.npz", **parts)
    main(f"train parts.npz --out other {TRAIN}".split())
    for name in ("train", "validation", "test"):
        changed = parts | {f"x_{name}": parts[f"x_{name}"] + 1}
        np.savez(here / "parts.npz", **changed)
        assert f"its {name} rows differ" in refusal("evaluate other", capsys)
        assert name in refusal("train parts.npz --out other --resume --epochs 2", capsys)
    np.savez(here / "parts.npz", **parts)
    main(["evaluate", "other", "--num-samples", "2"])


def test_unchanged_data_are_accepted_at_another_path(here, capsys):
    before = metrics(here)
    main(["evaluate", "run", "--num-samples", "2"])
    assert metrics(here) == before
    (here / "moved").mkdir()
    (here / "data.npz").rename(here / "moved/data.npz")
    main(["evaluate", "run", "--num-samples", "2", "--data", "moved/data.npz"])
    assert metrics(here) == before
    assert "rows_trained_on" not in before
    assert "trained on" not in capsys.readouterr().err


def test_other_data_are_counted_row_by_row(here, capsys):
    """The number agrees with an independent comparison of the rows."""
    np.savez(here / "more.npz", **appended(arrays()))
    own, other = load_data(here / "data.npz"), load_data(here / "more.npz")
    seen = {tuple(row) for part in (own.train, own.validation) for row in part.x.tolist()}
    count = sum(tuple(row) in seen for row in other.test.x.tolist())
    assert 10 < count < len(other.test.x) == 21
    main(["evaluate", "run", "--num-samples", "2", "--data", "more.npz"])
    error = capsys.readouterr().err
    assert f"{count} of 21 test rows of more equal training or validation rows of run" in error
    assert metrics(here)["rows_trained_on"] == count
    main(["diagnose", "run", "--budget", "0.1", "--data", "more.npz", "--no-report"])
    assert metrics(here)["diagnostics"]["rows_trained_on"] == count
    assert f"{count} of 21" in capsys.readouterr().err


def test_the_report_names_the_data_and_the_number_of_training_rows_in_them(here):
    np.savez(here / "more.npz", **appended(arrays()))
    main(["evaluate", "run", "--num-samples", "2", "--data", "more.npz"])
    main(["report", "run"])
    page = (here / "run/report.html").read_text()
    count = metrics(here)["rows_trained_on"]
    assert f"equal to training or validation rows</td><td>{count}</td>" in page
    assert "The numbers describe the test part of more." in page


def test_data_without_a_row_in_common_are_marked_with_0(here, capsys):
    np.savez(here / "new.npz", **arrays() | {"x": arrays()["x"] + 10})
    main(["evaluate", "run", "--num-samples", "2", "--data", "new.npz"])
    assert metrics(here)["rows_trained_on"] == 0
    assert "trained on" not in capsys.readouterr().err


def test_the_same_rows_in_another_type_are_the_same_rows(here):
    np.savez(here / "more.npz", **arrays() | {"x": arrays()["x"].astype(np.float64)})
    main(["evaluate", "run", "--num-samples", "2", "--data", "more.npz"])
    assert metrics(here)["rows_trained_on"] == 0  # the split is the same, so these are test rows
    np.savez(here / "more.npz", **reordered(arrays() | {"x": arrays()["x"].astype(np.float64)}))
    main(["evaluate", "run", "--num-samples", "2", "--data", "more.npz"])
    assert metrics(here)["rows_trained_on"] > 10


def test_a_run_from_python_counts_rows_too(tmp_path, capsys):
    np.save(tmp_path / "x.npy", arrays()["x"])
    data = load_data(tmp_path / "x.npy")
    pair = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Gaussian())
    options = {"epochs": 1, "engine": "eager", "progress": False, "out": tmp_path / "run"}
    pv.fit(pair, data.test.x, validation=(data.validation.x,), **options)
    main(f"evaluate {tmp_path}/run --num-samples 2 --data {tmp_path}/x.npy".split())
    assert "20 of 20 test rows" in capsys.readouterr().err
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["rows_trained_on"] == 20


@pytest.mark.parametrize("binarize", ["dynamic", "fixed"])
def test_binarization_and_seeds_do_not_hide_rows(binarize, tmp_path):
    """Rows are recorded before binarization."""
    x = np.random.default_rng(0).integers(0, 256, (60, 4)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    line = f"train {tmp_path}/x.npy --out {tmp_path}/run --binarize {binarize} --seed 3 --epochs 1"
    main(f"{line} --batch-size 8 --engine eager --num-eval-samples 2 --no-report".split())
    main(f"evaluate {tmp_path}/run --num-samples 2".split())
    data = load_data(tmp_path / "x.npy")
    assert held_out_rows.count_seen(tmp_path / "run", data.test.x) == 0
    assert held_out_rows.count_seen(tmp_path / "run", data.train.x) == len(data.train.x)
    assert held_out_rows.count_seen(tmp_path / "run", data.validation.x) == len(data.validation.x)
    np.save(tmp_path / "x.npy", np.concatenate([x, x[:1]]))
    with pytest.raises(SystemExit):
        main(f"evaluate {tmp_path}/run --num-samples 2".split())


def test_a_line_appended_to_a_text_is_detected(tmp_path, capsys):
    lines = [f"line {i} of text" for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    line = f"train {tmp_path}/lines.txt --out {tmp_path}/run --hidden 4 --epochs 1 --batch-size 8"
    main(f"{line} --engine eager --num-eval-samples 2 --no-report".split())
    main(f"evaluate {tmp_path}/run --num-samples 2".split())
    (tmp_path / "lines.txt").write_text("\n".join([*lines, "line 3 of line 4"]))
    assert "lines has changed" in refusal(f"evaluate {tmp_path}/run", capsys)


def test_a_run_of_0_1_0_has_no_record_and_is_evaluated_without_it(here):
    config = json.loads((here / "run/config.json").read_text())
    del config["split"]
    run_files.write_json(here / "run/config.json", config)
    (here / "run/rows.safetensors").unlink()
    np.savez(here / "data.npz", **appended(arrays()))
    main(["evaluate", "run", "--num-samples", "2"])
    main(["evaluate", "run", "--num-samples", "2", "--data", "data.npz"])
    assert "rows_trained_on" not in metrics(here)


def test_a_damaged_record_is_rejected(here, capsys):
    np.savez(here / "more.npz", **appended(arrays()))
    path = here / "run/rows.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert "rows.safetensors is damaged" in refusal("evaluate run --data more.npz", capsys)
    assert torch.equal(  # nothing else depends on the record
        run_folder.read_model(here / "run")["decoder.network.layers.0.bias"],
        pv.load(here / "run").state_dict()["decoder.network.layers.0.bias"],
    )
