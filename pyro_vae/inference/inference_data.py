"""Tensors as ArviZ ``InferenceData``."""

import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pyro_vae.errors import UsageError

Groups: TypeAlias = dict[str, dict[str, Tensor]]
"""Tensors by group and name, of dimensions (draws, data, ...)."""


def converted(arviz: ModuleType, groups: Groups, shared: Mapping[str, Tensor]) -> Any:
    """Convert groups of tensors (draws, data, ...) and draws of global latents to ArviZ.

    The result is the object of the installed version, before or from 1.0.
    """
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for group, variables in groups.items():
        for name, value in variables.items():
            array = value.cpu().numpy()
            arrays.setdefault(group, {})[name] = array[0] if "data" in group else array[None]
    dims = {name: ["data"] for variables in arrays.values() for name in variables}
    for name, value in shared.items():
        arrays.setdefault("posterior", {})[name] = value.cpu().numpy()[None]
    if "posterior" in signature(arviz.from_dict).parameters:
        return arviz.from_dict(**arrays, dims=dims)
    return arviz.from_dict(arrays, dims=dims)


def installed_arviz() -> ModuleType:
    """Return the module arviz. Raises `UsageError` if ArviZ is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version at import
        try:
            return import_module("arviz")
        except ImportError as error:
            raise UsageError(
                "to_arviz needs ArviZ, which is not installed; run pip install 'pyro-vae[arviz]'"
            ) from error


def unit_names(name: str, shape: Iterable[int]) -> list[str]:
    """Return the names of a site's units, as ArviZ writes them: z, or z[0], or z[0, 1].

    >>> unit_names("z", (1, 2)), unit_names("w", ())
    (['z[0, 0]', 'z[0, 1]'], ['w'])
    """
    indices = list(np.ndindex(*shape))
    return [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]
