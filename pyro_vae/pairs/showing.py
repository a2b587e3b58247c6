"""Results as HTML, for notebooks: the lines that `print` shows, as paragraphs and tables."""

import html
import re
from itertools import groupby
from typing import Any

_STYLE = "text-align: left; font-variant-numeric: tabular-nums"


def shown_html(result: Any) -> str:
    """What a notebook shows of a result; a result has it as its method ``_repr_html_``.

    Lines with the same number of cells, which two or more spaces separate, become a table. Other
    lines keep their form.

    >>> shown_html("ELBO      -3.2\\nKL         1.5").count("<tr>")
    2
    """
    blocks = groupby(str(result).split("\n"), key=lambda line: bool(line.strip()))
    return "".join(_block(list(lines)) for full, lines in blocks if full)


def _block(lines: list[str]) -> str:
    rows = [_cells(line) for line in lines]
    if len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
    return f"<table>{''.join(map(_row, rows))}</table>"


def _cells(line: str) -> list[str]:
    """The cells of a line; spaces at its start are an empty cell."""
    return re.split(r"\s{2,}", line.rstrip())


def _row(cells: list[str]) -> str:
    told = (f'<td style="{_STYLE}">{html.escape(cell)}</td>' for cell in cells)
    return f"<tr>{''.join(told)}</tr>"
