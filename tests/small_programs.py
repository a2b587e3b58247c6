"""Programs for readers run small in the tests: few rows, few epochs, the eager engine."""

from dataclasses import replace

ROWS = 200
"""Rows of each part of a data set."""


def few(split):
    return type(split)(*(None if part is None else part[:ROWS] for part in split))


def small(function):
    """`load_data` with a few rows."""

    def load_data(*args, **kwargs):
        data = function(*args, **kwargs)
        parts = {name: few(getattr(data, name)) for name in ("train", "validation", "test")}
        return replace(data, **parts)

    return load_data


def short(function):
    """`fit` for three epochs at most, by the eager engine if the program names no other."""

    def fit(*args, **kwargs):
        epochs = min(3, kwargs.get("epochs", 3))
        return function(*args, **{"engine": "eager"} | kwargs | {"epochs": epochs})

    return fit
