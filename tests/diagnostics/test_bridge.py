"""True latents of the model's own data show how much log p(x) is too low."""

from dataclasses import replace
from math import isnan, log, nan

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from verdict_helpers import N, annealed, checked, moments, normals, ranks, weights

import pyro_vae as pv
from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.model_sides import _bridge, _scores, through_inference
from pyro_vae.diagnostics.signs import Sign
from pyro_vae.inference.weighted import Weighted
from pyro_vae.pairs.rng import seeded

ROWS = torch.arange(N)


class Classes(nn.Module):
    """x ~ N(0, 1) beside a class of three with probabilities ``p``; the guide has other ones.

    x does not depend on the class, so the posterior is ``p``, and log p(x) is that of a normal.
    """

    def __init__(self, p, q):
        super().__init__()
        self.p, self.q = torch.tensor(p), torch.tensor(q)

    def template(self, n):
        return (torch.zeros(n),)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(self.p))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(self.q.expand(len(x), 3)))


class Enumerated(Classes):
    """The same, with a class that the guide enumerates."""

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(self.q.expand(len(x), 3)), infer=ENUMERATE)


ENUMERATE = {"enumerate": "parallel"}
P = [0.5, 0.3, 0.2]


def missed(pair, rows=400, samples=60):
    x = torch.linspace(-2, 2, rows)
    return pv.model_check(pair, x, num_samples=samples, progress=False).missed


@pytest.mark.parametrize("kind", [Classes, Enumerated])
def test_a_class_that_the_guide_never_draws_is_measured(kind):
    never = 1e-30
    found = missed(kind(P, [0.625, 0.375, never]))
    assert found.standard_error < 0.03
    assert found.value == pytest.approx(-log(0.8), abs=4 * found.standard_error)
    assert found.bias == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", [Classes, Enumerated])
def test_an_exact_guide_misses_nothing(kind):
    assert missed(kind(P, P))[:3] == pytest.approx((0, 0, 0), abs=1e-6)


def test_other_probabilities_of_the_same_classes_miss_nothing():
    found = missed(Classes(P, [0.2, 0.4, 0.4]))
    assert abs(found.value) < 4 * found.standard_error < 0.2
    assert found.bias > 0


class Narrow(nn.Module):
    """z ~ N(0, 1) whatever x is, and a guide that has no density below -1."""

    def template(self, n):
        return (torch.zeros(n),)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Uniform(-1.0, 4 * torch.ones(len(x))))


def test_true_latents_outside_of_the_support_of_the_guide_are_missed():
    found = missed(Narrow())
    share = dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0))
    assert found.value == pytest.approx(-share.log().item(), abs=4 * found.standard_error)


def test_the_numbers_of_a_row_are_those_of_a_bridge():
    """Weights 1, 1 and 4 have mean 2; the weight at the truth is 6."""
    part = Weighted((torch.zeros(1),), {}, torch.tensor([[1.0], [1.0], [4.0]]).double().log())
    (row,) = _bridge(part, torch.tensor([6.0]).double().log()).tolist()
    assert row == pytest.approx([(1 / 3 + 1 / 3 + 2 / 3) / 3, 1 / 4, (0.5 - 1 / 3) / 2])


@pytest.mark.parametrize(
    ("reliable", "rows", "known"),
    [(50, 50, True), (49, 49, False), (50, 100, True), (50, 101, False), (99, 200, False)],
)
def test_few_rows_or_few_reliable_ones_show_nothing(reliable, rows, known):
    found = replace(
        checked(missed=0.5, bridged=reliable), own_unreliable=torch.zeros(rows).bool()
    ).missed
    assert (found.value == pytest.approx(0.5)) == known
    assert isnan(found.value) != known


def test_the_error_is_that_of_the_difference_of_the_two_numbers():
    """Both numbers vary together, so their ratio has no error."""
    numbers = 0.5 + 0.1 * normals(200)
    rows = torch.stack([numbers, 0.8 * numbers, 0 * numbers + 0.01], 1)
    found = replace(checked(), bridge=rows).missed
    assert found == pytest.approx((-log(0.8), 0, 0.01, 200), abs=1e-12)


def test_true_latents_that_are_all_missed_show_as_much_as_so_many_rows_can():
    rows = torch.tensor([[0.5, 0.0, 0.0]]).double().repeat(200, 1)
    assert replace(checked(), bridge=rows).missed == pytest.approx((log(200), 0, 0, 200))


class OnlyOfTheModel(nn.Module):
    """z ~ N(0, 1), and a class that only the model has, which is summed out."""

    def template(self, n):
        return (torch.zeros(n),)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            y = pyro.sample("y", dist.Bernoulli(torch.full((len(x),), 0.5)), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_latents_that_only_the_model_has_are_summed_out():
    assert missed(OnlyOfTheModel(), 100, 30)[:3] == pytest.approx((0, 0, 0), abs=1e-6)


def test_without_true_latents_nothing_is_known():
    x = (torch.zeros(60),)
    rows = through_inference(Classes(P, P), x, {}, 30).bridge
    assert rows.isnan().any(1).all()
    truth = {"y": torch.zeros(60).long()}
    assert not through_inference(Classes(P, P), x, truth, 30).bridge.isnan().any()
    assert isnan(replace(checked(), bridge=rows.repeat(3, 1)).missed.value)


def test_equal_values_are_half_below():
    """Draws 0, 0 and 1 with shares 1/4, 1/4 and 1/2: 8/3 draws without weights."""
    draws, shares = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([[0.25], [0.25], [0.5]]).double()
    for truth, below in ((0.0, 0.25), (1.0, 0.75), (0.5, 0.5), (2.0, 1.0)):
        score = _scores(draws, torch.tensor([[truth]]), shares).item()
        size = 8 / 3
        rank = (below * size + 0.5) / (size + 1)
        assert score == pytest.approx(torch.special.ndtri(torch.tensor(rank).double()).item())


class OneHot(Classes):
    """The same, with a class as a vector of zeros and a one: real numbers with ties."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.OneHotCategorical(self.p))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.OneHotCategorical(self.q.expand(len(x), 3)))


def test_an_exact_guide_of_ties_is_not_blamed():
    pair = OneHot([0.9, 0.05, 0.05], [0.9, 0.05, 0.05])
    found = pv.model_check(pair, torch.linspace(-2, 2, 400), num_samples=60, progress=False)
    assert found.weighted_scores.shape == (400, 3)
    assert signs.missing_mass({"model_check": found}) is None


# The rules


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"missed": 0.019}, False),
        ({"missed": 0.021}, True),
        ({"missed": 0.29, "missed_error": 0.1}, False),
        ({"missed": 0.31, "missed_error": 0.1}, True),
        ({"missed": 0.079, "bias": 0.02}, False),
        ({"missed": 0.081, "bias": 0.02}, True),
        ({"missed": 0.35, "missed_error": 0.1, "bias": 0.02}, False),
        ({"missed": 0.37, "missed_error": 0.1, "bias": 0.02}, True),
        ({"missed": -0.5}, False),
        ({"missed": nan}, False),
    ],
)
def test_the_limit_of_log_p_that_is_too_low(options, told):
    results = {"model_check": checked(**options)}
    assert (signs.too_low_for_truth(results) is not None) == told
    assert (signs.missing_mass(results) is not None) == told


def test_nothing_is_too_low_without_a_check_of_the_model():
    assert signs.too_low_for_truth({}) is None
    assert signs.missing_mass({}) is None


TOO_LOW = (
    "by the true latents of the model's own data, log p(x) is 0.10 ± 0.01 nats too low (200 data)"
)


def test_true_latents_take_the_trust_and_blame_the_family():
    results = {"model_check": checked(missed=0.1, missed_error=0.01), "log_likelihood": weights()}
    (blame,), said = verdict.findings(results, ROWS)
    assert (blame.part, blame.nats) == ("family", pytest.approx(0.1))
    assert blame.evidence[0].words == f"the guide misses a part of the posterior: {TOO_LOW}"
    assert {f.about: f.kind for f in said} == {
        "family": "fault",
        "model": "trust",
        "log p(x)": "doubt",
        "ELBO": "doubt",
    }


def test_a_fault_that_the_weights_show_is_blamed_first_but_log_p_is_not_trusted():
    results = {
        "model_check": checked(missed=0.1, missed_error=0.01),
        "log_likelihood": weights(),
        "local_calibration": moments(shift=0.5),
        "calibration": ranks(mean=0.5),
        "annealing": annealed(),
    }
    (blame,), said = verdict.findings(results, ROWS)
    assert blame.part == "encoder"
    (words,) = (f.words for f in said if f.about == "log p(x)" and f.kind == "doubt")
    assert words.endswith(f": {TOO_LOW}")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"missed": 0.29}, "encoder"),
        ({"missed": 0.31}, "family"),
        ({"missed": 0.42, "missed_error": 0.05}, "encoder"),
        ({"missed": 0.47, "missed_error": 0.05}, "family"),
    ],
)
def test_much_missing_mass_is_the_fault_whatever_the_weights_show(options, part):
    results = {"model_check": checked(**options), "local_calibration": moments(shift=0.5)}
    assert [blame.part for blame in verdict.blamed(results)] == [part]


def test_the_words_of_true_values_that_are_far_from_weighted_draws():
    found = {"model_check": checked(scores=2 * normals(200)[:, None])}
    words = "true values of 'z[0]' are far from the guide's draws, also after weighting: the guide "
    words += "misses a part of the posterior"
    assert signs.missing_mass(found) == Sign("mass", "model_check", words)


@pytest.mark.parametrize(("bad", "parts"), [(0, ["family"]), (133, ["family"]), (134, [])])
def test_ranks_of_few_reliable_rows_show_no_missed_part(bad, parts):
    found = replace(checked(scores=2 * normals(200)[:, None]), own_unreliable=bad > ROWS)
    assert [blame.part for blame in verdict.blamed({"model_check": found})] == parts


class Third(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), with the exact mean and a third of the posterior's scale."""

    def template(self, n):
        return (torch.zeros(n),)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 / 3))


def test_a_guide_that_is_far_too_narrow_misses_no_part_of_the_posterior():
    """Another scale would cure it, so it is the encoder's; its weights are not reliable."""
    with seeded(0):
        x = 2**0.5 * torch.randn(600)
    found = pv.model_check(Third(), x, num_samples=100, progress=False)
    assert len(found.weighted_scores) > signs.LEAST_SCORES
    assert found.weighted_scores.std() > 1.6
    assert signs.missing_mass({"model_check": found}) is None


PREDICTIVE = Sign("decoder", "predictive", "replicates differ")


@pytest.mark.parametrize(("missed", "parts"), [(0.5, ["family"]), (0.0, ["decoder"])])
def test_replicates_do_not_count_if_their_latents_miss_a_part_of_the_posterior(missed, parts):
    results = {"model_check": checked(missed=missed)}
    assert [blame.part for blame in verdict.blamed(results, [PREDICTIVE])] == parts


def test_other_signs_of_the_model_count_although_a_part_of_the_posterior_is_missed():
    results = {"model_check": checked(missed=0.5, dependence=0.3)}
    more = [PREDICTIVE._replace(tool="latents")]
    assert [blame.part for blame in verdict.blamed(results, more)] == ["family", "decoder"]
    assert len(verdict.blamed(results, more)[1].evidence) == 2


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"bridged": 100}, "9"),
        ({"bridged": 180}, "5"),
        ({"bridged": 300}, "3"),
        ({"bridged": 1000}, "2"),
        ({"bridged": 1000, "bias": 0.02}, "8"),
    ],
)
def test_which_part_would_not_show(options, share):
    results = {"model_check": checked(**options), "log_likelihood": weights()}
    _, said = verdict.findings(results, ROWS)
    (words,) = (f.words for f in said if f.about == "log p(x)" and f.kind == "trust")
    assert words.endswith(f"; a missed part of the posterior would show from {share} % on")


def test_calibration_alone_gives_no_share():
    results = {"calibration": ranks(), "log_likelihood": weights()}
    _, said = verdict.findings(results, ROWS)
    (words,) = (f.words for f in said if f.about == "log p(x)" and f.kind == "trust")
    assert words.endswith("by importance weights")
