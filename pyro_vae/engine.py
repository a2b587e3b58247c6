"""How a step is run: eagerly, as a graph traced once and replayed, or as that graph compiled.

A Pyro program costs Python: handlers, checks, a message for each site. The structure of a pair
seldom changes from step to step, so its loss and gradients are traced once, for each shape of the
minibatch, into a flat graph of tensor operations, which is replayed, or compiled by Inductor. The
pair stays plain Pyro, and the engine is a Pyro ``ELBO`` that any ``pyro.infer.SVI`` takes.
"""

import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.util import zero_grads
from torch import Tensor, nn

from pyro_vae import rng
from pyro_vae.config import ENGINES
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.objectives import KLWeight, NotTraceable, Parts, recorded, surrogate
from pyro_vae.pairs import Batch, scope

Named: TypeAlias = dict[str, Tensor]
"""The results of a graph, by name."""

MOST_GRAPHS = 32
"""Shapes and settings for which graphs are kept; a pair that needs more is no static program."""

COMPILE_SECONDS = 20.0
"""What Inductor takes for a step, about."""

NODE_SECONDS = 1e-5
"""What compiling saves at each step for each operation of the graph, about."""


class Graphs:
    """A function of a pair and of tensors, run as a graph that is kept for each shape.

    Arguments:
        pair: its parameters, buffers and other tensor attributes are inputs of the graph, so that
            what changes in them between calls, by whatever means, takes effect.
        function: takes tensors, uses the pair, returns tensors by name.
        compiles: whether the graph for these inputs, of so many operations, shall be compiled.

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
    ) -> None:
        self.pair, self.function, self.compiles = pair, function, compiles
        self.graphs: dict[Any, Callable[[list[Tensor], Sequence[Tensor]], Named]] = {}
        self._places: list[tuple[dict[str, Any], str]] = []
        self._settings: list[tuple[dict[str, Any], str]] = []
        for module in pair.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        self._places.append((cast(dict[str, Any], held), name))
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
        yield
        changed = []
        for (held, name), was in zip(self._settings, settings, strict=True):
            if held.get(name) != was:
                held[name] = was
                changed.append(name)
        for name, value, was in containers:
            if len(value) != len(was):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(was)
                changed.append(name)
        if changed:
            raise NotTraceable(f"it changes its attribute '{changed[0]}' as it runs")

    def _make(self, values: list[Tensor], inputs: Sequence[Tensor]) -> Callable[..., Named]:
        eager = self._left(lambda: self.function(*inputs), values)
        before = _python_state()
        graph, names = self._trace(values, inputs)
        drew = _python_state() != before
        if drew:
            raise NotTraceable("it draws from Python's or NumPy's generators, not from torch's")
        run: Callable[..., Any] = graph.forward
        if values[0].is_cuda:
            run = _Captured(run, values, inputs)
        replay = _named(run, names)
        _require_same(eager, self._left(lambda: replay(values, inputs), values), 1e-5)
        operations = sum(node.op == "call_function" for node in graph.graph.nodes)
        if self.compiles(inputs, operations):
            try:
                compiled = _named(_compile(graph, [*values, *inputs]), names)
                _require_same(eager, self._left(lambda: compiled(values, inputs), values), 0.1)
                return compiled
            except Exception as error:  # a missing compiler, or what Inductor cannot do
                self.compiles = lambda inputs, operations: False
                warnings.warn(
                    f"the graph of {type(self.pair).__name__} is replayed, not compiled: "
                    f"{type(error).__name__}: {first_line(error)[:200]}",
                    stacklevel=2,
                )
        return replay

    def _trace(
        self, values: list[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[torch.fx.GraphModule, list[str]]:
        from torch.fx.experimental.proxy_tensor import make_fx

        names: list[str] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            with self._holding(tensors[: len(values)]), scope(self.pair):
                found = self.function(*tensors[len(values) :])
                foreign = set(map(id, pyro.get_param_store()._params.values()))
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
                graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(
                    *shared, *inputs
                )
        except NotTraceable:
            raise
        except Exception as error:  # a user's own code may raise anything
            raise NotTraceable(_reason(error)) from error
        _tidy(graph)
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


def _require_same(
    eager: list[tuple[str, Tensor]], replayed: list[tuple[str, Tensor]], tolerance: float
) -> None:
    others, scale = dict(replayed), max(float(value.double().norm()) for _, value in eager)
    for name, value in eager:
        if name in others and not _close(value, others[name], tolerance, scale):
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
        with torch.no_grad():
            return dict(zip(names, run(*values, *inputs), strict=True))

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
    kinds = [kind.__name__ for kind in type(error).__mro__]
    data = ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShape")
    if any(kind.startswith(data) for kind in kinds) or "data-dependent" in str(error):
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


_ALIASES = ("aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default")
_SHAPES = ("aten.view.default", "aten.expand.default")


def _tidy(graph: torch.fx.GraphModule) -> None:
    """Take out what a replay need not do: aliases, views to the same shape, unused results."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not node.args:
            continue
        name, source = str(node.target), node.args[0]
        same = name in _SHAPES and source.meta["val"].shape == node.meta["val"].shape
        twice = name == "aten.t.default" and str(source.target) == "aten.t.default"
        if name in _ALIASES[:2] or same:
            node.replace_all_uses_with(source)
        elif twice:
            node.replace_all_uses_with(source.args[0])
    for node in reversed(list(graph.graph.nodes)):
        target = node.target
        effect = isinstance(target, torch._ops.OpOverload) and (
            target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        )
        pure = node.op in ("get_attr", "call_function") and not effect
        if pure and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _compile(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    import torch._inductor

    with torch.no_grad(), _quiet():
        # The generators are those of the eager step, so that the draws are the same.
        return torch._inductor.compile(
            graph,
            [tensor.detach() for tensor in examples],
            options={"fallback_random": True},
        )


class Step(SVI):
    """``SVI`` whose step leaves the loss where it is, so that a GPU is not waited for."""

    def step(self, *batch: Tensor) -> Any:
        with poutine.trace(param_only=True) as capture:
            loss = self.loss_and_grads(self.model, self.guide, *batch)
        sites: Any = capture.trace.nodes.values()
        params = {site["value"].unconstrained() for site in sites}
        self.optim(params)
        zero_grads(params)
        return loss


class Engine(ELBO):
    r"""A Pyro ELBO that runs another one as a graph: the same loss, the same gradients, less time.

    Arguments:
        pair: the pair that is trained.
        objective: a Pyro ELBO; ``Trace_ELBO()`` by default.
        engine: "eager" is stock Pyro; "traced" replays a graph; "compiled" runs it through
            Inductor; "auto" is the second, and the third where the steps repay the compilation.
        prepare: what is done to a minibatch before the pair sees it, within the graph.
        precision: "bfloat16" runs the networks under autocast.
        batch_size: rows of a full minibatch; shorter ones are never compiled.
        steps: how many full minibatches are to come, for "auto".
        declare: make every parameter a site that SVI sees. An optimiser that knows its parameters,
            such as `pyro_vae.optim.Optimizer`, needs none.
        say: shows a few words while something takes seconds.

    The attribute ``beta``, a number or a tensor, weighs the KL; set it between steps. What else
    model and guide use that is no attribute of the pair is taken to stay as it is.
    What cannot be traced is run eagerly from then on, and one warning says why. After each step
    ``numbers`` holds the loss and the parts of the ELBO, summed over the minibatch and named by
    ``names``, on the pair's device.

    >>> import torch, pyro.optim, pyro_vae as pv
    >>> from pyro.infer import SVI
    >>> vae = pv.VAE.mlp((4,))
    >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Engine(vae))
    >>> loss = svi.step(torch.ones(8, 4))
    """

    def __init__(
        self,
        pair: nn.Module,
        objective: ELBO | None = None,
        engine: str = "auto",
        *,
        prepare: Callable[[Sequence[Tensor]], Batch] | None = None,
        precision: str = "float32",
        batch_size: int = 0,
        steps: int = 0,
        declare: bool = True,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        objective = objective or Trace_ELBO()
        super().__init__(num_particles=objective.num_particles)
        if engine not in ENGINES:
            raise UsageError(f"engine is '{engine}'; {nearest(engine, ENGINES)}")
        self.pair, self.engine = pair, engine
        self.parts = Parts()
        self.objective: Any = recorded(objective, self.parts)
        self.weight = KLWeight()
        self.prepare = prepare or tuple
        self.precision, self.declare = precision, declare
        self.batch_size, self.steps, self.say = batch_size, steps, say
        self.names: list[tuple[str, str]] = []
        self.numbers = torch.zeros(0)
        self._graphs: Graphs | None = None
        self._beta = torch.zeros(())

    @property
    def beta(self) -> float | Tensor:
        """The weight on the KL."""
        return self.weight.weight

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self.weight.weight = value

    def _get_trace(self, *args: Any) -> Any:
        return self.objective._get_trace(*args)

    def loss(self, model: Any, guide: Any, *batch: Tensor) -> float:
        """The objective's loss, eagerly."""
        return self.objective.loss(self.weight(model), self.weight(guide), *self.prepare(batch))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Tensor) -> Tensor | float:
        """The loss, as a tensor on the pair's device; gradients go to the pair's parameters."""
        model, guide = self.weight(model), self.weight(guide)
        if self.engine != "eager":
            try:
                return self._replay(model, guide, batch)
            except NotTraceable as error:
                self.engine = "eager"
                warnings.warn(
                    f"{type(self.pair).__name__} is trained by the eager engine, because {error}",
                    stacklevel=2,
                )
        self.parts.clear()
        with self._autocast(batch):
            loss = self.objective.loss_and_grads(model, guide, *self.prepare(batch))
        self.names, numbers = self._sums(torch.as_tensor(loss, device=batch[0].device))
        self.numbers = torch.stack(numbers)
        return loss

    def _replay(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        trained = [p for p in self.pair.parameters() if p.requires_grad]
        if self._graphs is None:
            self._graphs = Graphs(self.pair, self._function(model, guide), self._compiles)
            self._beta = torch.zeros((), dtype=trained[0].dtype, device=trained[0].device)
        self._beta.fill_(self.beta)
        found = self._graphs(self._beta, *(t.to(self._beta.device) for t in batch))
        self.numbers = found["numbers"]
        for name in self.parts.outside:
            if found[f"outside {name}"].item():
                raise ValueError(f"site '{name}' observes values outside its support")
        for i, parameter in enumerate(trained):
            parameter.grad = found.get(f"gradient {i}")
            if self.declare:
                pyro.param(f"pair$$${i}", parameter)
        return self.numbers[0]

    def _function(self, model: Any, guide: Any) -> Callable[..., Named]:
        def function(beta: Tensor, *batch: Tensor) -> Named:
            before, self.beta = self.beta, beta
            self.parts.clear()
            try:
                with self._autocast(batch):
                    loss, differentiable = surrogate(
                        self.objective, model, guide, self.prepare(batch)
                    )
                    trained = [p for p in self.pair.parameters() if p.requires_grad]
                    gradients = torch.autograd.grad(differentiable, trained, allow_unused=True)
            finally:
                self.beta = before
            self.names, numbers = self._sums(loss.detach())
            found = {"numbers": torch.stack(numbers)}
            found |= {f"outside {name}": n for name, n in self.parts.outside.items()}
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    found[f"gradient {i}"] = gradient
            return found

        return function

    def _sums(self, loss: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """The names and values of ``numbers``."""
        named = {("loss", ""): loss}
        named |= {("reconstruction", name): v for name, v in self.parts.reconstruction.items()}
        named |= {("kl", name): v for name, v in self.parts.kl.items()}
        return list(named), [value.to(loss.dtype) for value in named.values()]

    def _autocast(self, batch: Sequence[Tensor]) -> Any:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(batch[0].device.type, dtype=torch.bfloat16)

    def _compiles(self, inputs: Sequence[Tensor], operations: int) -> bool:
        if self.engine == "auto":
            repays = self.steps * operations * NODE_SECONDS > COMPILE_SECONDS
            self.engine = "compiled" if repays else "traced"
        chosen = self.engine == "compiled" and len(inputs[1]) >= self.batch_size
        if chosen:
            self.say("compiling the step")
        return chosen
