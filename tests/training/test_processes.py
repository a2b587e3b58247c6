"""Several processes share a run: same gradients, same order, one error, and exact resumption.

One pair of processes runs `processes_program.everything`; the tests read what both of them found.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import processes_program as program
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.pairs.processes import Team

PROGRAM = Path(program.__file__)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def both(folder):
    """The results of two processes."""
    running, port = [], free_port()
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = os.environ | own | {"MASTER_PORT": port, "PYTHONPATH": str(PROGRAM.parents[2])}
        command = [sys.executable, "-W", "ignore", str(PROGRAM), str(folder)]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said.decode()[-2000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return program.recorded()


@pytest.mark.parametrize("kind", ["gradients", "traced", "items"])
def test_gradients_are_those_of_one_process(kind, both, alone):
    wanted = alone[0]
    for found in both:
        found = found[kind][0] if kind == "gradients" else found[kind]
        assert found.shape == wanted.shape == (6, 32 + 4)
        assert bool(((found - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all())


def test_a_loader_of_the_user_has_one_order_in_all_processes(both):
    """The whole gradient of an epoch at the first parameters does not depend on the order."""
    assert torch.equal(both[0]["loader"], both[1]["loader"])


def test_history_and_validation_are_those_of_one_process(both, alone):
    """ELBO, bound on validation data, norm of the gradient, and one KL of the shared latent."""
    for found in both:
        torch.testing.assert_close(found["gradients"][1], alone[1], rtol=1e-5, atol=1e-6)


def test_each_row_is_read_once_by_one_process(both):
    """A process reads row 0 for its part without rows, to know the shapes."""
    n = len(program.X)
    wanted = torch.cat([order(0, epoch, n) for epoch in range(2)])
    for rank, found in enumerate(both):
        parts = [wanted[i * n : (i + 1) * n].split(8) for i in range(2)]
        mine = [Team(rank, 2).of(part).tolist() or [0] for parts in parts for part in parts]
        flat = [row for part in mine for row in part]
        assert found["read"].tolist()[-len(flat) :] == flat


def test_a_resumed_run_is_bit_identical(both):
    for found in both:
        whole, parts = found["resumed"]
        assert torch.equal(whole, parts)
    assert torch.equal(both[0]["resumed"], both[1]["resumed"])


@pytest.mark.usefixtures("both")
def test_another_number_of_processes_may_resume(folder):
    pair, options = program.make(), program.OPTIONS | {"out": folder / "parts", "resume": True}
    with pytest.warns(UserWarning, match="of 2 processes and 1 continue it: the order of the rows"):
        history = pv.fit(pair, program.X, epochs=4, **options)
    assert len(history) == 4
    history = pv.fit(pair, program.X, epochs=5, **options)  # one process wrote it, and no warning
    assert len(history) == 5


def test_a_restart_by_torchrun_resumes(tmp_path, monkeypatch):
    options = program.OPTIONS | {"out": tmp_path / "run", "overwrite": True}
    whole, parts = program.make(), program.make()
    pv.fit(whole, program.X, epochs=2, **program.OPTIONS)
    pv.fit(parts, program.X, epochs=1, **options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    pv.fit(program.make(), program.X, epochs=2, **options)
    parts = pv.load(tmp_path / "run")
    assert torch.equal(program.weights(whole), program.weights(parts))


def test_running_means_are_the_same_in_all_processes(both):
    assert torch.equal(both[0]["normalized"], both[1]["normalized"])


def test_an_error_of_one_process_ends_all(both):
    one, other = (found["failures"] for found in both)
    assert other["model"].startswith("UsageError: training stopped in epoch 1, step 1: the model")
    assert one["model"].startswith("ElsewhereError: process 1 of 2 stopped: training stopped in")
    assert one["callback"] == "UsageError: the callback fails"
    assert other["callback"] == "ElsewhereError: process 0 of 2 stopped: the callback fails"
    assert "process 1 has another data than process 0" in one["data"]
    assert "batch_size must be at least 2, the number of processes, got 1" in one["small"]
    assert one["nan"].startswith("ElsewhereError: process 1 of 2 stopped: training stopped in epo")
    assert other["nan"].startswith("NonFiniteError: training stopped in epoch 1, step 1: the loss")


def test_tools_share_their_rows(both):
    pair = program.make()
    pair.eval()
    x = program.X.repeat(30, 1)
    found, other = (each["log_likelihood"] for each in both)
    wanted = pv.log_likelihood(pair, x, num_samples=300, engine="eager")
    assert torch.equal(found, other)
    assert torch.equal(found[:500], wanted.per_datum[:500])  # the rows of the first process
    assert not torch.equal(found[500:], wanted.per_datum[500:])  # they have noise of their own
    error = (found[500:] - wanted.per_datum[500:]).abs()
    assert bool((error < 8 * wanted.standard_errors[500:] + 0.05).all())
    encoded = pv.encode(pair, program.X.repeat(100, 1))["z"]
    for each in both:
        torch.testing.assert_close(each["encoded"], encoded)
    assert both[0]["evaluated"] == both[1]["evaluated"]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_runs_and_runs_that_fail_give_their_shared_memory_back(both):
    assert [found["kept"] for found in both] == [0, 0]


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_of_a_minibatch_hold_each_row_once(n, count):
    parts = [Team(rank, count).of(torch.arange(n)) for rank in range(count)]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) == max(map(len, parts))
