"""A run folder that disappears, and data that change, in the middle of a run."""

import os
import shutil

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data import disk
from pyro_vae.errors import UsageError
from pyro_vae.runs import files as run_files
from pyro_vae.runs.lock import writing

X = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)).numpy()


def fit(x, run, after=None, epochs=4, **options):
    def see(epoch):
        if epoch.epoch == 2 and after is not None:
            after()

    torch.manual_seed(0)
    pair = pv.VAE.mlp((4,), latent_dim=1, hidden=(4,), likelihood=pv.Gaussian)
    quick = {"engine": "eager", "batch_size": 16, "checkpoint_seconds": 0.0, "progress": False}
    pv.fit(pair, x, epochs=epochs, out=run, on_epoch=[see], **quick, **options)
    return pair


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "one"


CHANGES = {
    "deleted": lambda run: shutil.rmtree(run),
    "moved": lambda run: run.rename(run.parent / "moved"),
    "a file": lambda run: (shutil.rmtree(run), run.write_text("x")),
    "replaced": lambda run: (run.rename(run.parent / "moved"), run.mkdir()),
    "parent moved": lambda run: run.parent.rename(run.parent.parent / "away"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_disappears_stops_training_in_one_line(change, run, tmp_path):
    with pytest.raises(UsageError, match=r"training stopped in epoch 3.*deleted, moved or") as told:
        fit(X, run, lambda: CHANGES[change](run))
    assert "\n" not in str(told.value)
    assert not run.is_dir() or not os.listdir(run)  # no part of a run in its place
    for kept in (run.parent / "moved", tmp_path / "away" / "one"):
        if kept.exists():
            assert len(run_files.read_checkpoint(kept)["epochs"]) == 1
            shutil.rmtree(run, ignore_errors=True)
            kept.rename(tmp_path / "back")
            again = fit(X, tmp_path / "back", resume=True).state_dict()
            whole = fit(X, tmp_path / "whole").state_dict()
            assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_run_of_another_process_in_its_place_stays(run):
    other = {}

    def replace():
        run.rename(run.parent / "moved")
        fit(X, run, epochs=1)
        other.update({name: (run / name).read_bytes() for name in os.listdir(run)})

    with pytest.raises(UsageError, match="deleted, moved or replaced"):
        fit(X, run, replace)
    found = {name: (run / name).read_bytes() for name in other if name != ".lock"}
    assert found == {name: content for name, content in other.items() if name != ".lock"}


def test_a_lock_file_that_is_swept_away_stops_nothing(run):
    fit(X, run, lambda: (run / ".lock").unlink())
    assert len(run_files.read_checkpoint(run)["epochs"]) == 4


def test_a_command_does_not_write_into_a_new_folder(run):
    with writing(run):
        shutil.rmtree(run)
        with pytest.raises(UsageError, match=r"metrics.json was not written"):
            run_files.write_json(run / "metrics.json", {})
        run_files.write_json(run.parent / "other.json", {})  # no part of the run
    assert not run.exists()


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A file that is read by rows, and the file as a map."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64)
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


def touched(path):
    found = np.load(path, mmap_mode="r+")
    os.utime(path, ns=(0, 0))  # so that the clock's resolution does not matter
    found[3] += 1
    found.flush()


DATA_CHANGES = {
    "written": touched,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"1234"),
    "shorter": lambda path: os.truncate(path, 600),
}


@pytest.mark.parametrize("change", DATA_CHANGES)
def test_data_that_change_during_a_run_stop_it(change, stored, run):
    x = np.load(stored, mmap_mode="r")
    with pytest.raises(UsageError, match=r"x\.npy has been changed while it was read") as told:
        fit(x, run, lambda: DATA_CHANGES[change](stored))
    assert "\n" not in str(told.value)
    assert len(run_files.read_checkpoint(run)["epochs"]) >= 1


def test_a_file_that_is_replaced_by_another_one_is_read_on(stored, run, tmp_path):
    """The open file stays as it was, so the result is that of the first file."""

    def replace():
        np.save(tmp_path / "new.npy", X + 1)
        os.replace(tmp_path / "new.npy", stored)

    made = fit(np.load(stored, mmap_mode="r"), run, replace).state_dict()
    np.save(stored, X)
    whole = fit(np.load(stored, mmap_mode="r"), tmp_path / "whole").state_dict()
    assert all(torch.equal(made[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_data_that_change_before_a_resume_are_refused(kind, tmp_path, capsys):
    path = tmp_path / f"x.{kind}"

    def write(x):
        if kind == "npy":
            np.save(path, x)
        else:
            np.savetxt(path, x, delimiter=",", header="a,b,c,d", comments="")

    write(X)
    line = f"train {path} --out {tmp_path}/run --engine eager --no-report --num-eval-samples 2"
    line += " --likelihood gaussian" * (kind == "npy")
    main(f"{line} --epochs 1".split())
    changed = X.copy()
    changed[5, 1] += 0.5
    write(changed)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(f"{line} --epochs 2 --resume".split())
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "has changed since" in said[0]
