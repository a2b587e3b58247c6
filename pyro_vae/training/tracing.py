"""Programs as graphs: a function of a pair, traced once for each shape, then replayed or compiled.

A Pyro program costs Python time: handlers, checks, and a message for each site. The structure of a
pair seldom changes from call to call. Therefore a flat graph can hold its tensor operations.
"""

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae import compat
from pyro_vae.errors import NotTraceable, active_line, first_line, users_line, warn
from pyro_vae.pairs import noise, rng
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import scope
from pyro_vae.training.captured import Run, captured
from pyro_vae.training.comparing import Left, require_same
from pyro_vae.training.decompositions import DECOMPOSITIONS
from pyro_vae.training.graph import MOST_TOLERANCE, Found, Graph, Made, Named, named
from pyro_vae.training.plain_state import PlainState
from pyro_vae.training.products import IN_C, choose_products
from pyro_vae.training.tidying import hold_constants, tidy

MOST_GRAPHS = 32
"""How many graphs are kept, one for each combination of shapes and settings. A pair that needs more
is not static enough for graphs."""


class Graphs:
    """A function of a pair and of tensors. It runs as a graph, one for each shape.

    Arguments:
        pair: its parameters, buffers and other tensor attributes are inputs of the graph.
            Therefore any change to them between calls takes effect.
        function: takes tensors, uses the pair, and returns tensors by name.
        compiles: whether to compile the graph for these inputs, given its number of operations.
        tolerance: the greatest relative difference between a graph and the function. Rounding
            causes it, and under autocast the casts that eager code keeps and a graph repeats.
        say: shows a few words before a compilation.
        held: further tensors that the function uses and changes, by name.
        updates: whether the function updates the trained parameters. Then the comparison leaves
            them out, because an optimizer can enlarge differences of rounding.
        finish: takes the results of the function, and its inputs, and returns the final results. It
            is not part of the graph. On a GPU it is captured together with the graph.
        fixed: the number of the first inputs that are the same tensors in each call.

    A new graph is made if a shape, a type, ``training``, or any number or flag of a module of the
    pair differs from those of the existing graphs. Before its first use, each graph is compared
    with the function itself, under the same state of the generators. It is compared again if what
    the pair holds besides tensors and numbers has changed, such as the contents of a list.

    Raises `NotTraceable` if the two differ, and if the function reads values of tensors or draws
    from Python's or NumPy's generators. A graph would freeze such values.
    """

    def __init__(
        self,
        pair: nn.Module,
        function: Callable[..., Named],
        compiles: Callable[[Sequence[Tensor], int], bool],
        tolerance: float = 1e-5,
        say: Callable[[str], None] = lambda words: None,
        held: dict[str, Tensor] | None = None,
        updates: bool = False,
        finish: Callable[..., Named] | None = None,
        fixed: int = 0,
    ) -> None:
        self.pair, self.function, self.compiles = pair, function, compiles
        self.tolerance, self.say, self.updates = tolerance, say, updates
        self.finish, self.fixed = finish, fixed
        self.graphs: dict[Any, list[Made]] = {}
        self.can_compile = True
        self._plain = PlainState(pair)
        self._places: list[tuple[dict[str, Any], str]] = [(held or {}, name) for name in held or {}]
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
        return self.found(*inputs)()

    def found(self, *inputs: Tensor) -> "Found":
        """Return the graph for these inputs, ready to run; make it if it does not exist."""
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        values = [held[name] for held, name in self._places]
        key = self._key(values, inputs)
        plain = self._plain.now()
        for made in self.graphs.get(key, ()):
            if made.plain is plain or made.plain == plain:
                return Found(made.graph, values, inputs)
        self._plain.find()
        for made in self.graphs.get(key, ()):
            if self.tolerance <= MOST_TOLERANCE and self._serves(made.graph, values, inputs):
                made.plain, made.kept = self._plain.now(), self._plain.contents()
                return Found(made.graph, values, inputs)
        if sum(map(len, self.graphs.values())) == MOST_GRAPHS:
            raise NotTraceable(
                f"it needs more than {MOST_GRAPHS} graphs: a shape, or a number that a module "
                "holds, keeps changing"
            )
        with poutine.block(), self._unchanged():  # trial runs must not change anything
            graph = self._make(values, inputs)
        made = Made(graph, self._plain.now(), self._plain.contents())
        self.graphs.setdefault(key, []).append(made)
        return Found(graph, values, inputs)

    def _serves(self, graph: Graph, values: list[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Whether a graph still gives the results of the function."""
        with poutine.block():
            eager = self._left(lambda: self._eager(inputs), values, inputs)
            replayed = self._left(lambda: graph.trace(values, inputs), values, inputs)
        try:
            require_same(eager, replayed, self.tolerance)
        except NotTraceable:
            return False
        return True

    def _key(self, values: list[Tensor], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Everything but the numbers of tensors that a graph depends on."""
        try:
            return (
                *((tensor.shape, tensor.dtype) for tensor in inputs),
                *(value.requires_grad for value in values),
                *map(Tensor.stride, values),  # with the number of elements, this is the shape
                *map(Tensor.numel, values),
                *map(Tensor.element_size, values),
                *(own.get(name) for own, name in self._settings),
            )
        except (AttributeError, TypeError) as error:
            raise NotTraceable("a tensor of it was replaced by something else") from error

    @property
    def first_operations(self) -> int:
        """The number of operations of the first graph."""
        return next(iter(self.graphs.values()))[0].graph.operations

    def trained(self) -> list[Tensor]:
        """Return the pair's parameters with gradients, in the order of ``pair.parameters()``."""
        return [held[name] for held, name in self._parameters if held[name].requires_grad]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Restore numbers and flags of the pair; reject a pair that changes what it holds."""
        settings = [held.get(name) for held, name in self._settings]
        self._plain.changed.clear()
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
        changed += self._plain.changed
        if changed:
            raise NotTraceable(f"it changes its attribute '{changed[0]}' while it runs") from fault
        if fault is not None:
            raise fault

    def _make(self, values: list[Tensor], inputs: Sequence[Tensor]) -> Graph:
        eager = self._left(lambda: self._eager(inputs), values, inputs)
        before, generators = _python_state(), rng.state()
        try:
            with self._plain.unchanged():
                graph, names = self._trace(values, inputs)
            drew = _python_state() != before or self._plain.drew
        finally:
            rng.restore(generators)
        if drew:
            raise NotTraceable("it draws from Python's or NumPy's generators, not from torch's")
        single = named(graph.forward, names, self.finish)
        replay = captured(single, values, inputs, self.fixed)
        replayed = self._left(lambda: replay(values, inputs), values, inputs)
        require_same(eager, replayed, self.tolerance)
        operations = sum(node.op == "call_function" for node in graph.graph.nodes)
        if self.can_compile and self.compiles(inputs, operations):
            found = self._compiled(graph, names, values, inputs, eager)
            if found is not None:
                return Graph(found[0], operations, single, compiled=True, uncaptured=found[1])
        return Graph(replay, operations, single, uncaptured=single)

    def _eager(self, inputs: Sequence[Tensor]) -> Named:
        found = self.function(*inputs)
        return found if self.finish is None else self.finish(found, *inputs)

    def _compiled(
        self,
        graph: torch.fx.GraphModule,
        names: list[Any],
        values: list[Tensor],
        inputs: Sequence[Tensor],
        eager: Left,
    ) -> tuple[Run, Run] | None:
        """Return the compiled graph, and the same without a capture.

        If it is not usable, warn, and do not compile again.
        """
        self.say("compiling the step")
        try:
            single = named(_compile(graph, [*values, *inputs]), names, self.finish)
            compiled = captured(single, values, inputs, self.fixed)
            # Fused kernels round differently, most of all in bfloat16. A wrong graph is far off.
            require_same(eager, self._left(lambda: compiled(values, inputs), values, inputs), 0.1)
            return compiled, single
        except Exception as error:  # no compiler, or an operation that Inductor does not support
            self.can_compile = False
            why = f"{type(error).__name__}: {first_line(error)[:200]}"
            if isinstance(error, NotTraceable) and error.__cause__ is None:
                why = "its draws or values would differ from those of the pair"
            warn(f"the graph of {type(self.pair).__name__} is replayed, not compiled: {why}")
            return None

    def _trace(
        self, values: list[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[torch.fx.GraphModule, list[Any]]:
        names: list[Any] = []  # a graph returns only tensors, so their names leave by here
        dynamic = _Dynamic()

        def flat(*tensors: Tensor) -> list[Tensor]:
            with self._holding(tensors[: len(values)]), scope(self.pair), dynamic:
                found = self.function(*tensors[len(values) :])
                foreign = set(map(id, compat.declared_parameters(pyro.get_param_store())))
            if foreign - set(map(id, tensors)):
                raise NotTraceable(
                    "it declares a pyro.param that it does not own: pyro_vae.check adopts it"
                )
            names[:] = found
            return list(found.values())

        # A tensor that two places share is passed twice. The two inputs must be the same leaf.
        leaves = {id(value): value.detach().requires_grad_(value.requires_grad) for value in values}
        shared = [leaves[id(value)] for value in values]
        try:
            with pyro.validation_enabled(False), _quiet():
                graph = compat.make_graph(flat, [*shared, *inputs])
            if any(tensor.is_cuda for tensor in inputs):
                hold_constants(graph)
            choose_products(graph)  # this and the next compare shapes, which may depend on values
            tidy(graph)
        except NotTraceable:
            raise
        except Exception as error:  # user code may raise anything
            raise NotTraceable(_reason(error), users_line(error) or dynamic.at) from error
        return graph, names

    @contextmanager
    def _holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Replace the pair's tensors by these tensors."""
        before = [held[name] for held, name in self._places]
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor

    def _left(self, run: Callable[[], Named], values: list[Tensor], inputs: Any) -> Left:
        """Return the results of a run and the tensors that it leaves in the pair; then undo it."""
        generators, changeable = rng.state(), (*values, *inputs)
        kept = [value.detach().clone() for value in changeable]
        try:
            with scope(self.pair), self._plain.unchanged():
                found = run()
            updated = set(map(id, self.trained())) if self.updates else ()
            left = [
                (f"{name}, tensor {i}", held[name].detach().clone())
                for i, (held, name) in enumerate(self._places)
                if id(held[name]) not in updated
            ]
        finally:
            self._put(values)
            rng.restore(generators)
            with torch.no_grad():
                for value, was in zip(changeable, kept, strict=True):
                    if not torch.equal(value, was):
                        value.copy_(was)
        return [*found.items(), *left]


def traced(
    pair: nn.Module, function: Callable[..., Named], engine: str, done: str
) -> Callable[..., Named]:
    """Return a function of a pair that runs under this engine.

    "eager" is the function itself, "traced" a graph that is replayed, "compiled" a compiled graph.
    If the function cannot be traced, it runs eagerly, and a warning gives the reason.

    Arguments:
        done: what the function does to the pair, a participle for the warning.
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
                warn(fall_back(pair, done, error))
        return function(*inputs)

    return run


def fall_back(pair: nn.Module, done: str, error: NotTraceable) -> str:
    """Return the warning that a pair runs eagerly, with the user's own file and line."""
    at = error.at or users_line(error, cast(Pair, pair).model)
    return f"{type(pair).__name__} is {done} by the eager engine, because {error}{at}"


def _python_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _reason(error: Exception) -> str:
    """Return why tracing failed, in words that continue "because"."""
    if compat.depends_on_values(error):
        return "a branch, a number or a shape in it depends on the values of tensors"
    return f"it cannot be traced ({type(error).__name__}: {first_line(error)})"


class _Dynamic(TorchFunctionMode):
    """Notes the first line of the user's whose result has a shape that depends on values.

    The trace fails only later, where a shape is compared, and then no line of the user's is active.
    """

    at = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        shape = found.shape if isinstance(found, Tensor) else ()
        if not self.at and any(isinstance(size, torch.SymInt) for size in shape):
            self.at = active_line(until="flat")
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's own messages about tracing and compiling."""
    loggers = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compile(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    with torch.no_grad(), _quiet():
        plain = [tensor.detach() for tensor in examples]
        formulas = {**DECOMPOSITIONS, **noise.FORMULAS}
        return compat.compile_graph(compat.with_formulas(graph, plain, formulas), plain, IN_C)
