"""Rows whose numbers are not finite are named as in the user's file, for every kind of file."""

import numpy as np
import pandas as pd
import pytest

from pyro_vae.cli.main import main
from pyro_vae.data import disk
from pyro_vae.data.datasets import load_data

MARK = 77.0
"""A value whose row has a density that is not finite."""

PROGRAM = """
import pyro, torch, pyro.distributions as dist
from torch import nn

class Pair(nn.Module):
    def __init__(self, data_shape, latent_dim=2, hidden=(8,)):
        super().__init__()
        self.net, self.calls = nn.Linear(1, 2), 0

    def model(self, x, *context):
        flat = x.flatten(1).float()
        self.calls += self.training
        bad = (flat == 77.0).any(1, keepdim=True) & (self.calls > 1)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.where(bad, torch.nan, z[:, :1])
            normal = dist.Normal(mean.expand_as(x), 1.0, validate_args=False)
            pyro.sample("x", normal.to_event(1), obs=x.float())

    def guide(self, x, *context):
        with pyro.plate("data", len(x), dim=-1):
            loc = self.net(x.flatten(1)[:, :1].float())
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    return np.arange(80.0).reshape(40, 2) / 100


def csv(values, names):
    columns = {} if names is None else {"id": names}
    frame = pd.DataFrame(columns | {"a": values[:, 0], "b": values[:, 1]})
    frame.to_csv("data.csv", index=False)
    return "data.csv"


def npy(values, _):
    np.save("data.npy", values.astype(np.float32))
    return "data.npy"


def npz(values, _):
    x = values.astype(np.float32)
    np.savez("data.npz", x=x)
    return "data.npz"


def parts(values, _):
    x = values.astype(np.float32)
    np.savez("data.npz", x_train=x, x_test=x[:5] * 0)
    return "data.npz"


def refused(source, capsys, size=8):
    line = (
        f"train {source} --out run --model mine:Pair --epochs 2 --engine eager --batch-size {size}"
    )
    with pytest.raises(SystemExit) as stopped:
        main([*line.split(), "--no-report", "--num-eval-samples", "2"])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def marked(write, values, names, place):
    """Write a file with a mark in some row of the training part; return the file and the row."""
    data = load_data(write(values, names))
    row = int(data.train.rows[place])
    values[row, 0] = MARK
    return write(values, names), row


NAMES = [f"P{7 * i % 40}" for i in range(40)]


@pytest.mark.parametrize(
    ("write", "names", "words"),
    [
        (csv, NAMES, "the row with id {id} of data.csv"),
        (csv, None, "row {row} of data.csv, counted from 0"),
        (npy, None, "row {row} of data.npy, counted from 0"),
        (npz, None, "row {row} of data.npz, counted from 0"),
        (parts, None, "row {row} of the training part of data.npz, counted from 0"),
    ],
)
def test_a_message_names_the_row_of_the_file(write, names, words, table, capsys, tmp_path):
    source, row = marked(write, table, names, 11)
    said = refused(source, capsys)
    wanted = words.format(row=row, id=NAMES[row])
    assert wanted in said
    with np.load(tmp_path / "run" / "nonfinite.npz") as saved:
        (at,) = np.flatnonzero(saved["bad"])
        assert saved["id"][at] == (NAMES[row] if names else str(row))
        assert saved["row"][at] == 11
        assert (saved["x"][at] == MARK).any()


@pytest.mark.filterwarnings("default:left out the minibatch")
def test_skip_names_the_row_of_the_file_too(table, capsys):
    source, row = marked(csv, table, NAMES, 3)
    line = f"train {source} --out run --model mine:Pair --epochs 2 --engine eager --batch-size 4"
    main([*line.split(), "--on-nonfinite", "skip", "--no-report", "--num-eval-samples", "2"])
    assert f"the row with id {NAMES[row]} of data.csv" in capsys.readouterr().err


@pytest.mark.parametrize("size", [8, 26])
def test_a_row_of_a_file_on_disk(size, table, capsys, monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 24)  # three rows
    x = load_data(npy(table, None)).train.x
    row = round(float(x[17:18][0, 0]) * 100) // 2
    table[row, 0] = MARK
    assert f"row {row} of data.npy" in refused(npy(table, None), capsys, size)


@pytest.mark.parametrize("names", [None, NAMES])
def test_a_row_of_a_table_on_disk(names, table, capsys, monkeypatch, tmp_path):
    """Parts of a converted table have files of their own, whose row numbers nobody knows."""
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 48)
    source, row = marked(csv, table, names, 11)
    wanted = f"row {row} of data.csv" if names is None else f"with id {names[row]} of data.csv"
    assert wanted in refused(source, capsys)
