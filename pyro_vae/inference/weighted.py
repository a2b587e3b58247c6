"""Draws of the latents with importance weights: what imputation and scores by entry start from."""

from collections.abc import Iterator, Sequence
from math import log
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, shared_rows
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.pareto import LEAST, pareto_shape, threshold, unreliable
from pyro_vae.inference.passes import summed_out
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.given_globals import draw_globals, pools
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.processes import Team
from pyro_vae.pairs.rng import derived, seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import by_datum, data_first, latents, log_prob
from pyro_vae.pairs.traces import Given
from pyro_vae.pairs.weights import (
    draws_first,
    log_density,
    log_weights_alone,
    own_dims,
    sampled,
    structure,
    weights_of,
)


class Weighted(NamedTuple):
    """K draws of the latents of n rows, whose weights are p(x, z) / q(z | x)."""

    batch: Batch
    """The rows, repeated: row i of draw k is row k n + i. With ``blocks``, the rows once."""
    values: dict[str, Tensor]
    """The draws by latent site; those of local latents have the K n rows first. With ``blocks``,
    they are there."""
    log_weights: Tensor
    """Of shape (K, n), in float64."""
    blocks: tuple["Weighted", ...] = ()
    """The same draws in parts, if each part has its own draw of the global latents."""
    fitted: bool = False
    """Whether the weights of each block are divided by their mean: see `mixed_parts`."""

    @property
    def passes(self) -> tuple["Weighted", ...]:
        """The parts of the draws for which the model runs once, with one value of each global."""
        return self.blocks or (self,)

    @property
    def shares(self) -> Tensor:
        """The weights of a row, divided by their sum, (K, n)."""
        return self.log_weights.softmax(0)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2, (n,)."""
        return 1 / self.shares.square().sum(0)

    @property
    def pareto_k(self) -> Tensor:
        """The Pareto shape of the tail of each row's weights, (n,); 0 for constant weights.

        The mean of few weights is nearly the largest of them, and a weight divided by it is
        bounded. So for weights of fitted blocks, the shape is that of weights divided by the median
        of their block.
        """
        weights = self.log_weights
        if self.fitted:
            weights = torch.cat([_around_median(one.log_weights) for one in self.blocks])
        return steady_shape(weights, self.batch[0].dtype)

    @property
    def r_hat(self) -> Tensor:
        """NaN, (n,): independent draws have no chains."""
        return torch.full_like(self.effective_sample_size, torch.nan)

    @property
    def reliable(self) -> Tensor:
        """Whether the weights of each row give reliable means with so many draws, (n,)."""
        samples = len(self.log_weights)
        deviation = (samples * self.shares.square().sum(0) - 1).clamp(min=0).sqrt()
        parts = self.blocks if self.fitted else (self,)  # each mean of weights needs enough of them
        enough = threshold(min(len(part.log_weights) for part in parts))
        return ~unreliable(self.pareto_k, deviation, enough)


def _around_median(log_weights: Tensor) -> Tensor:
    """Log weights minus their median over draws (K, n), or minus the largest if it is infinite."""
    middle = log_weights.median(0).values
    middle = torch.where(middle.isfinite(), middle, log_weights.amax(0))
    return torch.where(middle.isfinite(), log_weights - middle, log_weights)


def steady_shape(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The Pareto shape over draws, (K, ...) to (...); 0 if only rounding of this type differs."""
    spread = log_weights.amax(0) - log_weights.amin(0)
    size = log_weights.abs().amax(0).clamp(min=1)
    kind = dtype if dtype.is_floating_point else torch.get_default_dtype()
    constant = spread <= 100 * torch.finfo(kind).eps * size
    shape = pareto_shape(log_weights.reshape(len(log_weights), -1).T).reshape(constant.shape)
    return torch.where(constant, 0.0, shape)


def require_samples(num_samples: int) -> None:
    if num_samples < LEAST:
        raise UsageError(
            f"must be at least {LEAST}, which Pareto k needs, got {num_samples}",
            argument="num_samples",
        )


def weighted_parts(pair: nn.Module, batch: Batch, num_samples: int) -> Iterator[Weighted]:
    """Weighted draws of a prepared batch, some rows at a time.

    Call this inside `pyro_vae.pairs.scope.using`.
    """
    few = tuple(tensor[:2] for tensor in batch)
    nesting, vectorized, _ = structure(pair, few)
    draw = _under_a_plate if vectorized and _all_drawn(pair, few) else weighted
    rows = rows_at_once(pair, batch, num_samples)
    for part in zip(*(tensor.split(rows) for tensor in batch), strict=True):
        yield draw(pair, part, num_samples, nesting)


def mixed_parts(
    pair: nn.Module, batch: Batch, num_samples: int, fitted: bool = False, seed: int = 0
) -> Iterator[Weighted]:
    """`weighted_parts`, with many draws of the global latents among the draws of each row.

    Each draw of a row has its own draw of the global latents, because weights with a common one are
    not independent.

    Arguments:
        fitted: the guide of the global latents was fitted to these rows, so they do not weigh its
            draws again: all draws of the global latents have equal weight. Several draws of the
            local latents share each of them.
        seed: the seed of the draws of the global latents, which are then the same for all rows.

    Call `require_not_pooled` before, with all rows of the batch.
    """
    if not (names := global_latents(pair, batch)):
        yield from weighted_parts(pair, batch, num_samples)
        return
    few = tuple(tensor[[0, -1]] for tensor in batch)  # two rows, so that all calls draw alike
    sizes = shares_of(pair, batch, num_samples, fitted)
    nesting, _, _ = structure(pair, few)
    shared = []
    for i in range(len(sizes)):
        with seeded(derived(seed, "global latents", i)):
            shared.append(draw_globals(pair, few, names))
    rows = MANY * rows_at_once(pair, batch, num_samples)
    for part in zip(*(tensor.split(rows) for tensor in batch), strict=True):
        blocks = tuple(
            _weighted_at(pair, part, size, nesting, values)
            for size, values in zip(sizes, shared, strict=True)
        )
        weights = [block.log_weights for block in blocks]
        if fitted:
            weights = [one - one.logsumexp(0) + log(len(one)) for one in weights]
        yield Weighted(part, {}, torch.cat(weights), blocks, fitted)


def _weighted_at(
    pair: nn.Module, batch: Batch, num_samples: int, nesting: int, shared: dict[str, Tensor]
) -> Weighted:
    """`weighted` with these values of the global latents."""
    with Given(shared):
        return weighted(pair, batch, num_samples, nesting)


def shares_of(pair: nn.Module, batch: Batch, num_samples: int, fitted: bool) -> list[int]:
    """How many draws of `mixed_parts` share each draw of the global latents; all if it has none."""
    if not global_latents(pair, batch):
        return [num_samples]
    number = min(GLOBAL_DRAWS, max(1, num_samples // LEAST)) if fitted else num_samples
    return [num_samples // number + (i < num_samples % number) for i in range(number)]


def require_not_pooled(pair: nn.Module, batch: Batch) -> None:
    """Raise `UsageError` if the guide computes global latents from the rows that it is given."""
    names = global_latents(pair, batch)
    if pools(pair, batch, names):
        raise UsageError(
            f"the guide computes {', '.join(map(repr, names))} from the rows that it is given, "
            "which here are parts of the data and their copies: use pyro_vae.log_likelihood or "
            "pyro_vae.posterior"
        )


WEIGHED_ROWS = 500
"""Rows that are prepared at once."""


def rows_to_weigh(
    team: Team, pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str
) -> tuple[Source, Preparation]:
    """Rows of which each process of a team takes some minibatches.

    Raises `UsageError` if the guide pools rows. A process might not see this in its own few rows.
    """
    rows, prepare = shared_rows(team, pair, x, context, binarize)
    if team.count > 1:
        with using(pair, seed=0):
            require_not_pooled(pair, prepare(rows.first(WEIGHED_ROWS)))
    return rows, prepare


GLOBAL_DRAWS = 200
"""The most draws of global latents whose guide was fitted to the rows."""

MANY = 4
"""How many times as much memory may be used, so that each draw of them serves several rows."""


def rows_at_once(pair: nn.Module, batch: Batch, num_samples: int) -> int:
    """How many rows fit into memory if each is repeated ``num_samples`` times."""
    _, _, widest = structure(pair, tuple(tensor[:2] for tensor in batch))
    return max(1, CELLS // (max(widest, batch[0][:1].numel()) * num_samples))


def repeated(batch: Batch, number: int) -> Batch:
    """The rows of a batch, repeated: row i of copy k is row k n + i."""
    return tuple(tensor.repeat(number, *[1] * (tensor.dim() - 1)) for tensor in batch)


def _all_drawn(pair: nn.Module, few: Batch) -> bool:
    """Whether all latents are local and drawn by the guide, none summed out."""
    guide = trace_guide(pair, few)
    model = trace_model(pair, few, guide)
    sites = latents(guide)
    return (
        not enumeration.to_enumerate(guide)
        and latents(model).keys() <= sites.keys()
        and all(is_local(site) for site in sites.values())
    )


def _under_a_plate(pair: nn.Module, batch: Batch, num_samples: int, nesting: int) -> Weighted:
    """Draws under a plate of samples, so that the encoder runs once for each row."""
    model, guide = sampled(pair, batch, num_samples, nesting)
    values = {
        name: draws_first(site["value"], own_dims(site, nesting), site["fn"].event_dim).flatten(
            0, 1
        )
        for name, site in latents(guide).items()
    }
    return Weighted(
        repeated(batch, num_samples), values, weights_of(model, guide, nesting).double()
    )


def weighted(pair: nn.Module, batch: Batch, num_samples: int, nesting: int) -> Weighted:
    """Draws of the guide and their weights, for all rows of a batch at once.

    Latents that the guide enumerates are drawn, too, because the draws must fit together: the
    weights are p(x, z, y) / q(z, y | x). Latents that only the model enumerates are summed out of
    the weights, and drawn given the others.
    """
    many = repeated(batch, num_samples)
    guide = trace_guide(pair, many)
    log_weights = _log_weights(pair, many, guide, nesting).double()
    values = {
        name: data_first(site["value"], site) if is_local(site) else site["value"]
        for name, site in latents(guide).items()
    }
    values |= summed_out(pair, many, guide, means=False)
    return Weighted(many, values, log_weights.reshape(num_samples, -1))


def log_weights_at(pair: nn.Module, batch: Batch, values: dict[str, Tensor]) -> Tensor:
    """The log weights of given latents of each row, (n,), as those of `weighted_parts`."""
    nesting, _, _ = structure(pair, tuple(tensor[:2] for tensor in batch))
    with Given(values):
        guide = trace_guide(pair, batch)
    return _log_weights(pair, batch, guide, nesting).double().reshape(-1)


def _log_weights(pair: nn.Module, batch: Batch, guide: Trace, nesting: int) -> Tensor:
    """The log weights of the draws in a trace of the guide."""
    if not enumeration.to_enumerate(guide):
        drawn = {name: site["value"] for name, site in latents(guide).items()}
        return log_weights_alone(pair, batch, nesting, drawn)
    model = enumeration.enumerated_model(pair, batch, guide)
    if enumeration.enumerated(model):
        return summing.evidence(model, guide)
    local = (site for site in latents(guide).values() if is_local(site))
    log_q = sum(by_datum(log_prob(site), particles=False) for site in local)
    return log_density(model, False) - log_q
