"""Cells: counts of genes from AnnData files (.h5ad)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.files import require_observed_rows
from pyro_vae.data.schema import Column, Schema, read_schema, whole_schema
from pyro_vae.data.split import Data
from pyro_vae.data.table_files import arrow
from pyro_vae.data.tables import Table, schema_of
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs.arrays import as_tensor

FILE = ".h5ad"
"""The ending of AnnData files."""

ROLES = ("context", "label", "group", "split")
"""The roles that a column of obs can have."""

ROWS = 4096
"""The number of rows that are converted at once."""

_IDS = "obs_names"


@dataclass(frozen=True)
class Cells:
    """The cells of an AnnData file: counts, the names of cells and genes, and columns of obs."""

    table: Table
    """The counts (n, genes), float32, with the names of the cells and the used columns of obs."""
    names: tuple[str, ...]
    """The names of the genes; repeated names get -1, -2, ..."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of the cells."""
        return self.table.ids

    @property
    def schema(self) -> Schema:
        """The used columns of obs."""
        columns = (column for column in self.table.schema.columns if column.role != "row id")
        return Schema(tuple(columns))

    def recorded(self) -> dict[str, Any]:
        """What a run records, so that it reads other files alike."""
        columns = {column.name: asdict(column) for column in self.schema.columns}
        kept = ("kind", "role", "categories")
        return {
            "genes": list(self.names),
            "columns": {
                name: {key: column[key] for key in kept if column[key]}
                for name, column in columns.items()
            },
        }

    def split(self) -> Data:
        """Training, validation and test data: by the split column, or 70 : 10 : 20 at random."""
        return replace(self.table.split(), table=None, schema=None, cells=self)


def read_cells(
    path: str | Path,
    columns: Mapping[str, Any] | str | Path | None = None,
    layer: str | None = None,
    batch: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Cells:
    """Read the counts of an AnnData file, which become a dense array of float32.

    Only the counts, obs and the names of the genes are read.

    Arguments:
        path: a .h5ad file.
        columns: the roles of columns of obs, as `pyro_vae.read_table` takes them: context, label,
            group or split.
        layer: the layer with the counts; the default is X.
        batch: the column of obs with the batch, which becomes context in one-hot rows.
        recorded: `Cells.recorded` of the training data. The genes must be the same, and the
            categories are those of training.

    Raises `UsageError` if the file cannot be read, lacks what is named, or does not fit into
    memory.
    """
    path = Path(path)
    with _opened(path) as (file, anndata):
        obs, var = (_read(anndata, _present(file, name, path), path) for name in ("obs", "var"))
        x = _counts(anndata, _found(file, path, layer), path)
    unique = import_module("anndata.utils").make_index_unique
    names = tuple(map(str, unique(var.index.astype(str))))
    if recorded is not None:
        _require_genes(names, recorded["genes"], path)
    table = _obs_table(path, obs, _roles(columns, batch, recorded))
    return Cells(replace(table, x=x), names)


def anndata_package() -> Any:
    """Import anndata; raise `UsageError` if it or pyarrow is not installed."""
    try:
        import_module("pyarrow")
        import_module("anndata.io")
        return import_module("anndata")
    except ImportError as error:
        raise UsageError(
            ".h5ad files need anndata and pyarrow, which are not installed; run pip install "
            "'pyro-vae[anndata]'"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An AnnData file as HDF5, and the package anndata."""
    anndata = anndata_package()
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        file = import_module("h5py").File(path, "r")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read as a .h5ad file ({first_line(error)[:120]})"
        ) from error
    with file:
        yield file, anndata


def _present(file: Any, name: str, path: Path) -> Any:
    if name not in file:
        raise UsageError(f"{path} has no {name}, so it is not a complete .h5ad file")
    return file[name]


def _found(file: Any, path: Path, layer: str | None) -> Any:
    """The element of the file with the counts."""
    layers = list(file["layers"]) if "layers" in file else []
    if layer is None:
        if "X" not in file:
            raise UsageError(f"{path} has no X; name one of its layers: {', '.join(layers)}")
        return file["X"]
    if layer not in layers:
        words = nearest(layer, layers) if layers else "it has no layers"
        raise UsageError(f"{path} has no layer '{layer}'; {words}", argument="layer")
    return file["layers"][layer]


def _read(anndata: Any, element: Any, path: Path) -> Any:
    """An element of the file: an array, a sparse matrix or a data frame."""
    if not element.attrs.get("encoding-type"):
        raise UsageError(
            f"{element.name} of {path} has the form of an old anndata: read the file and write it "
            "again with anndata 0.8 or later"
        )
    try:
        return anndata.io.read_elem(element)
    except Exception as error:  # a damaged file makes h5py and anndata raise anything
        raise UsageError(
            f"{element.name} of {path} cannot be read ({first_line(error)[:120]})"
        ) from error


def _require_memory(shape: Any, path: Path) -> None:
    """Raise `UsageError` if a dense array and its three parts do not fit into memory."""
    need, have = 8 * int(np.prod([int(size) for size in shape])), available_memory()
    if need > have:
        words = " × ".join(str(size) for size in shape)
        raise UsageError(
            f"{path} holds {words} numbers, which need {need / 2**30:.1f} GiB as dense arrays, but "
            f"{have / 2**30:.1f} GiB of memory are free: select genes (for example with "
            "scanpy.pp.highly_variable_genes) or cells"
        )


def available_memory() -> int:
    """The bytes of memory that are free, or a large number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else 2**62


def _counts(anndata: Any, element: Any, path: Path) -> Tensor:
    """The matrix of an element, (n, genes): dense ones are read in blocks, sparse ones whole."""
    _require_memory(element.attrs.get("shape", getattr(element, "shape", ())), path)
    dense = element.attrs.get("encoding-type") == "array"
    matrix = element if dense else _sound(_read(anndata, element, path), path)
    if len(matrix.shape) != 2 or matrix.dtype.kind not in "biuf":
        raise UsageError(f"{path}: the counts must be a matrix of numbers (cells, genes)")
    try:
        x = as_tensor(_dense(matrix, path), str(path), missing=True)
    except OSError as error:
        raise UsageError(f"{path} is damaged ({first_line(error)[:120]})") from error
    require_observed_rows(x, path)
    return x


def _dense(matrix: Any, path: Path) -> np.ndarray:
    """A matrix as float32, converted in blocks of rows."""
    made = np.empty(matrix.shape, np.float32)
    for start in range(0, len(made), ROWS):
        rows = matrix[start : start + ROWS]
        rows = rows.toarray() if hasattr(rows, "toarray") else rows
        with np.errstate(over="ignore"):  # infinite numbers are refused later
            block = made[start : start + ROWS] = rows.astype(np.float32)
        rounded = (block != rows) & (rows == np.floor(rows))
        if rounded.any():
            raise UsageError(
                f"{path} holds the whole number {rows[rounded][0]:.0f}; whole numbers above "
                f"{2**24:,} are not exact in float32"
            )
    return made


def _sound(matrix: Any, path: Path) -> Any:
    """A sparse matrix in rows, whose indices are inside its shape."""
    if not hasattr(matrix, "tocsr"):
        raise UsageError(f"{path}: the counts must be a matrix of numbers (cells, genes)")
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise UsageError(f"{path} holds a damaged sparse matrix ({first_line(error)})") from error
    return matrix.tocsr()


def _require_genes(names: tuple[str, ...], known: Any, path: Path) -> None:
    if list(names) == list(known):
        return
    if sorted(names) == sorted(known):
        raise UsageError(
            f"{path} has the genes of the run in another order: order them by the genes of the "
            "training data, adata[:, training.var_names]"
        )
    absent = [name for name in known if name not in set(names)]
    words = f"it lacks '{absent[0]}'" if absent else f"it has {len(names)} genes"
    raise UsageError(
        f"{path} must have the {len(known)} genes of the run, but {words}: select them with "
        "adata[:, training.var_names]"
    )


def _roles(
    columns: Mapping[str, Any] | str | Path | None,
    batch: str | None,
    recorded: Mapping[str, Any] | None,
) -> dict[str, Any] | Schema:
    """The roles of columns of obs, by name; or the whole schema that a run recorded."""
    if recorded is not None:
        return whole_schema(recorded["columns"])
    if isinstance(columns, Schema):
        raise UsageError(
            "must be roles by the name of a column of obs for a .h5ad file", argument="columns"
        )
    roles = dict(read_schema(columns) if isinstance(columns, str | Path) else columns or {})
    return roles | ({} if batch is None else {batch: {"kind": "categorical", "role": "context"}})


def _obs_table(path: Path, obs: Any, roles: dict[str, Any] | Schema) -> Table:
    """The used columns of obs and the names of the cells as a table, without data."""
    known = list(map(str, obs.columns))
    given = [column.name for column in roles.columns] if isinstance(roles, Schema) else list(roles)
    for name in given:
        if name not in known and isinstance(roles, dict):
            words = nearest(name, known) if known else "obs has no columns"
            raise UsageError(f"{path} has no column '{name}' in obs; {words}")
    pa = arrow()
    used = {name: pa.array(obs[name], from_pandas=True) for name in given if name in known}
    schema = schema_of(pa.table(used), roles) if used else Schema(())
    for column in schema.columns:
        if column.role not in ROLES:
            raise UsageError(
                f"column '{column.name}' of obs must be one of {', '.join(ROLES)}, got "
                f"{column.role}"
            )
    ids = {_IDS: pa.array(list(map(str, obs.index)))}
    whole = Schema((Column(_IDS, role="row id"), *schema.columns))
    return Table(path.stem, whole, torch.empty(0), pa.table(ids | used))
