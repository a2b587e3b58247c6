"""When checkpoints are written: by time, also within epochs, and with long histories."""

import time

import pytest
import torch
from bad_input_helpers import binary, small

import pyro_vae as pv
from pyro_vae.runs import files as run_files
from pyro_vae.training import pace
from pyro_vae.training.pace import Pace

OPTIONS = {"batch_size": 1, "engine": "eager", "progress": False}


def train(run, **options):
    torch.manual_seed(0)
    return pv.fit(small(), binary(), out=run, **OPTIONS | options)


def place(run):
    state = run_files.read_checkpoint(run)
    return len(state["epochs"]), state["batches"]


class Killed(Exception):
    pass


def test_a_long_epoch_has_checkpoints(tmp_path, monkeypatch):
    """A run that dies in its first epoch goes on from within this epoch, with the same bits."""
    train(tmp_path / "whole", epochs=2)
    monkeypatch.setattr(pace, "MIDWAY_SECONDS", 0.0)

    def beta(epoch):
        if epoch >= 5 / 8:
            raise Killed
        return 1.0

    with pytest.raises(Killed):
        train(tmp_path / "run", epochs=2, checkpoint_seconds=0, beta=beta)
    assert place(tmp_path / "run") == (0, 5)
    monkeypatch.undo()
    train(tmp_path / "run", epochs=2, resume=True)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_checkpoints_within_an_epoch_are_at_least_ten_seconds_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds, due in ((0.0, 10.0), (30.0, 30.0)):
        made = Pace(seconds)
        now[0] += due
        assert not made.is_due_within()
        now[0] += 0.1
        assert made.is_due_within()


@pytest.mark.parametrize(("n", "most"), [(1000, 1000), (20_000, 4100)])
def test_the_rows_that_checkpoints_write_grow_linearly(n, most, monkeypatch):
    """20,000 checkpoints would write 200 million rows; these write 20 million."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made, written, rows = Pace(0.0), 0, 0
    for epoch in range(1, n + 1):
        now[0] += 1e-3
        if made.is_due_after(epoch):
            made.wrote(epoch)
            written, rows = written + 1, rows + epoch
    assert written <= most
    assert rows <= 1100 * n
    assert n - made.epochs <= n / 1000


def test_a_slow_run_has_a_checkpoint_after_each_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = Pace(0.0, epochs=50_000)
    now[0] += 11.0
    assert made.is_due_after(50_001)
