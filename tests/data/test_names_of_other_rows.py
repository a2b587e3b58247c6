"""Rows that are not finite are named as in the user's data: images, cells, groups, lines of text.

Each datum holds a number that the name in its file belongs to, so the right name is known without
the loader.
"""

import os

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from cells_helpers import write_cells
from PIL import Image

from pyro_vae.cli.main import main
from pyro_vae.data.datasets import load_data

PROGRAM = """
import numpy, pyro, torch, pyro.distributions as dist
from torch import nn

class Pair(nn.Module):
    def __init__(self, data_shape, latent_dim=2, hidden=(8,)):
        super().__init__()
        self.net, self.calls = nn.Linear(1, 2), 0
        self.pattern = torch.from_numpy(numpy.load("pattern.npy"))

    def model(self, x, *context):
        flat = x.flatten(1).float()
        self.calls += self.training
        bad = (flat == self.pattern).all(1, keepdim=True) & (self.calls > 1)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.where(bad, torch.nan, z[:, :1])
            normal = dist.Normal(mean.expand_as(flat), 30.0, validate_args=False)
            pyro.sample("x", normal.to_event(1), obs=flat)

    def guide(self, x, *context):
        with pyro.plate("data", len(x), dim=-1):
            loc = self.net(x.flatten(1)[:, :1].float())
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
"""

N = 40


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "named_rows_pair.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    return tmp_path


def names(i):
    """A name whose order is not that of the numbers."""
    return f"s{7 * i % N:02d}"


def images():
    for i in range(N):
        path = f"scans/{'ab'[i % 2]}/{names(i)}.png"
        os.makedirs(f"scans/{'ab'[i % 2]}", exist_ok=True)
        Image.fromarray(np.full((4, 4), 5 * i, np.uint8)).save(path)
    data = load_data("scans")

    def number(x):
        return round(float(x.max()) * (255 if x.is_floating_point() else 1) / 5)

    return "scans", data, number, lambda i: f"image {'ab'[i % 2]}/{names(i)}.png of scans"


def cells():
    counts = np.ones((N, 5), np.float32)
    counts[:, 0] = np.arange(N) + 1
    write_cells("cells.h5ad", sp.csr_matrix(counts))
    data = load_data("cells.h5ad")
    return "cells.h5ad", data, lambda x: round(float(x[0])) - 1, lambda i: f"cell-{i} of cells.h5ad"


def lines():
    words = [f"{'abcd'[i % 4]}{'efghijklmn'[i // 4]} of text" for i in range(N)]
    with open("lines.txt", "w") as file:
        file.write("\n".join(["", words[3], *words]))
    data = load_data("lines.txt")
    first = {word[:2]: i for i, word in enumerate(words)}

    def number(x):
        return first["".join(data.vocabulary[t] for t in x[:2].tolist())]

    distinct = [3, 0, 1, 2, *range(4, N)]
    return (
        "lines.txt",
        data,
        number,
        lambda i: f"distinct line {distinct.index(i)} of lines.txt, counted from 0",
    )


def grouped(write):
    rows = np.arange(2 * N)
    order = np.random.default_rng(0).permutation(rows)  # two members of each group, scattered
    ids = np.array([names(i // 2) for i in order])
    values = np.stack([order // 2 + 1.0, np.ones(2 * N)], 1).astype(np.float32)
    source = write(values, ids)
    data = load_data(source, group="patient")

    # A table is standardized, which keeps the order.
    known = torch.cat([part.x[:, 0, 0] for part in (data.train, data.validation, data.test)])
    known = known.unique()
    assert len(known) == N

    def number(x):
        return known.tolist().index(float(x[0, 0]))

    return source, data, number, lambda i: f"the group {names(i)} of {source}"


def group_file():
    def write(values, ids):
        np.savez("visits.npz", x=values, patient=ids)
        return "visits.npz"

    return grouped(write)


def group_table():
    def write(values, ids):
        frame = pd.DataFrame({"patient": ids, "a": values[:, 0], "b": values[:, 1] + values[:, 0]})
        frame.to_csv("visits.csv", index=False)
        return "visits.csv"

    return grouped(write)


@pytest.mark.parametrize("make", [images, cells, lines, group_file, group_table])
def test_a_message_has_the_name_of_the_users_data(make, capsys, folder):
    source, data, number, words = make()
    x = data.train.x[17]
    scale = 255 if x.dtype == torch.uint8 else 1  # the pair sees intensities
    np.save("pattern.npy", (x.flatten().float() / scale).numpy())
    line = f"train {source} --out run --model named_rows_pair:Pair --epochs 2 --engine eager"
    line += " --batch-size 8"
    more = ["--group", "patient"] if data.group_ids is not None else []
    with pytest.raises(SystemExit) as stopped:
        main([*line.split(), *more, "--no-report", "--num-eval-samples", "2"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is not finite" in said
    assert words(number(x)) in said
    with np.load(folder / "run" / "nonfinite.npz") as saved:
        (at,) = np.flatnonzero(saved["bad"])
        assert saved["row"][at] == 17
        assert str(saved["id"][at]) in words(number(x))
