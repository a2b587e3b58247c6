"""Recurrent networks: torch modules over sequences (..., steps, width), padded at the end."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.parts.networks import MLP, Shape


class TokenEncoder(nn.Module):
    """Two LSTMs that read a row of tokens from both ends, and a linear map of their mean states.

    The mean of all states learns faster than the last state. The linear map also sees the context.

    Arguments:
        tokens: the number of different tokens. Token 0 ends a row; the tokens after it are ignored.
        embedding_dim: the width of a token's embedding.
        hidden: the units of each LSTM.
        outputs: the width of the output.
        context: the shape of each context tensor.

    Rows have shape (..., length) and hold integers of any type.

    >>> import torch
    >>> TokenEncoder(5, 3, 8, 4)(torch.tensor([[2.0, 1, 0, 0], [4, 3, 2, 1]])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        tokens: int,
        embedding_dim: int,
        hidden: int,
        outputs: int,
        context: Sequence[int | Shape] = (),
    ) -> None:
        super().__init__()
        self.tokens, self.embedding_dim, self.hidden = tokens, embedding_dim, hidden
        self.outputs, self.context = outputs, tuple(context)
        self.embedding = nn.Embedding(tokens, embedding_dim)
        self.rightwards = nn.LSTM(embedding_dim, hidden, batch_first=True)
        self.leftwards = nn.LSTM(embedding_dim, hidden, batch_first=True)
        self.head = MLP([2 * hidden, *context], (), outputs)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        tokens = x.long().clamp(0, self.tokens - 1)
        lengths = token_lengths(tokens)
        inputs = self.embedding(tokens)
        inside = torch.arange(x.shape[-1], device=x.device) < lengths.unsqueeze(-1)
        both = (
            recur(self.rightwards, inputs)[0],
            recur(self.leftwards, backwards(inputs, lengths))[0],
        )
        states = torch.where(inside.unsqueeze(-1), torch.cat(both, -1), 0.0)
        return self.head(states.sum(-2) / lengths.unsqueeze(-1), *context)


class BackwardLSTM(nn.Module):
    """An LSTM that reads a sequence backward; its state at a step summarizes the rest from there.

    Arguments:
        inputs: the width of each step.
        hidden: the units of the LSTM.

    Sequences have shape (..., steps, inputs), or another shape of each step of the same size, and
    their lengths have shape (...,). The states have shape (..., steps, hidden); beyond the length
    they have no meaning.

    >>> import torch
    >>> BackwardLSTM(2, 5)(torch.zeros(3, 4, 2), torch.tensor([4, 2, 1])).shape
    torch.Size([3, 4, 5])
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x.flatten(lengths.dim() + 1)
        return backwards(recur(self.lstm, backwards(x, lengths))[0], lengths)


class GatedTransition(nn.Module):
    r"""A gated transition between states: a gate mixes a linear map and a multilayer perceptron.

    :math:`\mu(z) = (1 - g(z)) \odot (W z + b) + g(z) \odot h(z)`. The unbounded scale is a function
    of :math:`h(z)`. The linear map starts as the identity.

    Arguments:
        latent_dim: the dimension d of a state.
        hidden: the hidden units of the gate g and of the perceptron h.

    The output has shape (..., 2 d), as `pyro_vae.DiagonalNormal` needs it.
    Krishnan, Shalit & Sontag, 2017 (https://arxiv.org/abs/1609.09869).

    >>> import torch
    >>> GatedTransition(3, 8)(torch.zeros(5, 3)).shape
    torch.Size([5, 6])
    """

    def __init__(self, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.latent_dim, self.hidden = latent_dim, hidden
        self.linear = nn.Linear(latent_dim, latent_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.gate = MLP(latent_dim, (hidden,), latent_dim)
        self.proposal = MLP(latent_dim, (hidden,), latent_dim)
        self.scale = nn.Linear(latent_dim, latent_dim)

    def forward(self, z: Tensor) -> Tensor:
        proposal = self.proposal(z)
        loc = torch.lerp(self.linear(z), proposal, self.gate(z).sigmoid())
        return torch.cat([loc, self.scale(proposal.relu())], -1)


def recur(
    lstm: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM of one layer over (..., steps, width); return its outputs and its last state.

    The first state is two tensors of shape (..., hidden); the default is 0.
    """
    leading = inputs.shape[:-2]
    flat = inputs.reshape(-1, *inputs.shape[-2:])
    if state is None:
        state = (flat.new_zeros(lstm.hidden_size),) * 2
    # cuDNN wants its first state without gaps.
    states = [s.expand(*leading, -1).reshape(1, len(flat), -1).contiguous() for s in state]
    # The module would use its own list of weights, which does not contain the inputs of a graph.
    outputs, *after = torch.lstm(
        flat, states, list(lstm.parameters()), True, 1, 0.0, True, False, True
    )
    h, c = (s.reshape(*leading, -1) for s in after)
    return outputs.reshape(*leading, *outputs.shape[-2:]), (h, c)


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse sequences (..., steps, width) within their lengths (...,).

    >>> backwards(torch.tensor([[1], [2], [3], [9]]), torch.tensor(3)).flatten()
    tensor([3, 2, 1, 1])
    """
    places = torch.arange(x.shape[-2], device=x.device)
    turned = (lengths[..., None] - 1 - places).clamp(min=0)
    return x.gather(-2, turned[..., None].expand(x.shape))


def token_lengths(tokens: Tensor) -> Tensor:
    """The number of tokens of each row (..., length) up to and including the first 0.

    >>> token_lengths(torch.tensor([[3, 0, 0, 0], [3, 2, 1, 2], [0, 1, 1, 1]]))
    tensor([2, 4, 1])
    """
    ended = (tokens == 0).cumsum(-1)
    return (tokens.shape[-1] + 1 - (ended > 0).sum(-1)).clamp(max=tokens.shape[-1])
