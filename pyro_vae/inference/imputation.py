"""Impute missing entries from their posterior, with the reliability of each row's imputation."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.compat import UNOBSERVED_PART
from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Arrays, Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.passes import observation
from pyro_vae.inference.weighted import Weighted, require_samples, weighted_parts
from pyro_vae.pairs import masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import has_mean, typical
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first, data_site
from pyro_vae.pairs.threads import alone

IMPUTED_ROWS = 500
"""Rows that are prepared at once."""


@dataclass(frozen=True)
class Imputation:
    """The missing entries of rows, drawn from their posterior given the observed entries."""

    mean: Tensor
    """Rows (n, *data_shape): observed entries as they are; missing entries are posterior means, or
    the most probable class."""
    draws: Tensor
    """Complete rows, (draws, n, *data_shape), independent given the importance weights."""
    low: Tensor
    """The lower end of the central posterior interval of each entry, (n, *data_shape). Intervals of
    classes have no meaning."""
    high: Tensor
    """The upper end of this interval."""
    level: float
    """The probability of the intervals."""
    missing: Tensor
    """Which entries are missing, booleans (n, *data_shape)."""
    effective_sample_size: Tensor
    """Of the importance weights of each row, (n,); ``num_samples`` for a complete row."""
    pareto_k: Tensor
    """The Pareto shape of the tail of each row's weights, (n,). Over 0.7 the imputation of the row
    is not reliable. It is 0 for a complete row."""
    num_samples: int
    """Importance samples of each row."""

    def __str__(self) -> str:
        rows = self.missing.flatten(1).any(1)
        bad = int((self.pareto_k[rows] > 0.7).sum())
        size = self.effective_sample_size[rows].median() if rows.any() else torch.tensor(torch.nan)
        lines = [
            ("missing entries", f"{int(self.missing.sum())} in {int(rows.sum())} rows"),
            ("draws", f"{len(self.draws)}"),
            ("effective samples", f"{100 * float(size) / self.num_samples:.1f} % (median)"),
            ("Pareto k over 0.7", f"{bad} rows, whose imputations are not reliable"),
        ]
        return "\n".join(f"{name:<20}{value}" for name, value in lines)


@alone()
def impute(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    draws: int = 20,
    num_samples: int = 1000,
    level: float = 0.9,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = False,
) -> Imputation:
    r"""Draw the missing entries of rows from their posterior given the observed entries.

    Latents :math:`z_k \sim q(z|x_{obs})` get weights :math:`w_k \propto p(x_{obs}, z_k) /
    q(z_k|x_{obs})`. The mean is :math:`\sum_k w_k E[x_{miss}|z_k]`; a draw takes one
    :math:`z_k` with probability :math:`w_k`, and then :math:`x_{miss} \sim p(x|z_k)`.

    Arguments:
        pair: any pair that masks missing entries. They are NaN in x or, if x is an array without
            NaN, the entries that a mask of the model hides (docs/missing-values.md). If the model
            has a latent site ``x_unobserved`` beside its site ``x``, the entries are the draws of
            this latent.
        x, context: the data, as `pyro_vae.log_likelihood` takes them.
        draws: the number of complete copies of the data (multiple imputations), at least 1.
        num_samples: importance samples of each row, at least 21.
        level: the probability of the intervals, which use all importance samples.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar.

    For a better proposal, refine the guide first: ``refined = pv.refine(pair, x)``, and then
    ``impute(refined.pair, *refined.batch)``. Global latents have one draw for each pass.
    Raises `UsageError` if ``draws`` or ``num_samples`` is too small, or if no entry is missing.
    Mattei & Frellsen, MIWAE, 2019 (https://arxiv.org/abs/1812.02633).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((3,), latent_dim=2, likelihood=pv.Missing(pv.Gaussian))
    >>> found = impute(vae, torch.tensor([[1.0, torch.nan, 2.0]]), draws=5, num_samples=100)
    >>> found.draws.shape, found.mean[0, 2]
    (torch.Size([5, 1, 3]), tensor(2.))
    """
    if draws < 1:
        raise UsageError(f"must be at least 1, got {draws}", argument="draws")
    if not 0 < level < 1:
        raise UsageError(f"must be between 0 and 1, got {level}", argument="level")
    require_samples(num_samples)
    rows, prepare = held_rows(pair, x, context, binarize)
    by_mask = not (isinstance(rows, Arrays) and bool(rows.tensors[0].isnan().any()))
    parts: list[Imputation] = []
    with using(pair, seed), torch.no_grad(), bar(progress, len(rows), "impute") as shown:
        for raw in rows.batches(IMPUTED_ROWS):
            parts.append(_imputed(pair, prepare(raw), by_mask, draws, num_samples, level))
            shown.update(len(raw[0]))
    found = _joined(parts)
    if not bool(found.missing.any()):
        raise UsageError("x has no missing entry, so nothing is to be imputed")
    return found


def _imputed(
    pair: nn.Module, batch: Batch, by_mask: bool, draws: int, num_samples: int, level: float
) -> Imputation:
    """The imputation of a prepared batch; complete rows stay as they are."""
    x = batch[0]
    missing = x.isnan()
    if by_mask:
        site = data_site(trace_model(pair, batch, trace_guide(pair, batch)))
        missing = masks.seen(site, x).isnan()
    holes = missing.flatten(1).any(1)
    mean, low, high = x.clone(), x.clone(), x.clone()
    drawn = x.expand(draws, *x.shape).clone()
    size, k = (x.new_full((len(x),), v, dtype=torch.double) for v in (float(num_samples), 0.0))
    if bool(holes.any()):
        few = tuple(part[holes] for part in batch)
        parts = [
            _posterior(pair, one, draws, level) for one in weighted_parts(pair, few, num_samples)
        ]
        for full, name in ((mean, "mean"), (low, "low"), (high, "high")):
            new = torch.cat([getattr(part, name) for part in parts])
            full[holes] = torch.where(missing[holes], new, full[holes])
        new = torch.cat([part.draws for part in parts], 1)
        drawn[:, holes] = torch.where(missing[holes], new, drawn[:, holes])
        size[holes] = torch.cat([part.effective_sample_size for part in parts])
        k[holes] = torch.cat([part.pareto_k for part in parts])
    found = (mean, drawn, low, high, missing, size, k)
    mean, drawn, low, high, missing, size, k = (value.cpu() for value in found)
    return Imputation(mean, drawn, low, high, level, missing, size, k, num_samples)


class _Completed(NamedTuple):
    """What weighted draws say about complete rows; see `Imputation`."""

    mean: Tensor
    draws: Tensor
    low: Tensor
    high: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor


def _posterior(pair: nn.Module, part: Weighted, draws: int, level: float) -> _Completed:
    site = observation(pair, part.batch, part.values)
    like, shares = part.batch[0], part.shares
    shape = (*shares.shape, *like.shape[1:])
    drawn = data_first(site["value"], site).reshape(shape).to(like.dtype)
    centers = data_first(typical(site["fn"]), site).reshape(shape)
    classes = ~data_first(has_mean(site["fn"]), site).reshape(shape)[0]
    if (own := part.values.get(f"{site['name']}{UNOBSERVED_PART}")) is not None:
        drawn = centers = own.reshape(shape)  # the latent is part of the weights
    wide = shares.reshape(*shares.shape, *[1] * (like.dim() - 1)).to(like.dtype)
    mean = (wide * centers).sum(0)
    if bool(classes.any()):
        mean = torch.where(classes, _most_probable(drawn, wide, classes), mean)
    chosen = torch.multinomial(shares.T, draws, replacement=True).T  # (draws, n)
    rows = torch.arange(shares.shape[1], device=chosen.device)
    low, high = _quantiles(drawn, wide, ((1 - level) / 2, (1 + level) / 2))
    return _Completed(
        mean, drawn[chosen, rows], low, high, part.effective_sample_size, part.pareto_k
    )


def _quantiles(drawn: Tensor, weights: Tensor, levels: tuple[float, float]) -> list[Tensor]:
    """Weighted quantiles over draws (K, n, ...): where the sum of the weights passes a level."""
    ordered, order = drawn.sort(0)
    below = weights.expand_as(drawn).gather(0, order).cumsum(0)
    found = []
    for level in levels:
        at = (below < level * below[-1:]).sum(0, keepdim=True).clamp(max=len(drawn) - 1)
        found.append(ordered.gather(0, at)[0])
    return found


def _most_probable(drawn: Tensor, weights: Tensor, classes: Tensor) -> Tensor:
    """The value with the largest weight over the draws, for entries that are classes."""
    values = drawn[:, classes].unique()
    votes = torch.stack([((drawn == value) * weights).sum(0) for value in values])
    return values[votes.argmax(0)]


def _joined(parts: list[Imputation]) -> Imputation:
    by_row = ("mean", "low", "high", "missing", "effective_sample_size", "pareto_k")
    whole: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in by_row
    }
    return replace(parts[0], draws=torch.cat([part.draws for part in parts], 1), **whole)
