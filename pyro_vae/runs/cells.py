"""Write codes into AnnData files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.cell_stores import opened
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
        with opened(Path(copy.name), "r+") as file:
            obsm = _marked(file.require_group("obsm"), "dict", "0.1.0")
            for site, code in codes.items():
                if (name := f"X_{site}") in obsm:
                    del obsm[name]
                array = np.asarray(code).reshape(len(code), -1)
                _marked(obsm.create_dataset(name, data=array), "array", "0.2.0")


def _marked(element: Any, form: str, version: str) -> Any:
    """An element of the file with its form, as anndata writes it."""
    element.attrs["encoding-type"], element.attrs["encoding-version"] = form, version
    return element
