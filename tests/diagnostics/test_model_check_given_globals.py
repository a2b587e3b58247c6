"""`model_check` of pairs with global latents: what the guide of local latents misses, no more."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import verdict
from pyro_vae.diagnostics.signs import model_signs


class Signs(nn.Module):
    """w ~ N(0, 1), z ~ N(-a, 1) or N(a, 1), x_1 ~ N(|z|, 0.3), x_2 ~ N(w, 1).

    The posterior of z has two equal modes. The exact guide draws both of them, the other only the
    positive one.
    """

    a, noise = 4.0, 0.3

    def __init__(self, both):
        super().__init__()
        self.both = both

    def prior(self):
        mixing = dist.Categorical(torch.tensor([0.5, 0.5]))
        return dist.MixtureSameFamily(mixing, dist.Normal(torch.tensor([-self.a, self.a]), 1.0))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            loc = torch.stack(torch.broadcast_tensors(z.abs(), w), -1)
            scale = torch.tensor([self.noise, 1.0])
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 0.1))
        precision = 1 + self.noise**-2
        loc = (self.a + x[:, 0] / self.noise**2) / precision
        mixing = dist.Categorical(torch.tensor([0.5, 0.5] if self.both else [1e-12, 1.0]))
        modes = dist.Normal(torch.stack([-loc, loc], -1), precision**-0.5)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MixtureSameFamily(mixing, modes))

    def template(self, n):
        return (torch.zeros(n, 2),)


@pytest.fixture
def x():
    z = 4 + torch.randn(400)
    return torch.stack([z + 0.3 * torch.randn(400), 0.1 + torch.randn(400)], -1)


def checked(both, x):
    return pv.model_check(Signs(both), x, num_samples=50, progress=False)


def test_an_exact_guide_misses_nothing(x):
    found = checked(True, x)
    assert found.given == ("w",)
    assert abs(found.missed.value) < 0.02
    assert found.missed.num_examples > 350


def test_a_missed_mode_is_measured(x):
    found = checked(False, x)
    assert found.missed.value == pytest.approx(math.log(2), abs=4 * found.missed.standard_error)
    assert found.missed.standard_error < 0.1
    (blame,) = verdict.blamed({"model_check": found})
    assert blame.part == "family"


def test_the_model_is_not_judged_at_one_draw(x):
    """Own data are drawn at w of about 0. Data at w = 3 differ, and the model is right."""
    x[:, 1] += 3
    found = checked(True, x)
    assert math.isnan(found.marginal_p)
    assert not model_signs({"model_check": found})
    said = verdict.findings({"model_check": found}, torch.arange(400))[1]
    assert [finding.kind for finding in said if finding.about == "model"] == ["unchecked"]
    assert "given one draw of       w" in str(found)
    assert found.as_dict()["given"] == ["w"]


def test_log_p_is_reliable_only_if_nothing_is_missed(x):
    for both, kind in ((True, "trust"), (False, "doubt")):
        weighed = pv.log_likelihood(Signs(both), x, num_samples=100, engine="eager")
        results = {"model_check": checked(both, x), "log_likelihood": weighed}
        said = verdict.findings(results, torch.arange(400))[1]
        assert {finding.kind for finding in said if finding.about == "log p(x)"} == {kind}


def test_no_advice_to_refit_a_guide_with_global_latents(x):
    """`refit_guide` refuses such a pair."""
    with pytest.raises(pv.UsageError, match="refit_guide serves only continuous local latents"):
        pv.refit_guide(Signs(True), x, posterior=pv.DiagonalNormal, epochs=1, progress=False)
    results = {"model_check": checked(False, x)}
    (blame,), said = verdict.findings(results, torch.arange(400), shared=["w"])
    assert "refit_guide" not in blame.next
    assert blame.next in said[0].words
    assert "refit_guide" in verdict.findings(results, torch.arange(400))[0][0].next


def test_a_missing_template_is_one_of_the_given_pair(x):
    class Plain(Signs):
        template = property()

    with pytest.raises(pv.UsageError, match="Plain has no method template"):
        pv.model_check(Plain(True), x, progress=False)
