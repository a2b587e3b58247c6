"""What the verdict says about the prior of global and group latents."""

from types import SimpleNamespace

import torch
from global_pairs import Means, drawn

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis, global_studies, sizing
from pyro_vae.diagnostics.attribution import of_prior_conflict
from pyro_vae.inference.prior_tail import PriorTails

QUIET = {"progress": False}


def test_the_verdict_names_the_prior_of_global_latents(monkeypatch):
    monkeypatch.setattr(diagnosis, "STUDIES", [global_studies.global_weights_study])
    # The smallest size is enough.
    monkeypatch.setattr(sizing.Climb, "fits", lambda self, left: [] if self.known else [0])
    x = drawn([0.3, 7.0])
    found = pv.diagnose(Means(x), x, train=x, budget=60, **QUIET)
    assert [blame.part for blame in found.blamed] == ["prior of globals"]
    assert "At fault:\n- the prior of global latents: the posterior of 'w[1]'" in found.summary
    right = drawn([0.3, -1.0])
    assert pv.diagnose(Means(right), right, train=right, budget=60, **QUIET).blamed == []


def tails(mean):
    """Tails of one element with this mean, in closed form."""
    return PriorTails(("w",), torch.full((100, 1), mean).double(), torch.tensor([torch.inf]))


def test_chains_that_disagree_say_nothing_of_the_prior():
    shared = SimpleNamespace(r_hat=torch.tensor([[2.0]]))
    chains = SimpleNamespace(shared=shared, prior_tails=tails(0.0))
    assert of_prior_conflict({"global_nuts": chains}) == []
    chains.shared.r_hat = torch.tensor([[1.0]])
    (blame,) = of_prior_conflict({"global_nuts": chains})
    assert (blame.part, blame.nats, blame.evidence[0].tool) == (
        "prior of globals",
        None,
        "global_nuts",
    )
    weights = SimpleNamespace(prior_tails=tails(0.0))
    chains.prior_tails = tails(0.5)
    (blame,) = of_prior_conflict({"global_nuts": chains, "global_weights": weights})
    assert blame.evidence[0].tool == "global_weights"
    weights.prior_tails = None
    assert of_prior_conflict({"global_nuts": chains, "global_weights": weights}) == []
