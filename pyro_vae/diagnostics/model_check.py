"""Compare held-out data with data that the model draws, through the same inference."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.two_samples import (
    Difference,
    Separation,
    dependence_statistics,
    difference,
    scale_statistics,
    separation,
    some_columns,
)
from pyro_vae.errors import UsageError
from pyro_vae.inference.given_globals import at_one_draw
from pyro_vae.inference.importance import STEADY, relative_error
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.weighted import Weighted, require_samples, weighted_parts
from pyro_vae.pairs import masks
from pyro_vae.pairs.moments import num_values
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.sites import data_first, data_site
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import DataFirst, trace

LEAST_ROWS = 50
"""With fewer rows the tests hardly find anything."""


SIGNIFICANT = 4
"""A difference of rates matters from this many standard errors on."""


@dataclass(frozen=True)
class ModelCheck:
    """The results of `model_check`. "Data" are the rows that you passed, "own data" those that the
    model drew."""

    log_likelihood: Tensor
    """log p(x) of the data, (n,)."""
    own_log_likelihood: Tensor
    """log p(x) of the model's own data, (m,)."""
    unreliable: Tensor
    """Data whose importance weights are not reliable, booleans (n,)."""
    own_unreliable: Tensor
    """The same for the model's own data, (m,)."""
    marginal_p: float
    """p-value of a Kolmogorov-Smirnov test of log p(x) of data and of own data."""
    codes: dict[str, Separation]
    """How well a classifier tells codes of data from codes of own data, by latent site. If the
    prior fits, it cannot."""
    scale: Difference | None
    """Logarithm of the mean square of standardized residuals, data minus own data. Below 0 the
    likelihood is too wide, above 0 too narrow. None if the likelihood has no scale."""
    scale_nats: float
    """Nats per example that a scale for all data would gain."""
    row_scale: Difference | None
    """Nats per example that a scale for each row would gain, data minus own data."""
    column_scale: Difference | None
    """Nats per example that a scale for each element would gain, data minus own data."""
    dependence: Difference | None
    """Nats per example in the correlations of residuals, data minus own data: structure that the
    decoder does not explain. At most 30 elements are used."""
    regression: Difference | None
    """Nats per example that codes still explain in the residuals, data minus own data."""
    units: tuple[str, ...]
    """The units of the latents whose true values are ranked, such as "z[0]"."""
    weighted_scores: Tensor
    """Normal scores of the true values of the model's own data among weighted draws of the guide,
    (rows, units): standard normal if the weighted draws are the posterior. Far from that, the guide
    misses a part of the posterior, which no weights can restore. Unreliable rows are left out."""
    left_out: bool
    """Whether unreliable rows were left out, because the data have more of them."""
    num_samples: int
    """Importance samples of each row."""
    given: tuple[str, ...] = ()
    """Global and group latents, held at one draw of the guide."""

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers for metrics.json."""
        numbers = ("scale", "row_scale", "column_scale", "dependence", "regression")
        kept, own = (~(u & self.left_out) for u in (self.unreliable, self.own_unreliable))
        return {
            "num_examples": len(self.log_likelihood),
            "num_simulations": len(self.own_log_likelihood),
            "num_samples": self.num_samples,
            "unreliable": int(self.unreliable.sum()),
            "own_unreliable": int(self.own_unreliable.sum()),
            "left_out": self.left_out,
            "log_likelihood": _mean(self.log_likelihood[kept]),
            "own_log_likelihood": _mean(self.own_log_likelihood[own]),
            "marginal_p": self.marginal_p,
            "codes": {name: found._asdict() for name, found in self.codes.items()},
            "scale_nats": self.scale_nats,
            **{
                name: None if (found := getattr(self, name)) is None else found._asdict()
                for name in numbers
            },
        }

    def __str__(self) -> str:
        found = self.as_dict()
        lines = [
            ("rows", f"{found['num_examples']} data, {found['num_simulations']} of the model"),
            ("unreliable", f"{found['unreliable']} and {found['own_unreliable']}"),
            (
                "log p(x)",
                f"{_shown(found['log_likelihood'])} and {_shown(found['own_log_likelihood'])} "
                f"(p {self.marginal_p:.2g})",
            ),
            *(
                (f"codes of '{name}'", f"AUC {one.auc:.3f}, {one.nats:.2f} nats")
                for name, one in self.codes.items()
            ),
        ]
        for title, name in (
            ("log scale", "scale"),
            ("scale by row", "row_scale"),
            ("scale by element", "column_scale"),
            ("correlated residuals", "dependence"),
            ("residuals on codes", "regression"),
        ):
            one = getattr(self, name)
            if one is not None:
                unit = "" if name == "scale" else " nats"
                lines.append((title, f"{one.value:.3f}{unit}, {one.deviations:.1f} deviations"))
        return "\n".join(f"{name:<24}{value}" for name, value in lines)


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


@alone()
def model_check(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 200,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> ModelCheck:
    r"""Compare held-out data with as many data that the model draws.

    Both go through the same inference: draws of the guide are resampled by their importance
    weights, which also estimate log p(x). If the data were draws of the model, each number would
    have the same distribution on both sides, **however good or bad the guide is**. So a difference
    is a fault of the model:

    - of log p(x): of the model as a whole (Kolmogorov-Smirnov);
    - of the codes (classifier): of the prior;
    - of the scale of standardized residuals :math:`(x - E[x|z]) / \mathrm{sd}[x|z]`, over all
      elements, by row or by element: of the likelihood's scale;
    - of their correlations, and of their regression on the codes: of the decoder.

    Arguments:
        pair: any pair with ``template(n)``.
        x, context: held-out data, at least 50 rows. Each row of context serves one row of both
            sides; entries that are missing (NaN) in x are missing on the other side too.
        num_samples: importance samples of each row, at least 21.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    Only a guide that is worse for the data than for the model's own data can cause a difference
    too. It then has more rows with unreliable importance weights among the data, and such rows are
    left out on both sides. A model of images is
    almost always told from data; the sizes in nats say how much it matters. Raises `UsageError` for
    fewer rows or samples, and for a pair whose model cannot draw data.
    Moran, Blei & Ranganath, Holdout predictive checks, 2024; Schmitt et al., Detecting model
    misspecification in amortized Bayesian inference, 2021.

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,), latent_dim=1)
    >>> found = pv.model_check(vae, torch.ones(60, 4), num_samples=30, progress=False)
    >>> bool(found.marginal_p < 0.01)  # the model never draws rows of ones only
    True
    """
    require_samples(num_samples)
    rows, prepare = held_rows(pair, x, context, binarize)
    if len(rows) < LEAST_ROWS:
        raise UsageError(f"model_check needs at least {LEAST_ROWS} rows of data, got {len(rows)}")
    parts = [prepare(part) for part in rows.batches(1000)]
    batch = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    pair, given = at_one_draw(pair, batch, seed)
    with using(pair, seed):
        own, truth = _own_data(pair, batch)
    with using(pair, seed + 1), bar(progress, 2, "model check", delay=2) as shown:
        found = []
        for side, true in ((batch, {}), (own, truth)):
            found.append(_through_inference(pair, side, true, num_samples))
            shown.update()
    return _compared(*found, num_samples, given, seed)


def _own_data(pair: nn.Module, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Return as many rows that the model draws, with the same context and the same holes, and the
    latents that generated them."""
    own, truth = simulate(pair, len(batch[0]), batch[1:])
    x = batch[0]
    if x.is_floating_point() and bool(x.isnan().any()):
        own = (torch.where(x.isnan(), torch.nan, own[0]), *own[1:])
    return own, truth


class _Side(NamedTuple):
    """One side of the comparison, by row."""

    log_likelihood: Tensor
    unreliable: Tensor
    codes: dict[str, Tensor]
    residuals: Tensor | None
    scaled: bool
    scores: dict[str, Tensor]
    """Normal scores of true values among weighted draws, (n, units of the site)."""


def _through_inference(
    pair: nn.Module, batch: Batch, truth: dict[str, Tensor], num_samples: int
) -> _Side:
    parts, start = [], 0
    for part in weighted_parts(pair, batch, num_samples):
        n = part.log_weights.shape[1]
        own = tuple(tensor[start : start + n] for tensor in batch)
        true = {
            name: truth[name].reshape(len(batch[0]), -1)[start : start + n]
            for name, value in part.values.items()
            if _ranks(value, truth.get(name), n * num_samples)
        }
        parts.append(_of_rows(pair, own, part, true))
        start += n
    residuals = [part.residuals for part in parts if part.residuals is not None]
    return _Side(
        torch.cat([part.log_likelihood for part in parts]),
        torch.cat([part.unreliable for part in parts]),
        {name: torch.cat([part.codes[name] for part in parts]) for name in parts[0].codes},
        torch.cat(residuals) if len(residuals) == len(parts) else None,
        parts[0].scaled,
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
    )


def _ranks(draws: Tensor, truth: Tensor | None, number: int) -> bool:
    """Whether true values of a site can be ranked among its draws: real numbers of each datum."""
    return (
        truth is not None
        and draws.is_floating_point()
        and len(draws) == number
        and truth[0].numel() == draws[0].numel()
        and truth.shape[1:] == draws.shape[1:]
    )


def _scores(draws: Tensor, truth: Tensor, shares: Tensor) -> Tensor:
    """Return normal scores of true values (n, units) among weighted draws (K n, ...)."""
    samples, n = shares.shape
    values = draws.reshape(samples, n, -1)
    below = (shares[..., None] * (values < truth)).sum(0)
    size = 1 / shares.square().sum(0)[:, None]  # as among so many draws without weights
    return torch.special.ndtri((below * size + 0.5) / (size + 1)).cpu()


def _of_rows(pair: nn.Module, batch: Batch, part: Weighted, truth: dict[str, Tensor]) -> _Side:
    samples, n = part.log_weights.shape
    log_p = part.log_weights.logsumexp(0) - torch.tensor(float(samples)).log()
    error = relative_error(part.shares.square().sum(0), samples)
    varies = error * samples**0.5 > STEADY
    unreliable = (part.pareto_k > threshold(samples)) & varies | ~log_p.isfinite()
    chosen = torch.multinomial(part.shares.nan_to_num(1.0).T, 1)[:, 0].to(batch[0].device)
    index = chosen * n + torch.arange(n, device=batch[0].device)
    values = {
        name: value[index] for name, value in part.values.items() if len(value) == samples * n
    }
    with DataFirst(dict(values)):
        site = data_site(trace(cast(Pair, pair).model, batch))
    residuals, scaled = _residuals(site, batch[0])
    codes = {
        name: value.reshape(n, -1).double().cpu()
        for name, value in values.items()
        if value.is_floating_point() and value.numel()
    }
    scores = {name: _scores(part.values[name], true, part.shares) for name, true in truth.items()}
    return _Side(log_p.cpu(), unreliable.cpu(), codes, residuals, scaled, scores)


def _residuals(site: Any, x: Tensor) -> tuple[Tensor | None, bool]:
    """Return standardized residuals (n, elements) of x, and whether the likelihood has a scale."""
    fn = site["fn"]
    try:
        mean, variance = fn.mean, fn.variance
    except NotImplementedError:
        return None, False
    if bool(mean.isnan().all()) or not bool(variance.isfinite().any()):
        return None, False
    value = masks.seen(site, x).double()
    mean, variance = (
        data_first(part, site).double().reshape(value.shape) for part in (mean, variance)
    )
    found = (value - mean) / variance.clamp(min=1e-8).sqrt()
    try:
        scaled = num_values(fn) != 2
    except UsageError:
        scaled = True
    found = torch.where(found.isfinite(), found, torch.nan)
    return found.reshape(len(x), -1).cpu(), scaled


def _more(data: Tensor, own: Tensor) -> bool:
    """Whether significantly more rows of the data are unreliable than of the model's own data."""
    first, second = data.double().mean().item(), own.double().mean().item()
    both = (first * len(data) + second * len(own)) / (len(data) + len(own))
    error = (both * (1 - both) * (1 / len(data) + 1 / len(own))) ** 0.5
    return first - second > SIGNIFICANT * error


def _compared(
    data: _Side, own: _Side, num_samples: int, given: tuple[str, ...], seed: int
) -> ModelCheck:
    from scipy.stats import ks_2samp

    left_out = _more(data.unreliable, own.unreliable)
    keep = [~(side.unreliable & left_out) for side in (data, own)]
    enough = min(int(kept.sum()) for kept in keep) >= LEAST_ROWS
    p, codes = torch.nan, {}
    scale = by_row = by_column = dependence = regression = None
    nats = 0.0
    if enough:
        first, second = (
            side.log_likelihood[kept] for side, kept in zip((data, own), keep, strict=True)
        )
        p = float(ks_2samp(first.numpy(), second.numpy(), method="asymp").pvalue)
        for name in data.codes:
            both = [side.codes[name][kept] for side, kept in zip((data, own), keep, strict=True)]
            if both[0].shape[1] and bool((torch.cat(both).std(0) > 0).any()):
                codes[name] = separation(*both, seed)
        if data.residuals is not None and own.residuals is not None:
            r = [
                part[kept] for part, kept in zip((data.residuals, own.residuals), keep, strict=True)
            ]
            if data.scaled:
                scale, by_row, by_column = difference(scale_statistics, *r, seed)
                c = torch.tensor(scale.value, dtype=torch.float64).exp()
                nats = float(0.5 * r[0].shape[1] * (c - 1 - c.log()))
            columns = some_columns(r[0].shape[1], seed)
            z = [
                torch.cat([part[kept] for part in side.codes.values()], 1)[:, :30]
                if side.codes
                else side.log_likelihood.new_zeros(int(kept.sum()), 1)
                for side, kept in zip((data, own), keep, strict=True)
            ]
            rows = [torch.cat([a, b[:, columns]], 1) for a, b in zip(z, r, strict=True)]
            dependence, regression = difference(
                dependence_statistics(z[0], r[0][:, columns]), *rows, seed
            )
    scores = torch.cat(
        [part[~own.unreliable] for part in own.scores.values()] or [torch.zeros(0, 0)], 1
    )
    units = tuple(
        name + (f"[{i}]" if part.shape[1] > 1 else "")
        for name, part in own.scores.items()
        for i in range(part.shape[1])
    )
    return ModelCheck(
        data.log_likelihood,
        own.log_likelihood,
        data.unreliable,
        own.unreliable,
        p,
        codes,
        scale,
        nats,
        by_row,
        by_column,
        dependence,
        regression,
        units,
        scores,
        left_out,
        num_samples,
        given,
    )
