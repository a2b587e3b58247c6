"""Rows that are single numbers, and x of integers: imputation, replicates, decoding."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.missing import PartlyObserved

N = 24


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Number(nn.Module):
    """x ~ N(w + z, 1), one number for each row; a mask hides some; w is global."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(2.0))

    def model(self, x, seen):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0).mask(seen), obs=x)

    def guide(self, x, seen):
        w = pyro.sample("w", dist.Normal(self.loc, 0.1))
        with pyro.plate("data", len(x), dim=-1):
            loc = torch.where(seen, (x - w) / 2, 0.0)
            pyro.sample("z", dist.Normal(loc, torch.where(seen, 0.5**0.5, 1.0)))

    def template(self, n):
        return torch.zeros(n), torch.ones(n, dtype=torch.bool)


class Gaps(Number):
    """The same with NaN for what is missing."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", PartlyObserved(dist.Normal(w + z, 1.0, validate_args=False)), obs=x)

    def guide(self, x):
        super().guide(x.nan_to_num(0.0), ~x.isnan())


class Items(nn.Module):
    """Items with classes and with counts, (n, 3) integers; a mask hides some."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 0.5))
            pyro.sample(
                "x", self.fn(z[..., None].expand(*z.shape, 3)).mask(seen).to_event(1), obs=x
            )

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.5))

    def template(self, n):
        return torch.zeros(n, 3, dtype=torch.long), torch.ones(n, 3, dtype=torch.bool)


def classes(z):
    return dist.Categorical(logits=torch.stack([0 * z, z + 3, z], -1))


def counts(z):
    return dist.Poisson(z.exp())


class Choices(nn.Module):
    """A class for each row, and nothing latent but a shared shift."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            logits = torch.stack([0 * w, w, -w], -1)
            pyro.sample("x", dist.Categorical(logits=logits), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(torch.zeros(()), 0.5))


class Visits(nn.Module):
    """A class k of each datum, a latent of each of its visits; masks hide visits of both."""

    means = torch.tensor([-1.0, 1.0])

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
            with pyro.plate("visits", 3, dim=-2), poutine.mask(mask=seen.T):
                z = pyro.sample("z", dist.Normal(self.means[k], 0.8))
                pyro.sample("x", dist.Normal(z, 0.6), obs=x.T)

    def guide(self, x, seen):
        data, inside = pyro.plate("data", len(x), dim=-1), pyro.plate("visits", 3, dim=-2)
        with data, inside, poutine.mask(mask=seen.T):
            # The guide also gives a value to hidden visits.
            pyro.sample("z", dist.Normal(torch.where(seen, 0.64 * x, 9.0).T, 0.7))

    def classes(self, x, seen):
        """p(k | x), in closed form."""
        each = dist.Normal(self.means, 1.0).log_prob(x[..., None])
        return torch.where(seen[..., None], each, 0.0).sum(1).softmax(-1)


def visits():
    seen = torch.rand(N, 3, generator=generator(2)) > 0.4
    seen[:, 0] = True
    return torch.randn(N, 3, generator=generator(1)), seen


def test_missing_numbers_are_imputed():
    x, holes = torch.randn(N, generator=generator(1)) + 2, torch.arange(N) % 3 == 0
    found = pv.impute(Number(), x, ~holes, num_samples=4000, draws=400)
    assert torch.equal(found.missing, holes)
    assert torch.equal(found.mean[~holes], x[~holes])
    assert (found.mean[holes] - 2).abs().max() < 0.15
    spread = 2.01**0.5  # of w, z and the noise
    width = (found.high - found.low)[holes].mean().item()
    assert width == pytest.approx(2 * 1.645 * spread, rel=0.1)
    assert found.draws[:, holes].std().item() == pytest.approx(spread, rel=0.1)
    assert "8 in 8 rows" in str(found)


def test_numbers_can_be_hidden_during_training():
    x = torch.randn(N, generator=generator(1))
    history = pv.fit(Gaps(), x, mask_rate=0.3, epochs=1, engine="eager", progress=False)
    assert history["elbo"][0] < 0


def hidden_items():
    seen = torch.rand(N, 3, generator=generator(1)) > 0.5
    return torch.randint(3, (N, 3), generator=generator(2)), seen


def test_missing_classes_of_integers_are_imputed():
    x, seen = hidden_items()
    found = pv.impute(Items(classes), x, seen, num_samples=2000, draws=50)
    assert torch.equal(found.missing, ~seen)
    assert torch.equal(found.mean[seen], x[seen].float())
    assert (found.mean[~seen] == 1).all()  # the class with the largest logit by far
    assert found.draws.dtype == torch.long
    assert torch.equal(found.draws[:, seen], x[seen].expand(50, -1))


def test_means_of_missing_integer_counts_are_not_rounded():
    x, seen = hidden_items()
    pair = Items(counts)
    found = pv.impute(pair, x, seen, num_samples=4000, draws=20)
    line = torch.linspace(-4, 4, 1601)
    prior = dist.Normal(0.0, 0.5).log_prob(line)
    each = dist.Poisson(line.exp()).log_prob(x[..., None].float())
    posterior = (prior + torch.where(seen[..., None], each, 0.0).sum(1)).softmax(-1)
    truth = (posterior * line.exp()).sum(-1)[:, None].expand(-1, 3)
    torch.testing.assert_close(found.mean[~seen], truth[~seen], rtol=0.1, atol=0.02)
    assert found.draws.dtype == torch.long


def test_hidden_visits_whose_latents_are_hidden_are_drawn_from_the_model():
    pair, (x, seen) = Visits(), visits()
    found = pv.impute(pair, x, seen, num_samples=4000, draws=200)
    truth = (pair.classes(x, seen) @ pair.means)[:, None].expand(-1, 3)
    assert (found.mean - truth)[~seen].abs().max() < 0.1
    second = pair.classes(x, seen) @ (pair.means.square() + 1)
    assert (found.draws.square().mean(0) - second[:, None])[~seen].abs().max() < 0.6


def test_units_that_a_mask_hides_and_an_enumerated_class_do_not_stop_evaluate():
    pair, (x, seen) = Visits(), visits()
    assert pv.evaluate(pair, x, seen, num_samples=10).kl_by_unit == {}  # visits are a plate


class AsManyClassesAsRows(nn.Module):
    """A mask hides rows of a latent that depends on an enumerated class."""

    means = torch.linspace(-3, 3, N)

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=seen):
            k = pyro.sample("k", dist.Categorical(x.new_ones(N)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.means[k], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(x / 2, 0.8))


def test_the_kl_of_a_unit_leaves_out_rows_that_a_mask_hides():
    """E_q[log q(z) - sum_k p(k | z) log p(z | k)], by quadrature over z."""
    x, seen = torch.randn(N, generator=generator(1)), torch.rand(N, generator=generator(3)) > 0.5
    pair = AsManyClassesAsRows()
    line = torch.linspace(-8, 8, 4001)[:, None]
    q = dist.Normal(x / 2, 0.8).log_prob(line)
    p = dist.Normal(pair.means, 1.0).log_prob(line)
    each = q.exp() * (q - (p.softmax(-1) * p).sum(-1, keepdim=True)) * 0.004
    truth = torch.where(seen, each.sum(0), 0.0).mean()
    runs = [
        pv.evaluate(pair, x, seen, num_samples=2, seed=seed).kl_by_unit["z"][0]
        for seed in range(40)
    ]
    runs = torch.tensor(runs)
    assert abs(runs.mean() - truth) < 5 * runs.std() / 40**0.5


def test_rows_of_one_class_are_compared_with_replicates():
    x = torch.randint(3, (N,), generator=generator(1))
    found = pv.predictive_check(Choices(), x, num_replicates=30, progress=False)
    assert found.names == tuple(f"share of class {k}" for k in range(3))
    assert torch.equal(found.observed[:, 1], (x == 1).double())


def test_the_codes_of_a_pair_with_a_global_number_can_be_decoded():
    pair, x, seen = Number(), torch.randn(N, generator=generator(1)), torch.ones(N).bool()
    codes = pv.encode(pair, x, seen)
    assert codes["w"].shape == ()
    torch.testing.assert_close(pv.decode(pair, codes, seen), codes["w"] + codes["z"])
    for w in (1.5, torch.tensor(1.5), torch.tensor(1.5).numpy()):
        made = pv.decode(pair, {"w": w, "z": codes["z"]}, seen)
        torch.testing.assert_close(made, 1.5 + codes["z"])
    for wrong, says in (
        ([1.0, 2.0], "must have shape"),
        (float("nan"), "not finite"),
        ("one", "an array of numbers"),
    ):
        with pytest.raises(pv.UsageError, match=says):
            pv.decode(pair, {"w": wrong, "z": codes["z"]}, seen)


class Shifted(nn.Module):
    """z ~ N(c, 1) and x ~ N(z, 1), for context c of shape (n,), or (n, 1) if ``columns``."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c, 1.0).to_event(self.columns))
            loc = z if self.columns else z[..., None]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        loc = (c + (x if self.columns else x[:, 0])) / 2
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5).to_event(self.columns))


TOOLS = {
    "log_likelihood": {},
    "evaluate": {},
    "score": {},
    "encode": {},
    "reconstruct": {},
    "diagnose": {"budget": 1, "progress": False},
    "predictive_check": {},
}


@pytest.mark.parametrize("columns", [0, 1])
@pytest.mark.parametrize("tool", TOOLS)
def test_context_of_a_wrong_shape_does_not_count_rows_several_times(tool, columns):
    """A column (n, 1) in place of (n,) broadcasts to (n, n): log p(x) would be n times as large."""
    pair, c = Shifted(columns), torch.randn(N, generator=generator(0))
    x = c[:, None] + torch.randn(N, 1, generator=generator(1))
    right, wrong = (c[:, None], c) if columns else (c, c[:, None])
    exact = dist.Normal(c, 2**0.5).log_prob(x[:, 0])
    found = pv.log_likelihood(pair, x, right, num_samples=2).per_datum
    assert torch.allclose(found, exact.double(), atol=1e-5)
    with pytest.raises(pv.UsageError, match="row of x or of context has a wrong shape") as caught:
        getattr(pv, tool)(pair, x, wrong, **TOOLS[tool])
    assert "\n" not in str(caught.value)
