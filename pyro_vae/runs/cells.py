"""Write codes into AnnData files."""

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.cells import anndata_package
from pyro_vae.errors import UsageError
from pyro_vae.runs.files import atomic


def write_codes(source: str | Path, codes: Mapping[str, Any], out: Path) -> None:
    """Write a copy of an AnnData file with an array ``obsm["X_SITE"]`` for each latent site.

    Arguments:
        codes: arrays (n, units) by site, in the order of the file.

    Raises `UsageError` if the copy would replace the file.
    """
    source = Path(source)
    if out.resolve() == source.resolve():
        raise UsageError(f"must be another file than the data, got {out}", argument="out")
    with atomic(out) as copy:
        with source.open("rb") as original:
            shutil.copyfileobj(original, copy)
        copy.flush()
        with import_module("h5py").File(copy.name, "r+") as file:
            write = anndata_package().io.write_elem
            if "obsm" not in file:
                write(file, "obsm", {})
            for site, code in codes.items():
                write(file, f"obsm/X_{site}", np.asarray(code).reshape(len(code), -1))
