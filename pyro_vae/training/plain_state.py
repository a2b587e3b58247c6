"""What a pair holds besides modules, tensors and numbers: lists, dictionaries, functions, objects.

A graph keeps their contents at the time of its trace. So other contents need another graph.
"""

from collections.abc import Collection
from itertools import chain
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

DEPTH = 4
"""How deep containers within containers are watched."""

SMALL = 512
"""The most bytes of a NumPy array whose numbers are compared in each step."""

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_WHOLE = (*_NUMBERS, Tensor, nn.Module, type, FunctionType, MethodType, ModuleType, np.ndarray)
"""What has no contents that are watched."""

_BASE = frozenset(vars(nn.Module()))


class PlainState:
    """Tells whether plain attributes of a pair, or the contents of its containers, have changed.

    An object counts as another one if its attributes do. Numbers are compared by value, all else by
    identity. What the programs of the pair themselves change while they run does not count.

    >>> pair = nn.Module()
    >>> pair.scales = [1.0, 2.0]
    >>> state = PlainState(pair)
    >>> before = state.now()
    >>> pair.scales[0] = 3.0
    >>> state.now() == before
    False
    """

    def __init__(self, pair: nn.Module) -> None:
        self.pair = pair
        self._ignored: set[tuple[int, str]] = set()
        self.find()

    def find(self) -> None:
        """Find the attributes and the containers that the pair has now."""
        self._owners = [vars(module) for module in self.pair.modules()]
        self._attributes: list[tuple[dict[str, Any], str]] = []
        self._containers: list[Any] = []
        seen: set[int] = set()
        for own in self._owners:
            for name, value in own.items():
                known = (
                    name in _BASE or name.startswith("_pyro") or (id(own), name) in self._ignored
                )
                if known or (isinstance(value, (Tensor, nn.Module, *_NUMBERS[:-1]))):
                    continue
                self._attributes.append((own, name))
                self._add(value, DEPTH, seen)
        self._see()

    def _add(self, value: Any, depth: int, seen: set[int]) -> None:
        if isinstance(value, _WHOLE) or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        held = (
            value
            if isinstance(value, (list, tuple, dict, set))
            else getattr(value, "__dict__", None)
        )
        if held is None:
            return
        if not isinstance(held, tuple):
            self._containers.append(held)
        for one in _contents(held):
            self._add(one, depth - 1, seen)

    def now(self) -> tuple[Any, ...]:
        """The present state, to be compared with another one."""
        if not self._is_as_seen():
            self._see()
        return self._state

    def _is_as_seen(self) -> bool:
        """Whether all objects are the same ones as before. This needs a few microseconds."""
        if [*map(len, self._owners)] != self._sizes:
            return False
        held = [own.get(name) for own, name in self._attributes]
        for values, seen in zip((held, *map(_contents, self._containers)), self._seen, strict=True):
            if len(values) != len(seen) or not all(map(is_, values, seen)):
                return False
        return all(value.tobytes() == was for value, was in self._arrays)

    def _see(self) -> None:
        self._sizes = [*map(len, self._owners)]
        held = [own.get(name) for own, name in self._attributes]
        self._seen = [held, *(list(_contents(one)) for one in self._containers)]
        small = (v for v in chain(*self._seen) if isinstance(v, np.ndarray) and v.nbytes <= SMALL)
        self._arrays = [(value, value.tobytes()) for value in small]
        self._state = (*self._sizes, *(tuple(map(_entry, values)) for values in self._seen))

    def contents(self) -> list[Any]:
        """The objects of the present state."""
        return list(self._seen)

    def ignore_changes(self, before: tuple[Any, ...]) -> None:
        """Ignore the attributes that have changed since ``before``, because a program changes them.

        What their containers held before does not matter then.
        """
        was = before[len(self._owners)]
        for (own, name), entry in zip(self._attributes, was, strict=True):
            if _entry(own.get(name)) != entry:
                self._ignored.add((id(own), name))
        self.find()


def _contents(held: Any) -> Collection[Any]:
    return held.values() if isinstance(held, dict) else held


def _entry(value: Any) -> Any:
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, np.ndarray) and value.nbytes <= SMALL:
        return value.tobytes()
    return id(value)
