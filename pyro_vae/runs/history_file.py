"""Write and read history.csv, whose last column detects each changed bit and each cut."""

import csv
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.data.sizes import read_bytes
from pyro_vae.errors import UsageError
from pyro_vae.runs.files import atomic

CHECK = "check"
"""The last column: the CRC-32 of all text before it in the last row, and 0 in the other rows."""

_FORMER_LAST = "seconds"
"""The last column in files of version 0.1.0, which have no check."""


def write_history(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same columns as CSV with a check, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(rows[0] if rows else ()), CHECK])
    writer.writerows([*row.values(), 0] for row in rows)
    body = text.getvalue().encode()
    if rows:
        body = body[: -len("0\n")]
    with atomic(path) as file:
        file.write(body + f"{zlib.crc32(body)}\n".encode())


def read_history(path: Path) -> dict[str, list[float]]:
    """Read the columns of history.csv, without the check.

    Raises `UsageError` if the file is cut short, damaged, or not a table of numbers.
    """
    content = read_bytes(path)
    try:
        header, *rows = csv.reader(io.StringIO(content.decode(), newline=""))
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        last = columns.pop(CHECK, None)
        if _is_whole(content, header, last) and (not columns or "epoch" in columns):
            return {name: [float(word) for word in words] for name, words in columns.items()}
    except (ValueError, csv.Error):
        pass
    raise UsageError(f"{path} is cut short, damaged or not a table of numbers")


def _is_whole(content: bytes, header: Sequence[str], checks: Sequence[str] | None) -> bool:
    """Whether the check is right; files of version 0.1.0 have none."""
    if checks is None:
        return header[-1] == _FORMER_LAST
    end = f"{checks[-1]}\n".encode()
    body = content[: -len(end)]
    return content.endswith(end) and checks[-1] == str(zlib.crc32(body))
