"""What all tests share."""

import os
import shutil
import signal
import time
import traceback
import warnings

import pyro
import pytest
import torch
from bad_input_helpers import FAST, binary, small
from cli_helpers import train
from torch import distributed

import pyro_vae as pv


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as thorough all variants of a sampled test but n at equal distances."""
    sampled = {}
    for item in items:
        if item.get_closest_marker("sample"):
            sampled.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for variants in sampled.values():
        (number,) = variants[0].get_closest_marker("sample").args
        kept = {len(variants) * place // number for place in range(number)}
        for place, item in enumerate(variants):
            if place not in kept:
                item.add_marker(pytest.mark.thorough)


torch.set_num_threads(1)  # the tensors of tests are small: threads would only wait for each other


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    """A test, and so the library, leaves process-wide state as it was.

    Each test starts from one seed, so that its result does not depend on the tests before it.
    """
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(int(os.environ.get("PYRO_VAE_TEST_SEED", "0")))
    yield
    assert torch.get_default_dtype() == dtype
    pyro.clear_param_store()


@pytest.fixture
def forks():
    """Skip a test whose forked processes train, where a fork cannot.

    Autograd may have started threads in this process, as it does for a GPU. A fork does not have
    them, and torch refuses to compute gradients in it.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        pytest.skip("autograd has threads in this process, so a fork of it cannot train")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, to be copied."""
    run = tmp_path_factory.mktemp("trained") / "run"
    pv.fit(small(), binary(), validation=binary(), out=run, **FAST)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A run folder of a test's own, without the older checkpoint, which reading falls back to."""
    older = shutil.ignore_patterns("checkpoint-older.pt")
    return shutil.copytree(trained, tmp_path / "run", ignore=older)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run with its report, left as it is."""
    return train(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A run conditional on the label, left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "conditional"
    return train(folder, "--condition label --no-report")


@pytest.fixture
def in_two(tmp_path, forks):
    """Run a function of the rank in two processes that have joined a group; return the results."""
    started = []

    def run(work):
        for rank in range(2):
            process = os.fork()
            if process == 0:
                _joined(tmp_path, rank, work)
            started.append(process)
        end = time.monotonic() + 60.0
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
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
