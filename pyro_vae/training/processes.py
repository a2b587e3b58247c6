"""Steps that several processes share: each takes a part of the minibatch, and gradients are added.

The sum of the losses of all processes is the loss of the whole minibatch, because a loss is a sum
over rows. Each process knows the order of all rows, so all take the same number of steps. A process
whose part has no rows adds nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pyro_vae.data.sources import Source
from pyro_vae.errors import UsageError
from pyro_vae.pairs import rng
from pyro_vae.pairs.processes import Team
from pyro_vae.pairs.waiting import lost, wait
from pyro_vae.training.shared_memory import shared_sum
from pyro_vae.training.state import Sums, TrainState, no_sums


class Exchange:
    """Adds up the gradients of all processes, as one flat vector, outside of the graph.

    The vector also holds the number of rows, and says whether a process was asked to stop or has
    failed. So all processes stop after the same step. Processes on one CPU machine add up the
    vectors in memory that they share, all others by an all-reduce of torch.distributed.
    """

    def __init__(self, parameters: list[Tensor], team: Team) -> None:
        self.parameters = parameters
        dtype = torch.float32  # bfloat16 cannot count 257 rows
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        sizes = [*(p.numel() for p in parameters), 3 + len(parameters)]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
        self.shared = shared_sum(flat, team)
        self.flat = flat if self.shared is None else self.shared.own
        *gradients, self._told = self.flat.split(sizes)
        self._gradients = [g.view(p.shape) for g, p in zip(gradients, parameters, strict=True)]
        self.rows, self.stop, self.failed = 0, False, False
        self.done = True

    def close(self) -> None:
        """Give back the shared memory, and tell the processes that still wait for this one."""
        self.clear()  # the gradients are views of the memory
        if self.shared is not None:
            self.shared.close()

    def begin(self, rows: int, stop: bool) -> None:
        """Start a step of so many rows in this process; ``stop`` asks all processes to stop."""
        self.rows, self.stop, self.failed, self.done = rows, stop, False, False
        if not rows:
            self.clear()

    def clear(self) -> None:
        """Remove the gradients, as SVI does after a step."""
        for parameter in self.parameters:
            parameter.grad = None

    def fail(self) -> None:
        """Tell the other processes, which wait for the gradients, that this one has failed."""
        self.failed = True
        self.clear()
        self()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Replace the gradients by their sums over all processes, and return the global norm."""
        for view, parameter in zip(self._gradients, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        present = [float(p.grad is not None) for p in self.parameters]
        self._told.copy_(
            torch.tensor([self.rows, self.stop, self.failed, *present], dtype=torch.float32)
        )
        self.done = True
        add_up(self.flat) if self.shared is None else self.shared()
        rows, stop, failed, *known = self._told.tolist()
        self.rows, self.stop, self.failed = round(rows), stop > 0, failed > 0
        for view, parameter, count in zip(self._gradients, self.parameters, known, strict=True):
            parameter.grad = view.to(parameter.dtype) if count else None
        return torch.linalg.vector_norm(self.flat[: -len(self._told)])


def add_up(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
    """Replace a tensor by the sum over all processes, or by their least or greatest values.

    Raises `LostError` if another process has ended or does not answer. NCCL does not let a program
    wait for a time: after the timeout of the group it ends the process.
    """
    if tensor.is_cuda:
        with lost():
            dist.all_reduce(tensor, how)
    else:
        wait(lambda: dist.all_reduce(tensor, how, async_op=True))


def merged(parts: list[Sums]) -> Sums:
    """The sums of all processes. Each has the same norms, since gradients are added first."""
    whole = no_sums()
    for kind in whole:
        for part in parts[:1] if kind in ("norm", "greatest", "skipped") else parts:
            for name, value in part[kind].items():
                whole[kind][name] = whole[kind].get(name, 0.0) + value
    return whole


@torch.no_grad()
def average_buffers(pair: nn.Module, team: Team) -> None:
    """Give buffers that differ between processes, such as running means, their mean over all."""
    floats = [b for b in pair.buffers() if b.is_floating_point() and b.numel()]
    if team.count == 1 or not floats:
        return
    for buffer in floats:
        least, most, total = buffer.clone(), buffer.clone(), buffer.clone()
        add_up(least, dist.ReduceOp.MIN)
        add_up(most, dist.ReduceOp.MAX)
        add_up(total)
        buffer.copy_(torch.where(least == most, buffer, total / team.count))


def start_alike(pair: nn.Module, job: dict[str, Any], rows: Source, seed: int, team: Team) -> None:
    """Give all processes the tensors of the first one.

    Raises `UsageError` if their jobs, which contain a checksum of the data, or their first rows
    differ.
    """
    if team.count == 1:
        return
    with rng.seeded(seed):
        first = [tensor.cpu() for tensor in rows.first(16)]
    jobs = team.gather(lambda: (job, first))
    team.together(lambda: _require_alike(jobs))
    team.together(lambda: _require_rows(job["settings"]["batch_size"], team))
    tensors = team.from_first(lambda: [t.detach().cpu() for t in pair.state_dict().values()])
    with torch.no_grad():
        for own, value in zip(pair.state_dict().values(), tensors, strict=True):
            own.copy_(value)


def _require_alike(jobs: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
    for rank, (other, few) in enumerate(jobs):
        differ = [name for name, value in other.items() if value != jobs[0][0].get(name)]
        if not differ and not _same(few, jobs[0][1]):
            differ = ["data"]
        if differ:
            raise UsageError(
                f"process {rank} has another {differ[0]} than process 0: give the same data and "
                "settings to each process, which then takes its part of each minibatch"
            )


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and bool(((a == b) | (a != a)).all())
        for a, b in zip(some, others, strict=True)
    )


def _require_rows(batch_size: int, team: Team) -> None:
    if batch_size < team.count:
        raise UsageError(
            f"must be at least {team.count}, the number of processes, got {batch_size}",
            argument="batch_size",
        )


def noise_seed(seed: int, team: Team) -> int:
    """The seed of this process's own stream of noise; the first process keeps the seed."""
    return rng.derived(seed, "process", team.rank)


def restore_generators(state: TrainState, seed: int, team: Team) -> None:
    """Restore the generators of this process from a checkpoint.

    If another number of processes wrote the checkpoint, a process without generators gets new ones.
    """
    saved = [state.generators, *state.more_generators]
    if team.rank < len(saved):
        rng.restore(saved[team.rank])
        return
    place = 1 + len(state.epochs) + 1_000_003 * state.batches
    torch.manual_seed(rng.derived(noise_seed(seed, team), "resumed", place))


def another_number(state: TrainState, team: Team) -> str | None:
    """A warning if another number of processes wrote the checkpoint."""
    before = 1 + len(state.more_generators)
    if before == team.count:
        return None
    return (
        f"the checkpoint is of {before} process{'es' * (before > 1)} and {team.count} continue it: "
        "the order of the rows is the same, but the result is not bit-identical to that of an "
        "uninterrupted run"
    )
