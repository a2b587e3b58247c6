"""Formatting of numbers as text."""

from math import isnan


def with_error(value: float, error: float, width: int = 0) -> str:
    """A number with its standard error; only the number if the error is NaN (one sample).

    >>> with_error(-4.5, 0.1), with_error(-4.5, float("nan"))
    ('-4.500 ± 0.100', '-4.500')
    """
    return f"{value:>{width}.3f}" + ("" if isnan(error) else f" ± {error:.3f}")
