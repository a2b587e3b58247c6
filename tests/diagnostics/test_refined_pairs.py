"""A refined pair at its rows: no gap of the encoder is left, and simulated data are refused."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.models.exact import Spoiled
from pyro_vae.pairs.rng import seeded


def test_refinement_removes_the_fault_of_the_encoder_at_the_refined_rows():
    pair = Spoiled("full", shift=0.6, stretch=1.4)
    with seeded(0):
        x = pair.marginal().sample((50,)).detach()
    settings = {"steps": 150, "num_samples": 300, "engine": "eager", "progress": False}
    put_in = pair.kl(x, pair.q(x)).mean().item()
    before = pv.gaps(pair, x, **settings)
    assert before.amortization.value == pytest.approx(put_in, abs=0.05)
    refined = pv.refine(pair, x, **settings)
    after = pv.gaps(refined.pair, *refined.batch, **settings)
    assert after.amortization.value < 0.02 < before.amortization.value / 5
    exact = pair.marginal().log_prob(x).mean().item()
    assert refined.after.elbo == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize(
    "tool",
    [
        lambda pair, batch: pv.calibration(pair, *batch[1:], progress=False),
        lambda pair, batch: pv.model_check(pair, *batch, progress=False),
        lambda pair, batch: pv.tarp(pair, *batch[1:]),
        lambda pair, batch: pv.sandwich(pair, *batch[1:], num_examples=10, progress=False),
        lambda pair, batch: pv.local_c2st(pair, *batch, progress=False),
    ],
)
def test_offsets_of_the_rows_do_not_serve_simulated_data(tool):
    pair = Spoiled("full", shift=0.6)
    x = torch.zeros(60, 4).double()
    refined = pv.refine(pair, x, steps=2, num_samples=30, engine="eager", progress=False)
    with pytest.raises(pv.UsageError, match=r"Refined has no method template\(n\)"):
        tool(refined.pair, refined.batch)
