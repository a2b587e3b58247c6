"""`diagnose` in several processes: each process runs some of the diagnostics.

A diagnostic runs as in one process, in the time that its own process measures. So its numbers do
not depend on the number of processes, except that more time allows larger sizes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.processes import Team


def shares(weights: Sequence[float], team: Team) -> list[int]:
    """The process that runs each diagnostic, so that all processes have about the same weight.

    >>> shares([1, 2, 3, 1, 1], Team(0, 2))
    [0, 1, 0, 1, 1]
    """
    loads, found = [0.0] * team.count, []
    for weight in weights:
        found.append(loads.index(min(loads)))
        loads[found[-1]] += weight
    return found


def share_out(
    climbs: Sequence[Any],
    team: Team,
    data: Sequence[Tensor],
    run: Callable[[Sequence[Any]], None],
) -> None:
    """Run each diagnostic in one of the processes, and give its outcome to all of them.

    Arguments:
        climbs: the diagnostics; each has a ``study``, and its other attributes are its outcome.
        data: the rows, which must be the same in all processes.
        run: runs the diagnostics of this process.

    Raises `UsageError` if the processes have other data.
    """
    if team.count == 1:
        run(climbs)
        return
    owners = shares([climb.study.weight for climb in climbs], team)
    own = {i: climbs[i] for i, rank in enumerate(owners) if rank == team.rank}
    sums = team.gather(lambda: [(t.shape, t.double().nansum().item()) for t in data])
    team.together(lambda: _require_same(sums))
    outcomes = team.gather(lambda: _ran(own, run))
    for content in outcomes:
        for i, outcome in _unpacked(content).items():
            vars(climbs[i]).update(outcome)


def _require_same(sums: Sequence[Any]) -> None:
    for rank, other in enumerate(sums):
        if other != sums[0]:
            raise UsageError(
                f"process {rank} has other data than process 0: give the same data to each "
                "process, which then runs its part of the diagnostics"
            )


def _ran(own: Mapping[int, Any], run: Callable[[Sequence[Any]], None]) -> bytes:
    run(list(own.values()))
    return _packed(own)


def _packed(climbs: Mapping[int, Any]) -> bytes:
    """The outcomes of diagnostics; their studies cannot be pickled, and each process has them."""
    outcomes = {
        i: {name: value for name, value in vars(climb).items() if name != "study"}
        for i, climb in climbs.items()
    }
    buffer = io.BytesIO()
    torch.save(outcomes, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> dict[int, dict[str, Any]]:
    """The outcomes of a process, with tensors of its GPU on the GPU of this process."""
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    places = {f"cuda:{i}": here for i in range(torch.cuda.device_count())}
    return dict(torch.load(io.BytesIO(content), map_location=places, weights_only=False))
