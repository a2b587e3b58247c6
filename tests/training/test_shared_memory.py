"""Processes of one host add up gradients in memory that they share, and else by torch.distributed.

Each test forks a few processes, which meet by gloo, as those of torchrun do.
"""

import ctypes
import os
import resource
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import pyro_vae as pv
from pyro_vae.pairs.processes import here
from pyro_vae.training.processes import Exchange

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")

SECONDS = 60.0
"""A process that takes longer waits forever."""

STEPS = 5


def together(count, work, folder, dead=()):
    """What ``work`` returns in each of so many processes; those in ``dead`` are killed."""
    started = []
    for rank in range(count):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                store = distributed.FileStore(str(folder / "store"), count)
                distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
                here().gather(lambda: None)  # they have met before a test hinders them
                torch.save(work(rank), folder / f"{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        started.append(process)
    end, ended = time.monotonic() + SECONDS, {}
    while len(ended) < count and time.monotonic() < end:
        for process in set(started) - set(ended):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                ended[process] = status
        time.sleep(0.01)
    for process in set(started) - set(ended):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    left = [rank for rank in range(count) if rank not in dead]
    assert [ended.get(started[rank]) for rank in left] == [0] * len(left)
    assert not distributed.is_initialized()
    return [torch.load(folder / f"{rank}.pt") for rank in left]


def parameters():
    """Parameters of several types; the third never has a gradient, the last only sometimes."""
    shapes = [((7, 3), torch.float32), ((), torch.float32), ((5,), torch.bfloat16), ((4,), None)]
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]


def gradient(step, rank, i, like):
    """The gradient of a parameter in a process, or None."""
    if i == 2 or (i == 3 and rank != step % 2):
        return None
    draws = torch.Generator().manual_seed(1000 * step + 10 * rank + i)
    return torch.randn(like.shape, generator=draws).to(like.dtype)


def steps(exchange, rank):
    """The sums that an exchange gives in some steps, and their norms."""
    found = []
    for step in range(STEPS):
        exchange.begin(rank + 1, stop=False)
        for i, p in enumerate(exchange.parameters):
            p.grad = gradient(step, rank, i, p)
        norm = exchange()
        found.append([None if p.grad is None else p.grad.clone() for p in exchange.parameters])
        found[-1] += [norm, exchange.rows]
        exchange.clear()
    return found


def equal(some, others):
    return all(
        (a is None and b is None) or (torch.is_tensor(a) and torch.equal(a, b)) or a == b
        for step, other in zip(some, others, strict=True)
        for a, b in zip(step, other, strict=True)
    )


def no_memory(rank):
    """Files of the first process have no room. Python ignores the signal that says so."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def no_more_files(rank):
    """The second process can open a socket, but cannot take the memory."""
    if rank == 1:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (free + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )


def own_network():
    """Give this process a network of its own; returns whether the system allows it."""
    new_network = 0x40000000
    return ctypes.CDLL(None).unshare(new_network) == 0


def another_machine(rank):
    """The second process has a network of its own, as on another machine or in a container."""
    if rank == 1:
        assert own_network()


def may_have_own_network():
    process = os.fork()
    if process == 0:
        os._exit(0 if own_network() else 1)
    return os.waitpid(process, 0)[1] == 0


def both_ways(rank):
    """The sums in shared memory, and by the all-reduce of gloo."""
    shared = Exchange(parameters(), here())
    assert shared.shared is not None
    found = steps(shared, rank)
    shared.close()
    no_memory(rank)
    gloo = Exchange(parameters(), here())
    assert gloo.shared is None
    reduced = steps(gloo, rank)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return found, reduced


@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_are_in_the_order_of_the_ranks_and_those_of_gloo(count, tmp_path):
    found = together(count, both_ways, tmp_path)
    like = parameters()
    for step in range(STEPS):
        sums = found[0][0][step]
        for i, p in enumerate(like):
            given = [gradient(step, rank, i, p) for rank in range(count)]
            whole = torch.zeros(p.shape)
            for each in given:
                whole = whole if each is None else whole + each.float()
            if all(each is None for each in given):
                assert sums[i] is None
            else:
                assert torch.equal(sums[i], whole.to(p.dtype))
        assert sums[-1] == count * (count + 1) // 2
        known = torch.cat([s.flatten().float() for s in sums[:-2] if s is not None])
        torch.testing.assert_close(sums[-2], known.norm())
    for shared, reduced in found:
        assert equal(shared, found[0][0])
        if count == 2:
            assert equal(shared, reduced)
        for some, others in zip(shared, reduced, strict=True):
            torch.testing.assert_close(some[:-1], others[:-1])


@pytest.mark.parametrize("hindered", [no_memory, no_more_files, another_machine])
def test_processes_that_cannot_share_memory_use_gloo(hindered, tmp_path):
    limits = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)

    def work(rank):
        before = [resource.getrlimit(limit) for limit in limits]
        hindered(rank)
        exchange = Exchange(parameters(), here())
        found = steps(exchange, rank)
        exchange.close()
        for limit, value in zip(limits, before, strict=True):
            resource.setrlimit(limit, value)
        return exchange.shared is None, found, steps(Exchange(parameters(), here()), rank)

    if hindered is another_machine and not may_have_own_network():
        pytest.skip("the system does not let this user make a network")
    for gloo, found, again in together(2, work, tmp_path):
        assert gloo
        assert equal(found, again)


def test_rows_are_counted_exactly_beside_parameters_of_few_bits(tmp_path):
    def work(rank):
        exchange = Exchange([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], here())
        exchange.begin(129 - rank, stop=False)
        exchange()
        exchange.close()
        return exchange.rows

    assert together(2, work, tmp_path) == [257, 257]


def open_files():
    """The open files of this process, and its maps of the shared memory."""
    maps = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "memfd:pyro_vae" in line
    ]
    return len(os.listdir("/proc/self/fd")), len(maps)


def test_nothing_is_left_after_a_run(tmp_path):
    def work(rank):
        here().gather(open_files)  # gloo opens its connections
        left = [open_files()]
        for _ in range(3):
            exchange = Exchange(parameters(), here())
            kept = exchange.parameters
            exchange.begin(1, stop=False)
            kept[0].grad = torch.ones(7, 3)
            exchange()
            during = open_files()
            exchange.close()
            del exchange
            left.append(open_files())
            assert all(p.grad is None for p in kept)
        return left, during

    before = os.listdir("/dev/shm")
    for (first, *left), during in together(2, work, tmp_path):
        assert left == [first] * 3
        assert during[1] == first[1] + 1
    assert set(os.listdir("/dev/shm")) <= set(before)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_others_and_leaves_nothing(dead, tmp_path):
    def work(rank):
        exchange = Exchange(parameters(), here())
        steps(exchange, rank)
        began = time.monotonic()
        if rank == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        said = []
        for _ in range(2):  # a second attempt does not wait either
            with pytest.raises(pv.UsageError) as error:
                steps(exchange, rank)
            said.append(str(error.value))
        return said, time.monotonic() - began

    before = os.listdir("/dev/shm")
    for said, seconds in together(3, work, tmp_path, dead={dead}):
        assert all(f"process {dead} of 3 has ended" in words for words in said)
        assert seconds < 10
    assert set(os.listdir("/dev/shm")) <= set(before)


def test_a_process_that_leaves_ends_the_others(tmp_path):
    """It does not need to die, nor its children, such as workers of a loader."""

    def work(rank):
        exchange = Exchange(parameters(), here())
        steps(exchange, rank)
        if rank == 2:
            child = os.fork()
            if child == 0:
                time.sleep(SECONDS)
                os._exit(0)
            exchange.close()
            here().gather(lambda: None)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return ""
        with pytest.raises(pv.UsageError) as error:
            steps(exchange, rank)
        here().gather(lambda: None)
        return str(error.value)

    *others, _ = together(3, work, tmp_path)
    assert all("has ended or does not answer, after" in words for words in others)


def test_all_processes_learn_of_a_stop_an_error_and_a_bad_gradient(tmp_path):
    def work(rank):
        exchange, found = Exchange(parameters(), here()), []
        for step in range(4):
            rows = 0 if step == 0 and rank == 1 else 5
            exchange.begin(rows, stop=step == 1 and rank == 1)
            for i, p in enumerate(exchange.parameters):
                p.grad = gradient(step, rank, i, p) if rows else None
            if step == 2 and rank == 1:
                exchange.fail()
            else:
                if step == 3 and rank == 0:
                    exchange.parameters[0].grad[0] = torch.nan
                finite = bool(exchange().isfinite())
                found.append((exchange.rows, exchange.stop, finite))
            found.append(exchange.failed)
        return found

    other, failed = together(2, work, tmp_path)
    stopped = [(5, False, True), False, (10, True, True), False]
    assert other == [*stopped, (10, False, True), True, (10, False, False), False]
    assert failed == [*other[:4], True, *other[6:]]
