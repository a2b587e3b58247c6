"""Cells: counts of genes from AnnData files (.h5ad) and stores (.zarr).

Only what is used is read, with h5py or zarr, and no code of the file runs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.data.cell_stores import require_whole, strings
from pyro_vae.data.files import require_observed_rows
from pyro_vae.data.schema import Column, Schema, read_schema, whole_schema
from pyro_vae.data.sizes import available_memory
from pyro_vae.data.split import Data
from pyro_vae.data.table_files import arrow
from pyro_vae.data.tables import Table, schema_of
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs.arrays import as_tensor

ROLES = ("context", "label", "group", "split")
"""The roles that a column of obs can have."""

CELLS_AT_ONCE = 4096
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

    def new(self) -> Data:
        """All cells as test data, for a pair that was fitted to other cells."""
        return replace(self.table.new(), table=None, schema=None, cells=self)


def described(
    file: Any,
    path: Path,
    columns: Mapping[str, Any] | str | Path | None,
    layer: str | None,
    batch: str | None,
    recorded: Mapping[str, Any] | None,
) -> tuple[Cells, Any]:
    """The cells of an open file without their counts, and the matrix that holds these.

    Arguments:
        file: the root group of a .h5ad file or of a .zarr store.
        columns: the roles of columns of obs, as `pyro_vae.read_table` takes them: context, label,
            group or split.
        layer: the layer with the counts; the default is X.
        batch: the column of obs with the batch, which becomes context in one-hot rows.
        recorded: `Cells.recorded` of the training data. The genes must be the same, and the
            categories are those of training.

    Raises `UsageError` if the file lacks what is named, or if the counts are not a matrix.
    """
    names = tuple(_unique(_index(file, "var", path)))
    if recorded is not None:
        _require_genes(names, recorded["genes"], path)
    table = _obs_table(path, file, _roles(columns, batch, recorded))
    matrix = _found(file, path, layer)
    _require_matrix(matrix, (table.source.num_rows, len(names)), path)
    return Cells(table, names), matrix


def with_counts(cells: Cells, matrix: Any, path: Path) -> Cells:
    """Cells with their counts as a dense array of float32 in memory.

    Raises `UsageError` if they cannot be read or do not fit into memory.
    """
    _require_memory((cells.table.source.num_rows, len(cells.names)), path)
    whole = matrix if form_of(matrix, path) == "array" else sparse_rows(matrix, path)
    x = as_tensor(_dense(whole, path), str(path), missing=True)
    require_observed_rows(x, path)
    return replace(cells, table=replace(cells.table, x=x))


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


def form_of(element: Any, path: Path) -> str:
    """How an element is encoded."""
    form = element.attrs.get("encoding-type")
    if not form:
        raise UsageError(
            f"{element.name} of {path} has the form of an old anndata: read the file and write it "
            "again with anndata 0.8 or later"
        )
    return str(form)


def _index(file: Any, name: str, path: Path) -> list[str]:
    """The names of the rows of obs or var."""
    if name not in file:
        raise UsageError(f"{path} has no {name}, so it is not a complete {path.suffix} file")
    form_of(file[name], path)
    names = file[name][file[name].attrs["_index"]]
    require_whole(names, path)
    return list(map(str, _column(names, path).to_pylist()))


def _column(element: Any, path: Path) -> Any:
    """A column of obs or var as an Arrow array, with nulls for missing values."""
    pa, form = arrow(), form_of(element, path)
    if form == "string-array":
        return pa.array(strings(element).tolist(), pa.string())
    if form == "array":
        return pa.array(element[:], from_pandas=True)
    if form == "categorical":
        codes, categories = element["codes"][:], _column(element["categories"], path)
        number = pa.array(codes.astype(np.int32), mask=codes < 0)
        ordered = bool(element.attrs.get("ordered", False))
        return pa.DictionaryArray.from_arrays(number, categories, ordered=ordered)
    if form.startswith("nullable-"):
        values, hidden = element["values"], element["mask"][:]
        plain = strings(values) if form == "nullable-string-array" else values[:]
        return pa.array(plain, mask=hidden)
    raise UsageError(f"{element.name} of {path} has the form '{form}', which is not supported")


def _unique(names: list[str]) -> Iterator[str]:
    """Names, where repeated ones get -1, -2, ..., as anndata makes them unique."""
    taken, numbers = set(names), dict.fromkeys(names, -1)
    for name in names:
        numbers[name] += 1
        made = name
        while numbers[name] and (made := f"{name}-{numbers[name]}") in taken:
            numbers[name] += 1
        taken.add(made)
        yield made


def _require_memory(shape: tuple[int, ...], path: Path) -> None:
    """Raise `UsageError` if a dense array and its three parts do not fit into memory."""
    need, have = 8 * int(np.prod(shape)), available_memory()
    if need > have:
        words = " × ".join(map(str, shape))
        raise UsageError(
            f"{path} holds {words} numbers, which need {need / 2**30:.1f} GiB as dense arrays, but "
            f"{have / 2**30:.1f} GiB of memory are free: select genes (for example with "
            "scanpy.pp.highly_variable_genes) or cells"
        )


def _require_matrix(element: Any, shape: tuple[int, int], path: Path) -> None:
    """Raise `UsageError` unless an element is a matrix of numbers of this shape."""
    form = form_of(element, path)
    if form not in ("array", "csr_matrix", "csc_matrix"):
        raise UsageError(f"{path}: the counts must be a matrix of numbers (cells, genes)")
    is_dense = form == "array"
    declared = tuple(map(int, element.shape if is_dense else element.attrs["shape"]))
    numbers = element if is_dense else element["data"]
    if declared != shape or numbers.dtype.kind not in "biuf":
        raise UsageError(
            f"{path}: the counts must be a matrix of numbers of shape {shape}, for obs and var; "
            f"got {numbers.dtype} of shape {declared}"
        )


def sparse_rows(element: Any, path: Path) -> Any:
    """A sparse matrix in memory, in rows, whose indices are inside its shape."""
    arrays = sparse_arrays(element, path)
    return checked_rows(tuple(array[:] for array in arrays), element, path)


def sparse_arrays(element: Any, path: Path) -> list[Any]:
    """The arrays data, indices and indptr of a sparse matrix on disk."""
    arrays = [element[name] for name in ("data", "indices", "indptr")]
    for array in arrays:
        require_whole(array, path)
    return arrays


def checked_rows(parts: tuple[Any, ...], element: Any, path: Path, rows: int | None = None) -> Any:
    """A sparse matrix of these arrays in rows; ``rows`` is the number of its rows."""
    from scipy import sparse

    shape = tuple(int(size) for size in element.attrs["shape"])
    try:
        made = getattr(sparse, form_of(element, path))
        matrix = made(parts, shape=shape if rows is None else (rows, shape[1]))
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise UsageError(f"{path} holds a damaged sparse matrix ({first_line(error)})") from error
    found = matrix.tocsr()
    if not found.has_canonical_format:  # the sum of repeated entries may exceed their type
        found = found.astype(np.float64)
        found.sum_duplicates()
    return found


def _dense(matrix: Any, path: Path) -> np.ndarray:
    """A matrix as float32, converted in blocks of rows."""
    made = np.empty(matrix.shape, np.float32)
    for start in range(0, len(made), CELLS_AT_ONCE):
        rows = matrix[start : start + CELLS_AT_ONCE]
        rows = rows.toarray() if hasattr(rows, "toarray") else rows
        made[start : start + CELLS_AT_ONCE] = in_float32(rows, path)
    return made


def in_float32(numbers: np.ndarray, path: Path) -> np.ndarray:
    """Numbers as float32; raise `UsageError` for a whole number that would be rounded."""
    with np.errstate(over="ignore"):  # infinite numbers are refused later
        made = numbers.astype(np.float32)
    rounded = (made != numbers) & (numbers == np.floor(numbers))
    if rounded.any():
        raise UsageError(
            f"{path} holds the whole number {numbers[rounded][0]:.0f}; whole numbers above "
            f"{2**24:,} are not exact in float32"
        )
    return made


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
            "must be roles by the name of a column of obs for cells", argument="columns"
        )
    roles = dict(read_schema(columns) if isinstance(columns, str | Path) else columns or {})
    return roles | ({} if batch is None else {batch: {"kind": "categorical", "role": "context"}})


def _obs_table(path: Path, file: Any, roles: dict[str, Any] | Schema) -> Table:
    """The used columns of obs and the names of the cells as a table, without data."""
    names, obs = _index(file, "obs", path), file["obs"]
    known = list(map(str, obs.attrs["column-order"]))
    given = [column.name for column in roles.columns] if isinstance(roles, Schema) else list(roles)
    for name in given:
        if name not in known and isinstance(roles, dict):
            words = nearest(name, known) if known else "obs has no columns"
            raise UsageError(f"{path} has no column '{name}' in obs; {words}")
    pa = arrow()
    used = {name: _column(obs[name], path) for name in given if name in known}
    schema = schema_of(pa.table(used), roles) if used else Schema(())
    for column in schema.columns:
        if column.role not in ROLES:
            raise UsageError(
                f"column '{column.name}' of obs must be one of {', '.join(ROLES)}, got "
                f"{column.role}"
            )
    ids = {_IDS: pa.array(names)}
    whole = Schema((Column(_IDS, role="row id"), *schema.columns))
    return Table(path.stem, whole, torch.empty(0), pa.table(ids | used))
