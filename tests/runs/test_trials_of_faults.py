"""The trials of benchmarks/faults.py: what counts as a hang."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults

WORK, LIMIT = 0.15, 0.3


def spin():
    began = time.process_time()
    while time.process_time() - began < WORK:
        pass


@pytest.fixture
def busy_core():
    """A core on which five other processes run all the time."""
    core = min(os.sched_getaffinity(0))
    others = []
    for _ in range(5):
        process = os.fork()
        if process == 0:
            os.sched_setaffinity(0, {core})
            end = time.monotonic() + 30  # also if pytest dies
            while time.monotonic() < end:
                pass
            os._exit(0)
        others.append(process)
    yield core
    for process in others:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux says it")
def test_a_wait_for_a_core_is_no_hang(busy_core):
    def work():
        os.sched_setaffinity(0, {busy_core})
        spin()

    began = time.monotonic()
    assert faults.child(work, seconds=LIMIT) == "done"
    assert time.monotonic() - began > LIMIT  # the wait was longer than the limit


@pytest.mark.parametrize("work", [lambda: time.sleep(9), lambda: [spin() for _ in range(60)]])
def test_sleep_and_endless_work_are_hangs(work):
    began = time.monotonic()
    assert faults.child(work, seconds=LIMIT) == "hang"
    assert time.monotonic() - began < 9
