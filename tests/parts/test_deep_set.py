"""The pooled network of sets: its formula, by hand."""

import torch
from torch import Tensor, nn

import pyro_vae as pv


class Square(nn.Module):
    """The embedding x^2 c of each member."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.square() * c


class Both(nn.Module):
    """The two inputs of the head, side by side."""

    def forward(self, mean: Tensor, size: Tensor) -> Tensor:
        return torch.cat([mean, size], -1)


def test_the_head_sees_the_mean_of_the_members_that_count_and_their_number():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[..., None]
    c = torch.tensor([[1.0, 10.0, 1.0], [2.0, 1.0, torch.nan]])[..., None]
    counts = torch.tensor([[True, True, True], [True, False, False]])
    mean = torch.tensor([(1 + 40 + 9) / 3, 32.0])
    wanted = torch.stack([mean, torch.tensor([4.0, 2.0]).log()], -1)
    assert torch.allclose(pv.DeepSet(Square(), Both())(x, counts, c), wanted)


def test_more_leading_dimensions():
    torch.manual_seed(0)
    network = pv.DeepSet(pv.MLP(2, (3,), 4), pv.MLP([4, 1], (), 5))
    x, counts = torch.randn(3, 2, 6, 2), torch.rand(2, 6) > 0.3
    found = network(x, counts)
    assert found.shape == (3, 2, 5)
    assert torch.allclose(found[1], network(x[1], counts), atol=1e-6)
