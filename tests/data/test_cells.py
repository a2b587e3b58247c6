"""AnnData files: counts, batches, labels and names go in; codes go back into the file."""

import re

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells_helpers import GENES, counts, marked, write_cells
from cli_helpers import command, read

import pyro_vae as pv
from pyro_vae.data import cells
from pyro_vae.data.datasets import load_cells_of
from pyro_vae.data.split import part_of
from pyro_vae.runs.cells import write_codes

SHORT = "--epochs 2 --num-eval-samples 21 --latent-dim 2 --hidden 8 --engine eager --no-report"

FORMS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr array": sp.csr_array,
    "dense": np.asarray,
    "uint8": lambda x: np.asarray(x, np.uint8),
    "int64": lambda x: np.asarray(x, np.int64),
    "int16, sparse": lambda x: sp.csc_matrix(x.astype(np.int16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_the_same_in_every_form(tmp_path, monkeypatch, form):
    monkeypatch.setattr(cells, "CELLS_AT_ONCE", 7)  # several blocks, the last one smaller
    path = write_cells(tmp_path / "cells.h5ad", FORMS[form](counts().astype(np.float32)))
    whole = part_of(pv.load_data(path), "all")
    assert whole.x.dtype == torch.float32
    assert np.array_equal(whole.x.numpy(), counts())


def test_parts_hold_each_cell_once_with_its_name(tmp_path):
    data = pv.load_data(write_cells(tmp_path / "cells.h5ad"))
    assert [len(part.x) for part in (data.train, data.validation, data.test)] == [28, 4, 8]
    for part in (data.train, data.validation, data.test):
        names = [data.cells.ids[row] for row in part.rows]
        at = [int(name.removeprefix("cell-")) for name in names]
        assert np.array_equal(part.x.numpy(), counts()[at])
    assert data.cells.names == GENES
    assert (data.table, data.schema, data.train.context) == (None, None, None)


def test_a_layer_is_read_in_place_of_x(tmp_path):
    x = counts()
    path = write_cells(tmp_path / "cells.h5ad", np.log1p(x), layers={"raw": sp.csr_matrix(x)})
    assert np.array_equal(part_of(pv.load_data(path, layer="raw"), "all").x.numpy(), x)
    found = part_of(pv.load_data(path), "all").x
    torch.testing.assert_close(found, torch.from_numpy(np.log1p(x)).float())


def test_columns_of_obs_become_batch_label_and_groups(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    data = pv.load_data(path, batch="batch", columns={"kind": "label", "donor": "group"})
    whole = part_of(data, "all")
    assert whole.context.argmax(1).tolist() == [(1, 0, 2)[i % 3] for i in range(40)]
    assert whole.context.sum(1).eq(1).all()
    assert whole.labels.tolist() == [(1, 0)[i % 2] for i in range(40)]
    parts = [set((part.rows // 4).tolist()) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10  # no donor is in two parts


def test_numbers_of_batches_are_categories(tmp_path):
    data = pv.load_data(write_cells(tmp_path / "cells.h5ad"), batch="run")
    wanted = torch.eye(2).repeat(20, 1)
    assert torch.equal(part_of(data, "all").context, wanted)


def test_repeated_names_of_genes_get_numbers(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", genes=["A", "A-1", "A", "B", "A"])
    assert pv.load_data(path).cells.names == ("A", "A-1", "A-2", "B", "A-3")


BAD = {
    "layer": (lambda p: pv.load_data(write_cells(p), layer="raw"), "no layer 'raw'; it has no"),
    "batch": (
        lambda p: pv.load_data(write_cells(p), batch="bach"),
        "no column 'bach' in obs.*'batch'",
    ),
    "role": (
        lambda p: pv.load_data(write_cells(p), columns={"run": "count"}),
        "column 'run' of obs must be one of context, label, group, split, got data",
    ),
    "one batch": (
        lambda p: pv.load_data(write_cells(p, obs={"batch": ["a"] * 40}), batch="batch"),
        "column 'batch' is 'a' in all rows",
    ),
    "no batch": (
        lambda p: pv.load_data(
            write_cells(p, obs={"batch": (("a", "b"), [-1, *[0, 1] * 19, 0])}), batch="batch"
        ),
        "context column 'batch' is empty in row 0",
    ),
    "infinite": (
        lambda p: pv.load_data(write_cells(p, np.full((40, 5), np.inf))),
        "not finite",
    ),
    "too large for float32": (
        lambda p: pv.load_data(write_cells(p, np.full((40, 5), 2**24 + 1))),
        "holds the whole number 16777217",
    ),
    "few": (lambda p: pv.load_data(write_cells(p, np.ones((9, 5)))), "at least 10"),
    "no file": (lambda p: pv.load_data(p), "no such file"),
    "not HDF5": (lambda p: p.write_text("a") and pv.load_data(p), "cannot be read as a .h5ad"),
    "HDF5 alone": (lambda p: h5py.File(p, "w").close() or pv.load_data(p), "has no var"),
    "group": (lambda p: pv.load_data(write_cells(p), group="donor"), "needs a table"),
    "layer of a table": (
        lambda p: pv.load_data("digits", layer="raw"),
        "applies only to .h5ad files and .zarr stores, got digits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, case):
    act, words = BAD[case]
    with pytest.raises(pv.UsageError, match=words) as caught:
        act(tmp_path / "cells.h5ad")
    assert "\n" not in str(caught.value)


def test_a_file_without_x_names_its_layers(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", layers={"raw": counts()})
    with h5py.File(path, "r+") as file:
        del file["X"]
    with pytest.raises(pv.UsageError, match="has no X; name one of its layers: raw"):
        pv.load_data(path)
    assert len(part_of(pv.load_data(path, layer="raw"), "all").x) == 40


def test_files_of_an_old_anndata_are_refused(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        del file["obs"].attrs["encoding-type"]
    with pytest.raises(pv.UsageError, match="has the form of an old anndata"):
        pv.load_data(path)


def test_counts_must_have_the_shape_of_obs_and_var(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", genes=GENES[:4])
    with pytest.raises(pv.UsageError, match=r"of shape \(40, 4\), for obs and var; got float32"):
        pv.load_data(path)


@pytest.mark.parametrize("array", [np.array([1, 2, 3] * 13 + [1]), np.array([True, False] * 20)])
def test_nullable_columns_of_obs(tmp_path, array):
    path = write_cells(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        del file["obs/run"]
        group = marked(file.create_group("obs/run"), "nullable-integer", "0.1.0")
        group["values"], group["mask"] = array, np.arange(40) == 5
    labels = part_of(pv.load_data(path, columns={"run": "label"}), "all").labels
    wanted = np.unique(array, return_inverse=True)[1]
    wanted[5] = -1
    assert labels.tolist() == wanted.tolist()


def test_files_of_anndata_are_read_and_written(tmp_path):
    """The package itself, where it is installed: it is not compatible with pandas 3."""
    anndata, pd = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {
            "batch": pd.Categorical(["b", "a"] * 20),
            "kind": ["T", "B"] * 20,
            "score": pd.array([1, None, 2, 3] * 10, "Int64"),
        },
        index=[f"cell-{i}" for i in range(40)],
    )
    made = anndata.AnnData(sp.csc_matrix(counts()), frame, pd.DataFrame(index=list(GENES)))
    path, out = tmp_path / "cells.h5ad", tmp_path / "coded.h5ad"
    made.write_h5ad(path)
    found = part_of(pv.load_data(path, batch="batch", columns={"kind": "label"}), "all")
    assert np.array_equal(found.x.numpy(), counts())
    assert found.context[:, 1].tolist() == [1, 0] * 20
    assert found.labels.tolist() == [1, 0] * 20
    codes = np.random.default_rng(0).normal(size=(40, 2))
    write_codes(path, {"z": codes}, out)
    again = anndata.read_h5ad(out)
    assert np.array_equal(again.obsm["X_z"], codes)
    assert again.obs.equals(anndata.read_h5ad(path).obs)


def test_a_damaged_sparse_matrix_is_refused(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 99
    with pytest.raises(pv.UsageError, match="damaged sparse matrix"):
        pv.load_data(path)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write_cells(tmp_path / "cells.h5ad")
    need = 8 * 40 * len(GENES)
    monkeypatch.setattr(cells, "available_memory", lambda: need)
    pv.load_data(path)
    monkeypatch.setattr(cells, "available_memory", lambda: need - 1)
    monkeypatch.setattr(cells, "_dense", None)  # nothing is converted
    with pytest.raises(pv.UsageError, match=r"40 × 5 numbers.*of memory are free: select genes"):
        pv.load_data(path)


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < cells.available_memory() <= 2**62


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    x = counts()
    write_cells(folder / "cells.h5ad", np.log1p(x), layers={"raw": sp.csr_matrix(x)})
    options = f"--layer raw --batch batch --library-size {SHORT}"
    line = f"train {{data}} --out {{run}} {options}"
    command(line, data=folder / "cells.h5ad", run=folder / "run")
    return folder


def test_train_conditions_on_the_batch_and_counts_by_default(trained):
    given = read(trained / "run" / "config.json")["train"]
    assert given["likelihood"] == "negative-binomial"
    assert (given["condition"], given["library_size"]) == (["context"], True)
    assert given["context_shapes"] == [[3], [1]]
    assert given["cells"]["genes"] == list(GENES)
    test = pv.load_data(trained / "cells.h5ad", layer="raw", batch="batch").test
    context = test.context, test.x.sum(1, keepdim=True).log()
    found = pv.evaluate(pv.load(trained / "run"), test.x, *context, num_samples=21)
    assert read(trained / "run" / "metrics.json")["elbo"] == pytest.approx(found.elbo, abs=1e-4)


def test_encode_writes_codes_into_a_copy_of_the_file(trained, tmp_path):
    source, out = trained / "cells.h5ad", tmp_path / "coded.h5ad"
    before = source.read_bytes()
    command("encode {run} --out {out}", run=trained / "run", out=out)
    assert source.read_bytes() == before
    with h5py.File(source) as old, h5py.File(out) as new:
        assert np.array_equal(new["obs/_index"][:], old["obs/_index"][:])
        assert np.array_equal(new["X"][:], old["X"][:])
        assert set(new) == {*old, "obsm"}
        codes = new["obsm/X_z"][:]
        assert dict(new["obsm/X_z"].attrs)["encoding-type"] == "array"
    batch = torch.eye(3)[[(1, 0, 2)[i % 3] for i in range(40)]]
    x = torch.from_numpy(counts()).float()
    wanted = pv.encode(pv.load(trained / "run"), x, batch, x.sum(1, keepdim=True).log())
    np.testing.assert_allclose(codes, wanted["z"].numpy(), atol=1e-5)
    command("encode {run} --data {out} --out {again}", run=trained / "run", out=out,
            again=tmp_path / "again.h5ad")  # fmt: skip
    with h5py.File(tmp_path / "again.h5ad") as again:
        assert np.array_equal(again["obsm/X_z"][:], codes)


def test_score_names_cells_and_genes(trained, tmp_path):
    out = tmp_path / "scores.npz"
    command("score {run} --part all --num-samples 21 --out {out}", run=trained / "run", out=out)
    found = np.load(out)
    assert found["obs_names"].tolist() == [f"cell-{i}" for i in range(40)]
    assert set(found["strangest_1"].tolist()) <= set(GENES)


def test_other_files_must_have_the_genes_and_batches_of_the_run(trained, tmp_path, capsys):
    cases = {
        "it lacks 'PPBP'": {"genes": (*GENES[:-1], "X")},
        "in another order": {"genes": GENES[::-1]},
        "holds 'z' in row 0, which is not one of its categories: a, b, c": {
            "obs": {"batch": ["z"] * 40}
        },
    }
    for words, changed in cases.items():
        path = write_cells(tmp_path / "other.h5ad", layers={"raw": counts()}, **changed)
        with pytest.raises(SystemExit):
            command("score {run} --data {other}", run=trained / "run", other=path)
        assert re.search(words, capsys.readouterr().err)
    # Two of the three batches keep the columns that they had.
    path = write_cells(
        tmp_path / "other.h5ad", layers={"raw": counts()}, obs={"batch": ["c", "a"] * 20}
    )
    recorded = read(trained / "run" / "config.json")["train"]["cells"]
    found = load_cells_of(path, None, "raw", recorded, new=True).test.context
    assert found.argmax(1).tolist() == [2, 0] * 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("encode {run} --part test --out {out}", "--part must be all"),
        ("encode {run} --out {data}", "--out must be another file than the data"),
        ("train {data} --out {out}", "outside the support of the NegativeBinomial likelihood"),
        ("train {data} --out {out} --model pairs:Plain --batch batch", "needs --condition context"),
        ("train digits --out {out} --batch batch", "--batch applies only to .h5ad files"),
    ],
)
def test_bad_commands(trained, tmp_path, capsys, line, words):
    paths = {"run": trained / "run", "data": trained / "cells.h5ad", "out": tmp_path / "o.h5ad"}
    with pytest.raises(SystemExit):
        command(line, **paths)
    assert words in capsys.readouterr().err
