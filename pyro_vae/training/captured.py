"""Graphs on a GPU: captured once as a CUDA graph, then replayed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import NotTraceable, UsageError, first_line
from pyro_vae.pairs import rng


def runner(
    graph: torch.fx.GraphModule, values: list[Tensor], inputs: Sequence[Tensor]
) -> Callable[..., Any]:
    """Return the function that runs a graph on the device of the pair's values."""
    if not any(tensor.is_cuda for tensor in (*values, *inputs)):
        return graph.forward
    try:
        return Captured(graph.forward, values, inputs)
    except RuntimeError as error:
        raise NotTraceable(f"CUDA cannot capture it ({first_line(error)})") from error


class Captured:
    """A run on CUDA that is captured as one graph. A replay copies its inputs into place."""

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
                "a parameter of the pair was replaced during training; change it in place"
            )
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.outputs
