"""The alarm for posterior collapse warns once for each collapsed posterior, and never otherwise."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.collapse import CollapseAlarm, units
from pyro_vae.training.history import Epoch

SPECTRUM = torch.tensor([4.0, 2.0, 1.2, 0.5, 0.3, 0.1], dtype=torch.float64)


class Linear(nn.Module):
    """x = W z + noise of a known size, with a diagonal linear guide (Lucas et al., 2019)."""

    def __init__(self, noise, latent_dim=3):
        super().__init__()
        self.noise = noise
        self.decoder = nn.Linear(6, latent_dim, bias=False).double()  # the transpose of its weight
        self.encoder = nn.Linear(6, latent_dim, bias=False).double()
        self.decoder.weight.data.mul_(0.3).add_(0.5 * torch.eye(latent_dim, 6))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(self.log_scale)), 1.0).to_event(1))
            loc = z @ self.decoder.weight
            pyro.sample("x", dist.Normal(loc, self.noise**0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))


def data(n=240):
    """Rows whose covariance has exactly this spectrum."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64))[0]
    x = torch.linalg.qr(x - x.mean(0))[0]
    return x * (n * SPECTRUM).sqrt()


def fitted(noise, said, **settings):
    """Fit the pair, and return it with the warnings of fit."""
    torch.manual_seed(1)
    pair = Linear(noise)
    settings = {"epochs": 100, "batch_size": 40, "learning_rate": 0.03} | settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = pyro.infer.TraceMeanField_ELBO()
        settings = {"progress": False, "engine": "eager", "objective": objective} | settings
        history = pv.fit(pair, data(), **settings)
    assert [str(w.message).split("'")[1] for w in caught] == said
    return pair, history


@pytest.mark.sample(1)
@pytest.mark.parametrize(("noise", "kept"), [(6.0, 0), (1.6, 2), (0.8, 3)])
def test_as_many_units_collapse_as_theory_predicts(noise, kept):
    """Units with an eigenvalue below the noise collapse. Others: log(eigenvalue / noise) / 2."""
    schedule = pv.CosineSchedule(100)
    pair, history = fitted(noise, [] if kept else ["z"], learning_rate_schedule=schedule)
    result = pv.evaluate(pair, data(), num_samples=1)
    found = sorted(result.kl_by_unit["z"], reverse=True)
    wanted = [0.5 * max(0.0, (value / noise).log().item()) for value in SPECTRUM[:3]]
    assert found == pytest.approx(wanted, abs=0.02)
    assert result.active_units["z"] == kept
    assert history.collapsed == (() if kept else ("z",))


def test_the_alarm_waits_for_half_of_the_epochs_and_for_the_full_weight():
    pair, history = fitted(9.0, ["z"], beta=pv.LinearSchedule(10))
    assert [epoch.kl["z"] < 0.03 for epoch in history.epochs[-50:]] == 50 * [True]
    alarm = CollapseAlarm(units(pair, (data()[:2],)), 100, 6)
    heard = [epoch.epoch for epoch in history.epochs if alarm.heard(epoch)]
    low = next(epoch.epoch for epoch in history.epochs[10:] if epoch.kl["z"] < 0.03)
    assert heard == [max(low, 11) + 49]


def epochs(kl, beta=None):
    beta = beta or [1.0] * len(kl)
    parts = zip(kl, beta, strict=True)
    return [Epoch(i + 1, 0, 0, 0, {"z": k}, None, b, 0, 0, 0) for i, (k, b) in enumerate(parts)]


def said(history, planned=20, steps=100, count=3):
    alarm = CollapseAlarm({"z": count}, planned, steps)
    heard = [epoch.epoch for epoch in history if alarm.heard(epoch)]
    return heard, alarm.over(), alarm.collapsed


def test_threshold_window_and_weight():
    assert said(epochs([0.02] * 20)) == ([10], [], ("z",))  # once
    assert said(epochs([0.04] * 20)) == ([], [], ())
    assert said(epochs([0.04] * 20), count=5) == ([10], [], ("z",))
    assert said(epochs([0.25] * 20), count=500) == ([], [], ())  # 0.2 for the whole site
    assert said(epochs([0.02] * 9 + [0.04] + [0.02] * 9 + [0.04])) == ([], [], ())
    assert said(epochs([0.04] * 14 + [0.02] * 6)) == ([], ["z"], ("z",))  # at the end
    assert said(epochs([0.02] * 4), planned=4) == ([], [], ())
    assert said(epochs([0.02] * 20), steps=2) == ([], [], ())  # 40 steps are too few
    rising = [min(1.0, i / 8) for i in range(1, 21)]
    assert said(epochs([0.02] * 20, rising)) == ([17], [], ("z",))
    assert said(epochs([0.02] * 20, [0.5] * 20)) == ([10], [], ("z",))  # the weight no longer rises
    assert said([epoch._replace(kl={}) for epoch in epochs([0.02] * 20)]) == ([], [], ())


def test_a_resumed_run_speaks_once_and_units_are_counted_by_site(tmp_path):
    settings = {"epochs": 40, "out": tmp_path / "run", "learning_rate": 0.05}
    fitted(9.0, ["z"], **settings)
    fitted(9.0, [], **(settings | {"epochs": 44}), resume=True)
    levels = pv.HierarchicalVAE.mlp((6,), latent_dim=(4, 2), hidden=(5,))
    assert units(levels, (torch.ones(3, 6),)) == {"z2": 2, "z1": 4}
    mixture = pv.MixtureVAE.mlp((6,), latent_dim=2, components=3)
    assert units(mixture, (torch.ones(3, 6),))["z"] == 2


class Levels(nn.Module):
    """Two levels. The lower follows the upper, in model and in guide."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("low", dist.Normal(top * self.weight, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(top, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(x * 0.8, 0.4).to_event(1))
            pyro.sample("low", dist.Normal(top * self.weight, 0.5).to_event(1))


def test_a_level_that_only_follows_the_one_above_has_no_active_unit():
    torch.manual_seed(0)
    result = pv.evaluate(Levels(), torch.randn(300, 2, dtype=torch.float64), num_samples=1)
    assert result.active_units == {"top": 2, "low": 0}
    assert "2 of 2 (top), 0 of 2 (low)" in str(result)
