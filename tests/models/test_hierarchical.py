"""Hierarchical VAEs, the VampPrior, and shared parts of a pair."""

from math import log

import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pairs import PlainAttributes
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.posteriors import product
from pyro_vae.runs.description import describe

A, B, LEVEL, NOISE = 0.8, 1.5, 0.6, 0.5
"""z2 ~ N(0, 1), z1 ~ N(A z2, LEVEL), x ~ N(B z1, NOISE), all one-dimensional."""


class Affine(pv.Family):
    """A normal with the network's output as its mean, and with a given scale."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def outputs(self, shape):
        return 1

    def forward(self, raw, shape):
        return dist.Normal(raw, torch.full_like(raw, self.scale)).to_event(1)


def slope(value, scale):
    network = pv.MLP(1, (), 1)
    nn.init.constant_(network.layers[0].weight, value)
    nn.init.zeros_(network.layers[0].bias)
    return pv.Factor(network, Affine(scale), (1,))


def linear(top_down=True):
    """A pair of two levels whose guide is the exact posterior."""
    above = LEVEL**2 + (NOISE / B) ** 2  # variance of x / B given z2
    variance = 1 / (1 + A**2 / above)  # of z2 given x
    total = A**2 + LEVEL**2
    narrow = 1 / (1 / total + (B / NOISE) ** 2)  # of z1 given x
    if top_down:
        gain = variance * A / above / B
        messages = [slope(1 / B, NOISE / B), slope(gain, variance**0.5)]
        identity = [nn.Identity(), nn.Identity()]
        inference = pv.TopDown(identity, messages)
    else:
        lowest = slope(narrow * B / NOISE**2, narrow**0.5)
        given = 1 / (1 + (A / LEVEL) ** 2)  # of z2 given z1
        inference = pv.BottomUp([lowest, slope(given * A / LEVEL**2, given**0.5)])
    decoder, level = slope(B, NOISE), slope(A, LEVEL)
    return pv.HierarchicalVAE(inference, decoder, [level], pv.StandardNormal(1), True).double()


def exact(x):
    variance = B**2 * (A**2 + LEVEL**2) + NOISE**2
    return dist.Normal(0.0, variance**0.5).log_prob(x[:, 0])


X = torch.linspace(-4, 4, 9).double()[:, None]


@pytest.mark.parametrize("top_down", [True, False])
def test_the_exact_guide_of_a_linear_pair_has_no_gap_at_any_draw(top_down):
    pair = linear(top_down)
    found = pv.log_likelihood(pair, X, num_samples=50)
    torch.testing.assert_close(found.per_datum, exact(X), rtol=1e-6, atol=1e-6)
    assert found.standard_error < 1e-6
    loss = Trace_ELBO().loss(pair.model, pair.guide, X)
    assert -loss == pytest.approx(float(exact(X).sum()), abs=1e-5)


def test_free_bits_of_a_guide_in_the_other_order_take_no_closed_form():
    """If z2 is drawn given z1, KL(q(z1|x) || p(z1|z2)) at the draw is not an unbiased estimate."""
    pair = linear(top_down=False)
    with seeded(0):
        loss = pv.FreeBitsELBO(1e-9)
        many = X.repeat(4000, 1)
        found = -loss.loss(pair.model, pair.guide, many) / len(many)
    assert found == pytest.approx(float(exact(X).mean()), abs=0.02)


def test_a_product_of_normals_is_that_of_their_densities():
    q = dist.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])).to_event(1)
    p = dist.Normal(torch.tensor([-0.7, 0.4]), torch.tensor([1.5, 0.3])).to_event(1)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    left = product(q, p).log_prob(z) - q.log_prob(z) - p.log_prob(z)
    torch.testing.assert_close(left, left[:1].expand(6), rtol=1e-4, atol=1e-4)
    with pytest.raises(pv.UsageError, match="use DiagonalNormal at every level"):
        product(q, dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


def test_every_level_is_given_all_those_above_it_unless_markov():
    widths = [
        [level.network.shapes for level in pv.HierarchicalVAE.mlp((6,), (4, 3, 2), markov=m).levels]
        for m in (False, True)
    ]
    assert widths == [[[(3,), (2,)], [(2,)]], [[(3,)], [(2,)]]]


def test_a_pair_brings_a_recipe_that_arguments_switch_off(tmp_path):
    with seeded(0):
        pair, x = pv.HierarchicalVAE.mlp((6,), (2, 2), hidden=(4,)), torch.rand(64, 6).round()
    settings = {"epochs": 5, "batch_size": 32, "progress": False}
    history = pv.fit(pair, x, out=tmp_path / "run", **settings)
    assert history["beta"] == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert "FreeBitsELBO" in (tmp_path / "run" / "config.json").read_text()
    plain = pv.fit(pair, x, beta=1.0, objective=Trace_ELBO(), **settings)
    assert plain["beta"] == [1.0] * 5
    assert plain["objective"] == pytest.approx(plain["elbo"], rel=1e-5)


@pytest.mark.thorough
def test_the_recipe_prevents_collapsed_levels():
    """Without the recipe, the upper level of a Markov pair collapses; with it, it is used."""
    digits = pv.load_data("digits")
    kl = []
    for recipe in ({"beta": 1.0, "objective": Trace_ELBO()}, {"objective": pv.FreeBitsELBO(0.3)}):
        with seeded(0):
            pair = pv.HierarchicalVAE.mlp(digits.shape, (4, 4), (32,), markov=True)
        history = pv.fit(pair, digits.train.x, epochs=6, batch_size=64, progress=False, **recipe)
        kl.append(history.epochs[-1].kl["z2"])
    assert kl[0] < 0.3
    assert kl[1] > 0.8


def test_a_vamp_prior_is_the_mixture_of_the_posteriors_of_its_pseudo_inputs():
    with seeded(1):
        vae, x = pv.VAE.mlp((6,), 2, hidden=(5,)), torch.rand(20, 6)
        vae.prior = pv.VampPrior.of_data(vae.encoder, x, components=7)
        z = torch.randn(4, 2)
    (rows,) = vae.prior.pseudo_inputs
    assert all(bool((row == x).all(1).any()) for row in rows)
    each = torch.stack([vae.encoder(row).log_prob(z) for row in rows])
    torch.testing.assert_close(vae.prior().log_prob(z), each.logsumexp(0) - log(7))
    bytes_ = (255 * x).to(torch.uint8)
    start = pv.VampPrior.of_data(vae.encoder, bytes_, components=20).pseudo_inputs[0]
    assert start.max() <= 1
    torch.testing.assert_close(start.sort(0)[0], (bytes_ / 255).sort(0)[0])
    with pytest.raises(pv.UsageError, match=r"components must be at most 20, .*, got 30"):
        pv.VampPrior.of_data(vae.encoder, x, components=30)
    assert pv.VampPrior.of_data(vae.encoder, x).components == 20
    assert pv.VampPrior.of_data(vae.encoder, x.repeat(30, 1)).components == 500


def test_a_conditional_pair_has_pseudo_inputs_with_context():
    vae = pv.VAE.mlp((6,), 2, hidden=(5,), context_shapes=[(3,)])
    x, context = torch.rand(20, 6).round(), torch.eye(3)[torch.arange(20) % 3]
    vae.prior = pv.VampPrior.of_data(vae.encoder, x, context, components=4)
    assert [tuple(rows.shape) for rows in vae.prior.pseudo_inputs] == [(4, 6), (4, 3)]
    assert str(pv.check(vae, (x, context))) == "the pair is sound"
    bytes_ = context.to(torch.uint8)  # integers in the context are never intensities
    start = pv.VampPrior.of_data(vae.encoder, x, bytes_).pseudo_inputs[1]
    assert torch.equal(start.sum(1), torch.ones(20))


def test_a_part_that_is_shared_is_kept_once_and_rebuilt_as_one(tmp_path):
    pair = pv.HierarchicalVAE.mlp((6,), (3, 2), hidden=(5,))
    pair.prior = pv.VampPrior(pair.inference.top(), (6,), components=4)
    assert describe(pair)["arguments"]["prior"]["arguments"]["encoder"]["arguments"]["parts"] == [
        {"same": "pair.inference.trunks.0"},
        {"same": "pair.inference.trunks.1"},
        {"same": "pair.inference.messages.1"},
    ]
    pv.save(pair, tmp_path / "run")
    stored = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert len(stored) == len(list(pair.parameters()))
    loaded = pv.load(tmp_path / "run")
    assert loaded.prior.encoder.parts[0] is loaded.inference.trunks[0]
    assert len(list(loaded.parameters())) == len(stored)
    x = torch.rand(8, 6).round()
    assert pv.evaluate(loaded, x, num_samples=3) == pv.evaluate(pair, x, num_samples=3)


def test_a_file_that_lacks_a_shared_tensor_is_refused(tmp_path):
    pair = pv.VAE.mlp((6,), 2)
    pair.prior = pv.VampPrior(pair.encoder, (6,), components=4)
    pv.save(pair, tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    del stored["encoder.network.layers.0.weight"]
    safetensors.torch.save_file(stored, path)
    with pytest.raises(pv.UsageError, match=r"lacks tensor 'encoder.network.layers.0.weight'"):
        pv.load(tmp_path / "run")


def test_a_gated_layer_is_a_linear_map_times_a_gate():
    with seeded(0):
        network, x = pv.MLP(4, (3,), 2, nn.GLU), torch.randn(5, 4)
    first, _, last = network.layers
    linear, gate = first(x).chunk(2, -1)
    torch.testing.assert_close(network(x), last(linear * torch.sigmoid(gate)))
    with pytest.raises(pv.UsageError, match=r"activation cannot be nn\.GLU for convolutions"):
        pv.VAE.conv((1, 8, 8), activation=nn.GLU)


def test_normalised_layers_leave_rows_apart():
    with seeded(0):
        network, x = pv.MLP(4, (6, 3), 2, normalize=True), torch.randn(5, 4)
    whole = network(x)
    torch.testing.assert_close(network(x[:1]), whole[:1])
    torch.testing.assert_close(network(x * 1.0)[3:], network(x[3:]))


def test_a_chain_without_an_output_layer_ends_with_features():
    network = pv.MLP(4, (6, 3), None)
    assert network(torch.randn(5, 4)).shape == (5, 3)
    assert bool((network(torch.randn(5, 4)) >= 0).all())


@pytest.mark.parametrize("latent_dim", [(), 3])
def test_levels_that_make_no_sense_are_refused(latent_dim):
    with pytest.raises(pv.UsageError, match="dimension of each level, from the data to the top"):
        pv.HierarchicalVAE.mlp((6,), latent_dim)


def test_a_loaded_pair_keeps_the_type_of_each_tensor(tmp_path):
    class Mixed(PlainAttributes):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(2, dtype=torch.float64))

    pv.save(Mixed(), tmp_path / "run")
    loaded = pv.load(tmp_path / "run", Mixed())
    assert loaded.table.dtype == torch.float64
    assert loaded.encoder.weight.dtype == torch.float32
