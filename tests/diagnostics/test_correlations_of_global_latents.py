"""A guide of global latents that has the right means and scales, but lost a correlation."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_vae.diagnostics import global_studies
from pyro_vae.diagnostics.global_studies import GlobalEvidence, judge_globals
from pyro_vae.inference.global_weights import GlobalWeights
from pyro_vae.inference.pareto import pareto_shape


def weighed(correlated, exact=-0.6):
    """Weights of draws of two standard normal marginals, for a posterior with this correlation."""
    torch.manual_seed(0)
    zero, identity = torch.zeros(2).double(), torch.eye(2).double()
    covariance = torch.tensor([[1.0, exact], [exact, 1.0]]).double()
    posterior = MultivariateNormal(zero, covariance)
    guide = posterior if correlated else MultivariateNormal(zero, identity)
    w = guide.sample((1000,))
    log_weights = posterior.log_prob(w) - guide.log_prob(w)
    k = 0.0 if correlated else pareto_shape(log_weights[None]).item()
    return GlobalWeights({"w": w}, log_weights, ("w[0]", "w[1]"), k, 1, 40, 0.0), exact


def test_marginals_that_are_right_do_not_excuse_a_lost_correlation():
    found, exact = weighed(correlated=False)
    one = global_studies.of_weights(found)
    assert one.enough  # before, this was all, and the guide was called reliable
    assert not one.faulty
    assert one.correlation[0, 1] == pytest.approx(exact, abs=0.08)
    (told, _) = judge_globals(["w"], {"global_weights": found}, {})
    assert told.kind == "doubt"
    assert "'w[0]' and 'w[1]': their correlation is " in told.words


def test_an_exact_guide_is_reliable_and_its_correlations_are_told():
    found, exact = weighed(correlated=True)
    one = global_studies.of_weights(found)
    assert one.misjudged_pair is None
    assert one.guide_correlation[0, 1] == pytest.approx(exact, abs=0.08)
    (told,) = judge_globals(["w"], {"global_weights": found}, {})
    assert told.kind == "trust"
    assert "its correlations are within 0.00, by" in told.words


def evidence(posterior=0.0, guide=0.0, draws=1000.0):
    one = torch.ones(2).double()
    both = [torch.tensor([[1.0, r], [r, 1.0]]).double() for r in (posterior, guide)]
    return GlobalEvidence("NUTS", ("w", "u"), one, one, one, one, draws * one, 1000, True, *both)


@pytest.mark.parametrize(
    ("posterior", "guide", "draws", "off"),
    [
        (-0.9, 0.0, 1000, True),
        (0.0, 0.9, 1000, True),
        (0.2, -0.3, 1000, True),
        (0.25, 0.0, 1000, False),  # below the limit
        (0.4, 0.0, 1000, False),  # above it, but not by three errors
        (0.9, 0.0, 20, True),
        (0.7, 0.0, 10, False),
        (torch.nan, 0.0, 1000, False),  # a unit that is constant
    ],
)
def test_a_correlation_is_off_beyond_its_limit_and_three_errors(posterior, guide, draws, off):
    assert (evidence(posterior, guide, draws).misjudged_pair == (0, 1)) is off


def test_nuts_tells_the_correlation_of_its_chains(monkeypatch):
    monkeypatch.setattr(global_studies, "of_nuts", lambda found: found.evidence)
    shared = SimpleNamespace(r_hat=torch.ones(1, 2))
    chains = SimpleNamespace(shared=shared, evidence=evidence(-0.9))
    (told, advice) = judge_globals(["w", "u"], {"global_nuts": chains}, {})
    assert told.words == (
        "the guide of 'w' and 'u': their correlation is 0.00, and the posterior's is -0.90, by NUTS"
    )
    assert "richer q(w)" in advice.words
