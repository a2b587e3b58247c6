"""Graphs on a GPU: captured once as a CUDA graph, so that each later run is one launch."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from pyro_vae.errors import NotTraceable, UsageError, first_line
from pyro_vae.pairs import rng
from pyro_vae.training.graph import Named

Run = Callable[[list[Tensor], Sequence[Tensor]], Named]


def on_gpu(tensor: Tensor) -> bool:
    """Whether a step with this tensor is captured, and must not wait for its numbers."""
    return tensor.is_cuda


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU whose copy to a GPU does not wait."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def captured(run: Run, values: list[Tensor], inputs: Sequence[Tensor], fixed: int = 0) -> Run:
    """Return a run of a graph as a CUDA graph if its tensors are on a GPU, else the run itself.

    Arguments:
        fixed: the number of the first inputs that are the same tensors in each call.

    Raises `NotTraceable` if CUDA cannot capture it.
    """
    there = any(tensor.is_cuda for tensor in (*values, *inputs))
    return Captured(run, values, inputs, fixed) if there else run


def several(run: Run, number: int, values: list[Tensor], inputs: Sequence[Tensor]) -> Run | None:
    """Return a captured run that takes several steps; None if CUDA cannot capture it.

    Its inputs are a row of numbers for each step, a row with the number behind the key of each
    step, and the minibatches one after the other. The rows have 16 bytes, because compiled kernels
    want their tensors at such addresses.
    """

    def steps(values: list[Tensor], inputs: Sequence[Tensor]) -> Named:
        plan, keys, *batch = inputs
        size = len(batch[0]) // number
        found = []
        for i in range(number):
            rows = (tensor[i * size : (i + 1) * size] for tensor in batch)
            found.append(run(values, [plan[i, :2], keys[i, 0], *rows]))
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    try:
        return captured(steps, values, inputs)
    except NotTraceable:
        return None


class Captured:
    """A run that is captured as one CUDA graph.

    A replay copies its inputs into place, and returns copies of its results, because the next
    replay writes to the same memory. It does not wait for the GPU.
    """

    def __init__(
        self, run: Run, values: list[Tensor], inputs: Sequence[Tensor], fixed: int = 0
    ) -> None:
        self.run, self.fixed = run, fixed
        self._capture(values, inputs)

    def __call__(self, values: list[Tensor], inputs: Sequence[Tensor]) -> Named:
        if [value.data_ptr() for value in values] != self.addresses:
            raise UsageError(
                "a parameter of the pair was replaced during training; change it in place"
            )
        if any(not torch.equal((*values, *inputs)[i], was) for i, was in self.frozen):
            self._capture(values, inputs)
        for held, given in zip(self.inputs[self.fixed :], inputs[self.fixed :], strict=True):
            held.copy_(given)
        self.graph.replay()
        copies = (output.clone() for output in self.outputs)
        return dict(zip(self.names, copies, strict=True))

    @torch.no_grad()
    def _capture(self, values: list[Tensor], inputs: Sequence[Tensor]) -> None:
        copied = (tensor.clone() for tensor in inputs[self.fixed :])
        self.inputs = [*inputs[: self.fixed], *copied]
        self.addresses = [value.data_ptr() for value in values]
        given = enumerate((*values, *inputs))
        self.frozen = [(i, tensor.clone()) for i, tensor in given if not tensor.is_cuda]
        """Tensors on the CPU by place. Their numbers become part of the CUDA graph."""
        generators, kept = rng.state(), [value.detach().clone() for value in values]
        try:
            stream = _stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries take their memory, and kernels are compiled
                    self.run(values, self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU in the meantime.
            mode = "thread_local"
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode=mode):
                found = self.run(values, self.inputs)
        except RuntimeError as error:
            raise NotTraceable(f"CUDA cannot capture it ({first_line(error)})") from error
        finally:
            rng.restore(generators)
            for value, was in zip(values, kept, strict=True):
                value.copy_(was)
        self.names, self.outputs = list(found), list(found.values())


@cache
def _stream() -> torch.cuda.Stream:
    """Return the stream of all captures. For each stream, cuBLAS keeps memory of its own."""
    return torch.cuda.Stream()
