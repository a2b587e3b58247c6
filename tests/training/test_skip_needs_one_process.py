"""`fit` with several processes cannot leave minibatches out."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.pairs.processes import Team


def test_skip_with_several_processes_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("pyro_vae.training.fit.here", lambda: Team(0, 2))
    with pytest.raises(pv.UsageError, match="'skip' needs one process, got 2; use 'stop'"):
        pv.fit(pv.VAE.mlp((4,)), torch.ones(8, 4), on_nonfinite="skip", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
