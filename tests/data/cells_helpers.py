"""AnnData files for tests."""

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = ("ACTB", "CD3E", "MS4A1", "NKG7", "PPBP")


def counts(n=40, seed=0):
    return np.random.default_rng(seed).negative_binomial(2, 0.3, (n, len(GENES)))


def write_cells(path, x=None, genes=GENES, obs=None, **more):
    """A small .h5ad file; its counts are sparse unless x is given."""
    x = sp.csr_matrix(counts().astype(np.float32)) if x is None else x
    n = x.shape[0]
    frame = pd.DataFrame(
        {
            "batch": pd.Categorical([("b", "a", "c")[i % 3] for i in range(n)]),
            "kind": [("T", "B")[i % 2] for i in range(n)],
            "donor": [f"d{i // 4}" for i in range(n)],
            "run": [i % 2 + 7 for i in range(n)],
        }
        | (obs or {}),
        index=[f"cell-{i}" for i in range(n)],
    )
    cells = anndata.AnnData(x, obs=frame, var=pd.DataFrame(index=list(genes)), **more)
    cells.write_h5ad(path)
    return path
