"""Programs for readers run small in the tests: few rows, epochs and samples, the eager engine."""

import inspect
from dataclasses import replace
from functools import wraps

import pyro_vae as pv

ROWS = 200
"""Rows of each part of a data set."""
MOST = {
    "num_samples": 42,
    "steps": 20,
    "num_simulations": 100,
    "num_temperatures": 50,
    "num_draws": 100,
    "warmup": 100,
    "budget": 1.0,
}
"""The most that a program may ask of a tool."""


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


def quick(function):
    """A tool that takes at most ``MOST``."""
    signature = inspect.signature(function)

    @wraps(function)
    def run(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name in MOST.keys() & signature.parameters.keys():
            value = given.arguments[name]
            given.arguments[name] = value if value is None else min(value, MOST[name])
        return function(*given.args, **given.kwargs)

    return run


def shrink(monkeypatch):
    """Let programs load few data, train for a short time, and use tools with few samples."""
    monkeypatch.setattr(pv, "load_data", small(pv.load_data))
    monkeypatch.setattr(pv, "fit", short(pv.fit))
    for name in pv.__all__:
        tool = getattr(pv, name)
        if inspect.isfunction(tool) and MOST.keys() & inspect.signature(tool).parameters.keys():
            monkeypatch.setattr(pv, name, quick(tool))
