"""Masks: right where model and guide agree on them, and told in one line where they do not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from masks_helpers import Imputed, Latent, imputed_rows, ragged, same
from pyro import poutine
from torch import nn

import pyro_vae as pv


class Without(Imputed):
    def impute(self, z, seen):
        pass


TOOLS = {
    "fit": lambda pair, *rows: pv.fit(
        pair, *rows, epochs=1, batch_size=10, progress=False, engine="eager"
    ),
    "evaluate": lambda pair, *rows: pv.evaluate(pair, *rows, num_samples=10),
    "log_likelihood": lambda pair, *rows: pv.log_likelihood(pair, *rows, num_samples=10),
    "kl_parts": pv.kl_parts,
    "refine": lambda pair, *rows: pv.refine(pair, *rows, steps=2, progress=False),
    "gaps": lambda pair, *rows: pv.gaps(pair, *rows, progress=False),
    "anneal": lambda pair, *rows: pv.anneal(pair, *rows, num_temperatures=3, progress=False),
    "nuts": lambda pair, *rows: pv.nuts(pair, *rows, num_draws=4, warmup=4, progress=False),
    "to_arviz": lambda pair, *rows: pv.to_arviz(pair, *rows, num_samples=3, progress=False),
    "predictive_check": lambda pair, *rows: pv.predictive_check(pair, *rows, progress=False),
    "outlier_scores": lambda pair, *rows: pv.outlier_scores(pair, *rows, progress=False),
    "diagnose": lambda pair, *rows: pv.diagnose(pair, *rows, budget=0.1, progress=False),
    "calibration": lambda pair, *rows: pv.calibration(pair, *rows[1:], progress=False),
    "sandwich": lambda pair, *rows: pv.sandwich(pair, *rows[1:], num_examples=40, progress=False),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unmasked_guide_of_obs_mask_is_refused_in_words(tool):
    x, seen = imputed_rows()
    words = "site 'x_unobserved' differ.*obs_mask at site 'x'.*poutine.mask\\(mask=~obs_mask\\)"
    with pytest.raises(pv.UsageError, match=words) as caught:
        TOOLS[tool](Imputed(masked=False), x, seen)
    assert "\n" not in str(caught.value)
    with pytest.raises(pv.UsageError, match="obs_mask at site 'x' makes a latent site"):
        TOOLS[tool](Without(), x, seen)


def test_check_reports_the_same():
    batch = imputed_rows()
    assert not pv.check(Imputed(), batch).errors
    assert "obs_mask at site 'x' masks the site" in pv.check(Imputed(masked=False), batch).errors[0]
    assert "makes a latent site 'x_unobserved'" in pv.check(Without(), batch).errors[0]


def test_obs_mask_with_its_guide_gives_log_p_of_what_is_seen():
    pair, (x, seen) = Imputed(), imputed_rows()
    wanted = pair.log_p(x, seen)
    found = pv.log_likelihood(pair, x, seen, num_samples=4000)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-6).all())
    annealed = pv.anneal(pair, x, seen, num_temperatures=20, num_chains=30, progress=False)
    assert annealed.value == pytest.approx(wanted.mean().item(), abs=0.05)
    x, seen = imputed_rows(1000)
    kl = pv.evaluate(pair, x, seen, num_samples=1).kl_by_site["x_unobserved"]
    own = torch.distributions.kl_divergence(dist.Normal(0.3, 1.1), dist.Normal(0.0, 1.0)).item()
    assert kl == pytest.approx(own * (~seen).double().mean().item(), abs=0.015)


def whole(live):
    return live[:, 0]


DISAGREE = {
    "model alone, by element": (same, None, True),
    "guide alone, by element": (None, same, True),
    "model alone, by row": (whole, None, False),
    "guide alone, by row": (None, whole, False),
    "all and by row": (lambda live: False, whole, False),
    "False and nothing": (lambda live: False, None, False),
    "by row and by element": (lambda live: live[:, :1].expand(-1, 2), same, True),
}


@pytest.mark.parametrize("kind", DISAGREE)
def test_masks_of_a_latent_that_differ_are_refused(kind):
    ours, theirs, events = DISAGREE[kind]
    pair, rows = Latent(ours, theirs, events=events), ragged()
    words = "the masks of latent site 'z' differ.*put the site under the same pyro.poutine.mask"
    with pytest.raises(pv.UsageError, match=words):
        pv.log_likelihood(pair, *rows, num_samples=5)
    with pytest.raises(pv.UsageError, match=words):
        pv.fit(pair, *rows, epochs=1, batch_size=10, progress=False, engine="eager")
    assert "differ: " in pv.check(pair, rows).errors[0]


@pytest.mark.parametrize("ours", [lambda live: True, lambda live: torch.ones(()) > 0])
def test_a_mask_that_hides_nothing_agrees_with_none(ours):
    rows = ragged()
    assert not pv.check(Latent(ours, None), rows).errors
    found = pv.log_likelihood(Latent(ours, None), *rows, num_samples=2000)
    wanted = Latent().log_p(*rows)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-9).all())


def test_what_counts_must_not_depend_on_what_a_mask_hides():
    """z has no prior where it is hidden; today the weights have the mean E_q[p(x | z)]."""
    pair, rows = Latent(same, same, x_masked=False, events=True), ragged()
    words = "site 'x' of the model depends on entries of latent site 'z' that a mask hides"
    with pytest.raises(pv.UsageError, match=words):
        pv.log_likelihood(pair, *rows, num_samples=5)
    assert "that a mask hides" in pv.check(pair, rows).errors[0]


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_padded_latents_count_for_nothing(engine):
    pair, (x, live) = Latent(same, same, events=True), ragged()
    assert not pv.check(pair, (x, live)).errors
    found = pv.log_likelihood(pair, x, live, num_samples=2000, engine=engine)
    wanted = pair.log_p(x, live)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-9).all())
    assert found.per_datum[-1] == 0  # nothing of the last row is seen
    result = pv.evaluate(pair, x, live, num_samples=1)
    q = dist.Normal(0.5 * x + 0.2, 0.8)
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros_like(x), 1.0))
    torch.testing.assert_close(result.kl_by_unit["z"], (kl * live).mean(0).tolist())


@pytest.mark.parametrize("mask", [False, True])
def test_boolean_masks_within_a_distribution(mask):
    """Pyro gives the number 0.0, no tensor, for the KL of what is masked whole."""
    pair, (x, live) = Latent(lambda live: mask, lambda live: mask, events=True), ragged()
    live = live & mask
    found = pv.evaluate(pair, x, live, num_samples=500)
    assert found.log_likelihood == pytest.approx(pair.log_p(x, live).mean().item(), abs=0.05)
    assert sum(found.kl_by_unit["z"]) == pytest.approx(found.kl_by_site["z"], abs=0.1)
    assert mask or found.kl_by_unit["z"] == [0, 0]


@pytest.mark.parametrize(
    "objective",
    [
        pyro.infer.TraceMeanField_ELBO(),
        pv.ImportanceWeightedELBO(1),
        pv.ImportanceWeightedELBO(1, gradient=pv.Gradient.DOUBLY_REPARAMETRIZED),
        pv.StickingTheLandingELBO(),
        pv.FreeBitsELBO(0.0),
    ],
)
def test_gradients_of_objectives_leave_padding_out(objective):
    """What is in the padding of x has no part in a loss."""
    pair, (x, live) = Latent(same, same, events=True), ragged()
    torch.manual_seed(0)
    loss = objective.differentiable_loss(pair.model, pair.guide, x, live)
    padded = torch.where(live, x, 1e3)
    torch.manual_seed(0)
    again = objective.differentiable_loss(pair.model, pair.guide, padded, live)
    torch.testing.assert_close(loss, again)


def test_weights_are_each_datums_own():
    """The bound of many samples is log p of each row's own entries, summed."""
    pair, (x, live) = Latent(same, same, events=True), ragged()
    torch.manual_seed(0)
    loss = pv.ImportanceWeightedELBO(5000).differentiable_loss(pair.model, pair.guide, x, live)
    assert -loss.item() == pytest.approx(pair.log_p(x, live).sum().item(), abs=0.5)


def test_free_bits_floor_counts_what_is_live():
    pair, (x, live) = Latent(same, same, events=True), ragged()
    floors = {}
    for floor in (100.0, 200.0):
        torch.manual_seed(0)
        objective = pv.FreeBitsELBO(floor)
        floors[floor] = objective.differentiable_loss(pair.model, pair.guide, x, live).item()
    assert floors[200.0] - floors[100.0] == pytest.approx(100 * live.sum().item())


class Scaled(Latent):
    """A weight on the KL that only the model, or the guide too, has."""

    def __init__(self, ours, theirs):
        super().__init__()
        self.scales = ours, theirs

    def latent(self, which, fn, live):
        with poutine.scale(scale=self.scales[which]):
            return super().latent(which, fn, live)


def test_scales_of_a_latent_must_agree():
    rows = ragged()
    assert not pv.check(Scaled(0.5, 0.5), rows).errors
    words = "latent site 'z' is scaled by 0.5 in the model and by 1 in the guide"
    assert words in pv.check(Scaled(0.5, 1.0), rows).errors[0]
    with pytest.raises(pv.UsageError, match=words):
        pv.fit(Scaled(0.5, 1.0), *rows, epochs=1, batch_size=10, progress=False, engine="eager")
    # Densities leave scales out, and so are right all the same.
    found = pv.log_likelihood(Scaled(0.5, 1.0), *rows, num_samples=2000)
    assert found.value == pytest.approx(Latent().log_p(*rows).mean().item(), abs=0.02)


class Visits(nn.Module):
    """u ~ N(0, 1) of a patient, z | u ~ N(u, 1) and x | z ~ N(z, 1) of each visit, some of which
    are masked in a plate within the datum; its guide is the exact posterior."""

    def __init__(self, inside=True):
        super().__init__()
        self.inside, self.shift = inside, nn.Parameter(torch.zeros(()).double())

    def visits(self, live):
        plate = pyro.plate("visits", live.shape[1], dim=-2)
        return plate, poutine.mask(mask=live.T)

    def model(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            plate, mask = self.visits(live)
            with plate, mask:
                z = pyro.sample("z", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x.T)

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            n = live.sum(1)
            u = pyro.sample("u", dist.Normal((x * live).sum(1) / (n + 2), (2 / (n + 2.0)).sqrt()))
            plate, mask = self.visits(live)
            with plate, mask if self.inside else poutine.mask(mask=True):
                pyro.sample("z", dist.Normal((x.T + u) / 2, 0.5**0.5))


def test_masks_of_a_plate_within_a_datum():
    x, live = ragged()
    found = pv.log_likelihood(Visits(), x, live, num_samples=50)
    for value, row, m in zip(found.per_datum, x, live, strict=True):
        k = int(m.sum())
        cov = torch.ones(k, k).double() + 2 * torch.eye(k).double()
        exact = dist.MultivariateNormal(torch.zeros(k).double(), cov).log_prob(row[m]) if k else 0.0
        assert value.item() == pytest.approx(float(exact), abs=1e-6)
    check = pv.predictive_check(Visits(), x, live, num_replicates=50, progress=False)
    part = torch.where(live, x, torch.nan)
    torch.testing.assert_close(check.observed[:, 0], part.nanmean(1), equal_nan=True)
    with pytest.raises(pv.UsageError, match="masks of latent site 'z' differ"):
        pv.log_likelihood(Visits(inside=False), x, live, num_samples=50)


class Classes(nn.Module):
    """A class k, summed out, gives x ~ N(2 k, 1); rows that are masked say nothing of it."""

    def __init__(self, by_guide):
        super().__init__()
        self.by_guide, self.logits = by_guide, nn.Parameter(torch.tensor([0.3, -0.2]).double())

    def sampled(self, seen, logits):
        with poutine.mask(mask=seen):
            fn = dist.Categorical(logits=logits)
            return pyro.sample("k", fn, infer={"enumerate": "parallel"})

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            k = self.sampled(seen, self.logits)
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            if self.by_guide:
                self.sampled(seen, torch.stack([x * 0, x], -1))


@pytest.mark.parametrize("by_guide", [True, False])
def test_masks_with_enumeration(by_guide):
    x, seen = imputed_rows()
    pair = Classes(by_guide)
    found = pv.log_likelihood(pair, x, seen, num_samples=1).per_datum
    each = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    exact = (each + pair.logits.detach().log_softmax(0)).logsumexp(1)
    torch.testing.assert_close(found, torch.where(seen, exact, 0.0))
