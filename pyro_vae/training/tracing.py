"""Programs as graphs: a function of a pair, traced once for each shape, then replayed or compiled.

A Pyro program costs Python: handlers, checks, a message for each site. The structure of a pair
seldom changes from call to call, so that what it does with tensors can be kept as a flat graph.
"""

import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, TypeAlias, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae import compat
from pyro_vae.errors import NotTraceable, UsageError, first_line
from pyro_vae.pairs import rng
from pyro_vae.pairs.scope import scope
from pyro_vae.training.tidying import tidy

Named: TypeAlias = dict[str, Tensor]
"""The results of a graph, by name."""

MOST_GRAPHS = 32
"""Shapes and settings for which graphs are kept; a pair that needs more is no static program."""


class Graphs:
    """A function of a pair and of tensors, run as a graph that is kept for each shape.

    Arguments:
        pair: its parameters, buffers and other tensor attributes are inputs of the graph, so that
            what changes in them between calls, by whatever means, takes effect.
        function: takes tensors, uses the pair, returns tensors by name.
        compiles: whether the graph for these inputs, of so many operations, shall be compiled.
        tolerance: how far, relatively, a graph may be from the function: rounding, and under
            autocast the casts that eager code keeps and a graph makes again.

    A graph is made anew where a shape, a type, ``training`` or any number or flag that a module of
    the pair holds differs from those of the graphs at hand. Before its first use each graph is run
    beside the function itself under one state of the generators.

    Raises `NotTraceable` where the two differ, and where the function reads values of tensors or
    draws from Python's or NumPy's generators, which a graph would freeze.
    """

    def __init__(
        self,
        pair: nn.Module,
        function: Callable[..., Named],
        compiles: Callable[[Sequence[Tensor], int], bool],
        tolerance: float = 1e-5,
    ) -> None:
        self.pair, self.function, self.compiles = pair, function, compiles
        self.tolerance = tolerance
        self.graphs: dict[Any, Callable[[list[Tensor], Sequence[Tensor]], Named]] = {}
        self._places: list[tuple[dict[str, Any], str]] = []
        self._settings: list[tuple[dict[str, Any], str]] = []
        known: set[int] = set()
        self._parameters: list[tuple[dict[str, Any], str]] = []
        for module in pair.modules():
            own = compat.parameters_of(module)
            for held in (own, compat.buffers_of(module), vars(module)):
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        self._places.append((cast(dict[str, Any], held), name))
                        if held is own and id(value) not in known:
                            self._parameters.append(self._places[-1])
                            known.add(id(value))
                    elif isinstance(value, (bool, int, float, str)):
                        self._settings.append((cast(dict[str, Any], held), name))

    def __call__(self, *inputs: Tensor) -> Named:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        values = [held[name] for held, name in self._places]
        settings = [held.get(name) for held, name in self._settings]
        key = (
            *((tensor.shape, tensor.dtype) for tensor in inputs),
            *(value.requires_grad for value in values),
            *settings,
        )
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) == MOST_GRAPHS:
                raise NotTraceable(
                    f"it took {MOST_GRAPHS} graphs already: a shape, or a number that a module "
                    "holds, keeps changing"
                )
            with poutine.block(), self._unchanged():  # the runs on trial shall leave no trace
                graph = self._make(values, inputs)
            self.graphs[key] = graph
        return graph(values, inputs)

    def trained(self) -> list[Tensor]:
        """The pair's parameters that take gradients, in the order of ``pair.parameters()``."""
        return [held[name] for held, name in self._parameters if held[name].requires_grad]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Put numbers, flags and containers of the pair back; refuse a pair that changes them."""
        settings = [held.get(name) for held, name in self._settings]
        containers = [
            (name, value, copy.copy(value))
            for module in self.pair.modules()
            for name, value in vars(module).items()
            if isinstance(value, (list, dict, set)) and name not in vars(nn.Module())
        ]
        fault = None
        try:
            yield
        except NotTraceable as error:
            fault = error
        changed = []
        for (held, name), was in zip(self._settings, settings, strict=True):
            now = held.get(name)
            if now is not was and now != was:
                held[name] = was
                changed.append(name)
        for name, value, was in containers:
            if len(value) != len(was):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(was)
                changed.append(name)
        if changed:
            raise NotTraceable(f"it changes its attribute '{changed[0]}' as it runs") from fault
        if fault is not None:
            raise fault

    def _make(self, values: list[Tensor], inputs: Sequence[Tensor]) -> Callable[..., Named]:
        eager = self._left(lambda: self.function(*inputs), values)
        before, generators = _python_state(), rng.state()
        try:
            graph, names = self._trace(values, inputs)
            drew = _python_state() != before
        finally:
            rng.restore(generators)
        if drew:
            raise NotTraceable("it draws from Python's or NumPy's generators, not from torch's")
        run: Callable[..., Any] = graph.forward
        if values[0].is_cuda:
            try:
                run = _Captured(run, values, inputs)
            except RuntimeError as error:
                raise NotTraceable(f"CUDA cannot capture it ({first_line(error)})") from error
        replay = _named(run, names)
        _require_same(eager, self._left(lambda: replay(values, inputs), values), self.tolerance)
        operations = sum(node.op == "call_function" for node in graph.graph.nodes)
        if self.compiles(inputs, operations):
            try:  # fused kernels round otherwise, bfloat16 most of all: wrong is what is far off
                compiled = _named(_compile(graph, [*values, *inputs]), names)
                _require_same(eager, self._left(lambda: compiled(values, inputs), values), 0.1)
                return compiled
            except Exception as error:  # a missing compiler, or what Inductor cannot do
                self.compiles = lambda inputs, operations: False
                why = f"{type(error).__name__}: {first_line(error)[:200]}"
                if isinstance(error, NotTraceable):
                    why = "its draws or values would be others than those of the pair"
                warnings.warn(
                    f"the graph of {type(self.pair).__name__} is replayed, not compiled: {why}",
                    stacklevel=2,
                )
        return replay

    def _trace(
        self, values: list[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[torch.fx.GraphModule, list[str]]:
        names: list[str] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            with self._holding(tensors[: len(values)]), scope(self.pair):
                found = self.function(*tensors[len(values) :])
                foreign = set(map(id, compat.declared_parameters(pyro.get_param_store())))
            if foreign - set(map(id, tensors)):
                raise NotTraceable(
                    "it declares a pyro.param that it does not hold: pyro_vae.check adopts it"
                )
            names[:] = found
            return list(found.values())

        # Tensors that two places share are one input twice; as leaves they are one again.
        leaves = {id(value): value.detach().requires_grad_(value.requires_grad) for value in values}
        shared = [leaves[id(value)] for value in values]
        try:
            with pyro.validation_enabled(False), _quiet():
                graph = compat.make_graph(flat, [*shared, *inputs])
            tidy(graph)  # shapes are compared here, which may depend on values
        except NotTraceable:
            raise
        except Exception as error:  # a user's own code may raise anything
            raise NotTraceable(_reason(error)) from error
        return graph, names

    @contextmanager
    def _holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The pair with these tensors in place of its own."""
        before = [held[name] for held, name in self._places]
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor

    def _left(self, run: Callable[[], Named], values: list[Tensor]) -> list[tuple[str, Tensor]]:
        """What a run returns and what it leaves in the pair, all of which is then put back."""
        generators = rng.state()
        kept = [value.detach().clone() for value in values]
        with scope(self.pair):
            found = run()
        left = [
            (f"{name}, tensor {i}", held[name].detach().clone())
            for i, (held, name) in enumerate(self._places)
        ]
        self._put(values)
        rng.restore(generators)
        with torch.no_grad():
            for value, was in zip(values, kept, strict=True):
                if not torch.equal(value, was):
                    value.copy_(was)
        return [*found.items(), *left]


def traced(
    pair: nn.Module, function: Callable[..., Named], engine: str, done: str
) -> Callable[..., Named]:
    """A function of a pair as this engine runs it: "eager", as it is; "traced", as a graph that is
    replayed; "compiled". What cannot be traced is run eagerly, and a warning says why.

    Arguments:
        done: what is done to the pair, a participle for the warning.
    """
    if engine == "eager":
        return function
    graphs: Graphs | None = Graphs(pair, function, lambda inputs, _: engine == "compiled")

    def run(*inputs: Tensor) -> Named:
        nonlocal graphs
        if graphs is not None:
            try:
                return graphs(*inputs)
            except NotTraceable as error:
                graphs = None
                warnings.warn(
                    f"{type(pair).__name__} is {done} by the eager engine, because {error}",
                    stacklevel=2,
                )
        return function(*inputs)

    return run


def _require_same(
    eager: list[tuple[str, Tensor]], replayed: list[tuple[str, Tensor]], tolerance: float
) -> None:
    """Compare what two runs left; a graph may have further results, as counts of values."""
    others = dict(replayed)
    norms = [value.double().norm().item() for _, value in eager]
    scale = max((norm for norm in norms if isfinite(norm)), default=0.0)
    for name, value in eager:
        if name not in others or not _close(value, others[name], tolerance, scale):
            raise NotTraceable(
                f"a graph of it gives other values than itself (first in '{name}'): something that "
                "changes from call to call is no tensor of the pair"
            )


class _Captured:
    """A run on CUDA, captured as one graph that is replayed on inputs copied into place."""

    def __init__(
        self, run: Callable[..., Any], values: list[Tensor], inputs: Sequence[Tensor]
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        generators, kept = rng.state(), [value.detach().clone() for value in values]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                run(*values, *self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.outputs = run(*values, *self.inputs)
        rng.restore(generators)
        with torch.no_grad():
            for value, was in zip(values, kept, strict=True):
                value.copy_(was)
        self.addresses = [value.data_ptr() for value in values]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        values, inputs = tensors[: len(self.addresses)], tensors[len(self.addresses) :]
        if [value.data_ptr() for value in values] != self.addresses:
            raise UsageError(
                "a parameter of the pair was replaced while it trained; change it in place"
            )
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.outputs


def _named(run: Callable[..., Any], names: list[str]) -> Callable[..., Named]:
    def named(values: list[Tensor], inputs: Sequence[Tensor]) -> Named:
        # The kernel of an LSTM keeps what its backward pass needs only where gradients are on.
        with torch.enable_grad():
            found = run(*(value.detach() for value in values), *inputs)
        return dict(zip(names, found, strict=True))

    return named


def _close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= tolerance * (a.norm() + b.norm()) + 1e-6 * scale)


def _python_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _reason(error: Exception) -> str:
    """Why tracing failed, in words that go on from "because"."""
    if compat.depends_on_values(error):
        return "a branch, a number or a shape in it depends on the values of tensors"
    return f"it cannot be traced ({type(error).__name__}: {first_line(error)})"


@contextmanager
def _quiet() -> Iterator[None]:
    """No words of torch's own about tracing and compiling."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _compile(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    with torch.no_grad(), _quiet():
        return compat.compile_graph(graph, [tensor.detach() for tensor in examples])
