"""A graph of a function of tensors that takes any number of rows.

The tracer writes the number of rows into the graph as a plain number. Therefore the function is
traced for two numbers of rows. A number that differs between the two graphs is replaced by the
number of rows of the input, or by a multiple of it. Nothing else may differ.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae import compat
from pyro_vae.errors import NotTraceable

TRACED_ROWS = (11, 13)
"""Two numbers of rows. As primes, they differ in every multiple that a program computes."""


def any_rows(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[int]]:
    """Trace a function of tensors whose rows are dimension 0.

    Arguments:
        function: takes the tensors and returns tensors; it must not draw.
        tensors: examples; their rows are repeated as needed.

    Returns the graph and the indices of those tensors that it takes. Raises `NotTraceable` if the
    function draws, reads values of tensors, or does something else for each number of rows.
    """
    first, second = (compat.make_graph(function, repeated(tensors, n)) for n in TRACED_ROWS)
    for graph in (first, second):
        _drop_unused(graph)
    _require_no_draws(first)
    _open(first, second)
    used = [i for i, node in enumerate(_inputs(first)) if node.users]
    for node in _inputs(first):
        if not node.users:
            first.graph.erase_node(node)
    first.recompile()
    return compat.owning_source(first), used


def repeated(tensors: Sequence[Tensor], n: int) -> list[Tensor]:
    """The first n rows of each tensor, repeated from the start if there are fewer."""
    return [tensor[torch.arange(n) % len(tensor)] for tensor in tensors]


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _drop_unused(graph: fx.GraphModule) -> None:
    """Remove nodes without users, even draws, which ``eliminate_dead_code`` keeps."""
    for node in reversed(graph.graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.graph.erase_node(node)


def _require_no_draws(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise NotTraceable("it draws random numbers")


def _open(first: fx.GraphModule, second: fx.GraphModule) -> None:
    """Replace in the first graph each number that differs from the second by a number of rows."""
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if [(node.op, str(node.target)) for node in nodes] != [(n.op, str(n.target)) for n in others]:
        raise NotTraceable("it computes something else for another number of rows")
    rows = _Rows(first)
    for node, other in zip(nodes, others, strict=True):
        if node.op == "get_attr" and not _same(first, second, node, other):
            raise NotTraceable("it makes a tensor of its own with a row for each datum")
        node.args = rows.opened(node.args, other.args)
        node.kwargs = rows.opened(node.kwargs, other.kwargs)


def _same(first: fx.GraphModule, second: fx.GraphModule, node: fx.Node, other: fx.Node) -> bool:
    one, two = getattr(first, str(node.target)), getattr(second, str(other.target))
    return not isinstance(one, Tensor) or bool(one.shape == two.shape and torch.equal(one, two))


class _Rows:
    """The number of rows of the first input in use, and its multiples, as nodes of a graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph.graph
        inputs = _inputs(graph)
        self.last, self.source = inputs[-1], next(node for node in inputs if node.users)
        self.nodes: dict[int, fx.Node] = {}

    def opened(self, one: Any, two: Any) -> Any:
        """The first argument, with the number of rows where it differs from the second."""
        if isinstance(one, (list, tuple)):
            parts = [self.opened(a, b) for a, b in zip(one, two, strict=True)]
            return type(one)(parts)
        if isinstance(one, dict):
            return {name: self.opened(value, two[name]) for name, value in one.items()}
        if type(one) is int and one != two:
            return self.multiple(one, two)
        return one

    def multiple(self, one: int, two: int) -> fx.Node:
        factor, rest = divmod(one, TRACED_ROWS[0])
        if rest or two != factor * TRACED_ROWS[1]:
            raise NotTraceable(
                f"it uses the number {one} for {TRACED_ROWS[0]} rows and {two} for {TRACED_ROWS[1]}"
            )
        if factor not in self.nodes:
            with self.graph.inserting_after(self.nodes.get(1, self.last)):
                if factor == 1:
                    made = self.graph.call_function(torch.ops.aten.sym_size.int, (self.source, 0))
                else:
                    made = self.graph.call_function(
                        operator.mul, (self.multiple(*TRACED_ROWS), factor)
                    )
            self.nodes[factor] = made
        return self.nodes[factor]
