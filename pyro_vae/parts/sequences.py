"""Sequences: a likelihood of tokens that writes one after another, and Markov chains of vectors.

Token 0 ends a sequence; what follows it in a row is padding, which nothing here looks at.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Family
from pyro_vae.parts.networks import Shape
from pyro_vae.parts.recurrent import recur, token_lengths


class Autoregressive(Family):
    r"""Sequences of tokens, each written by an LSTM that has read those before it.

    :math:`p(x|z) = \prod_{t=1}^{\tau} p(x_t \mid x_{<t}, z)`, where :math:`\tau` is the place of
    the first token 0, which ends a sequence, or the end of the row. What follows is padding.

    Arguments:
        tokens: how many tokens there are, 0 to ``tokens - 1``, the end counted.
        embedding_dim: the width of a token's embedding.
        hidden: the units of the LSTM.
        word_dropout: the rate at which, in training only, the LSTM reads an unknown token in place
            of the one before. It must then ask z, which guards against collapse (Bowman et al.,
            2016, https://arxiv.org/abs/1511.06349).

    The network gives what the LSTM knows of z: what is added to each input and to the logits of
    each token, and its first state, ``embedding_dim + tokens + hidden`` outputs. Data are rows of
    tokens as numbers, of shape (length,).

    >>> import torch
    >>> family = Autoregressive(5, embedding_dim=3, hidden=4)
    >>> written = family(torch.zeros(2, family.outputs((6,))), (6,))
    >>> written.sample().shape, written.log_prob(torch.tensor([[3.0, 1, 0, 0, 0, 0]])).shape
    (torch.Size([2, 6]), torch.Size([2]))
    """

    def __init__(
        self, tokens: int, embedding_dim: int = 32, hidden: int = 128, word_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if tokens < 2:
            raise UsageError(f"tokens must be 2 or more, the end counted, {tokens} came")
        if not 0 <= word_dropout <= 1:
            raise UsageError(
                f"must be a rate from 0 to 1, got {word_dropout}", argument="word_dropout"
            )
        self.tokens, self.embedding_dim, self.hidden = tokens, embedding_dim, hidden
        self.word_dropout = word_dropout
        self.writer = Writer(tokens, embedding_dim, hidden)

    def outputs(self, shape: Shape) -> int:
        if len(shape) != 1:
            raise UsageError(f"a row of tokens has shape (length,), {tuple(shape)} came")
        return self.embedding_dim + self.tokens + self.hidden

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        kept = None
        if self.training and self.word_dropout > 0:
            kept = torch.rand(*raw.shape[:-1], *shape, device=raw.device) >= self.word_dropout
        return TokenSequence(self.writer, raw, shape[0], kept)


class Writer(nn.Module):
    """An LSTM over embedded tokens, and the logits of the next one."""

    def __init__(self, tokens: int, embedding_dim: int, hidden: int) -> None:
        super().__init__()
        self.tokens, self.embedding_dim, self.hidden = tokens, embedding_dim, hidden
        self.embedding = nn.Embedding(tokens + 1, embedding_dim)  # the last one is unknown
        self.lstm = nn.LSTM(embedding_dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, tokens)

    def forward(
        self, read: Tensor, condition: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits after each token read, (..., length, tokens), and the state after the last."""
        shift, direct, first = condition.split([self.embedding_dim, self.tokens, self.hidden], -1)
        if state is None:
            state = (first.tanh(), torch.zeros_like(first))
        inputs = self.embedding(read) + shift.unsqueeze(-2)
        outputs, state = recur(self.lstm, inputs, state)
        return self.head(outputs) + direct.unsqueeze(-2), state


class _Remembering(dist.TorchDistribution):
    """A distribution whose log density is costly: it is computed once for a value."""

    has_rsample = False
    arg_constraints: ClassVar[dict[str, Any]] = {}
    _seen: tuple[Tensor, tuple[bool, int], Tensor] | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        state = (torch.is_grad_enabled(), value._version)
        if self._seen is None or self._seen[0] is not value or self._seen[1] != state:
            self._seen = (value, state, self._log_prob(value))
        return self._seen[2]

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class TokenSequence(_Remembering):
    """Rows of tokens, written one after another until token 0 or the end of the row.

    Arguments:
        writer: gives logits of the next token, from those before it and the condition.
        condition: of shape (..., width).
        length: tokens in a row, the end counted.
        kept: which tokens the writer is shown, of shape (..., length); all by default.

    Its ``mode`` is its greedy decoding: the likeliest token at each place, given those before.
    """

    def __init__(
        self, writer: Writer, condition: Tensor, length: int, kept: Tensor | None = None
    ) -> None:
        self.writer, self.condition, self.length, self.kept = writer, condition, length, kept
        super().__init__(condition.shape[:-1], torch.Size([length]), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        tokens = constraints.integer_interval(0, self.writer.tokens - 1)
        return constraints.independent(tokens, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TokenSequence":
        condition = self.condition.expand(*batch_shape, -1)
        kept = None if self.kept is None else self.kept.expand(*batch_shape, -1)
        return TokenSequence(self.writer, condition, self.length, kept)

    def _log_prob(self, value: Tensor) -> Tensor:
        tokens = value.long().clamp(0, self.writer.tokens - 1)
        read = tokens if self.kept is None else torch.where(self.kept, tokens, self.writer.tokens)
        read = F.pad(read[..., :-1], (1, 0))  # a row begins after an end
        logits, _ = self.writer(read, self.condition)
        tokens = tokens.expand(logits.shape[:-1])
        terms = -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        terms = torch.where(tokens == value, terms.reshape(tokens.shape), -torch.inf)
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        inside = places < token_lengths(tokens).unsqueeze(-1)
        return torch.where(inside, terms, 0.0).sum(-1)

    def elements(self, value: Tensor) -> Tensor:
        """How many tokens of each row count, its end among them, of shape (...)."""
        return token_lengths(value.long())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape

        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)

        return self._write(self.condition.expand(*shape, -1), draw)

    @property
    def mean(self) -> Tensor:
        """NaN, as torch has it of categories: tokens are names."""
        shape = (*self.condition.shape[:-1], self.length)
        return self.condition.new_full(shape, torch.nan)

    @property
    def mode(self) -> Tensor:
        """The row whose tokens are each the most probable after those before."""
        return self._write(self.condition, lambda logits: logits.argmax(-1))

    @torch.no_grad()
    def _write(self, condition: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        rows = condition.reshape(-1, condition.shape[-1])
        written = [torch.zeros(len(rows), dtype=torch.long, device=rows.device)]
        ended, state = torch.zeros_like(written[0], dtype=torch.bool), None
        for _ in range(self.length):
            logits, state = self.writer(written[-1].unsqueeze(-1), rows, state)
            written.append(choose(logits.squeeze(-2)).masked_fill(ended, 0))
            ended = ended | (written[-1] == 0)
        tokens = torch.stack(written[1:], -1).to(condition.dtype)
        return tokens.reshape(*condition.shape[:-1], self.length)


class MarkovChain(_Remembering):
    r"""A trajectory as one event of shape (steps, d), each vector drawn given the one before.

    :math:`p(z_{1:T}) = \prod_t p(z_t \mid z_{t-1}, h_t)`, drawn step by step, scored all at once.

    Arguments:
        step: returns the distribution of :math:`z_t`, over vectors, from the vector before and,
            where there are inputs, from those of its step; takes any leading dimensions.
        start: :math:`z_0`, of shape (d,).
        inside: which steps count, of shape (..., steps); a trajectory is 0 at the others.
        inputs: :math:`h`, of shape (..., steps, width).

    Its ``mean`` goes from mean to mean, which is the mean where steps are linear.

    >>> import torch, pyro_vae as pv
    >>> def step(before):
    ...     return dist.Normal(0.5 * before, 1.0).to_event(1)
    >>> chain = MarkovChain(step, torch.zeros(2), torch.ones(3, 4))
    >>> z = chain.rsample()
    >>> z.shape, chain.log_prob(z).shape
    (torch.Size([3, 4, 2]), torch.Size([3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "inputs": constraints.independent(constraints.real, 2)
    }
    has_rsample = True

    def __init__(
        self,
        step: Callable[..., Any],
        start: Tensor,
        inside: Tensor,
        inputs: Tensor | None = None,
    ) -> None:
        self.step, self.start, self.inside, self.inputs = step, start, inside.bool(), inputs
        shape = inside.shape[:-1]
        if inputs is not None:
            shape = torch.broadcast_shapes(shape, inputs.shape[:-2])
        event = torch.Size([inside.shape[-1], start.shape[-1]])
        super().__init__(shape, event, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MarkovChain":
        inputs = self.inputs
        if inputs is not None:
            inputs = inputs.expand(*batch_shape, *inputs.shape[-2:])
        inside = self.inside.expand(*batch_shape, -1)
        return MarkovChain(self.step, self.start, inside, inputs)

    def terms(self, value: Tensor) -> Tensor:
        """The log density of each step given the one before, 0 outside, of shape (..., steps)."""
        first = self.start.expand(*value.shape[:-2], 1, -1)
        before = torch.cat([first, value[..., :-1, :]], -2)
        inputs = () if self.inputs is None else (self.inputs,)
        return torch.where(self.inside, self.step(before, *inputs).log_prob(value), 0.0)

    def _log_prob(self, value: Tensor) -> Tensor:
        return self.terms(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._walk(torch.Size(sample_shape), lambda fn: fn.rsample())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self._walk(torch.Size(), lambda fn: fn.mean)

    def _walk(self, sample_shape: torch.Size, choose: Callable[[Any], Tensor]) -> Tensor:
        z = self.start.expand(*sample_shape, *self.batch_shape, -1)
        path = []
        for t in range(self.event_shape[0]):
            inputs = () if self.inputs is None else (self.inputs[..., t, :],)
            z = choose(self.step(z, *inputs))
            path.append(torch.where(self.inside[..., t, None], z, 0.0))
        return torch.stack(path, -2)


def elements(fn: Any, value: Tensor) -> Tensor:
    """How many numbers of each datum its distribution scores: all, but for what is masked."""
    if hasattr(fn, "elements"):
        return fn.elements(value)
    if isinstance(fn, torch.distributions.Independent):
        inner = elements(fn.base_dist, value)
        return inner.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    mask = getattr(fn, "_mask", True)
    each = torch.ones(value.shape[: value.dim() - len(fn.event_shape)], device=value.device)
    each = each * cast(int, fn.event_shape.numel())
    return each * mask if isinstance(mask, Tensor) else each
