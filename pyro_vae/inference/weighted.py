"""Draws of the latents with importance weights: what imputation and scores by entry start from."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pyro_vae.compat import Enumerate
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.pareto import LEAST, pareto_shape
from pyro_vae.inference.passes import summed_out
from pyro_vae.pairs import enumeration
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.sites import data_first, latents
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import log_guide, log_joint, sampled, structure, weights_of


class Weighted(NamedTuple):
    """K draws of the latents of n rows, whose weights are p(x, z) / q(z | x)."""

    batch: Batch
    """The rows, repeated: row i of draw k is row k n + i."""
    values: dict[str, Tensor]
    """The draws by latent site; those of local latents have the K n rows first."""
    log_weights: Tensor
    """Of shape (K, n), in float64."""

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
        """The Pareto shape of the tail of each row's weights, (n,); 0 for constant weights."""
        return steady_shape(self.log_weights, self.batch[0].dtype)


def steady_shape(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The Pareto shape over draws, (K, ...) to (...); 0 if only rounding of this type differs."""
    spread = log_weights.amax(0) - log_weights.amin(0)
    size = log_weights.abs().amax(0).clamp(min=1)
    constant = spread <= 100 * torch.finfo(dtype).eps * size
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
    nesting, vectorized, widest = structure(pair, few)
    draw = _under_a_plate if vectorized and _all_drawn(pair, few) else _repeated
    rows = max(1, CELLS // (max(widest, batch[0][:1].numel()) * num_samples))
    for part in zip(*(tensor.split(rows) for tensor in batch), strict=True):
        yield draw(pair, part, num_samples, nesting)


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
    n = len(batch[0])
    values = {
        name: _rows_first(site["value"], num_samples, n, site["fn"].event_dim)
        for name, site in latents(guide).items()
    }
    many = tuple(tensor.repeat(num_samples, *[1] * (tensor.dim() - 1)) for tensor in batch)
    return Weighted(many, values, weights_of(model, guide, nesting).double())


def _rows_first(value: Tensor, num_samples: int, n: int, event_dim: int) -> Tensor:
    """Draws (samples, plates within a datum, n, *event) as rows (samples n, plates, *event)."""
    value = value.movedim(-1 - event_dim, 1)
    within = list(value.shape[2:])
    while len(within) > event_dim and within[0] == 1:  # empty dimensions between the plates
        within = within[1:]
    return value.reshape(num_samples * n, *within)


def _repeated(pair: nn.Module, batch: Batch, num_samples: int, nesting: int) -> Weighted:
    """Draws of the guide for repeated rows; not every pair broadcasts over a plate of samples."""
    many = tuple(tensor.repeat(num_samples, *[1] * (tensor.dim() - 1)) for tensor in batch)
    guide = trace_guide(pair, many)
    given = {name: site["value"] for name, site in latents(guide).items()}
    # The guide draws all of its latents. Those that only the model has are summed out.
    with Enumerate(first_available_dim=-1 - nesting), Given(given):
        model = trace(cast(Pair, pair).model, many)
    log_weights = (log_joint(model, False) - log_guide(guide, False)).double()
    values = {
        name: data_first(site["value"], site) if is_local(site) else site["value"]
        for name, site in latents(guide).items()
    }
    values |= summed_out(pair, many, guide, means=False)
    return Weighted(many, values, log_weights.expand(len(many[0])).reshape(num_samples, -1))
