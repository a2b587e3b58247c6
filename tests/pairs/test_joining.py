"""Processes that torchrun restarts join each other, and do not look for the dead ones."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

import pyro_vae as pv
from pyro_vae.pairs.processes import join_processes

SECONDS = 30.0
"""A process that takes longer waits forever."""


def attempt(port, restart):
    """Two processes join a group in the store of the agent; they die without leaving it."""
    started = []
    for rank in range(2):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(restart),
                }
                time.sleep(0.2 * rank)  # the first one must not take the address of a dead second
                join_processes("gloo")
                found = torch.ones(1)
                distributed.all_reduce(found)
                code = 0 if found == 2 else 1
            finally:
                os._exit(code)
        started.append(process)
    end, left = time.monotonic() + SECONDS, dict.fromkeys(started)
    while None in left.values() and time.monotonic() < end:
        for process in [p for p, status in left.items() if status is None]:
            done, status = os.waitpid(process, os.WNOHANG)
            left[process] = status if done else None
        time.sleep(0.02)
    for process in [p for p, status in left.items() if status is None]:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return list(left.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_restarted_processes_join_in_the_store_that_torchrun_keeps():
    store = distributed.TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), wait_for_workers=False
    )
    for restart in range(3):
        assert attempt(store.port, restart) == [0, 0]


@pytest.mark.parametrize(
    ("backend", "variables", "words"),
    [
        ("mpi", {}, "must be 'gloo' or 'nccl', got 'mpi'"),
        ("gloo", {}, "start the program with torchrun"),
        ("gloo", {"RANK": "0"}, "cannot join the processes by gloo: .*WORLD_SIZE"),
    ],
)
def test_what_cannot_join_is_told_in_one_line(monkeypatch, backend, variables, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pv.UsageError, match=words) as error:
        join_processes(backend)
    assert "\n" not in str(error.value)
