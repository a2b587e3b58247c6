"""Each changed bit and each cut of the text files of a run is detected; the fast form of a trial.

`benchmarks/faults.py` has the full counts.
"""

import os
import random
import shutil

import pytest
import torch
from bad_input_helpers import binary, refused, small

import pyro_vae as pv
from pyro_vae.data.schema import Column, Schema, stored_schema
from pyro_vae.runs import files as run_files
from pyro_vae.runs.history_file import read_history, write_history
from pyro_vae.runs.metrics import read_metrics, write_metrics

OPTIONS = {"batch_size": 4, "engine": "eager", "progress": False}

READERS = {
    "config.json": pv.load,
    "metrics.json": read_metrics,
    "history.csv": lambda run: read_history(run / "history.csv"),
    "schema.toml": lambda run: stored_schema(run / "schema.toml"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    run = tmp_path_factory.mktemp("sealed") / "run"
    pair = small()
    pv.fit(pair, binary(), validation=binary(), out=run, epochs=3, **OPTIONS)
    write_metrics(run, pair, {"elbo": -1.25, "active_units": {"z": 2}})
    schema = Schema((Column("a"), Column("b")))
    (run / "schema.toml").write_bytes(schema.to_file())
    return run


@pytest.fixture
def run(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "run")


@pytest.mark.parametrize("name", READERS)
def test_the_sound_file_is_read(name, run):
    READERS[name](run)


@pytest.mark.parametrize("name", READERS)
def test_every_cut_is_detected(name, run):
    whole = (run / name).read_bytes()
    borders = [i + end for i, byte in enumerate(whole) if byte == ord("\n") for end in (0, 1)]
    others = random.Random(0).sample(range(len(whole)), 30)
    for length in {0, 1, *borders, *others} - {len(whole)}:
        (run / name).write_bytes(whole[:length])
        refused(lambda: READERS[name](run), str(run / name))


@pytest.mark.parametrize("name", READERS)
def test_every_flipped_bit_is_detected(name, run):
    whole, draw = (run / name).read_bytes(), random.Random(1)
    at_ends = [*range(30), *range(len(whole) - 100, len(whole))]  # of the formats and the seals
    for at in [*at_ends, *draw.sample(range(len(whole)), 30)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        (run / name).write_bytes(changed)
        refused(lambda: READERS[name](run), str(run / name))


def test_values_are_kept_and_other_programs_read_them(run):
    assert read_metrics(run) == {
        "elbo": -1.25,
        "active_units": {"z": 2},
        "model": read_metrics(run)["model"],
    }
    columns = read_history(run / "history.csv")
    assert columns["epoch"] == [1.0, 2.0, 3.0]
    assert "check" not in columns
    table = pytest.importorskip("numpy").genfromtxt(run / "history.csv", delimiter=",", names=True)
    assert table["elbo"].tolist() == columns["elbo"]
    assert [bool(check) for check in table["check"]] == [False, False, True]


def test_files_without_seals_are_those_of_0_1_0(run):
    lines = (run / "history.csv").read_text().splitlines()
    (run / "history.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    assert read_history(run / "history.csv")["epoch"] == [1.0, 2.0, 3.0]
    (run / "metrics.json").write_text('{"elbo": -1.0}')
    assert read_metrics(run) == {"elbo": -1.0}
    (run / "schema.toml").write_text("".join((run / "schema.toml").read_text().partition("\n")[2:]))
    assert len(stored_schema(run / "schema.toml").columns) == 2


def test_a_history_without_epochs(tmp_path):
    write_history(tmp_path / "history.csv", [])
    assert read_history(tmp_path / "history.csv") == {}


def test_a_checkpoint_of_a_later_version_is_refused(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["format"] == 2
    run_files.write_checkpoint(run, state | {"format": 3})
    (run / "checkpoint-older.pt").unlink()
    refused(lambda: run_files.read_checkpoint(run), "format 3", "later version")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_place_of_the_history_does_not_hang(run):
    (run / "history.csv").unlink()
    os.mkfifo(run / "history.csv")
    refused(lambda: pv.write_report(pv.load(run), binary(), run=run), "must be a plain file")
