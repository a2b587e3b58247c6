"""Schedules, and objectives in `fit`."""

from math import sqrt

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_helpers import linear
from pairs import PlainAttributes, rows
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (pv.LinearSchedule(4), {0: 0, 1: 0.25, 2.5: 0.625, 4: 1, 9: 1}),
        (pv.LinearSchedule(8, start=0.2), {0: 0.2, 2: 0.4, 8: 1, 100: 1}),
        (pv.LinearSchedule(10, start=1.0, end=0.5), {0: 1, 4: 0.8, 10: 0.5, 11: 0.5}),
        (
            pv.CyclicalSchedule(4, rise=0.25),
            {0: 0, 0.5: 0.5, 1: 1, 3.5: 1, 4: 0, 4.5: 0.5, 8.25: 0.25},
        ),
        (
            pv.CyclicalSchedule(10, start=0.1, end=0.5),
            {0: 0.1, 2.5: 0.3, 5: 0.5, 9: 0.5, 12.5: 0.3},
        ),
        (pv.CyclicalSchedule(2, rise=1.0), {0: 0, 1: 0.5, 1.5: 0.75, 2: 0, 3: 0.5}),
        (pv.CosineSchedule(6), {0: 1, 2: 0.75, 3: 0.5, 4: 0.25, 6: 0, 7: 0}),
        (pv.CosineSchedule(6, start=0.1, end=0.9), {0: 0.1, 2: 0.3, 3: 0.5, 6: 0.9, 60: 0.9}),
    ],
)
def test_schedules(schedule, points):
    assert [schedule(epoch) for epoch in points] == pytest.approx(list(points.values()))


def binary_pair(n=32):
    """A small VAE and rows of two kinds."""
    with seeded(6):
        pair = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,))
        kind = torch.rand(n, 1).round()
        return pair, torch.where(torch.rand(n, 6) < 0.1, 1 - kind, kind.expand(n, 6))


def test_fit_reports_the_elbo_beside_a_weighted_objective():
    pair, x = binary_pair()
    beta = pv.LinearSchedule(epochs=4)
    history = pv.fit(
        pair,
        x,
        epochs=8,
        batch_size=32,
        learning_rate=0.02,
        beta=beta,
        progress=False,
        engine="eager",
    )
    for number, epoch in enumerate(history.epochs):
        kl = epoch.kl["z"]
        assert epoch.beta == pytest.approx(beta(number))
        assert epoch.elbo == pytest.approx(epoch.reconstruction - kl, abs=1e-6)
        expected = epoch.reconstruction - beta(number) * kl
        assert epoch.objective == pytest.approx(expected, abs=1e-5)
        if number < 4:
            assert abs(epoch.objective - epoch.elbo) > 1e-3
        else:
            assert epoch.objective == pytest.approx(epoch.elbo, abs=1e-5)


def test_fit_moves_the_weight_within_an_epoch():
    pair, x = binary_pair()
    # The weight is 0 first, until the KL is so large that every estimate of it is positive.
    pv.fit(pair, x, epochs=30, batch_size=32, learning_rate=0.03, beta=0.0, progress=False)
    beta = pv.LinearSchedule(epochs=4)
    history = pv.fit(
        pair,
        x,
        epochs=3,
        batch_size=16,
        learning_rate=0.02,
        beta=beta,
        progress=False,
        engine="eager",
    )
    assert history["beta"] == pytest.approx([0.125, 0.375, 0.625])
    for number, epoch in enumerate(history.epochs):
        weight = (epoch.reconstruction - epoch.objective) / epoch.kl["z"]
        assert beta(number) < weight < beta(number + 0.5)


def test_fit_with_a_heavier_kl_ends_with_less_of_it():
    ends = []
    for beta in (0.1, 4.0):
        pair, x = binary_pair()
        history = pv.fit(
            pair, x, epochs=40, batch_size=32, learning_rate=0.03, beta=beta, progress=False
        )
        ends.append(history["kl"][-1])
    assert ends[0] > 2 * max(ends[1], 0) + 0.5


def test_fit_reports_the_exact_elbo_of_a_pair_that_does_not_change():
    """Forty epochs with a tiny learning rate are forty estimates of a known number."""
    pair, x = linear(100)
    reconstruction, kl = (part.mean().item() for part in pair.expectations(x))
    history = pv.fit(
        pair, x, epochs=40, batch_size=50, learning_rate=1e-12, beta=0.5, progress=False
    )
    expected = {
        "reconstruction": reconstruction,
        "kl": kl,
        "elbo": reconstruction - kl,
        "objective": reconstruction - 0.5 * kl,
    }
    for column, value in expected.items():
        found = torch.tensor(history[column], dtype=torch.float64)
        error = found.std() / sqrt(len(found))
        assert abs(found.mean() - value) < 5 * error, column
        assert error < 0.1


def test_fit_takes_the_learning_rate_from_a_schedule():
    pair, x = binary_pair()
    history = pv.fit(
        pair,
        x,
        epochs=5,
        batch_size=32,
        learning_rate=0.01,
        learning_rate_schedule=pv.CosineSchedule(4),
        progress=False,
        engine="eager",
    )
    expected = [0.01, 0.01 * (2 + sqrt(2)) / 4, 0.005, 0.01 * (2 - sqrt(2)) / 4, 0]
    assert history["learning_rate"] == pytest.approx(expected, abs=1e-12)


class Auxiliary(PlainAttributes):
    """A classifier of the first pixel. The term that trains it is not part of p(x)."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(6, 2)

    def model(self, x):
        super().model(x)
        with pyro.plate("rows", len(x), dim=-1):
            label = dist.Categorical(logits=self.classifier(x))
            pyro.sample("label", label, obs=x[:, 0].long(), infer={"is_auxiliary": True})


def test_total_correlation_refuses_a_prior_that_depends_on_context():
    with seeded(0):
        factor = pv.Factor(pv.MLP([3], (), 4), pv.DiagonalNormal(), (2,))
        pair = pv.VAE.mlp((6,), 2, (5,), prior=factor, context_shapes=[(3,)])
    x, context = torch.rand(6, 6).round(), torch.eye(3)[torch.arange(6) % 3]
    words = "needs the same prior for all data, but the prior of 'z' depends on the context"
    objective = pv.TotalCorrelationELBO(6)
    with pytest.raises(pv.UsageError, match=words):
        objective.loss(pair.model, pair.guide, x, context)
    assert words in pv.check(pair, x, context, objective=objective).errors[0]
    assert objective.loss(pair.model, pair.guide, x, context[:1].expand(6, 3)) > 0


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        pv.FreeBitsELBO(0.0),
        pv.ImportanceWeightedELBO(1),
        pv.ImportanceWeightedELBO(5),
        pv.TotalCorrelationELBO(50, 1.0),
    ],
)
def test_every_objective_adds_what_is_marked_auxiliary(objective):
    with seeded(0):
        pair = Auxiliary().double()
    (x,) = rows("plain", 50)
    terms = dist.Categorical(logits=pair.classifier(x)).log_prob(x[:, 0].long())
    losses = []
    for model in (pair.model, lambda x: PlainAttributes.model(pair, x)):
        with seeded(1):
            losses.append(objective.loss(model, pair.guide, x))
    assert losses[0] - losses[1] == pytest.approx(-terms.sum().item())


def test_rows_that_are_masked_have_no_floor():
    live = torch.arange(10) < 5

    class Masked(PlainAttributes):
        def model(self, x):
            with poutine.mask(mask=live):
                super().model(x)

        def guide(self, x):
            with poutine.mask(mask=live):
                super().guide(x)

    with seeded(0):
        pair = Masked().double()
    (x,) = rows("plain", 10)
    losses = []
    for floor in (0.0, 3.0):
        with seeded(1):
            losses.append(pv.FreeBitsELBO(floor).loss(pair.model, pair.guide, x))
    loc, raw = pair.encoder(x[live]).chunk(2, -1)
    q = dist.Normal(loc, nn.functional.softplus(raw))
    kl = kl_divergence(q, dist.Normal(0.0, 1.0)).sum()
    assert losses[1] - losses[0] == pytest.approx(5 * 2 * 3.0 - kl.item())
