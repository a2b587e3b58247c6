"""AnnData in zarr stores: the same cells as in .h5ad files; what a store declares is checked."""

import json
import os
import pickle
import shutil
import sys

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells_helpers import GENES, counts, marked, write_cells
from cli_helpers import command

import pyro_vae as pv
from pyro_vae.data import cells
from pyro_vae.data.split import part_of

pytest.importorskip("zarr", reason="zarr is not installed: pip install 'pyro-vae[zarr]'")
import zarr

FORMATS = (2, 3)
METADATA = {2: ".zarray", 3: "zarr.json"}

# zarr says of each array of words in format 3 that other programs may not read it.
pytestmark = pytest.mark.filterwarnings("ignore:.*Zarr.*:")


def as_store(file, form=3, **options):
    """The copy of a .h5ad file as a .zarr store."""
    store = file.with_suffix(".zarr")
    with h5py.File(file) as source:
        copy_group(source, zarr.open_group(store, mode="w", zarr_format=form), options)
    return store


def copy_group(source, group, options):
    # h5py holds its lock while it iterates, and zarr's own thread may need it to free a file.
    for name, element in list(source.items()):
        if isinstance(element, h5py.Group):
            made = group.create_group(name)
            copy_group(element, made, options)
        else:
            words = h5py.check_string_dtype(element.dtype) is not None
            data = element.asstr()[:].astype(str) if words else element[:]
            kind = {"shape": data.shape, "dtype": str} if words else {"data": data}
            made = group.create_array(name, **kind, **(options if element.ndim == 2 else {}))
            if words:
                made[:] = data
    for name, value in list(source.attrs.items()):
        group.attrs[name] = value.tolist() if hasattr(value, "tolist") else value
    for name, element in list(source.items()):
        if isinstance(element, h5py.Dataset):
            group[name].attrs.update(dict(element.attrs))


def store_of(folder, form=3, **options):
    return as_store(write_cells(folder / "cells.h5ad", **options), form)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FORMS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": np.asarray,
    "int64": lambda x: np.asarray(x, np.int64),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("matrix", FORMS)
def test_a_store_holds_the_cells_of_its_file(tmp_path, monkeypatch, form, matrix):
    monkeypatch.setattr(cells, "CELLS_AT_ONCE", 7)  # several blocks, the last one smaller
    x = counts().astype(np.float32)
    file = write_cells(tmp_path / "cells.h5ad", np.log1p(x), layers={"raw": FORMS[matrix](x)})
    with h5py.File(file, "r+") as opened:
        score = marked(opened.create_group("obs/score"), "nullable-integer", "0.1.0")
        for name, values in {"values": np.arange(40) % 3, "mask": np.arange(40) == 5}.items():
            marked(score.create_dataset(name, data=values), "array", "0.2.0")
        names = [*opened["obs"].attrs["column-order"], "score"]
        opened["obs"].attrs["column-order"] = np.array(names, h5py.string_dtype())
    options = {"layer": "raw", "batch": "batch", "columns": {"score": "label", "donor": "group"}}
    data, wanted = pv.load_data(as_store(file, form), **options), pv.load_data(file, **options)
    assert np.array_equal(part_of(data, "all").x.numpy(), counts())
    assert (data.cells.ids, data.cells.names) == (wanted.cells.ids, wanted.cells.names)
    assert data.cells.recorded() == wanted.cells.recorded()
    for part in ("train", "validation", "test"):
        found, known = getattr(data, part), getattr(wanted, part)
        for name in ("x", "context", "labels", "rows"):
            assert torch.equal(getattr(found, name), getattr(known, name))


@pytest.mark.parametrize("options", [{"chunks": (7, 2)}, {"chunks": (8, 1), "shards": (16, 5)}])
def test_chunks_and_shards_of_dense_counts(tmp_path, options):
    x = counts()
    x[:, 1] = 0  # zarr writes no chunk of zeros
    store = as_store(write_cells(tmp_path / "cells.h5ad", x), **options)
    assert np.array_equal(part_of(pv.load_data(store), "all").x.numpy(), x)


def test_consolidated_metadata_are_not_used(tmp_path):
    """They repeat those of the arrays, and can declare another shape."""
    store = store_of(tmp_path, 2, x=counts())
    zarr.consolidate_metadata(store, zarr_format=2)
    known = json.loads((store / ".zmetadata").read_text())
    known["metadata"]["X/.zarray"]["shape"] = [3, 5]
    (store / ".zmetadata").write_text(json.dumps(known))
    assert np.array_equal(part_of(pv.load_data(store), "all").x.numpy(), counts())


def test_stores_of_anndata_are_read(tmp_path):
    """The package itself, where it is installed: it is not compatible with pandas 3."""
    anndata, pd = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"batch": pd.Categorical(["b", "a"] * 20), "kind": ["T", "B"] * 20},
        index=[f"cell-{i}" for i in range(40)],
    )
    made = anndata.AnnData(sp.csc_matrix(counts()), frame, pd.DataFrame(index=list(GENES)))
    for form in FORMATS:
        anndata.settings.zarr_write_format = form
        made.write_zarr(tmp_path / f"{form}.zarr")
        data = pv.load_data(tmp_path / f"{form}.zarr", batch="batch")
        found = part_of(data, "all")
        assert np.array_equal(found.x.numpy(), counts())
        assert found.context[:, 1].tolist() == [1, 0] * 20
        assert data.cells.ids == tuple(frame.index)


class Ran:
    """What unpickling would run."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


def pickled(store, place):
    """Put what runs code into a chunk, where its codec is followed."""
    if place == "codecs":
        codecs = [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]
        edit(store / "X" / "zarr.json", codecs=codecs)
    elif place == "compressor":
        edit(store / "X" / ".zarray", filters=None, compressor={"id": "pickle"})
        (store / "X" / "0.0").write_bytes(pickle.dumps(Ran()))
    else:
        filters = [{"id": "vlen-utf8"}, {"id": "pickle"}]
        edit(store / "obs" / "_index" / ".zarray", filters=filters, compressor=None)
        (store / "obs" / "_index" / "0").write_bytes(pickle.dumps(Ran()))


REFUSED = {  # zarr itself refuses two of them
    "compressor": "cannot be read.*pickle",
    "filters": "/obs/_index of .* needs the codec 'pickle', which is refused",
    "codecs": "cannot be read.*Unknown codec: .*pickle",
}


@pytest.mark.parametrize("place", REFUSED)
def test_no_code_of_a_store_runs(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    store = store_of(tmp_path, 3 if place == "codecs" else 2, x=counts())
    pickled(store, place)
    with pytest.raises(pv.UsageError, match=REFUSED[place]) as caught:
        pv.load_data(store)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["X", "obs/_index", "var/_index"])
@pytest.mark.parametrize("size", [10**8, 10**15])
def test_a_declared_size_is_compared_with_the_store(tmp_path, form, name, size):
    """Whether one huge chunk or very many chunks are declared."""
    store = store_of(tmp_path, form, x=counts())
    file = store / name / METADATA[form]
    shape = [size, 5] if name == "X" else [size]
    edit(file, shape=shape)
    with pytest.raises(pv.UsageError, match=r"declares 10+( × 5)? values.*holds only") as caught:
        pv.load_data(store)
    assert "\n" not in str(caught.value)
    grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
    edit(file, **({"chunks": shape} if form == 2 else {"chunk_grid": grid}))
    with pytest.raises(pv.UsageError, match="holds only"):
        pv.load_data(store)


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_the_shape_of_a_sparse_matrix_is_compared_before_it_is_made(tmp_path, monkeypatch, ending):
    """Rows of a sparse matrix by columns need memory only when they are counted."""
    file = write_cells(tmp_path / "cells.h5ad", sp.csc_matrix(counts()))
    with h5py.File(file, "r+") as opened:
        opened["X"].attrs["shape"] = (10**9, len(GENES))
    path = file if ending == ".h5ad" else as_store(file)
    monkeypatch.setattr(cells, "sparse_rows", None)  # no matrix is made
    with pytest.raises(pv.UsageError, match=r"got int64 of shape \(1000000000, 5\)"):
        pv.load_data(path)


def linked(target):
    def act(store):
        shutil.move(store / "X", store.parent / "outside")
        (store / "X").symlink_to(target(store))

    return act


def index_outside(store):
    edit(store / "obs" / ".zattrs", _index="../../outside")


def device(store):
    os.mkfifo(store / "X" / "0.1")


def damaged(store):
    (store / "X" / "0.0").write_bytes(b"nonsense")


DAMAGE = {
    "link": (linked(lambda store: store.parent / "outside"), "X is a link that leaves the store"),
    "relative link": (linked(lambda store: "../outside"), "X is a link that leaves the store"),
    "name": (index_outside, "cannot be read as a .zarr store"),
    "device": (device, "is not a file"),
    "damaged": (damaged, "cannot be read as a .zarr store"),
    "no X": (lambda store: shutil.rmtree(store / "X"), "has no X"),
    "no var": (lambda store: shutil.rmtree(store / "var"), "not a complete .zarr"),
    "lost names": (lambda store: (store / "obs/_index/0").unlink(), "_index has 0 of its 1 chunks"),
    "no metadata": (lambda store: (store / ".zgroup").unlink(), "cannot be read as a .zarr store"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_stores_are_refused_in_one_line(tmp_path, case):
    store = store_of(tmp_path, 2, x=counts())
    act, words = DAMAGE[case]
    act(store)
    with pytest.raises(pv.UsageError, match=words) as caught:
        pv.load_data(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_sparse_matrix_without_a_chunk_is_refused(tmp_path, part):
    """zarr fills lost chunks with zeros, which would be counts of another gene."""
    store = store_of(tmp_path, 2)
    (store / "X" / part / "0").unlink()
    with pytest.raises(pv.UsageError, match=f"not complete: /X/{part} has 0 of its 1 chunks"):
        pv.load_data(store)


def test_a_link_inside_of_the_store_is_followed(tmp_path):
    store = store_of(tmp_path, 2, x=counts())
    shutil.move(store / "X", store / "layers" / "raw")
    (store / "X").symlink_to("layers/raw")
    assert np.array_equal(part_of(pv.load_data(store), "all").x.numpy(), counts())


def test_without_zarr_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "cells.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(pv.UsageError, match=r"need zarr 3.*pip install 'pyro-vae\[zarr\]'"):
        pv.load_data(tmp_path / "cells.zarr")


def test_commands_read_a_store_and_write_other_files(tmp_path, capsys):
    """A run of a file scores the same cells in a store, and a run of a store names its cells."""
    file = write_cells(tmp_path / "cells.h5ad", counts())
    paths = {"store": as_store(file), "run": tmp_path / "run", "out": tmp_path / "codes.npz"}
    command(
        "train {store} --out {run} --batch batch --library-size --epochs 1 --num-eval-samples 21 "
        "--latent-dim 2 --hidden 8 --engine eager --no-report",
        **paths,
    )
    command("encode {run} --part all --out {out}", **paths)
    command(
        "encode {run} --data {file} --out {other}", file=file, other=tmp_path / "o.csv", **paths
    )
    codes, rows = np.load(paths["out"]), (tmp_path / "o.csv").read_text().splitlines()
    command("encode {run} --part all --out {again}", again=tmp_path / "again.csv", **paths)
    assert (tmp_path / "again.csv").read_text().splitlines() == rows
    assert [row.split(",")[0] for row in rows[1:]] == [f'"cell-{i}"' for i in range(40)]
    means = [[float(cell) for cell in row.split(",")[1:3]] for row in rows[1:]]
    np.testing.assert_allclose(codes["z_mean"], means, rtol=1e-6)
    for ending in (".zarr", ".h5ad"):
        with pytest.raises(SystemExit):
            command("encode {run} --out {to}", to=tmp_path / f"coded{ending}", **paths)
        words = "--out must be a .npz, .csv, .parquet or .feather file, because codes are not"
        assert words in capsys.readouterr().err
        assert not (tmp_path / f"coded{ending}").exists()
