"""What the precision "auto" means, and that a run keeps it."""

import json

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training import precision

X = torch.rand(64, 784).round()
EAGER = {"epochs": 1, "batch_size": 32, "engine": "eager", "progress": False}


@pytest.fixture(params=[True, False], ids=["fast", "emulated"])
def fast(request, monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: request.param)
    return request.param


def wide():
    return pv.VAE.mlp((784,), latent_dim=2, hidden=(64,))


def test_only_large_products_on_a_fast_processor_are_in_bfloat16(fast):
    found = precision.chosen_precision(wide(), 4096)
    assert found == ("bfloat16" if fast else "float32")
    assert precision.chosen_precision(wide(), 1) == "float32"
    assert precision.chosen_precision(wide().double(), 4096) == "float32"


def test_frozen_weights_do_not_count(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    pair = wide()
    weights = sum(p.numel() for p in pair.parameters() if p.dim() == 2)
    monkeypatch.setattr(precision, "LEAST_WORK", 3 * 32 * weights)
    assert precision.chosen_precision(pair, 32) == "bfloat16"
    assert precision.chosen_precision(pair, 31) == "float32"
    pair.decoder.requires_grad_(False)
    assert precision.chosen_precision(pair, 32) == "float32"


def test_a_run_records_its_precision_and_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "LEAST_WORK", 1)
    pair, run = wide(), tmp_path / "run"
    pv.fit(pair, X, out=run, precision="auto", **EAGER)
    assert json.loads((run / "config.json").read_text())["settings"]["precision"] == "bfloat16"
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    again = wide()
    pv.fit(again, X, out=run, precision="auto", resume=True, **EAGER | {"epochs": 2})
    assert json.loads((run / "config.json").read_text())["settings"]["precision"] == "bfloat16"
    with pytest.raises(pv.UsageError, match="precision"):
        pv.fit(wide(), X, out=run, precision="float32", resume=True, **EAGER | {"epochs": 3})
