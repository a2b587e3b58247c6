"""A process that hangs ends the others, which say its name; one that is only slow does not.

Each test forks a few processes, as torchrun starts them.
"""

import os
import re
import signal
import socket
import time
import traceback
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.pairs.processes import here, join_processes
from pyro_vae.pairs.progress import bar
from pyro_vae.training import processes as training_processes

pytestmark = pytest.mark.usefixtures("forks")

TIMEOUT = 3.5
"""Seconds without a sign of life after which a process of these tests is lost."""

SECONDS = 60.0
"""A process that takes longer waits forever."""

X = torch.linspace(-1, 1, 16 * 4).reshape(16, 4).sin()

QUICK = {"batch_size": 4, "engine": "eager", "progress": False}


@pytest.fixture
def processes(tmp_path):
    """Run a function of the rank in some processes that join a group; return what each said.

    Those in ``hung`` do not end by themselves.
    """

    def run(count, work, hung=(), joined=None):
        joined = joined or by_file(tmp_path, count)
        started = []
        for rank in range(count):
            process = os.fork()
            if process == 0:
                _one(tmp_path / f"{rank}.txt", rank, joined, work)
            started.append(process)
        end = time.monotonic() + SECONDS
        left = [process for rank, process in enumerate(started) if rank not in hung]
        while left and time.monotonic() < end:
            left = [process for process in left if os.waitpid(process, os.WNOHANG)[0] == 0]
            time.sleep(0.02)
        for process in [*left, *(started[rank] for rank in hung)]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        assert not left, "a process waits"
        paths = [tmp_path / f"{rank}.txt" for rank in range(count)]
        return [path.read_text() if path.exists() else None for path in paths]

    return run


def _one(path, rank, joined, work):
    try:
        torch.set_num_threads(1)
        joined(rank)
        try:
            said = str(work(rank))
        except pv.UsageError as error:
            said = str(error)
        path.write_text(said)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def by_file(folder, count):
    limit = timedelta(seconds=TIMEOUT)
    kind = {"init_method": f"file://{folder}/store", "world_size": count, "timeout": limit}
    return lambda rank: distributed.init_process_group("gloo", rank=rank, **kind)


def stop():
    """Stop this process, as a system or a terminal does."""
    os.kill(os.getpid(), signal.SIGSTOP)


class Stops(nn.Module):
    """A pair that stops its process in one step of training."""

    def __init__(self, rank, step):
        super().__init__()
        self.vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
        self.rank, self.left = rank, step

    def model(self, x):
        if self.training and here_rank() == self.rank:
            self.left -= 1
            if self.left == 0:
                stop()
        return self.vae.model(x)

    def guide(self, x):
        return self.vae.guide(x)


def here_rank():
    return distributed.get_rank()


@pytest.mark.sample(2)
@pytest.mark.parametrize(("memory", "lost"), [(True, 1), (True, 0), (False, 1)])
def test_a_process_that_hangs_in_training_ends_the_others(memory, lost, processes, monkeypatch):
    """In shared memory and by gloo. The third process is not the one that is named."""
    if not memory:
        monkeypatch.setattr(training_processes, "shared_sum", lambda flat, team: None)

    def work(rank):
        pv.fit(Stops(lost, 6), X, epochs=3, **QUICK)

    said = processes(3, work, hung=[lost])
    assert said.pop(lost) is None
    for words in said:
        assert re.match(
            rf"training stopped in epoch 2, step 2: process {lost} of 3 did not answer for [3-9] "
            "seconds; if it hangs, py-spy dump shows where; if it is only slow, allow more seconds",
            words,
        ), words


def test_a_callback_that_never_returns_ends_the_others(processes):
    def work(rank):
        vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
        pv.fit(vae, X, epochs=3, on_epoch=[lambda epoch: time.sleep(SECONDS)], **QUICK)

    _, said = processes(2, work, hung=[0])
    assert said.startswith("training stopped in epoch 2, step 0: process 0 of 2 did not answer")


def test_a_process_that_hangs_in_a_shared_tool_ends_the_others(processes):
    vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)

    def work(rank):
        pv.encode(vae, X)
        if rank == 1:
            stop()
        pv.evaluate(vae, X, num_samples=5)

    said = processes(2, work, hung=[1])
    assert said[0].startswith("process 1 of 2 did not answer for")


def test_a_process_that_keeps_the_store_and_hangs_ends_the_others(processes):
    """Without torchrun, this is the first process. A call of its store never returns."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def joined(rank):
        os.environ.update(address, RANK=str(rank))
        join_processes("gloo", timeout=TIMEOUT)

    def work(rank):
        here().gather(lambda: None)
        if rank == 0:
            stop()
        here().gather(lambda: None)

    _, said = processes(2, work, hung=[0], joined=joined)
    assert said.startswith("process 0 of 2 did not answer for")


def test_a_process_that_ends_is_named(processes):
    def work(rank):
        here().gather(lambda: None)
        if rank == 1:
            os._exit(0)
        began = time.monotonic()
        with pytest.raises(pv.UsageError) as error:
            here().gather(lambda: None)
        assert time.monotonic() - began < TIMEOUT + 5
        return error.value

    said = processes(3, work)
    for words in (said[0], said[2]):
        assert words.startswith("process 1 of 3 has ended or does not answer, after ")


def test_a_slow_process_that_shows_signs_of_life_is_waited_for(processes):
    """A step of a progress bar, shown or not, is such a sign."""

    def slowly(epoch):
        with bar(False, 10, "slow") as shown:
            for _ in range(10):
                time.sleep(TIMEOUT / 6)
                shown.update()

    def work(rank):
        vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
        began = time.monotonic()
        pv.fit(vae, X, epochs=1, on_epoch=[slowly], **QUICK)
        return time.monotonic() - began > 1.5 * TIMEOUT

    assert processes(2, work) == ["True", "True"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e9"])
def test_the_time_is_a_positive_number(seconds, monkeypatch, capsys):
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (variables | {"PYRO_VAE_TIMEOUT": seconds}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "runs/none"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "must be" in said
    assert seconds in said or float(seconds) == 1e9
