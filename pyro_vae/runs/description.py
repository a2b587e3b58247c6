"""Describe a pair as JSON by its class, its parts and their arguments, and build it again."""

import inspect
import json
import re
from importlib import import_module
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

import pyro_vae
from pyro_vae.errors import UsageError


def recipe(pair: nn.Module) -> dict[str, Any]:
    """The description of a pair: its class, and its arguments if they are known."""
    try:
        return describe(pair)
    except UsageError:
        return {"class": _path(type(pair)), "arguments": None}


def describe(value: Any, place: str = "pair", known: dict[int, str] | None = None) -> Any:
    """Describe a value as JSON, from which `built` makes it again: parts by class and arguments.

    If the same part occurs at a second place, the second place refers to the first.

    Raises `UsageError` for a part that does not keep its arguments as attributes of the same names.
    """
    known = {} if known is None else known
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):  # NumPy's numbers are not numbers of JSON
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [describe(item, f"{place}.{i}", known) for i, item in enumerate(value)]
    if isinstance(value, type):
        return {"type": _path(value)}
    if isinstance(value, nn.Module):
        if id(value) in known:
            return {"same": known[id(value)]}
        known[id(value)] = place
        arguments = {}
        # The metaclass of PyroModule hides the signature of the class.
        parameters = list(inspect.signature(type(value).__init__).parameters.items())[1:]
        for name, parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(
                value, name
            ):
                raise UsageError(
                    f"{_path(type(value))} does not keep its argument '{name}' as an attribute"
                )
            arguments[name] = describe(getattr(value, name), f"{place}.{name}", known)
        return {"class": _path(type(value)), "arguments": arguments}
    raise UsageError(f"a {type(value).__name__} cannot be described")


def built(value: Any, place: str, made: dict[str, Any]) -> Any:
    """Make a value from its description; ``made`` keeps the parts by their places."""
    if isinstance(value, list):
        return tuple(built(item, f"{place}.{i}", made) for i, item in enumerate(value))
    if isinstance(value, dict) and "type" in value:
        return class_of(value["type"])
    if isinstance(value, dict) and "same" in value:
        return made[value["same"]]
    if isinstance(value, dict):
        arguments = built_arguments(value["arguments"], place, made)
        made[place] = class_of(value["class"])(**arguments)
        return made[place]
    return value


def built_arguments(values: dict[str, Any], place: str, made: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments of a part from their descriptions."""
    return {name: built(value, f"{place}.{name}", made) for name, value in values.items()}


_FORMER = (
    *("bayesian", "exact", "factors", "flows", "guides", "likelihoods", "networks", "posteriors"),
    *("priors", "recurrent", "sequences", "models.hierarchical", "models.mixture"),
    *("models.semisupervised", "models.sequence", "models.vae"),
)
"""The modules in the names of parts that version 0.1.0 wrote."""

_INNER = {
    **{
        "Viewed": "parts.networks",
        "Log1p": "parts.networks",
        "SeenAndMask": "parts.missing",
        "ColumnsView": "parts.columns",
        "StandardUnits": "parts.standardized",
        "OneHot": "parts.networks",
        "Writer": "parts.sequences",
    },
    **{
        "Refined": "inference.refinement",
        "Grafted": "inference.refitting",
        "Encoders": "inference.refitting",
    },
    **{"LinearGaussian": "models.exact", "Spoiled": "models.exact"},
}
"""Parts inside other parts, without public names, and their modules."""


def is_ours(path: str) -> bool:
    """Whether a recorded class is a part of this library or of ``torch.nn``."""
    return path.startswith(("pyro_vae:", "pyro_vae.", "torch.nn."))


def class_of(path: str) -> type:
    """The part with this recorded name.

    Raises `UsageError` for any other class, so that a name in a folder never imports a module.
    """
    module, _, name = path.partition(":")
    kind = _part(name) if module in _HOMES else None
    if module == "torch.nn" or module.startswith("torch.nn."):
        kind = getattr(torch.nn, name, None) if name in dir(torch.nn) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(
            f"load cannot build '{path}' from config.json: it builds only public parts of pyro_vae "
            "and torch.nn; pass the pair itself, load(run, pair)"
        )
    return kind


_HOMES = ("pyro_vae", *(f"pyro_vae.{module}" for module in _FORMER))


def _part(name: str) -> Any:
    """The part of this library with this name, or None."""
    if name in _INNER:
        return getattr(import_module(f"pyro_vae.{_INNER[name]}"), name)
    return getattr(pyro_vae, name) if name in pyro_vae.__all__ else None


def _path(kind: type) -> str:
    """The recorded name of a class: the public name for a part of this library, in any module."""
    module, name = kind.__module__, kind.__qualname__
    ours = module.startswith("pyro_vae.") and _part(name) is kind
    return f"pyro_vae:{name}" if ours else f"{module}:{name}"


def renamed(recipe: str) -> str:
    """Replace the names of parts of version 0.1.0 in a recipe by their present names.

    An argument that these parts did not have gets its default.

    >>> renamed('{"class": "pyro_vae.models.vae:VAE"}')
    '{"class": "pyro_vae:VAE"}'
    """
    present = re.sub(r'"pyro_vae\.[\w.]+:(?=\w+")', '"pyro_vae:', recipe)
    return json.dumps(json.loads(present, object_hook=_completed), sort_keys=True)


_LATER: dict[str, dict[str, Any]] = {
    "pyro_vae:Gaussian": {"start": 1.0},
    "pyro_vae:MLP": {"linear": False},
}
"""Arguments that parts of earlier versions did not have, with the values that change nothing."""


def _completed(found: dict[str, Any]) -> dict[str, Any]:
    arguments = found.get("arguments")
    if isinstance(arguments, dict):
        for name, value in _LATER.get(found.get("class", ""), {}).items():
            arguments.setdefault(name, value)
    return found
