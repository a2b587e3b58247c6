"""Formatting of numbers as text."""

from collections.abc import Iterable, Sequence
from math import isnan


def with_error(value: float, error: float, width: int = 0) -> str:
    """A number with its standard error; only the number if the error is NaN (one sample).

    >>> with_error(-4.5, 0.1), with_error(-4.5, float("nan"))
    ('-4.500 ± 0.100', '-4.500')
    """
    return f"{value:>{width}.3f}" + ("" if isnan(error) else f" ± {error:.3f}")


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with columns as wide as their entries.

    >>> aligned([("run", "ELBO"), ("first", "-3")])
    ['run    ELBO', 'first  -3']
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def in_words(seconds: float) -> str:
    """A duration in the largest unit in which it is at least 2.

    >>> in_words(1.2), in_words(300), in_words(20_000), in_words(1e6)
    ('1 s', '5 minutes', '6 hours', '12 days')
    """
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def in_columns(lines: Iterable[tuple[str, str]]) -> str:
    """Names and their values in two columns, two spaces apart at least.

    >>> print(in_columns([("ELBO", "-3.2"), ("KL of effect of hospital", "1.5")]))
    ELBO                      -3.2
    KL of effect of hospital  1.5
    """
    lines = list(lines)
    width = max([20, *(len(name) + 2 for name, _ in lines)])
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)
