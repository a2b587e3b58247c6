"""`diagnose` in a group of processes: it neither waits for others nor mixes their numbers."""

import os
import signal
import time

import pytest
import torch
from torch import distributed

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis
from pyro_vae.diagnostics.studies import reliability_study
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.pairs.processes import here

SECONDS = 60.0
"""A process that takes longer waits forever."""


@pytest.fixture
def processes(tmp_path):
    """Run a function of the rank in two processes that have joined a group; return the results."""
    started = []

    def run(work):
        for rank in range(2):
            process = os.fork()
            if process == 0:
                _joined(tmp_path, rank, work)
            started.append(process)
        end = time.monotonic() + SECONDS
        left = list(started)
        while left and time.monotonic() < end:
            left = [process for process in left if os.waitpid(process, os.WNOHANG)[0] == 0]
            time.sleep(0.02)
        for process in left:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        assert not left, "a process waits"
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    return run


def _joined(folder, rank, work):
    try:
        torch.set_num_threads(1)
        where = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
        torch.save(work(rank), folder / f"{rank}.pt")
        distributed.barrier()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_each_process_has_the_right_numbers_whatever_the_others_do(processes, monkeypatch):
    monkeypatch.setattr(diagnosis, "STUDIES", [reliability_study])
    pair = linear_gaussian(spread=1.3)
    x = pair.marginal().sample((40,))

    def work(rank):
        assert here().count == 2
        found = None
        if rank == 0:  # the other process does not call it at all
            found = pv.diagnose(pair, x, budget=0.3, progress=False)
        budget = (0.2, 1.5)[rank]  # other sizes in each process
        again = pv.diagnose(pair, x[: 40 - 5 * rank], budget=budget, progress=False)
        assert here().count == 2
        pick = [None if f is None else f.results["log_likelihood"] for f in (found, again)]
        return [None if p is None else (p.per_datum, p.standard_errors) for p in pick]

    exact = pair.marginal().log_prob(x)
    first, second = processes(work)
    for (per_datum, errors), n in ((first[0], 40), (first[1], 40), (second[1], 35)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        difference = per_datum - exact[:n][order][: len(per_datum)]
        assert bool((difference.abs() <= 6 * errors + 1e-3).all())
