"""A command of the shell is the only writer of its run folder until its last result is written."""

import os

import numpy as np
import pytest

from pyro_vae.cli.main import main
from pyro_vae.runs import lock

WORDS = ["train", "x.npy", "--out", "run", "--epochs", "1", "--engine", "eager", "--hidden", "8"]
WORDS += ["--num-eval-samples", "2", "--diagnosis-seconds", "0", "--no-report"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 2, (40, 4)).astype(np.uint8))
    before = os.getcwd()
    os.chdir(folder)
    main(WORDS)
    yield folder
    os.chdir(before)


@pytest.fixture
def at(here, monkeypatch):
    monkeypatch.chdir(here)
    return here


COMMANDS = [
    *(["evaluate", "run", "--num-samples", "2"], ["sample", "run"], ["encode", "run"]),
    *(["report", "run"], [*WORDS, "--resume"], [*WORDS, "--overwrite"]),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:1] + words[-1:]))
def test_a_command_is_refused_while_another_process_writes(words, at, capsys):
    before = {path.name: path.read_bytes() for path in (at / "run").iterdir() if path.is_file()}
    descriptor = lock._lock(at / "run")  # as another process holds it
    try:
        with pytest.raises(SystemExit, match="2"):
            main(words)
    finally:
        lock._release(at / "run", descriptor)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"process {os.getpid()} on" in error
    after = {path.name: path.read_bytes() for path in (at / "run").iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before


def test_training_holds_the_lock_while_it_measures(at, monkeypatch):
    from pyro_vae.cli import train as command

    held = []
    honest = command.measure_run

    def measured(*arguments, **options):
        held.append((at / "run" / ".lock").exists())
        return honest(*arguments, **options)

    monkeypatch.setattr(command, "measure_run", measured)
    main([*WORDS, "--overwrite"])
    assert held == [True]
    assert not (at / "run" / ".lock").exists()


def test_results_elsewhere_need_no_lock(at):
    descriptor = lock._lock(at / "run")
    try:
        main(["encode", "run", "--out", "codes.npz"])
    finally:
        lock._release(at / "run", descriptor)
    assert (at / "codes.npz").exists()


def test_a_folder_that_does_not_exist_stays_so(at, capsys):
    for words in (["evaluate", "rum"], ["train", "x.npy", "--out", "rum", "--resume"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "rum" in capsys.readouterr().err
        assert not (at / "rum").exists()
