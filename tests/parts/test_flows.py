"""Flows: densities and inverses compared with references; posteriors that are not normal."""

import itertools
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from pyro.infer import Trace_ELBO
from pyro.nn import AutoRegressiveNN
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.make_parts import make_posterior, make_prior
from pyro_vae.cli.options import Model
from pyro_vae.pairs import weights as pair_weights
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.flows import Flow, stack

KINDS = list(
    itertools.product(
        (pv.AutoregressiveLayer, pv.CouplingLayer), (pv.Affine(), pv.Spline(4)), (0, 2)
    )
)
every_kind = pytest.mark.parametrize(
    ("layer", "bijection", "context_dim"),
    KINDS,
    ids=lambda part: getattr(part, "__name__", type(part).__name__ if part else "0").lower(),
)


def flow(layer, bijection, context_dim, dim=2, seed=0, layers=2, strength=0.5, batch=()):
    """A flow whose layers are far from the identity."""
    with seeded(seed):
        made = stack(layer, layers, dim, context_dim, (8,), bijection).double()
        for parameter in made.parameters():
            parameter.data += strength * torch.randn_like(parameter)
        loc, scale = torch.randn(*batch, dim).double(), torch.rand(*batch, dim).double() + 0.5
        return Flow(loc, scale, torch.randn(*batch, context_dim).double(), made)


@pytest.mark.sample(4)
@every_kind
def test_a_flow_integrates_to_one_and_has_the_moments_of_its_draws(layer, bijection, context_dim):
    q = flow(layer, bijection, context_dim, strength=0.3)
    with seeded(1), torch.no_grad():
        draws = q.rsample((40_000,))
        entropy = -q.log_prob(draws)
        low, high = draws.min(0).values - 2, draws.max(0).values + 2
        axes = [
            torch.linspace(a, b, 500, dtype=torch.float64) for a, b in zip(low, high, strict=True)
        ]
        grid = torch.cartesian_prod(*axes)
        cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
        log_density = q.log_prob(grid)
    density = log_density.exp() * cell
    assert density.sum().item() == pytest.approx(1.0, abs=3e-3)
    for found, wanted in (
        (draws, (density[:, None] * grid).sum(0)),
        (draws.square(), (density[:, None] * grid.square()).sum(0)),
        (entropy[:, None], -(density * log_density).sum()[None]),
    ):
        error = 5 * found.std(0) / 200 + 3e-3 * (1 + wanted.abs())
        assert bool((found.mean(0) - wanted).abs().le(error).all())
    spread = draws.std(0)
    assert bool((q.mean - draws.mean(0)).abs().le(0.05 * spread).all())
    assert bool((q.stddev - spread).abs().le(0.05 * spread).all())


@every_kind
def test_given_values_have_the_density_of_drawn_ones(layer, bijection, context_dim):
    q = flow(layer, bijection, context_dim, dim=3, layers=3, batch=(5,))
    wide = q.expand((4, 5))
    z = wide.rsample()
    assert wide.log_prob(z) is wide.log_prob(z)  # the density that the draw kept
    torch.testing.assert_close(wide.log_prob(z.clone()), wide.log_prob(z))
    torch.testing.assert_close(q.log_prob(z), wide.log_prob(z))
    torch.testing.assert_close(q.log_prob(z[0]), wide.log_prob(z)[0])


@every_kind
def test_the_log_determinant_is_that_of_the_jacobian(layer, bijection, context_dim):
    q = flow(layer, bijection, context_dim, dim=3, layers=1)
    (one,) = q.layers
    with seeded(2):
        x = torch.randn(3).double()
    y, log_det = one(x, q.context)
    jacobian = torch.autograd.functional.jacobian(lambda v: one(v, q.context)[0], x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det)
    back, same = one.inverse(y, q.context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(same, log_det)


def test_an_affine_autoregressive_layer_is_pyros():
    with seeded(3):
        ours = pv.AutoregressiveLayer(4, 0, (7,), pv.Affine(), torch.tensor([2, 0, 3, 1])).double()
        network = AutoRegressiveNN(
            4, [7], [1, 1], torch.tensor([2, 0, 3, 1]), nonlinearity=nn.ELU()
        )
        network.double()
        for parameter in ours.parameters():
            parameter.data = torch.randn_like(parameter)
        network.load_state_dict(ours.network.state_dict())
        x = torch.randn(6, 4).double()

    def bounded(x):  # Pyro's flow takes the log scale
        shift, raw = network(x)
        return shift, pv.Affine()(torch.zeros_like(x), torch.stack([shift, raw], -2))[1]

    theirs = AffineAutoregressive(bounded)
    want = theirs(x)
    found, log_det = ours(x, x[..., :0])
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(log_det, theirs.log_abs_det_jacobian(x, want))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_spline_is_pyros_rational_quadratic_one(inverse):
    spline = pv.Spline(bins=5, bound=3.0)
    with seeded(4):
        raw = 2 * torch.randn(500, spline.outputs, 2).double()
        x = 2 * torch.randn(500, 2).double()  # some outside the box
    x_knots, y_knots, slopes = spline._knots(raw)
    want, log_slope = _monotonic_rational_spline(
        x,
        x_knots.diff() / 6,
        y_knots.diff() / 6,
        slopes[..., 1:-1],
        inverse=inverse,
        bound=3.0,
        min_bin_width=0.0,
        min_bin_height=0.0,
        min_derivative=0.0,
        eps=0.0,
    )
    found, log_det = spline.inverse(x, raw) if inverse else spline(x, raw)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(log_det, -log_slope if inverse else log_slope)


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_a_flow_starts_as_a_diagonal_normal_with_its_exact_moments(kind):
    family = pv.FlowPosterior(3, kind[0], kind[1], context_dim=2)
    raw = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    q, normal = family(raw, (3,)), pv.DiagonalNormal()(raw[:, :6], (3,))
    z = normal.sample()
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(q.mean, normal.mean)
    torch.testing.assert_close(q.stddev, normal.stddev)
    prior = pv.FlowPrior(3, kind[0], kind[1])
    torch.testing.assert_close(prior().log_prob(z), pv.StandardNormal(3)().log_prob(z))


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_extreme_outputs_of_networks_give_finite_values(kind):
    strength = 1e4 if isinstance(kind[1], pv.Spline) else 3.0
    q = flow(*kind, dim=4, strength=strength, layers=4)
    q = Flow(q.loc.float(), q.scale.float(), q.context.float(), q.layers.float())
    with seeded(5):
        values = [q.rsample((300,)), 10 * torch.randn(300, 4)]
    for value in values:
        q.layers.zero_grad()
        found = q.log_prob(value)
        found.mean().backward(retain_graph=True)
        assert bool(torch.isfinite(found).all())
        assert all(bool(torch.isfinite(p.grad).all()) for p in q.layers.parameters())


def test_what_was_drawn_without_gradients_is_scored_with_them():
    q = flow(pv.CouplingLayer, pv.Spline(4), 0)
    z = q.sample((10,))
    q.log_prob(z).sum().backward()
    gradients = [p.grad.clone() for p in q.layers.parameters()]
    q.layers.zero_grad()
    q.log_prob(z.clone()).sum().backward()
    for parameter, gradient in zip(q.layers.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_codes_do_not_depend_on_seed_or_company():
    with seeded(0):
        vae = pv.VAE.mlp((6,), 2, (5,), posterior=pv.FlowPosterior(2))
        for parameter in vae.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.eye(6)
    for what in ("mean", "scale"):
        codes = pv.encode(vae, x, what=what)["z"]
        torch.testing.assert_close(pv.encode(vae, x[:2], what=what, seed=5)["z"], codes[:2])


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(pv.UsageError, match=r"shape \(3,\), got shape \(2,\)"):
        pv.VAE.mlp((4,), latent_dim=2, posterior=pv.FlowPosterior(3))
    with pytest.raises(pv.UsageError, match="9 coordinates must be at least 9, got \\(8,\\)"):
        pv.FlowPosterior(9, hidden=(8,))
    with pytest.raises(pv.UsageError, match="a coupling layer needs at least 2 coordinates, got 1"):
        pv.FlowPrior(1)
    with pytest.raises(pv.UsageError, match="layers must be at least 1, got 0"):
        pv.FlowPrior(2, layers=0)
    with pytest.raises(pv.UsageError, match="context_dim must be at least 0, got -1"):
        pv.FlowPosterior(2, context_dim=-1)
    with pytest.raises(pv.UsageError, match=r"bins must be at least 2 .* got bins=1 and bound=5"):
        pv.Spline(1)


def test_the_command_line_names_flows():
    chosen = Model(latent_dim=(70,), posterior="spline", prior="flow")
    posterior = make_posterior(chosen)
    assert isinstance(posterior.bijection, pv.Spline)
    assert posterior.outputs((70,)) == 2 * 70 + posterior.context_dim
    assert isinstance(make_prior(chosen), pv.FlowPrior)
    iaf = make_posterior(Model(latent_dim=(3,), posterior="iaf"))
    assert (iaf.layer, type(iaf.bijection)) == (pv.AutoregressiveLayer, pv.Affine)


class Bent(nn.Module):
    """Two standard normal latents, observed through a curve: the posterior has a known shape.

    "banana": x ~ N(z_2 + exp(1.5 z_1), 0.3^2);  "two modes": x ~ N((z_1^2, z_1 + z_2), 0.5^2 I).
    """

    def __init__(self, shape, posterior):
        super().__init__()
        self.shape = shape
        width = 1 if shape == "banana" else 2
        network = pv.MLP([width], (16,), posterior.outputs((2,)), nn.Tanh)
        self.encoder = pv.Factor(network, posterior, (2,))

    def seen(self, z):
        a, b = z.unbind(-1)
        if self.shape == "banana":
            return dist.Normal((b + (1.5 * a).exp())[..., None], 0.3).to_event(1)
        return dist.Normal(torch.stack([a.square(), a + b], -1), 0.5).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.seen(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x))

    def log_evidence(self, x):
        """log p(x) of each datum, by numerical integration on a grid."""
        axis = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        z = torch.cartesian_prod(axis, axis)
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * log(axis[1] - axis[0])
        likelihood = self.seen(z)
        return torch.stack([(prior + likelihood.log_prob(row)).logsumexp(0) for row in x])


def gap(shape, posterior, x, steps):
    """log p(x) - ELBO of each datum, for a guide that is fitted to the known model."""
    with seeded(0):
        pair = Bent(shape, posterior).double()
    pv.fit(
        pair,
        x,
        objective=Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1),
        epochs=steps,
        batch_size=len(x),
        learning_rate=2e-2,
        learning_rate_schedule=pv.CosineSchedule(steps),
        clip_norm=20.0,
        progress=False,
    )
    with torch.no_grad(), seeded(1):
        log_weights = pair_weights.log_weights(pair, (x,), 4000)
    return pair.log_evidence(x) - log_weights.mean(0)


CASES = {
    "banana": ([[1.0], [2.0]], pv.Affine(), 500, 0.06),
    "two modes": ([[1.0, 0.0], [1.5, 0.5]], pv.Spline(), 400, 0.05),
}


@pytest.mark.thorough
@pytest.mark.parametrize("shape", CASES)
def test_a_flow_reaches_a_posterior_that_no_normal_does(shape):
    x, bijection, steps, most = CASES[shape]
    x = torch.tensor(x, dtype=torch.float64)
    for normal in (pv.DiagonalNormal(), pv.FullRankNormal()):
        assert gap(shape, normal, x, 200).min() > 0.35
    flow = gap(shape, pv.FlowPosterior(2, bijection=bijection, hidden=(32,)), x, steps)
    assert flow.max() < most
    assert flow.min() > -0.02
