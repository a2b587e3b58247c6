"""A graph that can run, and its results by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Named: TypeAlias = dict[Any, Tensor]
"""The results of a graph, by name."""


class Graph(NamedTuple):
    """A graph that can run."""

    run: Callable[[list[Tensor], Sequence[Tensor]], Named]
    operations: int
    """The number of operations that the trace has."""
    trace: Callable[[list[Tensor], Sequence[Tensor]], Named]
    """The trace, neither compiled nor captured."""
    compiled: bool = False
    uncaptured: Callable[[list[Tensor], Sequence[Tensor]], Named] | None = None
    """The same run without a capture, from which a longer one can be captured."""


MOST_TOLERANCE = 1e-4
"""With a greater tolerance, as in bfloat16, a comparison could miss a change of the pair."""


@dataclass
class Made:
    """A graph, and what the pair held when it was made or compared last."""

    graph: Graph
    plain: tuple[Any, ...]
    kept: list[Any]
    """The objects themselves, so that no new object has the identity of an old one."""


class Found(NamedTuple):
    """A graph together with its inputs."""

    graph: Graph
    values: list[Tensor]
    inputs: Sequence[Tensor]

    def __call__(self) -> Named:
        return self.graph.run(self.values, self.inputs)


def named(
    run: Callable[..., Any], names: list[Any], finish: Callable[..., Named] | None = None
) -> Callable[[list[Tensor], Sequence[Tensor]], Named]:
    """Return a run of a graph with results by name.

    Arguments:
        finish: takes these results and the inputs, and returns the results of the run.
    """
    aliases = _Aliases()

    def run_named(values: list[Tensor], inputs: Sequence[Tensor]) -> Named:
        # The kernel of an LSTM keeps the values for its backward pass only if gradients are on.
        with torch.enable_grad():
            found = run(*aliases(values), *inputs)
        results = dict(zip(names, found, strict=True))
        return results if finish is None else finish(results, *inputs)

    return run_named


class _Aliases:
    """Detached aliases of tensors, which are made anew only if a tensor or its memory changes.

    Detaching takes 1 µs for each tensor. That is long for the step of a small network.
    """

    def __init__(self) -> None:
        self.of: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        if len(self.of) != len(tensors) or any(
            tensor is not known or tensor.data_ptr() != memory
            for tensor, (known, memory, _) in zip(tensors, self.of, strict=True)
        ):
            self.of = [(tensor, tensor.data_ptr(), tensor.detach()) for tensor in tensors]
        return [alias for _, _, alias in self.of]
