"""A signal is never lost, and a second one stops at once."""

import os
import signal

import pytest
import torch
from bad_input_helpers import binary

import pyro_vae as pv
from pyro_vae.runs import files as run_files
from pyro_vae.training.stopping import Interrupted

OPTIONS = {"batch_size": 4, "engine": "eager", "progress": False, "checkpoint_seconds": 0}

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Halting(pv.VAE):
    """A pair whose guide sends signals to this process the next time that it is ``armed`` for."""

    armed = ()
    when = False
    """Whether it waits for training or for validation."""

    def guide(self, x):
        if self.training == self.when:
            armed, self.armed = self.armed, ()
            for number in armed:
                signal.raise_signal(number)
        return super().guide(x)


def halting():
    torch.manual_seed(0)
    made = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))
    return Halting(made.encoder, made.decoder, made.prior)


def fit(pair, out, **options):
    return pv.fit(pair, binary(), validation=binary(), out=out, **OPTIONS | options)


def place(run):
    state = run_files.read_checkpoint(run)
    return len(state["epochs"]), state["batches"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(halting(), run, epochs=2)
    return run


def arm(pair, *numbers, after=1, training=False):
    """Arm a pair after an epoch."""

    def see(epoch):
        if epoch.epoch == after:
            pair.armed, pair.when = numbers, training

    return see


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_last_validation_stops_after_writing(number, tmp_path, whole):
    pair, run = halting(), tmp_path / "run"
    with pytest.raises(Interrupted, match="training is complete"):
        fit(pair, run, epochs=2, on_epoch=[arm(pair, number)])
    assert place(run) == (2, 0)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not pair.training
    for name, value in pv.load(whole, halting()).state_dict().items():
        assert torch.equal(pair.state_dict()[name], value)
    assert len(fit(halting(), run, epochs=2, resume=True)) == 2


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("write", range(5))
def test_a_signal_while_writing_is_not_lost(number, write, tmp_path, whole, monkeypatch):
    """Each flush after the last epoch, of checkpoint, model and history and of their folder."""
    seen, honest = [], os.fsync

    def fsync(descriptor):
        honest(descriptor)
        if seen:
            seen.append(descriptor)
            if len(seen) == 2 + write:
                signal.raise_signal(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Interrupted, match="training is complete"):
        fit(
            *(halting(), tmp_path / "run"),
            epochs=2,
            on_epoch=[lambda epoch: seen.append(0) if epoch.epoch == 2 else None],
        )
    assert place(tmp_path / "run") == (2, 0)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_in_another_validation_stops_within_the_next_epoch(tmp_path):
    pair = halting()
    with pytest.raises(Interrupted, match="resume with"):
        fit(pair, tmp_path / "run", epochs=3, on_epoch=[arm(pair, signal.SIGTERM)])
    assert place(tmp_path / "run") == (2, 1)


def test_a_signal_without_a_folder(tmp_path):
    pair = halting()
    with pytest.raises(Interrupted, match="training is complete, and the pair has the result"):
        fit(pair, None, epochs=2, on_epoch=[arm(pair, signal.SIGINT)])


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_second_signal_stops_at_once(engine, tmp_path):
    """Also in the program of the pair, which the engine runs to make its graph."""
    pair, run = halting(), tmp_path / "run"

    def beta(epoch):  # is called in training only, after the checks that run the pair
        pair.armed, pair.when = (signal.SIGTERM, signal.SIGINT), True
        return 1.0

    with pytest.raises(Interrupted, match="at once by a second signal"):
        fit(pair, run, epochs=2, beta=beta, engine=engine)
    assert place(run) == (0, 0)
    assert not [name for name in os.listdir(run) if name.endswith(".part") or name == ".lock"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    fit(halting(), run, epochs=2, beta=lambda epoch: 1.0, engine=engine, resume=True)
    assert place(run) == (2, 0)


def test_a_second_signal_while_writing_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run, honest, seen = tmp_path / "run", os.fsync, []

    def fsync(descriptor):
        honest(descriptor)
        if seen:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Interrupted, match="at once by a second signal"):
        fit(
            *(halting(), run),
            epochs=3,
            on_epoch=[lambda epoch: seen.append(0) if epoch.epoch == 2 else None],
        )
    assert place(run) == (1, 0)
    assert not [name for name in os.listdir(run) if name.endswith(".part") or name == ".lock"]
