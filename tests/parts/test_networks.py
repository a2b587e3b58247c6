"""Networks and factors."""

from math import prod

import pytest
import torch
from pairs import EVERY
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.factors import bounded_scale


def test_mlp_is_its_layers_in_order():
    torch.manual_seed(10)
    network = pv.MLP([(2, 3), 4], (5, 7), 6, nn.Tanh)
    a, b = torch.randn(8, 2, 3), torch.randn(8, 4)
    first, second, last = (layer for layer in network.layers if isinstance(layer, nn.Linear))
    hidden = torch.tanh(first(torch.cat([a.reshape(8, 6), b], 1)))
    torch.testing.assert_close(network(a, b), last(torch.tanh(second(hidden))))
    linear = pv.MLP(3, (), 2)
    slope, offset = linear.layers[0].weight, linear.layers[0].bias
    x = torch.randn(4, 3)
    torch.testing.assert_close(linear(x), x @ slope.T + offset)


NETWORKS = {
    "mlp": (lambda: pv.MLP([3, 2], (8,), 4), (3,)),
    "conv-decoder": (lambda: pv.ConvDecoder([3, 2], (8,), (4, 3), (2, 5, 8)), (3,)),
    "conv-encoder": (lambda: pv.ConvEncoder([(2, 5, 8), 2], (3, 4), (8,), 6), (2, 5, 8)),
    "residual-decoder": (lambda: pv.ConvDecoder([3, 2], (8,), (4, 3), (2, 5, 8), blocks=1), (3,)),
    "residual-encoder": (
        lambda: pv.ConvEncoder([(2, 5, 8), 2], (3, 4), (8,), 6, blocks=2),
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_leading_dimensions_broadcast(name):
    torch.manual_seed(11)
    make, shape = NETWORKS[name]
    network = make()
    wide, context = torch.randn(4, 5, *shape), torch.randn(5, 2)
    expected = torch.stack([network(part, context) for part in wide])
    torch.testing.assert_close(network(wide, context), expected)
    row = torch.stack([network(wide[0, i : i + 1], context[i : i + 1])[0] for i in range(5)])
    torch.testing.assert_close(expected[0], row)
    # Context with a dimension of samples, and one row without a batch dimension.
    contexts = torch.randn(4, 5, 2)
    expected = torch.stack([network(wide[0], part) for part in contexts])
    torch.testing.assert_close(network(wide[0], contexts), expected)
    torch.testing.assert_close(network(wide[0, 0], contexts[0, 0]), expected[0, 0])


def test_a_factor_scores_samples_by_batch():
    torch.manual_seed(12)
    network = pv.MLP([3, 2], (8,), 12)
    decoder = pv.Factor(network, pv.Bernoulli(), (3, 2, 2))
    z, context = torch.randn(4, 5, 3), torch.randn(5, 2)
    x = torch.rand(5, 3, 2, 2).round()
    expected = torch.stack([decoder(part, context).log_prob(x) for part in z])
    assert expected.shape == (4, 5)
    torch.testing.assert_close(decoder(z, context).log_prob(x), expected)


IMAGES = [(1, 1), (1, 2), (2, 2), (3, 3), (5, 8), (8, 8), (28, 28), (17, 30)]


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("channels", [(4,), (4, 3), (4, 3, 2)])
def test_conv_encoder_sees_every_pixel(size, channels):
    torch.manual_seed(13)
    network = pv.ConvEncoder([(2, *size)], channels, (8,), 5, nn.Tanh)
    image = torch.randn(3, 2, *size, requires_grad=True)
    found = network(image)
    assert found.shape == (3, 5)
    (gradient,) = torch.autograd.grad(found[0].sum(), image)
    assert bool((gradient[0] != 0).all())
    assert bool((gradient[1:] == 0).all())


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("channels", [(4,), (4, 3), (4, 3, 2)])
def test_conv_decoder_paints_every_pixel(size, channels):
    torch.manual_seed(14)
    network = pv.ConvDecoder(3, (8,), channels, (2, *size), nn.Tanh)
    found = network(torch.randn(6, 3))
    assert found.shape == (6, 2 * prod(size))
    assert bool((found.std(0) > 0).all())


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_a_gradient_reaches_every_parameter_of_residual_networks(size):
    torch.manual_seed(18)
    encoder = pv.ConvEncoder([(2, *size), (1, 3, 4)], (4, 3), (8,), 3, nn.Tanh, blocks=1)
    decoder = pv.ConvDecoder([3, (1, 3, 4)], (8,), (3, 4), (2, *size), nn.Tanh, blocks=2)
    context = torch.randn(6, 1, 3, 4)
    found = decoder(encoder(torch.randn(6, 2, *size), context), context)
    assert found.shape == (6, 2 * prod(size))
    found.square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_residual_block_is_the_identity_and_what_its_last_convolution_adds():
    torch.manual_seed(19)
    block, x = pv.ResidualBlock(4).double(), torch.randn(3, 4, 5, 7).double()
    last = block.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(4.0))
    torch.testing.assert_close(block(x), x + torch.arange(4.0)[:, None, None])


def test_a_residual_block_normalises_row_by_row():
    torch.manual_seed(20)
    block, x = pv.ResidualBlock(4), torch.randn(3, 4, 5, 7)
    assert not torch.allclose(block(x), x)
    alone = block(x[:1])
    torch.testing.assert_close(block(torch.cat([x[:1], 100 * x[1:]]))[:1], alone)
    # The residual sees the normalized image, so its scale and offset do not matter.
    wide = 50 * x + 7
    torch.testing.assert_close(block(wide) - wide, block(x) - x, rtol=1e-3, atol=1e-3)


def test_images_of_the_context_have_their_own_convolutions():
    torch.manual_seed(21)
    shapes, inputs = [(2, 5, 8), 3, (1, 9, 2)], [torch.randn(4, 2, 5, 8), torch.randn(4, 3)]
    network, context = pv.ConvEncoder(shapes, (3, 4), (8,), 6), torch.randn(4, 1, 9, 2)
    first, second = network.layers.images
    expected = network.head(first(inputs[0]), inputs[1], second(context))
    torch.testing.assert_close(network(*inputs, context), expected)
    assert second(context).shape == (4, 4, 3, 1)
    decoder = pv.ConvDecoder([3, (1, 9, 2)], (8,), (4, 3), (2, 5, 8), nn.Tanh)
    torch.testing.assert_close(decoder.context.shapes, [(3,), (4, 3, 1)])
    moved = context.clone()
    moved[0] += 1
    change = (decoder(inputs[1], moved) != decoder(inputs[1], context)).any(1)
    assert change.tolist() == [True, False, False, False]


def test_conv_decoder_gives_channels_first_pieces_outermost():
    torch.manual_seed(15)
    network, shape = pv.ConvDecoder(3, (8,), (4, 3), (4, 5, 8)), (2, 5, 8)
    z = torch.randn(6, 3)
    raw = network.layers(network.head(z).reshape(6, *network.small))
    fn = pv.Factor(network, pv.Gaussian(), shape)(z)
    torch.testing.assert_close(fn.base_dist.loc, raw[:, :2])
    torch.testing.assert_close(fn.base_dist.scale, bounded_scale(raw[:, 2:], 1e-3, 1e3))


WRONG = [
    ("mlp", [(5, 4), (5, 2)], r"shape \(\.\.\., 3\).*\(5, 4\)"),
    ("mlp", [(5, 3), (5, 3)], r"shape \(\.\.\., 2\).*\(5, 3\)"),
    ("mlp", [(5, 3)], "needs 2 inputs, got 1"),
    ("mlp", [(), (5, 2)], r"shape \(\.\.\., 3\)"),
    ("conv-decoder", [(5, 4), (5, 2)], r"shape \(\.\.\., 3\).*\(5, 4\)"),
    ("conv-encoder", [(4, 2, 5, 8)], "needs 2 inputs, got 1"),
    ("conv-encoder", [(4, 2, 5, 8), (4, 3)], r"shape \(\.\.\., 2\).*\(4, 3\)"),
    ("conv-encoder", [(4, 5, 8, 2), (4, 2)], r"2, 5, 8.*\(4, 5, 8, 2\)"),
    ("conv-encoder", [(4, 1, 5, 8), (4, 2)], r"2, 5, 8.*\(4, 1, 5, 8\)"),
    ("conv-encoder", [(4, 2, 4, 8), (4, 2)], r"2, 5, 8.*\(4, 2, 4, 8\)"),
    ("conv-encoder", [(5, 8), (2,)], r"2, 5, 8.*\(5, 8\)"),
]


@pytest.mark.parametrize(("name", "shapes", "message"), WRONG)
def test_wrong_inputs_are_named_in_one_line(name, shapes, message):
    network = NETWORKS[name][0]()
    with pytest.raises(ValueError, match=message) as caught:
        network(*(torch.zeros(shape) for shape in shapes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_a_network_of_the_wrong_width_is_named_in_one_line(name):
    family = EVERY[name]()
    right = family.outputs((3,))
    factor = pv.Factor(pv.MLP(2, (), right + 1), family, (3,))
    with pytest.raises(pv.UsageError, match=f"needs {right} network outputs, got {right + 1}") as e:
        factor(torch.zeros(5, 2))
    assert "\n" not in str(e.value)
    assert type(family).__name__ in str(e.value)
