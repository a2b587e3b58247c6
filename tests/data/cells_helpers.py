"""AnnData files for tests, written with h5py in the form that anndata documents.

https://anndata.readthedocs.io/en/stable/fileformat-prose.html"""

import h5py
import numpy as np
import scipy.sparse as sp

GENES = ("ACTB", "CD3E", "MS4A1", "NKG7", "PPBP")


def counts(n=40, seed=0):
    return np.random.default_rng(seed).negative_binomial(2, 0.3, (n, len(GENES)))


def columns(n):
    """The columns of obs: a categorical one in an order of its own, words, groups and numbers."""
    return {
        "batch": (("a", "b", "c"), [(1, 0, 2)[i % 3] for i in range(n)]),
        "kind": [("T", "B")[i % 2] for i in range(n)],
        "donor": [f"d{i // 4}" for i in range(n)],
        "run": np.array([i % 2 + 7 for i in range(n)]),
    }


def write_cells(path, x=None, genes=GENES, obs=None, layers=None):
    """A small .h5ad file; its counts are sparse unless x is given."""
    x = sp.csr_matrix(counts().astype(np.float32)) if x is None else x
    n = x.shape[0]
    with h5py.File(path, "w") as file:
        marked(file, "anndata", "0.1.0")
        write_matrix(file, "X", x)
        write_frame(file, "obs", [f"cell-{i}" for i in range(n)], columns(n) | (obs or {}))
        write_frame(file, "var", list(genes), {})
        marked(file.create_group("layers"), "dict", "0.1.0")
        for name, layer in (layers or {}).items():
            write_matrix(file, f"layers/{name}", layer)
    return path


def marked(element, form, version):
    element.attrs["encoding-type"], element.attrs["encoding-version"] = form, version
    return element


def write_matrix(file, name, x):
    if not sp.issparse(x):
        marked(file.create_dataset(name, data=np.asarray(x)), "array", "0.2.0")
        return
    group = marked(file.create_group(name), f"{x.format}_matrix", "0.1.0")
    group.attrs["shape"] = x.shape
    for part in ("data", "indices", "indptr"):
        group.create_dataset(part, data=getattr(x, part))


def write_frame(file, name, index, frame):
    group = marked(file.create_group(name), "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    group.attrs["column-order"] = np.array(list(frame), dtype=h5py.string_dtype())
    for column, values in {"_index": index, **frame}.items():
        write_column(group, column, values)


def write_column(group, name, values):
    """Numbers, words, or a tuple of categories and codes."""
    if isinstance(values, tuple):
        made = marked(group.create_group(name), "categorical", "0.2.0")
        made.attrs["ordered"] = False
        write_column(made, "categories", list(values[0]))
        write_column(made, "codes", np.array(values[1], np.int8))
    elif isinstance(values, np.ndarray):
        marked(group.create_dataset(name, data=values), "array", "0.2.0")
    else:
        data = group.create_dataset(name, data=values, dtype=h5py.string_dtype())
        marked(data, "string-array", "0.2.0")
