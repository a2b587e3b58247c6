"""AnnData files whose counts stay on disk: the same cells as in memory, read by index."""

from importlib.util import find_spec

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from cells_helpers import GENES, counts, write_cells
from cli_helpers import command

import pyro_vae as pv
from pyro_vae.data import disk, large_cells, sizes
from pyro_vae.data.disk import DiskArray
from pyro_vae.data.split import part_of

N = 203

FORMS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": np.asarray,
    "int64": lambda x: np.asarray(x, np.int64),
    "float16": lambda x: np.asarray(x, np.float16),
    "int16, sparse": lambda x: sp.csr_matrix(x.astype(np.int16)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64)  # three cells
    monkeypatch.setattr(large_cells, "ENTRIES_AT_ONCE", 50)  # several parts of the file


def file_of(folder, x=None, **options):
    x = sp.csr_matrix(counts(N).astype(np.float32)) if x is None else x
    return write_cells(folder / "cells.h5ad", x, **options)


PARTS = ("train", "validation", "test")


def sorted_part(part):
    order = part.rows.argsort()
    return [None if column is None else column[order] for column in part]


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_are_those_of_a_file_in_memory(form, tmp_path, monkeypatch):
    path = file_of(tmp_path, FORMS[form](counts(N).astype(np.float32)))
    roles = {"batch": "batch", "columns": {"kind": "label"}}
    small = pv.load_data(path, **roles)
    assert isinstance(small.train.x, torch.Tensor)
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64)
    monkeypatch.setattr(large_cells, "ENTRIES_AT_ONCE", 50)
    large = pv.load_data(path, **roles)
    assert repr(large).replace(" in a sample", "") == repr(small)
    for name in PARTS:
        part, wanted = getattr(large, name), sorted_part(getattr(small, name))
        assert isinstance(part.x, DiskArray)
        for found, right in zip(part, wanted, strict=True):
            assert (found is None) == (right is None)
            assert found is None or torch.equal(found[:], right)
    assert large.cells.ids == small.cells.ids
    assert large.cells.recorded() == small.cells.recorded()
    whole = part_of(large, "all")
    assert np.array_equal(whole.x[:].numpy(), counts(N))
    assert torch.equal(whole.rows, torch.arange(N))
    assert torch.equal(whole.labels, part_of(small, "all").labels)


def test_cells_of_one_donor_are_in_one_part(tmp_path, on_disk):
    data = pv.load_data(file_of(tmp_path), columns={"donor": "group"})
    donors = [set((getattr(data, name).rows // 4).tolist()) for name in PARTS]
    assert sum(map(len, donors)) == len(set.union(*donors)) == -(-N // 4)
    for name in PARTS:
        part = getattr(data, name)
        assert np.array_equal(part.x[:].numpy(), counts(N)[part.rows])


def test_repeated_entries_are_added_up_and_holes_stay_holes(tmp_path, on_disk):
    x = sp.csr_matrix(counts(N).astype(np.float32))
    x.data[3] = np.nan
    repeated = x.copy()
    repeated.indices = np.concatenate([[2, 2], x.indices])
    repeated.data = np.concatenate([[5, 6], x.data]).astype(np.float32)
    repeated.indptr = x.indptr + 2
    repeated.indptr[0] = 0
    wanted = x.toarray()
    wanted[0, 2] += 11
    found = part_of(pv.load_data(file_of(tmp_path, repeated)), "all").x[:].numpy()
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(found).sum() == 1


@pytest.mark.parametrize("least", [1, 2**30])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_the_sum_of_repeated_entries_may_exceed_their_type(form, least, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", least)
    x = form(counts(N).astype(np.uint8))
    x.indices = np.concatenate([[2, 2], x.indices])
    x.data = np.concatenate([[200, 100], x.data]).astype(np.uint8)
    x.indptr = x.indptr + 2
    x.indptr[0] = 0
    wanted = counts(N)
    wanted[(0, 2) if form is sp.csr_matrix else (2, 0)] += 300
    assert np.array_equal(part_of(pv.load_data(file_of(tmp_path, x)), "all").x[:].numpy(), wanted)


def test_training_from_disk_equals_training_in_memory_on_the_same_rows(tmp_path, on_disk):
    """`fit` on the array that is read from the store, and on the same rows as one mapped file."""
    data = pv.load_data(file_of(tmp_path))
    x = data.train.x
    np.save(tmp_path / "plain.npy", x[:].numpy())
    plain = np.load(tmp_path / "plain.npy", mmap_mode="r")
    ends = []
    for rows in (x, plain):
        torch.manual_seed(0)
        pair = pv.VAE.mlp((len(GENES),), latent_dim=2, likelihood=pv.NegativeBinomial)
        history = pv.fit(pair, rows, epochs=2, batch_size=16, engine="eager", progress=False)
        ends.append(history["elbo"])
    assert ends[0] == ends[1]


def test_the_counts_are_converted_once_and_again_after_a_change(tmp_path, on_disk, monkeypatch):
    path = file_of(tmp_path)
    first = pv.load_data(path)
    calls = []
    convert = large_cells._convert
    monkeypatch.setattr(large_cells, "_convert", lambda *given: calls.append(1) or convert(*given))
    again = pv.load_data(path)
    assert not calls
    assert torch.equal(again.test.x[:], first.test.x[:])
    with h5py.File(path, "r+") as file:
        file["X/data"][:] = file["X/data"][:] + 1
    changed = pv.load_data(path)
    assert calls
    assert not torch.equal(changed.test.x[:], first.test.x[:])


def with_value(value):
    def edit(file):
        file["X/data"][7] = value

    return edit


def with_end(file):
    file["X/indptr"][-1] = 10_000


def with_fall(file):
    file["X/indptr"][5] = 0


def with_gene(file):
    file["X/indices"][3] = 99


BAD = {
    "infinite": (with_value(np.inf), "not finite.*first in row 1"),
    "large": (with_value(2**24 + 1), "whole number 16777217; whole numbers above"),
    "end": (with_end, "damaged sparse matrix"),
    "fall": (with_fall, "damaged sparse matrix"),
    "gene": (with_gene, "damaged sparse matrix"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_counts_are_refused_in_one_line(case, tmp_path, on_disk, cache):
    edit, words = BAD[case]
    x = counts(N)
    x[x == 0] = 1  # so that entry 7 is in row 1
    path = file_of(tmp_path, sp.csr_matrix(x.astype(np.float64)))
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(pv.UsageError, match=words) as refused:
        pv.load_data(path)
    assert "\n" not in str(refused.value)
    assert not [part for part in cache.rglob("*") if part.is_dir() and part.name != "cells"]


def test_a_cell_without_an_observed_count_is_refused_with_its_row(tmp_path, on_disk):
    x = counts(N).astype(np.float32)
    x[120] = np.nan
    with pytest.raises(pv.UsageError, match="all of row 120"):
        pv.load_data(file_of(tmp_path, x))


def test_counts_by_genes_need_the_memory(tmp_path, on_disk, monkeypatch):
    path = file_of(tmp_path, sp.csc_matrix(counts(N).astype(np.float32)))
    monkeypatch.setattr(sizes, "available_memory", lambda: 100)
    with pytest.raises(pv.UsageError, match=r"stored by genes and not by cells, needs .* GiB"):
        pv.load_data(path)


ZARR = pytest.mark.skipif(find_spec("zarr") is None, reason="zarr is not installed")


@pytest.mark.parametrize("ending", [".h5ad", pytest.param(".zarr", marks=ZARR)])
@pytest.mark.filterwarnings("ignore:.*Zarr.*:")
def test_commands_serve_cells_on_disk(ending, tmp_path, on_disk, capsys):
    """Codes, scores and copies of a run on disk are those of the Python tools on all rows."""
    x = counts(N) + 1
    path = file_of(tmp_path, np.log1p(x), layers={"raw": sp.csr_matrix(x)})
    if ending == ".zarr":
        from test_zarr_cells import as_store

        path = as_store(path)
    short = "--epochs 1 --num-eval-samples 5 --latent-dim 2 --hidden 8 --engine eager --no-report"
    line = f"train {{data}} --out {{run}} --layer raw --batch batch --library-size {short}"
    command(line, data=path, run=tmp_path / "run")
    codes = tmp_path / "codes.csv"
    command("encode {run} --part all --out {out}", run=tmp_path / "run", out=codes)
    batch = torch.eye(3)[[(1, 0, 2)[i % 3] for i in range(N)]]
    rows = torch.from_numpy(x).float()
    pair = pv.load(tmp_path / "run")
    wanted = pv.encode(pair, rows, batch, rows.sum(1, keepdim=True).log())["z"].numpy()
    found = pd.read_csv(codes)
    assert found["obs_names"].tolist() == [f"cell-{i}" for i in range(N)]
    np.testing.assert_allclose(found[["z_mean_0", "z_mean_1"]], wanted, atol=1e-5)
    if ending == ".h5ad":
        copy = tmp_path / "copy.h5ad"
        command("encode {run} --out {out}", run=tmp_path / "run", out=copy)
        with h5py.File(copy) as file:
            np.testing.assert_allclose(file["obsm/X_z"][:], wanted, atol=1e-5)
    scores = tmp_path / "scores.csv"
    command("score {run} --num-samples 21 --out {out}", run=tmp_path / "run", out=scores)
    test = part_of(pv.load_data(path, layer="raw"), "test")
    assert pd.read_csv(scores)["obs_names"].tolist() == [f"cell-{i}" for i in test.rows]
    few = write_cells(tmp_path / "few.h5ad", x[:3], layers={"raw": x[:3]})
    line = "encode {run} --data {data} --out {out}"
    command(line, run=tmp_path / "run", data=few, out=tmp_path / "few.csv")
    again = pd.read_csv(tmp_path / "few.csv")[["z_mean_0", "z_mean_1"]]
    np.testing.assert_allclose(again, wanted[:3], atol=1e-5)
    capsys.readouterr()
