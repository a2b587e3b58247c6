"""A run is not resumed on another kind of data."""

import pytest
from bad_input_helpers import binary, refused, small
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.runs import files as run_files

OPTIONS = {"batch_size": 4, "engine": "eager", "progress": False}

KINDS = {
    "tensor": lambda: binary(),
    "data set": lambda: TensorDataset(binary()),
    "loader": lambda: DataLoader(TensorDataset(binary()), batch_size=4),
}


@pytest.mark.parametrize("first", ["tensor", "loader"])
def test_another_kind_of_source_is_refused(first, tmp_path):
    run = tmp_path / "run"
    pv.fit(small(), KINDS[first](), out=run, epochs=1, **OPTIONS)
    before = (run / "checkpoint.pt").read_bytes()
    other = "loader" if first == "tensor" else "tensor"
    resumed = {"out": run, "epochs": 2, "resume": True, **OPTIONS}
    refused(lambda: pv.fit(small(), KINDS[other](), **resumed), "another source", str(run))
    assert (run / "checkpoint.pt").read_bytes() == before
    assert len(pv.fit(small(), KINDS[first](), **resumed)) == 2


def test_a_setting_that_this_version_does_not_know_is_refused(tmp_path):
    """`benchmarks/faults.py` found a traceback here."""
    run = tmp_path / "run"
    pv.fit(small(), binary(), out=run, epochs=1, **OPTIONS)
    state = run_files.read_checkpoint(run)
    state["job"]["settings"]["x" * 5000] = 1
    run_files.write_checkpoint(run, state)
    resumed = {"out": run, "epochs": 2, "resume": True, **OPTIONS}
    message = refused(lambda: pv.fit(small(), binary(), **resumed), "unknown setting")
    assert len(message) < 500
