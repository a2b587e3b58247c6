"""A model that lacks an effect of the context: the residuals or the codes depend on the context."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import verdict

W = torch.tensor([1.0, 0.5, -0.5]).double()
B = torch.tensor([0.0, 0.4, 0.5]).double()


class Conditional(nn.Module):
    """z ~ N(a c, 1), x ~ N(z W + b c B, 0.5^2), with the exact posterior as the guide.

    c is the first column of the context.
    """

    def __init__(self, a=1.0, b=1.0):
        super().__init__()
        self.a = a
        self.b = nn.Parameter(torch.tensor(b).double())

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.a * c[:, :1], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * W + self.b * c[:, :1] * B, 0.5).to_event(1), obs=x)

    def guide(self, x, c):
        variance = 1 / (1 + W @ W / 0.25)
        mean = self.a * c[:, :1] + ((x - self.b * c[:, :1] * B) @ W / 0.25)[:, None]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean * variance, variance.sqrt()).to_event(1))

    def template(self, n):
        return torch.zeros(n, 3).double(), torch.zeros(n, 2).double()


def blames(pair, seed=0, n=500):
    torch.manual_seed(seed)
    c = torch.randn(n, 2).double()
    x = (c[:, :1] + torch.randn(n, 1)) * W + c[:, :1] * B + 0.5 * torch.randn(n, 3)
    found = pv.model_check(pair, x, c, num_samples=21, progress=False)
    return found, verdict.blamed({"model_check": found})


def test_the_right_model_has_no_fault():
    assert blames(Conditional())[1] == []


def test_an_effect_on_the_data_is_charged_to_the_decoder_and_has_a_size():
    pair = Conditional(b=0.0)
    found, (first, *_) = blames(pair)
    assert first.part == "decoder"
    assert "residuals still depend on the codes or the context" in first.words
    # The residual of element j is c B_j less what z takes up: c W_j W.B / (W.W + 0.25), plus noise.
    # Its mean square is E[c^2] = 1 times the square of the rest, in units of the noise.
    left = B - W * (W @ B - 0.25 * 1.0) / (W @ W + 0.25)
    gain = 0.5 * left.square().sum() / 0.25
    assert found.regression.value == pytest.approx(gain.item(), rel=0.1)


def test_an_effect_on_the_latent_is_charged_to_the_prior():
    found, (first, *_) = blames(Conditional(a=0.0))
    assert first.part == "prior"
    # The KL of N(c, 1) and N(0, 1) is 1/2 on average, and codes by the wrong prior are nearer to 0.
    assert 0.1 < found.codes["z"].nats < 0.5


@pytest.mark.parametrize("kind", ["two columns", "column and latent"])
def test_a_missing_interaction_is_charged_to_the_decoder_alone(kind):
    torch.manual_seed(0)
    c, z = torch.randn(500, 2).double(), torch.randn(500, 1).double()
    other = c[:, 1:] if kind == "two columns" else z
    effect = c[:, :1] * other
    x = z * W + effect * B + 0.5 * torch.randn(500, 3)
    pair = Conditional(a=0.0, b=0.0)  # an exact pair without any effect of the context
    found = pv.model_check(pair, x, c, num_samples=50, progress=False)
    (blame,) = verdict.blamed({"model_check": found})
    assert blame.part == "decoder"
    left = B - W * (W @ B) / (W @ W + 0.25)  # z takes up a part, as above
    gain = 0.5 * effect.square().mean() * left.square().sum() / 0.25
    assert blame.nats == pytest.approx(gain.item(), rel=0.3)
