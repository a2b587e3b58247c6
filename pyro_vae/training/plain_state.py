"""What a pair uses besides its modules, tensors and numbers: lists, objects, functions, variables.

A graph keeps their contents at the time of its trace. So other contents need another graph.
"""

import dis
import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from inspect import unwrap
from itertools import chain
from operator import is_
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.errors import is_users

DEPTH = 4
"""How deep containers within containers are watched."""

MOST_WATCHED = 1000
"""The most entries of a container that is watched; a vocabulary would take long in each step."""

SMALL = 512
"""The most bytes of a NumPy array whose numbers are compared in each step."""

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)

_KINDS = (type, FunctionType, MethodType, ModuleType)

_WHOLE = (*_NUMBERS, *_KINDS, *_GENERATORS, Tensor, nn.Module, np.ndarray)
"""What has no contents that are watched."""

MOST_KEPT = 1_000_000
"""Greater tensors in containers are not copied before a trial."""

_BASE = frozenset(vars(nn.Module()))


class PlainState:
    """Tells whether plain attributes of a pair, or the contents of its containers, have changed.

    The attributes of the user's own classes count, too, and so do the global variables and the
    variables of enclosing functions that their methods use. An object counts as another one if its
    attributes do. Numbers are compared by value, all else by identity.

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
        self.changed: list[str] = []
        """The names of attributes whose contents the programs themselves change while they run."""
        self.drew = False
        """Whether the programs have drawn from a generator of NumPy or Python that the pair has."""
        self.find()

    def find(self) -> None:
        """Find the attributes and the containers that the pair has now."""
        self._owners = [vars(module) for module in self.pair.modules()]
        self._attributes: list[tuple[Any, str]] = []
        self._containers: list[Any] = []
        self._names: list[str] = []
        """The attribute that each container belongs to."""
        seen: set[int] = set()
        functions: list[Any] = []
        for own in self._owners:
            for name, value in own.items():
                if isinstance(value, FunctionType):
                    functions.append(value)
                if name in _BASE and any(part in name for part in ("modules", "forward_")):
                    self._containers.append(value)  # its parts and hooks
                    self._names.append(name)
                known = name in _BASE or name.startswith("_pyro")
                if not known and not isinstance(value, (Tensor, nn.Module, *_NUMBERS[:-1])):
                    self._watch(own, name, seen)
        for kind in {cls for module in self.pair.modules() for cls in type(module).__mro__}:
            of_class: Any = vars(kind)
            methods = [f for value in of_class.values() if (f := _function(value)) is not None]
            functions += methods
            if any(map(_is_users, methods)):
                for name, value in of_class.items():
                    if not name.startswith("__") and _function(value) is None:
                        self._watch(of_class, name, seen)
        for own, name in _variables(functions):
            self._watch(own, name, seen)
        self._see()

    def _watch(self, own: Any, name: str, seen: set[int]) -> None:
        self._attributes.append((own, name))
        self._add(own.get(name), name, DEPTH, seen)

    def _add(self, value: Any, name: str, depth: int, seen: set[int]) -> None:
        if isinstance(value, _WHOLE) or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        plain = isinstance(value, (list, tuple, dict, set))
        held = value if plain else getattr(value, "__dict__", None)
        if held is None or len(held) > MOST_WATCHED:
            return
        if not isinstance(held, tuple):
            self._containers.append(held)
            self._names.append(name if plain else "")
        for one in _contents(held):
            self._add(one, name, depth - 1, seen)

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

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what a run of the programs changes, and note it in ``changed`` and ``drew``.

        Only what a later run would read is noted: numbers, and containers that grow or shrink. A
        tensor that a program stores as an attribute is put back without a note.
        """
        self._see()
        held = [copy(one) for one in self._containers]
        tensors = [one for one in chain(*self._seen) if isinstance(one, Tensor)]
        few = [one for one in tensors if one.numel() <= MOST_KEPT]
        values = [one.detach().clone() for one in few]
        generators = [one for one in chain(*self._seen) if isinstance(one, _GENERATORS)]
        states = [_state_of(one) for one in generators]
        try:
            yield
        finally:
            for (own, name), was in zip(self._attributes, self._seen[0], strict=True):
                if (now := own.get(name)) is not was:
                    self._note(name, [was], [now])
                    _put(own, name, was)
            for one, name, before in zip(self._containers, self._names, held, strict=True):
                then, now = list(_contents(before)), list(_contents(one))
                same = one == before if isinstance(one, set) else all(map(is_, then, now))
                if len(then) != len(now) or not same:
                    self._note(name or "", then, now)
                    one.clear()
                    (one.extend if isinstance(one, list) else one.update)(before)
            with torch.no_grad():
                for one, value in zip(few, values, strict=True):
                    if not torch.equal(one, value):
                        one.copy_(value)
            for one, state in zip(generators, states, strict=True):
                if not _alike(_state_of(one), state):
                    self.drew = self.drew or not isinstance(one, torch.Generator)
                    _restore(one, state)

    def _note(self, name: str, then: list[Any], now: list[Any]) -> None:
        grown = name != "" and len(then) != len(now)
        both = zip(then, now, strict=False)
        counted = any(_is_number(a) and _is_number(b) and a != b for a, b in both)
        if grown or counted:
            self.changed.append(name or "of an object")


class _Cell:
    """A variable of an enclosing function."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # it has no value yet
            return None


def _put(own: Any, name: str, value: Any) -> None:
    """Give an attribute or a variable its value back."""
    if isinstance(own, _Cell):
        own.cell.cell_contents = value
    elif isinstance(own, dict):
        own[name] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS[:-1])


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def _alike(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property or a decorated function."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    value = unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, FunctionType) else None


def _is_users(function: FunctionType) -> bool:
    return is_users(function.__code__.co_filename)


def _variables(functions: Iterable[FunctionType]) -> Iterator[tuple[Any, str]]:
    """Global variables, and those of enclosing functions, that functions of the user use."""
    todo, seen = [f for f in functions if _is_users(f)], set[int]()
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        found: list[tuple[Any, str]] = [(_Cell(cell), name) for name, cell in cells]
        used = function.__globals__
        found += [(used, name) for name in _global_names(function.__code__) if name in used]
        for own, name in found:
            value = own.get(name)
            called = _function(value)
            if called is not None and _is_users(called):
                todo.append(called)
            if not isinstance(value, (ModuleType, type)):
                yield own, name


@cache
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names that code, and the functions within it, look up among the global variables."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    own = [str(one.argval) for one in dis.get_instructions(code) if one.opname in loads]
    within = [one for one in code.co_consts if isinstance(one, CodeType)]
    inner = [name for one in within for name in _global_names(one)]
    return tuple(dict.fromkeys([*own, *inner]))


def _contents(held: Any) -> Collection[Any]:
    return held.values() if isinstance(held, dict) else held


def _entry(value: Any) -> Any:
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, np.ndarray) and value.nbytes <= SMALL:
        return value.tobytes()
    return id(value)
