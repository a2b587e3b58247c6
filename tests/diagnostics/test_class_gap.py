"""q(y | x) of an enumerated class: importance weights sum over y, so they do not depend on it."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian
from torch import nn
from verdict_helpers import checked, gaps, weights

import pyro_vae as pv
from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.class_gap import ClassGap, class_sites

CENTERS = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]]).double()


class Classes(nn.Module):
    """y uniform, z ~ N(0, 1), x ~ N(z + center of y, 1); q(z | x, y) is exact, times ``spread``.

    q(y | x) is the posterior to the power ``sharp``.
    """

    def __init__(self, sharp=1.0, spread=1.0, possible=3):
        super().__init__()
        self.sharp, self.spread = sharp, spread
        self.never = torch.where(torch.arange(3) < possible, 0.0, -torch.inf).double()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.never))
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + CENTERS[y], 1.0).to_event(1), obs=x)

    def posterior(self, x):
        covariance = torch.eye(2).double() + 1
        return dist.MultivariateNormal(CENTERS, covariance).log_prob(x[:, None]).log_softmax(-1)

    def guide(self, x):
        q = dist.Categorical(logits=self.sharp * self.posterior(x) + self.never)
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            loc = (x - CENTERS[y]).sum(-1, keepdim=True) / 3
            pyro.sample("z", dist.Normal(loc, self.spread / 3**0.5).to_event(1))


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return CENTERS[torch.randint(3, (60,))] + torch.randn(60, 1) + torch.randn(60, 2)


@pytest.mark.parametrize("sharp", [1.0, 0.3, 3.0])
def test_the_gap_is_the_kl_of_the_guide_and_the_posterior(x, sharp):
    pair = Classes(sharp)
    found = pv.class_gap(pair, x, num_samples=3)
    p, q = pair.posterior(x), (sharp * pair.posterior(x)).log_softmax(-1)
    assert torch.allclose(found.per_datum, (q.exp() * (q - p)).sum(-1), atol=1e-9)
    assert found.sites == ("y",)


def test_a_value_that_is_impossible_in_model_and_guide_counts_as_nothing(x):
    """As the classes other than the known label."""
    pair = Classes(2.0, possible=2)
    p, q = (power * pair.posterior(x)[:, :2] for power in (1.0, 2.0))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    found = pv.class_gap(pair, x, num_samples=3)
    assert torch.allclose(found.per_datum, (q.exp() * (q - p)).sum(-1), atol=1e-9)


def test_it_is_how_far_the_elbo_is_below_that_of_the_weights(x):
    pair = Classes(3.0)
    found = pv.evaluate(pair, x, num_samples=2)
    of_weights = pv.log_likelihood(pair, x, num_samples=2).elbo
    assert pv.class_gap(pair, x, num_samples=2).value == pytest.approx(
        of_weights - found.elbo, abs=1e-6
    )


def test_few_draws_of_another_latent_do_not_look_like_a_gap(x):
    """The ratio of this wide q(z | x, y) has the same mean for every y, and a large variance."""
    found = pv.class_gap(Classes(spread=1.8), x.repeat(50, 1))
    assert abs(found.value) < 3 * found.standard_error < 0.005  # 0.03 without the jackknife


def test_only_enumerated_latents_of_the_guide_count(x):
    assert class_sites(Classes(), (x,)) == ["y"]
    assert class_sites(linear_gaussian(), (torch.zeros(3, 6).double(),)) == []


def found(value, n=100):
    return ClassGap(torch.full((n,), value).double(), ("y",), 20)


def test_wrong_probabilities_are_charged_to_the_encoder_with_their_size():
    results = {"class_gap": found(1.5), "log_likelihood": weights(gap=0.1), "gaps": gaps()}
    (blame,) = verdict.blamed(results)
    assert (blame.part, blame.nats) == ("encoder", pytest.approx(1.5))
    assert "other probabilities of 'y' would raise the ELBO by 1.50" in blame.words
    (alone,) = verdict.blamed({"class_gap": found(1.5)})
    assert (alone.part, alone.nats) == ("encoder", pytest.approx(1.5))
    both = verdict.blamed(results | {"gaps": gaps(family=0.5)})
    assert [one.part for one in both] == ["encoder", "family"]


def test_a_small_gap_is_not_a_sign():
    assert not signs.guide_signs({"class_gap": found(0.019)})
    assert signs.guide_signs({"class_gap": found(0.021)})


def test_the_elbo_of_the_finding_contains_the_gap():
    results = {"class_gap": found(1.5), "log_likelihood": weights(gap=0.1)}
    _, told = verdict.findings(results, torch.arange(200))
    (of_elbo,) = (one for one in told if one.about == "ELBO")
    assert of_elbo.kind == "doubt"
    assert "1.60 nats per example below log p(x)" in of_elbo.words


def test_what_it_does_not_serve_is_refused():
    with pytest.raises(pv.UsageError, match="needs a guide that enumerates a latent"):
        pv.class_gap(linear_gaussian(), torch.zeros(5, len(linear_gaussian().weight)).double())
    with pytest.raises(pv.UsageError, match="num_samples must be at least 2, got 1"):
        pv.class_gap(Classes(), torch.zeros(5, 2).double(), num_samples=1)


class Shared(nn.Module):
    """A class that all data share: an enumerated latent that is global."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.2]).double())

    def model(self, x):
        y = pyro.sample("y", dist.Categorical(torch.ones(2).double()))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("y", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})


def test_a_class_that_all_data_share_is_refused_and_not_diagnosed():
    with pytest.raises(pv.UsageError, match="latents are all local, and 'y' is global"):
        pv.class_gap(Shared(), torch.zeros(5).double())
    found = pv.diagnose(Shared(), torch.zeros(20).double(), budget=1e-3, progress=False)
    assert "class_gap" not in {**found.results, **found.failed, **found.not_applicable}


def test_one_row_has_no_error_and_is_no_sign(x):
    alone = pv.class_gap(Classes(3.0), x[:1])
    assert alone.standard_error != alone.standard_error
    assert json.loads(json.dumps(alone.as_dict(), allow_nan=False))["standard_error"] is None
    assert not signs.guide_signs({"class_gap": alone})


def test_rows_beyond_one_pass_have_the_gaps_of_their_own(x):
    pair = Classes(3.0)
    few = pv.class_gap(pair, x, num_samples=2).per_datum
    many = pv.class_gap(pair, x.repeat(20, 1), num_samples=2).per_datum
    assert torch.allclose(many, few.repeat(20), atol=1e-9)


def on_guide(results):
    return [one for one in verdict.findings(results, torch.arange(200))[1] if one.about == "guide"]


def test_class_gap_alone_is_no_trust_in_the_guide_of_other_latents():
    none = ClassGap(torch.zeros(100).double(), ("y",), 20)
    results = {"class_gap": none, "model_check": checked()}
    assert not on_guide(results)
    (told,) = on_guide(results | {"gaps": gaps()})
    assert (told.kind, told.words[-15:]) == ("trust", "gaps, class_gap")


def test_the_sign_in_full():
    spread = torch.tensor([1.0, 2.0] * 50).double()
    (sign,) = signs.guide_signs({"class_gap": ClassGap(spread, ("y", "label"), 20)})
    words = "other probabilities of 'y', 'label' would raise the ELBO by 1.50 ± 0.05 nats"
    assert sign == ("place", "class_gap", words, 1.5)


@pytest.mark.parametrize(("value", "said"), [(0.16, False), (0.18, True)])
def test_a_gap_within_three_errors_is_not_a_sign(value, said):
    """The error is 0.05, and the limit 0.02 + 3 * 0.05 = 0.17."""
    apart = torch.tensor([-1.0, 1.0] * 50).double()
    apart = 0.05 * 10 * apart / apart.std()
    assert bool(signs.guide_signs({"class_gap": ClassGap(value + apart, ("y",), 20)})) is said


@pytest.mark.parametrize("encoder", [0.0, 0.2])
def test_the_gap_of_the_class_adds_to_that_of_the_encoder(encoder):
    results = {"class_gap": found(0.3), "gaps": gaps(encoder=encoder, family=0.4)}
    results["log_likelihood"] = weights(gap=encoder + 0.4, n=400)  # more rows than the gaps have
    sizes = {one.part: one.nats for one in verdict.blamed(results)}
    assert sizes == {"encoder": pytest.approx(encoder + 0.3), "family": pytest.approx(0.4)}
