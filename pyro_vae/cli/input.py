"""The options that say where the data are. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pyro_vae.cli.groups import OF_LIKELIHOOD
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from pyro_vae.data.split import Data


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where the data are, and how the pair sees them.

    Parameters
    ----------
    data_dir
        Folder of the torchvision data sets, of the decoded images of folders, and of converted
        tables of 1 GiB or more. The default is the environment variable PYRO_VAE_DATA, or
        ~/.cache/pyro_vae.
    binarize
        How gray intensities become binary for --likelihood bernoulli: drawn again at each visit
        (dynamic), drawn once (fixed), or not at all (none, which does not define a likelihood).
    columns
        For a table: TOML file with a table [columns.NAME] for each column to change, and the
        entries kind, role, categories and period. schema.toml of a run is such a file. For a .h5ad
        file or .zarr store: the roles of columns of obs, which are context, label, group or split.
    standardize
        Scale real-valued data inside the pair, by constants that are saved with it. The default is
        yes for rows (n, d) with a Gaussian or Student-t likelihood, unless --scale is a number.
    length
        Maximum width of a row of text in characters, including the end symbol. Longer docstrings
        are left out; longer lines of a file are cut.
    layer
        For a .h5ad file or .zarr store: layer with the counts. The default is X.
    batch
        For a .h5ad file or .zarr store: column of obs with the batch, on which the pair becomes
        conditional.
    group
        Column of a table, or array of a .npz file, with the id of the group of each row. Whole
        groups are the data, and are never split between training and test data.
    image_size
        For a folder of images: one number, or height and width. The default is the size of most
        images, or the median height and width.
    color
        For a folder of images: three channels (--color) or one (--gray). The default is color if
        any image has color.
    crop
        For a folder of images: scale each image to cover the size and keep its center; --no-crop
        stretches it instead.
    """

    data_dir: Path | None = None
    group: str | None = None
    binarize: Annotated[Literal["dynamic", "fixed", "none"], OF_LIKELIHOOD] = "dynamic"
    columns: Path | None = None
    layer: str | None = None
    batch: str | None = None
    standardize: bool | None = None
    length: int = 60
    image_size: tuple[int, ...] = ()
    color: Annotated[bool | None, Parameter(negative="--gray")] = None
    crop: bool = True


def named_data(source: Input) -> dict[str, Any]:
    """The options that choose a part of a file or the form of images, for `pyro_vae.load_data`."""
    return {
        "group": source.group,
        "layer": source.layer,
        "batch": source.batch,
        "image_size": source.image_size or None,
        "color": source.color,
        "crop": source.crop,
    }


def reject_ignored_by_data(source: Input, data: Data) -> None:
    """Raise `UsageError` for options that do not apply to these data."""
    from pyro_vae.data.datasets import TORCHVISION
    from pyro_vae.data.large_tables import LargeTable

    if source.standardize is not None and data.schema is not None:
        raise UsageError(
            "does not apply to tables, whose columns are always standardized inside the pair",
            argument="standardize",
        )

    if source.length != Input.length and data.vocabulary is None:
        raise UsageError(f"applies only to text; {data.name} is not text", argument="length")
    converted = data.files is not None or isinstance(data.table, LargeTable)
    if source.data_dir is not None and data.name not in TORCHVISION and not converted:
        raise UsageError(
            f"applies only to {', '.join(TORCHVISION)}, folders of images, and tables of 1 GiB or "
            f"more; got {data.name}",
            argument="data_dir",
        )
