"""Sequences: an autoregressive likelihood of tokens, and Markov chains of vectors.

Token 0 ends a sequence. The tokens after it in a row are padding, and this module ignores them.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.compat import mask_of, version
from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Family
from pyro_vae.parts.networks import Shape
from pyro_vae.parts.recurrent import recur, token_lengths


class Autoregressive(Family):
    r"""Sequences of tokens, where an LSTM predicts each token from the tokens before it.

    :math:`p(x|z) = \prod_{t=1}^{\tau} p(x_t \mid x_{<t}, z)`, where :math:`\tau` is the position of
    the first token 0, which ends the sequence, or the end of the row. Later tokens are padding.

    Arguments:
        tokens: the number of different tokens, 0 to ``tokens - 1``, including the end token 0; at
            least 2.
        embedding_dim: the width of a token's embedding.
        hidden: the units of the LSTM.
        word_dropout: the rate at which the LSTM reads an unknown token instead of the previous
            token, only in training. The LSTM then has to use z, which counteracts posterior
            collapse (Bowman et al., 2016, https://arxiv.org/abs/1511.06349).

    The network outputs three vectors, ``embedding_dim + tokens + hidden`` outputs: a shift of the
    LSTM's inputs, a shift of its logits, and its first state. Data are rows of tokens as numbers,
    of shape (length,).

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
            raise UsageError(
                f"must be at least 2, including the end token, got {tokens}", argument="tokens"
            )
        if not 0 <= word_dropout <= 1:
            raise UsageError(
                f"must be a rate from 0 to 1, got {word_dropout}", argument="word_dropout"
            )
        self.tokens, self.embedding_dim, self.hidden = tokens, embedding_dim, hidden
        self.word_dropout = word_dropout
        self.writer = Writer(tokens, embedding_dim, hidden)

    def outputs(self, shape: Shape) -> int:
        if len(shape) != 1:
            raise UsageError(f"rows of tokens must have shape (length,), got {tuple(shape)}")
        return self.embedding_dim + self.tokens + self.hidden

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        kept = None
        if self.training and self.word_dropout > 0:
            kept = torch.rand(*raw.shape[:-1], *shape, device=raw.device) >= self.word_dropout
        return TokenSequence(self.writer, raw, shape[0], kept)


class Writer(nn.Module):
    """An LSTM over embedded tokens that returns the logits of the next token."""

    def __init__(self, tokens: int, embedding_dim: int, hidden: int) -> None:
        super().__init__()
        self.tokens, self.embedding_dim, self.hidden = tokens, embedding_dim, hidden
        self.embedding = nn.Embedding(tokens + 1, embedding_dim)  # the last token means "unknown"
        self.lstm = nn.LSTM(embedding_dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, tokens)

    def forward(
        self, read: Tensor, condition: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits after each token, of shape (..., length, tokens), and the last state."""
        shift, direct, first = condition.split([self.embedding_dim, self.tokens, self.hidden], -1)
        if state is None:
            state = (first.tanh(), torch.zeros_like(first))
        inputs = self.embedding(read) + shift.unsqueeze(-2)
        outputs, state = recur(self.lstm, inputs, state)
        return self.head(outputs) + direct.unsqueeze(-2), state


class _Remembering(dist.TorchDistribution):
    """A distribution that remembers its last log density, because it is expensive to compute."""

    has_rsample = False
    arg_constraints: ClassVar[dict[str, Any]] = {}
    _seen: tuple[Tensor, tuple[bool, int], Tensor] | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        state = (torch.is_grad_enabled(), version(value))
        if self._seen is None or self._seen[0] is not value or self._seen[1] != state:
            self._seen = (value, state, self._log_prob(value))
        return self._seen[2]

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class TokenSequence(_Remembering):
    """Rows of tokens, drawn one after another until token 0 or the end of the row.

    Arguments:
        writer: returns the logits of the next token, given the tokens before it and the condition.
        condition: what the writer knows of z, of shape (..., width).
        length: the number of tokens in a row, including the end token.
        kept: which tokens the writer sees, of shape (..., length); the default is all.

    Its ``mode`` is the greedy decoding: the most probable token at each position, given the tokens
    before it.
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
        read = F.pad(read[..., :-1], (1, 0))  # the end token 0 also marks the start of a row
        logits, _ = self.writer(read, self.condition)
        tokens = tokens.expand(logits.shape[:-1])
        terms = -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        terms = torch.where(tokens == value, terms.reshape(tokens.shape), -torch.inf)
        return torch.where(self.counted(tokens), terms, 0.0).sum(-1)

    def counted(self, value: Tensor) -> Tensor:
        """Which tokens count, of shape (..., length): those up to the end token."""
        places = torch.arange(value.shape[-1], device=value.device)
        return places < token_lengths(value).unsqueeze(-1)

    def elements(self, value: Tensor) -> Tensor:
        """The number of tokens of each row, including its end token, of shape (...)."""
        return token_lengths(value.long())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape

        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)

        return self._write(self.condition.expand(*shape, -1), draw)

    @property
    def mean(self) -> Tensor:
        """NaN, as in torch's Categorical, because tokens do not have a mean."""
        shape = (*self.condition.shape[:-1], self.length)
        return self.condition.new_full(shape, torch.nan)

    @property
    def mode(self) -> Tensor:
        """The row in which each token is the most probable one, given the tokens before it."""
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
    r"""A trajectory as one event of shape (steps, d); each vector depends on the previous one.

    :math:`p(z_{1:T}) = \prod_t p(z_t \mid z_{t-1}, h_t)`. Draws are made step by step. The log
    density is computed for all steps at once.

    Arguments:
        step: returns the distribution of the vector :math:`z_t`, given the previous vector and, if
            there are inputs, :math:`h_t`; it must accept any leading dimensions.
        start: :math:`z_0`, of shape (d,).
        inside: which steps count, of shape (..., steps); a trajectory is 0 at other steps.
        inputs: :math:`h`, of shape (..., steps, width).

    ``mean`` takes the mean of each step, given the mean of the previous step. This is the mean of
    the trajectory if the steps are linear.

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
        """The log density of each step given the previous one, (..., steps); 0 for other steps."""
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
    """The number of entries of each datum that count in its log density, without masked entries."""
    if hasattr(fn, "elements"):
        return fn.elements(value)
    if isinstance(fn, torch.distributions.Independent):
        inner = elements(fn.base_dist, value)
        return inner.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    mask = mask_of(fn)
    each = torch.ones(value.shape[: value.dim() - len(fn.event_shape)], device=value.device)
    each = each * cast(int, fn.event_shape.numel())
    return each * mask if isinstance(mask, Tensor) else each
