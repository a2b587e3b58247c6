"""What is printed for pairs whose latents are global or group latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_pairs import Amortized, Nested, data
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import nn

import pyro_vae as pv


class Slope(nn.Module):
    """Only a global latent: w ~ N(0, 1), q(w) = N(2, 0.5)."""

    site = "w"

    def model(self, x):
        w = pyro.sample(self.site, dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w.expand(len(x))[:, None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample(self.site, dist.Normal(x.new_tensor(2.0), 0.5))


KL = 0.5 * (0.25 + 4 - 1) - torch.tensor(0.5).log().item()
"""KL(N(2, 0.5) || N(0, 1))."""


def lines(result):
    return {line[:20].strip(): line[20:] for line in str(result).splitlines()}


def test_a_pair_without_local_latents_prints_the_kl_of_its_globals():
    result = pv.evaluate(Slope(), torch.ones(9, 1), num_samples=2, engine="eager")
    assert result.global_kl["w"] == pytest.approx(KL, abs=0.6)
    shown = lines(result)
    assert "KL" not in shown
    assert "active units" not in shown
    assert shown["KL of w"] == f"{result.global_kl['w']:.3f} nats for all data, not in the ELBO"
    assert result.elbo == pytest.approx(result.reconstruction)


def test_the_kl_does_not_depend_on_the_number_of_rows():
    few, many = (
        pv.evaluate(Slope(), torch.ones(n, 1), num_samples=2, engine="eager").global_kl["w"]
        for n in (3, 40)
    )
    assert few == many


def test_local_latents_keep_their_lines_beside_those_of_groups():
    x, g = data()
    result = pv.evaluate(Nested().set(x, g), x, g, num_samples=5, engine="eager")
    shown = lines(result)
    assert {"KL", "KL of w", "KL of u", "active units"} <= shown.keys()
    assert result.kl == pytest.approx(result.kl_by_site["z"])


def test_no_global_latent_has_no_kl():
    result = pv.evaluate(pv.VAE.mlp((4,), 2, ()), torch.ones(8, 4), num_samples=2, engine="eager")
    assert result.global_kl == {}
    assert "KL" in lines(result)


def test_unreliable_weights_show_their_table_with_the_warning():
    x, g = data()
    wide = Nested().set(x, g, shift=6.0, stretch=0.3)
    found = pv.global_weights(wide, x, g, num_draws=100, num_samples=1, progress=False)
    assert not found.reliable
    first, head, *rows = str(found).splitlines()
    assert first.split("; ")[1].endswith(": the weighted moments are not reliable")
    assert head.split() == ["weighted", "draws", "guide", "shift", "scale"]
    assert {row.split()[0] for row in rows} == set(found.units)


def test_reliable_weights_show_the_posterior():
    x, g = data()
    found = pv.global_weights(Amortized(), x, g, num_draws=100, num_samples=1, progress=False)
    assert found.reliable
    assert "posterior" in str(found)
    assert "not reliable" not in str(found)


class Guided(nn.Module):
    """The model of `Slope` with an autoguide."""

    site = Slope.site

    def __init__(self, guide, x):
        super().__init__()
        start = init_to_value(values={"w": torch.tensor(2.0)})
        self.guide = guide(self.model, init_loc_fn=start)
        self.guide(x)

    def model(self, x):
        Slope.model(self, x)


def test_a_point_estimate_has_no_kl_and_an_autoguide_has_that_of_its_latent():
    x = torch.ones(9, 1)
    point, auto = Guided(AutoDelta, x), Guided(AutoNormal, x)
    found = pv.evaluate(point, x, num_samples=2, engine="eager")
    assert (found.point_estimates, found.global_kl) == (("w",), {})
    scale = auto.guide.scales.w.item()
    exact = 0.5 * (scale**2 + 4 - 1) - torch.tensor(scale).log().item()
    found = pv.evaluate(auto, x, num_samples=2, engine="eager").global_kl
    assert found == {"w": pytest.approx(exact, abs=0.2)}


def test_a_long_name_is_apart_from_its_number():
    pair = Slope()
    pair.site = "effect of the hospital"
    shown = str(pv.evaluate(pair, torch.ones(9, 1), num_samples=2, engine="eager")).splitlines()
    width = len("KL of effect of the hospital") + 2
    (kl,) = [line for line in shown if line.startswith("KL of")]
    assert kl[:width] == "KL of effect of the hospital  "
    assert all(line[width - 1] == " " and line[width] != " " for line in shown)
