"""Read tables with Arrow: CSV, Parquet and Feather files, and data frames."""

import codecs
import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pyro_vae.data.sizes import read_bytes, require_memory
from pyro_vae.errors import UsageError, first_line

FILES = (".csv", ".tsv", ".parquet", ".feather", ".arrow")
"""The endings of files that hold tables."""

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "#N/A", "?")
"""The words of a CSV file that mark a missing entry."""


_PANDAS = {"__index_level_0__": "index"}


def arrow(module: str = "pyarrow") -> Any:
    """Import Arrow; raise `UsageError` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            "tables need pyarrow, which is not installed; run pip install 'pyro-vae[tables]'"
        ) from error


def is_frame(value: Any) -> bool:
    """Whether a value is a data frame: it exports itself by the Arrow PyCapsule protocol."""
    return hasattr(value, "__arrow_c_stream__")


def arrow_table(source: Any) -> Any:
    """An Arrow table from a file or a data frame; dictionaries and chunks are resolved.

    Raises `UsageError` for a file that cannot be read, and for a table without rows or with two
    columns of one name.
    """
    table = _of_frame(source) if is_frame(source) or isinstance(source, Mapping) else _read(source)
    table = table.rename_columns(columns_named(table.column_names))
    what = "the table" if is_frame(source) or isinstance(source, Mapping) else str(source)
    require_columns(table.column_names, table.num_rows, what)
    return table.combine_chunks()


def require_columns(names: Sequence[str], rows: int, what: str) -> None:
    """Raise `UsageError` for a table without rows, or with two columns of one name."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{what} has {names.count(name)} columns of the name '{name}'")
    if not names or not rows:
        raise UsageError(f"{what} has no rows")


def columns_named(names: Sequence[str]) -> list[str]:
    """The names of columns; the index of a pandas frame has one, too."""
    return [_PANDAS.get(name, name) for name in names]


def _of_frame(source: Any) -> Any:
    """A frame or a mapping as an Arrow table; Arrow itself may reject some of its columns."""
    try:
        return arrow().table(source)
    # The libraries raise many types: for repeated names, mixed types, sparse or complex columns.
    except Exception as error:
        words = first_line(error)[:200]
        raise UsageError(
            f"the table cannot be read as columns of one type each ({words})"
        ) from error


def _read(source: Any) -> Any:
    if not isinstance(source, str | Path):
        raise UsageError(
            "must be the path of a file, a data frame, or a mapping from names to lists, got "
            f"{type(source).__name__}",
            argument="source",
        )
    path = Path(source)
    if path.suffix not in FILES:
        raise UsageError(f"{path} must be one of {', '.join(FILES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    pa = arrow()
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path)
        _require_memory(path)
        kind = "parquet" if path.suffix == ".parquet" else "feather"
        table = arrow(f"pyarrow.{kind}").read_table(path)
        table.validate(full=True)  # a damaged file may lead out of its buffers
        return table
    except UsageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        words = first_line(error)[:120]
        raise UsageError(f"{path} cannot be read as a {path.suffix} table ({words})") from error


def _require_memory(path: Path) -> None:
    """Raise `UsageError` for a table that is larger than the memory: tables are loaded whole.

    A Parquet file may expand; its footer says how much, and how many numbers it holds.
    """
    need = path.stat().st_size
    if path.suffix == ".parquet":
        about = arrow("pyarrow.parquet").read_metadata(path)
        unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        need = max(need, unpacked, 4 * about.num_rows * about.num_columns)
    require_memory(need, f"the table {path}")


def _read_csv(path: Path) -> Any:
    content = read_bytes(path)
    require_csv(path, content)
    parse, convert = csv_options(path)
    try:
        table = arrow("pyarrow.csv").read_csv(io.BytesIO(content), None, parse, convert)
    except arrow().ArrowException:
        _require_delimiter(path, content)  # decimal commas make rows of several lengths
        raise
    require_utf8(path, table.schema)
    return table


def csv_options(path: Path) -> tuple[Any, Any]:
    """How a .csv or .tsv file is parsed, and how its words become values."""
    csv = arrow("pyarrow.csv")
    return (
        csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
        csv.ConvertOptions(null_values=list(MISSING), strings_can_be_null=True),
    )


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def require_csv(path: Path, head: bytes) -> None:
    """Raise `UsageError` if the head of a file shows another encoding or delimiter."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{path}: it is not UTF-8; convert it with iconv -f UTF-16 -t UTF-8")
    if _delimiter(path).encode() not in head.split(b"\n", 1)[0]:
        _require_delimiter(path, head)


def require_utf8(path: Path, types: Any) -> None:
    """Raise `UsageError` if a column is binary, which words are that are not UTF-8."""
    if "binary" in map(str, types.types):
        raise UsageError(f"{path}: it is not UTF-8; convert it with iconv -f LATIN1 -t UTF-8")


def _require_delimiter(path: Path, content: bytes) -> None:
    """Raise `UsageError` if the first line of a file has another delimiter than the file should."""
    own = _delimiter(path)
    header = content.split(b"\n", 1)[0].decode("utf-8", "replace").strip("\ufeff\r")
    for other in (";", "\t", "|", ","):
        if header.count(other) > header.count(own):
            raise UsageError(
                f"{path} starts with '{header[:60]}', so its delimiter is probably {other!r}: "
                f"write it with {own!r}, and numbers with a decimal point"
            )
