"""Write results as tables: CSV, Parquet, Feather, or .npz with an array for each column."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.table_files import FILES, arrow
from pyro_vae.errors import UsageError
from pyro_vae.runs.files import atomic


def write_table(table: Any, path: Path) -> None:
    """Write an Arrow table to .csv, .tsv, .parquet, .feather or .npz, by the ending of the path."""
    buffer = io.BytesIO()
    if path.suffix in (".csv", ".tsv"):
        csv = arrow("pyarrow.csv")
        delimiter = "\t" if path.suffix == ".tsv" else ","
        options = csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
        csv.write_csv(table, buffer, options)
    elif path.suffix == ".parquet":
        arrow("pyarrow.parquet").write_table(table, buffer)
    elif path.suffix in (".feather", ".arrow"):
        arrow("pyarrow.feather").write_feather(table, buffer)
    elif path.suffix == ".npz":
        _write_npz(table, buffer)
    else:
        raise UsageError(f"must end in {', '.join((*FILES, '.npz'))}, got {path}", argument="out")
    with atomic(path) as file:
        file.write(buffer.getvalue())


def _write_npz(table: Any, buffer: io.BytesIO) -> None:
    """Write an array for each column; words become fixed-width words, so no pickles are needed."""
    arrays: dict[str, Any] = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        words = any(isinstance(value, str) for value in values)
        if words:
            arrays[name] = np.array(["" if value is None else str(value) for value in values])
        else:
            kept = [np.nan if value is None else value for value in values]
            arrays[name] = np.array(kept)
    np.savez(buffer, **arrays)


def require_out(path: Path) -> Path:
    """Raise `UsageError` if results cannot be written to a file of this ending."""
    if path.suffix not in (*FILES, ".npz"):
        raise UsageError(f"must end in {', '.join((*FILES, '.npz'))}, got {path}", argument="out")
    return path
