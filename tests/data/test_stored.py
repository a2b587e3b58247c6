"""Arrays on disk: they are read by blocks, and give what the same arrays in memory give."""

import os
import subprocess
import sys
import threading
from itertools import chain

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import disk, stored
from pyro_vae.data.datasets import load_data
from pyro_vae.data.disk import DiskArray
from pyro_vae.data.order import Place
from pyro_vae.data.sources import source
from pyro_vae.data.split import Data, Split, part_of
from pyro_vae.data.stored import Stored
from pyro_vae.errors import UsageError
from pyro_vae.pairs.processes import Team
from pyro_vae.runs import held_out_rows

N = 103
X = np.random.default_rng(0).standard_normal((N, 3)).astype(np.float32)
C = np.arange(N, dtype=np.float32)[:, None]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every array on disk counts as large, and has many blocks."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 60)  # 5 rows
    monkeypatch.setattr(stored, "WINDOW_BLOCKS", 4)


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def pair():
    torch.manual_seed(0)
    return pv.VAE.mlp((3,), latent_dim=2, hidden=(4,), likelihood=pv.Gaussian)


def opened_zarr(folder):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(folder / "x.zarr"), shape=X.shape, chunks=(8, 3), dtype="f4")
    array[:] = X
    return zarr.open_array(str(folder / "x.zarr"), mode="r")


def opened_hdf5(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = X
    return h5py.File(folder / "x.h5")["x"]


def sliced(folder):
    """A part of a mapped file whose first bytes are another header."""
    with open(folder / "raw", "wb") as file:
        file.write(b"header!" + np.vstack([X[:7], X]).astype(">f4").tobytes())
    whole = np.memmap(folder / "raw", ">f4", "r", 7, (N + 7, 3))
    return whole[7:]


KINDS = {
    "map": lambda folder: (
        np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, X.shape).__setitem__(
            slice(None), X
        )
        or np.load(folder / "x.npy", mmap_mode="r+")
    ),
    "part": sliced,
    "zarr": opened_zarr,
    "hdf5": opened_hdf5,
}


@pytest.mark.parametrize("part_bytes", [1, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_are_those_in_memory(kind, part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PART_BYTES", part_bytes)  # one minibatch, and two
    rows = source(KINDS[kind](tmp_path), [C])
    assert isinstance(rows, Stored)
    assert len(rows) == N
    x, c = (torch.cat(parts) for parts in zip(*rows.batches(7), strict=True))
    assert torch.equal(x, torch.from_numpy(X))
    assert torch.equal(c, torch.from_numpy(C))
    x, c = (torch.cat(parts) for parts in zip(*rows.epoch(7, Place(1, 2)), strict=True))
    assert c[:, 0].long().sort().values.tolist() == list(range(N))
    assert torch.equal(x, torch.from_numpy(X)[c[:, 0].long()])
    few = rows.first(4)
    assert few[1][:, 0].tolist() == [0, 34, 68, 102]
    assert torch.equal(few[0], torch.from_numpy(X)[few[1][:, 0].long()])


def places(rows, place):
    return [batch[1][:, 0].long().tolist() for batch in rows.epoch(10, place)]


def test_the_order_depends_neither_on_processes_nor_on_the_first_minibatch(mapped):
    rows = source(mapped, [C])
    whole = places(rows, Place(5, 3))
    assert [len(batch) for batch in whole] == [10] * 10 + [3]
    assert whole != places(rows, Place(5, 4)) != places(rows, Place(6, 4))
    for done in range(1, 11):
        assert places(rows, Place(5, 3, done)) == whole[done:]
    parts = [places(rows, Place(5, 3, 4, Team(rank, 3))) for rank in range(3)]
    assert [[*chain(*each)] for each in zip(*parts, strict=True)] == whole[4:]
    # Rows of four blocks of five rows are mixed, and no more.
    assert len({row // 5 for row in [*chain(*whole[:2])]}) == 4


def test_no_thread_is_left_by_a_loop_that_ends_early(mapped):
    for _ in source(mapped, [C]).epoch(10, Place(0, 0)):
        break
    assert not [t for t in threading.enumerate() if "reads ahead" in t.name]


def fitted(x, **options):
    found = pair()
    options = {"epochs": 2, "batch_size": 10, "engine": "eager", "progress": False} | options
    history = pv.fit(found, x, **options)
    return torch.cat([p.detach().flatten() for p in found.parameters()]), history


def test_a_run_on_disk_is_resumed_exactly_and_only_on_the_same_data(mapped, tmp_path):
    whole, _ = fitted(mapped, validation=mapped)
    fitted(mapped, epochs=1, out=tmp_path / "run", validation=mapped)
    parts, _ = fitted(mapped, out=tmp_path / "run", resume=True, validation=mapped)
    assert torch.equal(whole, parts)
    np.save(tmp_path / "y.npy", X[::-1])
    other = np.load(tmp_path / "y.npy", mmap_mode="r")
    with pytest.raises(UsageError, match="another data"):
        fitted(other, epochs=3, out=tmp_path / "run", resume=True, validation=mapped)


def test_tools_take_arrays_on_disk(mapped):
    found, x = pair(), torch.from_numpy(X)
    assert torch.equal(pv.encode(found, mapped)["z"], pv.encode(found, x)["z"])
    scores = [pv.evaluate(found, rows, num_samples=5, engine="eager") for rows in (mapped, x)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("row", [0, 77, 102])
def test_values_that_are_not_finite_are_refused_with_their_row(row, tmp_path):
    x = X.copy()
    x[row, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UsageError, match="not finite"):
        fitted(np.load(tmp_path / "x.npy", mmap_mode="r"), epochs=1)


def test_missing_entries_are_left_out_or_refused(tmp_path):
    x = X.copy()
    x[50, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(UsageError, match="missing entry"):
        fitted(mapped, epochs=1)
    torch.manual_seed(0)
    other = pv.VAE.mlp((3,), latent_dim=2, hidden=(4,), likelihood=pv.Missing(pv.Gaussian))
    pv.fit(other, mapped, epochs=1, batch_size=10, engine="eager", progress=False)


def test_a_file_that_is_cut_short_is_refused(mapped, tmp_path):
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(600)
    with pytest.raises(UsageError, match="cut short"):
        list(source(mapped).batches(10))


def test_fixed_binarization_needs_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 3), np.float32))
    with pytest.raises(UsageError, match=r"binarize can be fixed only"):
        pv.fit(
            pv.VAE.mlp((3,), likelihood=pv.Bernoulli),
            np.load(tmp_path / "x.npy", mmap_mode="r"),
            binarize="fixed",
            epochs=1,
            batch_size=8,
            progress=False,
        )


@pytest.mark.parametrize("mode", ["c", "small"])
def test_other_maps_are_read_into_memory(mode, mapped, tmp_path, monkeypatch):
    if mode == "small":
        monkeypatch.setattr(disk, "LEAST_BYTES", X.nbytes + 1)
    else:
        mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
        mapped[3] = 7.0  # changed in memory only
    rows = source(mapped)
    assert not isinstance(rows, Stored)
    assert torch.equal(rows.tensors[0], torch.from_numpy(np.array(mapped)))


def test_rows_on_disk_are_not_recorded_one_by_one(mapped):
    assert held_out_rows.fitted_to(pair(), mapped) is None


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_hole_that_the_pair_does_not_leave_out_is_refused_in_every_type(kind, tmp_path):
    x = X.astype(kind)
    x[77, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(UsageError, match="for NaN as a missing entry, use a likelihood that"):
        fitted(rows, epochs=1)


TEAM = """
import os, sys
import numpy as np, torch
import pyro_vae as pv
from pyro_vae.data import disk, stored
from pyro_vae.data.datasets import load_data
from pyro_vae.data.disk import DiskArray
from pyro_vae.data.order import Place
from pyro_vae.data.sources import source

disk.LEAST_BYTES, stored.WINDOW_BLOCKS = 1, 4
torch.set_num_threads(2)
torch.rand(10**6).sin()  # this thread starts its team
pair = pv.VAE.mlp((400,), hidden=(4,), likelihood=pv.Missing(pv.Gaussian(1.0)))
rows = source(np.load(sys.argv[1], mmap_mode="r"), pair=pair)
before, most = len(os.listdir("/proc/self/task")), 0
for _ in rows.epoch(300, Place(0, 0)):
    most = max(most, len(os.listdir("/proc/self/task")))
print(most - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted on Linux")
@pytest.mark.parametrize("holes", [False, True])
def test_reading_ahead_starts_no_team_of_threads(holes, tmp_path):
    """A second team of OpenMP would halve the speed of training."""
    x = np.random.default_rng(0).standard_normal((4000, 400))
    x[::7, 3] = np.nan if holes else 0
    np.save(tmp_path / "x.npy", x)
    words = [sys.executable, "-c", TEAM, str(tmp_path / "x.npy")]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1", found.stderr


def test_all_parts_of_a_file_are_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64)  # four rows; the last block has three
    x = np.arange(203 * 4, dtype=np.float32).reshape(203, 4)
    np.save(tmp_path / "x.npy", x)
    whole = part_of(load_data(tmp_path / "x.npy"), "all")
    assert isinstance(whole.x, DiskArray)
    assert np.array_equal(whole.x[:].numpy(), x)
    assert np.array_equal(whole.x[[7, 150]].numpy(), x[[7, 150]])


def test_parts_whose_rows_have_no_common_numbers_follow_each_other(tmp_path, monkeypatch):
    """As a folder of images with test images of its own: labels stay with their rows."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float32).reshape(20, 2))
    mapped = disk.rows_of(np.load(tmp_path / "x.npy", mmap_mode="r"))
    order = torch.arange(20)
    train = Split(mapped, order, rows=order)
    test = Split(torch.full((3, 2), -1.0), torch.tensor([7, 8, 9]))
    none = Split(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    whole = part_of(Data("both", train, none, test), "all")
    assert whole.labels.tolist() == [*range(20), 7, 8, 9]
    assert whole.x[:].tolist() == [*mapped[:].tolist(), *test.x.tolist()]
    assert whole.rows is None
