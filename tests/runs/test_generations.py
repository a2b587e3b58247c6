"""The checkpoint before the last one is kept, and is read if the last one is damaged."""

import os
import signal
import warnings

import pytest
import torch
from bad_input_helpers import binary, refused, small

import pyro_vae as pv
from pyro_vae.runs import checksums
from pyro_vae.runs import files as run_files

OPTIONS = {"batch_size": 4, "engine": "eager", "progress": False, "checkpoint_seconds": 0}

NAMES = ("checkpoint.pt", "checkpoint-older.pt")


def train(out, **options):
    torch.manual_seed(0)
    return pv.fit(small(), binary(), validation=binary(), out=out, **OPTIONS | options)


def interrupt_at(epoch):
    """A schedule that interrupts training, like Ctrl-C, in the second step of an epoch."""

    def beta(now):
        if now > epoch:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    return beta


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, epochs=4)
    return run


@pytest.fixture
def halted(tmp_path):
    """A run with a checkpoint within epoch 3 and an older one at the end of epoch 2."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", epochs=4, beta=interrupt_at(2.0))
    return tmp_path / "run"


def place(run, name):
    """How many epochs and minibatches a checkpoint has."""
    state = torch.load(run / name, weights_only=True)
    return len(state["epochs"]), state["batches"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_two_generations_are_kept(halted, whole):
    assert [place(halted, name) for name in NAMES] == [(2, 2), (2, 0)]
    assert place(whole, "checkpoint.pt") == (4, 0)


DAMAGE = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04N."),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_resume_from_the_older_generation_is_bit_identical(halted, whole, damage):
    damage(halted / "checkpoint.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(halted, epochs=4, resume=True)
    (message,) = [str(w.message) for w in caught]
    assert "\n" not in message
    assert all(str(halted / name) in message for name in NAMES)
    assert [w.filename for w in caught] == [__file__]
    assert (halted / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    left, right = run_files.read_checkpoint(halted), run_files.read_checkpoint(whole)
    assert torch.equal(left["generators"]["torch"], right["generators"]["torch"])
    for name, value in left["optimizer"].items():
        assert str(value) == str(right["optimizer"][name])


def test_a_damaged_checkpoint_never_replaces_a_sound_older_one(halted):
    sound = (halted / "checkpoint-older.pt").read_bytes()
    flip(halted / "checkpoint.pt")
    run_files.write_checkpoint(halted, {"a": 1})
    assert (halted / "checkpoint-older.pt").read_bytes() == sound
    assert run_files.read_checkpoint(halted) == {"a": 1}


def test_if_both_are_damaged_the_last_is_named(halted):
    for name in NAMES:
        flip(halted / name)
    refused(lambda: train(halted, epochs=4, resume=True), str(halted / "checkpoint.pt"), "damaged")


def test_a_checkpoint_that_is_not_readable_leaves_both_generations(halted, monkeypatch):
    """A disk that stores other bytes than were written."""
    before = [(halted / name).read_bytes() for name in NAMES]
    honest = checksums.sealed_archive

    def faulty(content):
        sealed = bytearray(honest(content))
        sealed[len(sealed) // 2] ^= 1
        return bytes(sealed)

    monkeypatch.setattr(checksums, "sealed_archive", faulty)
    refused(lambda: run_files.write_checkpoint(halted, {"a": 1}), str(halted / "checkpoint.pt"))
    assert [(halted / name).read_bytes() for name in NAMES] == before
    assert not [name for name in os.listdir(halted) if name.endswith(".part")]


def test_the_older_generation_marks_a_run_and_is_overwritten(halted):
    for path in halted.iterdir():
        if path.name != "checkpoint-older.pt":
            path.unlink()
    refused(lambda: train(halted, epochs=1), "already holds a run", "checkpoint-older.pt")
    train(halted, epochs=1, overwrite=True)
    assert place(halted, "checkpoint-older.pt") == (1, 0)
