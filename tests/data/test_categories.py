"""Data and latents that are unordered classes have a mode and not a mean."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.pairs.moments import is_category, mode, typical

N = 12
PROBS = torch.tensor(
    [0.4, 0.05, 0.1, 0.45]
)  # the mean of the codes is 1.6, between two improbable classes
LOGITS = PROBS.log()


class Observing(nn.Module):
    """A latent, and data that depend on it a little, under any distribution."""

    def __init__(self, likelihood, width=2):
        super().__init__()
        self.encoder, self.likelihood, self.width = nn.Linear(width, 2), likelihood, width

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x.float().reshape(len(x), -1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, raw.tanh().exp()))

    def template(self, n):
        return (torch.zeros(n, self.width),)


def wide(z, values):
    """The same values for the two elements of each datum."""
    return (values + 0 * z[:, None, None]).expand(len(z), 2, len(values))


MIXED = torch.stack([LOGITS, LOGITS])

# The distribution of two elements given z, and the expected summary of it.
CLASSES = {
    "categorical": (lambda z: dist.Categorical(logits=wide(z, LOGITS)).to_event(1), 3.0),
    "masked": (
        lambda z: dist.Categorical(logits=wide(z, LOGITS)).mask(torch.tensor(True)).to_event(1),
        3.0,
    ),
    "mixture of categoricals": (
        lambda z: dist.MixtureSameFamily(
            dist.Categorical(logits=wide(z, torch.zeros(2))),
            dist.Categorical(logits=(MIXED + 0 * z[:, None, None, None]).expand(len(z), 2, 2, 4)),
        ).to_event(1),
        3.0,
    ),
    "ordinal": (
        lambda z: dist.OrderedLogistic(
            0 * z[:, None].expand(-1, 2), torch.tensor([-2.0, -1.5, 1.5])
        ).to_event(1),
        2.0,
    ),
    "tokens": (
        lambda z: pv.Categorical(4, tokens=True)(
            LOGITS.repeat_interleave(2) + 0 * z[:, None], (2,)
        ),
        3.0,
    ),
}

NUMBERS = {
    "levels": (
        lambda z: pv.Categorical(4)(LOGITS.repeat_interleave(2) + 0 * z[:, None], (2,)),
        float(PROBS @ torch.arange(4.0)) / 3,
    ),
    "Bernoulli": (lambda z: dist.Bernoulli(0.3 + 0 * z[:, None].expand(-1, 2)).to_event(1), 0.3),
    "binomial": (
        lambda z: dist.Binomial(7, 0.3 + 0 * z[:, None].expand(-1, 2)).to_event(1),
        2.1,
    ),
    "Poisson": (lambda z: dist.Poisson(2.5 + 0 * z[:, None].expand(-1, 2)).to_event(1), 2.5),
}


def data():
    return torch.zeros(N, 2)


@pytest.mark.parametrize("name", [*CLASSES, *NUMBERS])
def test_the_summary_of_data(name):
    """Every tool shows the most probable class, and the mean of numbers."""
    likelihood, want = (CLASSES | NUMBERS)[name]
    pair, x = Observing(likelihood), data()
    every = {
        "reconstruct": pv.reconstruct(pair, x),
        "decode": pv.decode(pair, {"z": torch.zeros(N)}),
        "sample": pv.sample(pair, N, means=True),
        "interpolate": pv.interpolate(pair, x, x, steps=3),
        "traverse": pv.traverse(pair, x[:1]),
    }
    for tool, found in every.items():
        torch.testing.assert_close(
            found.float(), torch.full(found.shape, want), msg=lambda text, t=tool: f"{t}: {text}"
        )


def test_the_mean_of_one_hot_rows_is_the_probabilities():
    pair = Observing(lambda z: dist.OneHotCategorical(logits=LOGITS + 0 * z[:, None]), 4)
    x = torch.eye(4).repeat(3, 1)
    torch.testing.assert_close(pv.reconstruct(pair, x), PROBS.expand(12, 4))
    pair = Observing(lambda z: dist.Multinomial(10, logits=LOGITS + 0 * z[:, None]), 4)
    torch.testing.assert_close(pv.reconstruct(pair, 10 * x), 10 * PROBS.expand(12, 4))


def test_a_mode_is_found_among_the_values():
    fn = CLASSES["mixture of categoricals"][0](torch.zeros(3))
    assert is_category(fn)
    scores = torch.stack([fn.base_dist.log_prob(torch.full((3, 2), float(k))) for k in range(4)])
    assert torch.equal(mode(fn), scores.argmax(0))
    assert typical(dist.Normal(1.0, 1.0)) == 1.0
    assert typical(dist.Cauchy(3.0, 1.0)) == 3.0  # a Cauchy distribution has no mean


def test_statistics_of_classes_are_their_frequencies():
    pair = Observing(CLASSES["categorical"][0])
    x = torch.multinomial(PROBS, 2 * N, replacement=True).reshape(N, 2)
    found = pv.predictive_check(pair, x, num_replicates=200, progress=False)
    assert found.names == tuple(f"share of class {k}" for k in range(4))
    for k in range(4):
        assert found.observed[:, k].mean() == (x == k).double().mean()
        assert found.replicated_mean[:, k].mean().item() == pytest.approx(PROBS[k].item(), abs=0.03)


class Latents(nn.Module):
    """Several discrete and bounded latents, and data whose mean is their sum."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 3)

    def model(self, x):
        n = len(x)
        with pyro.plate("data", n, dim=-1):
            k = pyro.sample("k", dist.OneHotCategorical(logits=torch.zeros(n, 3)))
            r = pyro.sample("r", dist.LogNormal(torch.zeros(n), 1.0))
            c = pyro.sample("c", dist.Poisson(torch.full((n,), 2.0)))
            loc = (k @ torch.arange(3.0) + r + c)[:, None].expand(n, 2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.OneHotCategorical(logits=self.encoder(x)))
            pyro.sample("r", dist.LogNormal(x[:, 0], 0.1))
            pyro.sample("c", dist.Poisson(1.5 + x[:, 1].abs()))


def test_interpolation_takes_classes_from_the_nearer_end():
    """Only the real-valued latent changes; classes and counts are those of the nearer end."""
    pair, start, end = Latents(), torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 5.0]])
    first, last = (pv.encode(pair, x) for x in (start, end))
    line = pv.interpolate(pair, start, end, steps=5)[0, :, 0]
    for step, found in enumerate(line):
        near, t = (first, step / 4) if step < 2 else (last, step / 4)
        r = torch.lerp(first["r"], last["r"], t)
        want = near["k"] @ torch.arange(3.0) + r + near["c"]
        torch.testing.assert_close(found, want[0])


def test_a_latent_is_traversed_within_its_support():
    pair, x = Latents(), torch.tensor([[0.0, 0.0]])
    assert pv.traverse(pair, x, values=[1.0, 2.0]).shape == (
        1,
        2,
        2,
    )  # "r" is the real-valued latent
    counted = pv.traverse(pair, x, latent="c", values=[0, 3])[0, :, 0]
    assert (counted[1] - counted[0]).item() == pytest.approx(3.0)
    for latent, values in (("r", [-1.0]), ("c", [0.5]), ("c", [-1]), ("k", [1.0, 0.0])):
        with pytest.raises(UsageError, match=f"within the support of latent '{latent}'"):
            pv.traverse(pair, x, latent=latent, values=values)


def test_both_ends_of_an_interpolation_are_encoded_with_their_own_context():
    torch.manual_seed(0)
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), context_shapes=((3,),))
    start, end = torch.rand(2, 5, 4).round()
    one, two = torch.eye(3)[:2, None].expand(2, 5, 3)
    line = pv.interpolate(pair, start, end, one, end_context=[two], steps=2)
    for frame, (x, label) in zip(line.unbind(1), ((start, one), (end, two)), strict=True):
        code = pv.encode(pair, x, label, binarize="none")
        torch.testing.assert_close(frame, pv.decode(pair, code, one))
