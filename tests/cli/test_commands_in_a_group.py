"""Commands under torchrun: two processes share the work, and the first one writes."""

import os
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from cli_helpers import only_smallest

from pyro_vae.cli.main import main
from pyro_vae.diagnostics.guide_studies import reliability_study
from pyro_vae.diagnostics.model_studies import latents_study
from pyro_vae.runs.lock import writing
from pyro_vae.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("forks")

SECONDS = 60.0
"""A process that takes longer waits forever."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def in_two(folder, *commands):
    """Run commands in two processes, as torchrun starts them; return their status and words."""
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ports = [free_port() for _ in commands]
    started = []
    for rank in range(2):
        process = os.fork()
        if process == 0:
            os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
            _run(folder / f"{rank}.txt", commands, ports)
        started.append(process)
    end, status = time.monotonic() + SECONDS, {}
    while len(status) < 2 and time.monotonic() < end:
        for process in set(started) - set(status):
            done, code = os.waitpid(process, os.WNOHANG)
            if done:
                status[process] = os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    for process in set(started) - set(status):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert len(status) == 2, "a process waits"
    return [status[p] for p in started], [(folder / f"{r}.txt").read_text() for r in range(2)]


def _run(said, commands, ports):
    """Run commands in this forked process, and end it with their status."""
    code = 1
    try:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
        for words, port in zip(commands, ports, strict=True):
            os.environ["MASTER_PORT"] = port
            main(words)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npy"
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    x[::7, 1] = np.nan
    np.save(path, x)
    return str(path)


def test_commands_that_share_their_work(tmp_path, data, monkeypatch):
    only_smallest(monkeypatch, latents_study, reliability_study)
    run = str(tmp_path / "run")
    small = ["--latent-dim", "2", "--hidden", "8", "--engine", "eager", "--no-report"]
    status, said = in_two(
        tmp_path,
        ["train", data, "--out", run, "--epochs", "1", "--num-eval-samples", "5", *small],
        ["evaluate", run, "--num-samples", "5"],
        ["diagnose", run, "--budget", "20", "--no-report"],
        ["encode", run],
        ["score", run, "--num-samples", "30"],
        ["impute", run, "--num-samples", "30"],
    )
    assert status == [0, 0]
    assert said[0].count("scores.npz") == said[0].count("filled.npz") == 1
    assert ".npz" not in said[1]
    assert np.load(tmp_path / "run" / "scores.npz")["log_likelihood"].shape == (12,)
    filled = np.load(tmp_path / "run" / "filled.npz")
    assert filled["mean"].shape == (60, 3)
    assert np.isfinite(filled["mean"]).all()
    assert filled["missing"].sum() == 9
    found = read_metrics(tmp_path / "run")
    assert found["diagnostics"]["results"].keys() == {"latents", "log_likelihood"}
    assert found["num_examples"] == 12
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_with_a_writer_is_refused_in_one_line(tmp_path, data):
    run = tmp_path / "run"
    with writing(run):
        status, said = in_two(tmp_path, ["train", data, "--out", str(run), "--epochs", "1"])
    assert status == [2, 2]
    assert "is writing into" in said[0]
    assert said[0].count("\n") == 1
    assert said[1] == ""
