"""Impute missing entries from their posterior, with the reliability of each row's imputation."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import UNOBSERVED_PART
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sizes import require_memory
from pyro_vae.data.sources import Arrays, Rows, Source
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.chained import Chained, chained_parts
from pyro_vae.inference.pareto import LEAST, threshold
from pyro_vae.inference.passes import HiddenDrawn, observation
from pyro_vae.inference.refinement import refine
from pyro_vae.inference.weighted import (
    WEIGHED_ROWS,
    Weighted,
    mixed_parts,
    require_not_pooled,
    require_samples,
    rows_to_weigh,
    shares_of,
)
from pyro_vae.pairs import masks
from pyro_vae.pairs.formatting import in_columns
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import has_mean, typical
from pyro_vae.pairs.pair import Batch, Site, placement
from pyro_vae.pairs.processes import here, in_order, single
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import derived, seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import data_first, data_site, latents
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.circular import circle_of, circular_mean, near

METHODS = ("importance", "refine", "nuts")


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
    classes have no meaning. Those of circular numbers lie within half a period of the mean."""
    high: Tensor
    """The upper end of this interval."""
    level: float
    """The probability of the intervals."""
    missing: Tensor
    """Which entries are missing, booleans (n, *data_shape)."""
    effective_sample_size: Tensor
    """Of the importance weights of each row, or of its chains, (n,); ``num_samples`` for a complete
    row."""
    pareto_k: Tensor
    """The Pareto shape of the tail of each row's weights, (n,). It is 0 for a complete row, and NaN
    for draws by NUTS."""
    num_samples: int
    """Importance samples of each row, or draws of its chains."""
    method: str
    """"importance", "refine" or "nuts"."""
    r_hat: Tensor
    """The largest R-hat of the latents of each row, (n,), for draws by NUTS. Over 1.01 the chains
    do not agree. It is NaN for the other methods."""
    reliable: Tensor
    """Whether the imputation of each row is reliable, booleans (n,). Its Pareto k is at most
    ``k_threshold``, or its weights vary by at most 1 %. Draws by NUTS: chains agree, none diverged,
    and at least 400 draws are effective. True for a complete row."""
    k_threshold: float
    """The largest Pareto k for which the samples are enough, ``min(1 - 1 / log10(S), 0.7)``. S is
    ``num_samples`` or, with global latents, the number of samples that share a draw of them."""

    _repr_html_ = shown_html

    def __str__(self) -> str:
        rows = _any(self.missing)
        bad = int((~self.reliable).sum())
        size = self.effective_sample_size[rows].median() if rows.any() else torch.tensor(torch.nan)
        limit = f"Pareto k over {self.k_threshold:.2f}"
        fault = "chains apart or short" if self.method == "nuts" else limit
        lines = [
            ("missing entries", f"{int(self.missing.sum())} in {int(rows.sum())} rows"),
            ("draws", f"{len(self.draws)}"),
            ("effective samples", f"{100 * float(size) / self.num_samples:.1f} % (median)"),
            (fault, f"{bad} rows, whose imputations are not reliable"),
        ]
        if bad and self.method == "importance":
            lines.append(("what to try", "the method refine, or more samples"))
        return in_columns(lines)


@alone()
def impute(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    method: str = "importance",
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
            NaN, the entries that a mask of the model hides (docs/how-to/missing-values.md), but not
            the steps after the end of a `MarkovChain`. If the model has a latent site
            ``x_unobserved`` beside its site ``x``, the entries are this latent's draws.
        x, context: the data, as `pyro_vae.log_likelihood` takes them.
        method: "importance" uses the guide of the pair as proposal. "refine" first refines the
            guide for each row with missing entries (`pyro_vae.refine`). "nuts" draws the latents of
            each such row by 4 chains of NUTS on the same model (`pyro_vae.nuts`), with equal
            weights; this takes seconds for each row.
        draws: the number of complete copies of the data (multiple imputations), at least 1.
        num_samples: importance samples of each row, at least 21; or draws of the chains together.
        level: the probability of the intervals, which use all of these samples.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar.

    To choose the steps of a refinement, call `pyro_vae.refine` yourself, and then
    ``impute(refined.pair, *refined.batch)``. Global and group latents are drawn from their guide,
    once for each 21 samples and at most 200 times, so draws and intervals contain their
    uncertainty. Their draws have equal weights: the guide was fitted to these rows, or to rows like
    them. All rows of one completed copy have the same values of them.
    Raises `UsageError` if ``draws`` or ``num_samples`` is too small, if no entry is missing, if the
    result does not fit into memory, or if the method does not serve the latents of the pair.
    Mattei & Frellsen, MIWAE, 2019 (https://arxiv.org/abs/1812.02633).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((3,), latent_dim=2, likelihood=pv.Missing(pv.Gaussian))
    >>> found = impute(vae, torch.tensor([[1.0, torch.nan, 2.0]]), draws=5, num_samples=100)
    >>> found.draws.shape, found.mean[0, 2]
    (torch.Size([5, 1, 3]), tensor(2.))
    """
    if method not in METHODS:
        raise UsageError(f"cannot be '{method}'; {nearest(method, METHODS)}", argument="method")
    if draws < 1:
        raise UsageError(f"must be at least 1, got {draws}", argument="draws")
    if not 0 < level < 1:
        raise UsageError(f"must be between 0 and 1, got {level}", argument="level")
    require_samples(num_samples)
    team, asked = here(), _Asked(method, draws, num_samples, level, seed)

    def own(rows: Source, prepare: Preparation) -> list[Imputation]:
        by_mask = not (isinstance(rows, Arrays) and bool(rows.tensors[0].isnan().any()))
        found, shown = [], bar(progress and team.first, len(rows), "impute")
        with seeded(derived(seed, "process", team.rank)), shown:
            for raw in team.own(rows.batches(team.share(len(rows), WEIGHED_ROWS))):
                found.append(_imputed(pair, prepare(raw), by_mask, asked))
                shown.update(team.count * len(raw[0]))
        return found

    with single():
        rows, prepare = rows_to_weigh(team, pair, x, context, binarize)
        team.together(lambda: _require_memory(rows, prepare, draws))
        found = _joined(list(in_order(team.gather(lambda: own(rows, prepare)))))
    if not bool(found.missing.any()):
        raise UsageError("x has no missing entry, so nothing is to be imputed")
    return found


def _require_memory(rows: Source, prepare: Preparation, draws: int) -> None:
    """Raise `UsageError` if the result does not fit into memory, first in parts and then joined."""
    need = 2 * (draws + 4) * len(rows) * rows.first(1)[0][0].numel() * prepare.dtype.itemsize
    require_memory(need, f"{draws} draws of {len(rows)} rows")


def _after_the_end(model: Trace, x: Tensor) -> Tensor:
    """Which entries of x come after the end of a `MarkovChain`: they do not exist.

    Rows have shape (steps, ...) or (1, steps, ...).
    """
    ended = torch.zeros_like(x, dtype=torch.bool)
    for site in latents(model).values():
        if x.dim() > 1 and hasattr(site["fn"], "inside"):
            counts = data_first(masks.scored(site), site).any(-1)  # (n, steps)
            steps = counts.shape[1]
            if steps in (x.shape[1], x.shape[1:3].numel()):
                wide = counts.repeat_interleave(x[0].numel() // steps, 1)
                ended |= ~wide.reshape(x.shape)
    return ended


def _any(missing: Tensor) -> Tensor:
    """Which rows have a missing entry, (n,)."""
    return missing.reshape(len(missing), -1).any(1)


class _Asked(NamedTuple):
    """How to impute; see `impute`."""

    method: str
    draws: int
    num_samples: int
    level: float
    seed: int


def _imputed(pair: nn.Module, batch: Batch, by_mask: bool, asked: _Asked) -> Imputation:
    """The imputation of a prepared batch; complete rows stay as they are."""
    x, n = batch[0], len(batch[0])
    missing = x.isnan()
    if by_mask:
        with using(pair):
            model = trace_model(pair, batch, trace_guide(pair, batch))
            missing = masks.seen(data_site(model), x).isnan() & ~_after_the_end(model, x)
    with using(pair):
        require_not_pooled(pair, batch)
        together = min(shares_of(pair, batch, asked.num_samples, fitted=True))
    holes = _any(missing)
    size = torch.full((n,), float(asked.num_samples), dtype=torch.double, device=x.device)
    known = x if x.is_floating_point() else x.to(placement(pair)[1])  # means are not integers
    whole = _Completed(
        known.clone(),
        known.clone(),
        known.clone(),
        x.expand(asked.draws, *x.shape).clone(),
        size,
        torch.zeros_like(size),
        torch.full_like(size, torch.nan),
        torch.ones_like(size, dtype=torch.bool),
    )
    if bool(holes.any()):
        parts = _completed(pair, tuple(part[holes] for part in batch), asked)
        for name in ("mean", "low", "high"):
            full, new = getattr(whole, name), torch.cat([getattr(part, name) for part in parts])
            full[holes] = torch.where(missing[holes], new, full[holes])
        new = torch.cat([part.draws for part in parts], 1)
        whole.draws[:, holes] = torch.where(missing[holes], new, whole.draws[:, holes])
        for name in BY_ROW:
            new = torch.cat([getattr(part, name) for part in parts])
            getattr(whole, name)[holes] = new.to(x.device)
    found = {name: value.cpu() for name, value in whole._asdict().items()}
    return Imputation(
        **found,
        level=asked.level,
        missing=missing.cpu(),
        num_samples=asked.num_samples,
        method=asked.method,
        k_threshold=threshold(together),
    )


def _completed(pair: nn.Module, few: Batch, asked: _Asked) -> "list[_Completed]":
    """The imputations of rows with missing entries, by the method that is asked for."""
    seed = int(torch.randint(2**31, ())) if asked.method != "importance" else 0
    if asked.method == "refine":
        refined = refine(pair, few[0], *few[1:], num_samples=LEAST, seed=seed, progress=False)
        pair, few = refined.pair, refined.batch
    if asked.method == "nuts":
        parts: Iterable[Any] = list(chained_parts(pair, few, asked.num_samples, seed))
    else:
        parts = mixed_parts(pair, few, asked.num_samples, fitted=True, seed=asked.seed)
    with using(pair):
        return [_posterior(pair, part, asked) for part in parts]


class _Completed(NamedTuple):
    """What draws of the latents say about rows; see `Imputation`."""

    mean: Tensor
    low: Tensor
    high: Tensor
    draws: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    r_hat: Tensor
    reliable: Tensor


BY_ROW = ("effective_sample_size", "pareto_k", "r_hat", "reliable")
"""The fields that have one value for each row."""


def _posterior(pair: nn.Module, part: Weighted | Chained, asked: _Asked) -> _Completed:
    like, shares = part.batch[0], part.shares
    entries = zip(*(_entries(pair, one) for one in part.passes), strict=True)
    draws_of, centers_of, (classes, *_), (site, *_) = entries
    drawn, centers = torch.cat(draws_of), torch.cat(centers_of)
    dtype = like.dtype if like.is_floating_point() else placement(pair)[1]
    wide = shares.reshape(*shares.shape, *[1] * (like.dim() - 1)).to(dtype)
    # A draw of weight 0 does not count, even if its mean is infinite in this type.
    mean = torch.where(wide > 0, wide * centers, 0.0).sum(0)
    circle = circle_of(site["fn"])
    period = torch.zeros_like(like[0]) if circle is None else circle.period.to(like)
    named = classes & (period == 0)
    if bool(named.any()):
        mean = torch.where(named, _most_probable(drawn, wide, named), mean)
    around = drawn
    if circle is not None:
        turned = circle.wrapped(circular_mean(drawn, wide, period))
        mean = torch.where(period > 0, turned, mean)
        # Quantiles may cross the end of the circle.
        around = near(drawn, mean, period)
    chosen = _chosen(part, asked)
    rows = torch.arange(shares.shape[1], device=chosen.device)
    low, high = _quantiles(around, wide, ((1 - asked.level) / 2, (1 + asked.level) / 2))
    return _Completed(
        *(mean.to(dtype), low.to(dtype), high.to(dtype), drawn[chosen, rows]),
        *(getattr(part, name) for name in BY_ROW),
    )


def _chosen(part: Weighted | Chained, asked: _Asked) -> Tensor:
    """The draw of the latents that each completed copy takes for each row, (draws, n).

    All rows of a copy take the same draw of the global latents.
    """
    if len(part.passes) == 1:
        return torch.multinomial(part.shares.T, asked.draws, replacement=True).T
    sizes = torch.tensor([len(one.shares) for one in part.passes])
    with seeded(derived(asked.seed, "copies", 0)):  # the same for other rows
        blocks = torch.multinomial(sizes.double(), asked.draws, replacement=True).tolist()
    starts = (sizes.cumsum(0) - sizes).tolist()
    shares = [one.shares.T for one in part.passes]
    return torch.stack([torch.multinomial(shares[b], 1)[:, 0] + starts[b] for b in blocks])


def _entries(pair: nn.Module, part: Weighted | Chained) -> tuple[Tensor, Tensor, Tensor, Site]:
    """A draw and the mean of each entry at each draw of the latents, which entries are classes, and
    the site of the entries."""
    site = observation(pair, part.batch, part.values, given=HiddenDrawn)
    like = part.batch[0]
    shape = (-1, part.shares.shape[1], *like.shape[1:])
    drawn = data_first(site["value"], site).reshape(shape).to(like.dtype)
    centers = data_first(typical(site["fn"]), site).reshape(shape)
    classes = ~data_first(has_mean(site["fn"]), site).reshape(shape)[0]
    if (own := part.values.get(f"{site['name']}{UNOBSERVED_PART}")) is not None:
        drawn = centers = own.reshape(shape)  # the latent is part of the weights
    return drawn, centers, classes, site


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
    whole: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("mean", "low", "high", "missing", *BY_ROW)
    }
    return replace(parts[0], draws=torch.cat([part.draws for part in parts], 1), **whole)
