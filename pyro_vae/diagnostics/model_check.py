"""Compare held-out data with data that the model draws, through the same inference."""

from dataclasses import dataclass
from math import exp, isnan, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.copies import without_copies
from pyro_vae.diagnostics.model_sides import Side, through_inference
from pyro_vae.diagnostics.two_samples import (
    WIDEST,
    Difference,
    Separation,
    clipped,
    correlation_statistic,
    difference,
    explained,
    scale_statistics,
    separation,
    some_columns,
)
from pyro_vae.errors import UsageError
from pyro_vae.inference.weighted import require_samples
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.masks import missing_entries
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.template import template
from pyro_vae.pairs.threads import alone

DIFFERENCES = ("scale", "row_scale", "column_scale", "dependence", "regression")
"""The fields of `ModelCheck` about residuals."""

LEAST_ROWS = 50
"""With fewer rows the tests hardly find anything."""


SIGNIFICANT = 4
"""A difference of rates matters from this many standard errors on."""


class Missed(NamedTuple):
    """How much log p(x) by importance weights is too low, because the guide misses a part."""

    value: float
    """Nats per example."""
    standard_error: float
    """Its standard error."""
    bias: float
    """The part of it that is due to so few importance samples, about."""
    num_examples: int
    """Rows of the model's own data."""

    @property
    def words(self) -> str:
        """The numbers in a sentence."""
        by = f"{self.value:.2f} ± {self.standard_error:.2f} nats too low ({self.num_examples} data)"
        return f"by the true latents of the model's own data, log p(x) is {by}"


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
    """How well a classifier tells codes of data from codes of own data, by latent site, beside the
    context. If the prior fits, it cannot."""
    scale: Difference | None
    """Logarithm of the mean square of standardized residuals after ``regression``, data minus own
    data. Below 0 the likelihood is too wide, above 0 too narrow. None if the likelihood has no
    scale. A scale for all data would gain ``scale_nats``."""
    row_scale: Difference | None
    """Nats per example that a scale for each row would gain, data minus own data."""
    column_scale: Difference | None
    """Nats per example that a scale for each element would gain, data minus own data."""
    dependence: Difference | None
    """Nats per example in the correlations of residuals, data minus own data: structure that the
    decoder does not explain. At most 30 elements are used."""
    regression: Difference | None
    """Nats per example that a constant, codes and context would gain as a part of the mean of the
    residuals, data minus own data. At most 30 columns of codes and of context are used."""
    num_elements: float
    """Observed elements of a row with a residual, on average."""
    units: tuple[str, ...]
    """The units of the latents whose true values are ranked, such as "z[0]"."""
    weighted_scores: Tensor
    """Normal scores of the true values of the model's own data among weighted draws of the guide,
    (rows, units): standard normal if the weighted draws are the posterior. Far from that, the guide
    misses a part of the posterior, which no weights can restore. Unreliable rows are left out, and
    scores of masked units are NaN."""
    bridge: Tensor
    """Three numbers of each row of the model's own data, (rows, 3), from which ``missed`` follows.
    Unreliable rows are left out."""
    left_out: bool
    """Whether unreliable rows were left out, because the data have more of them."""
    num_samples: int
    """Importance samples of each row."""
    given: tuple[str, ...] = ()
    """Global and group latents, held at one draw of the guide. The model's own data are drawn at
    these values, which are not those of the data, so only ``missed`` and the ranks are measured."""

    @property
    def missed(self) -> Missed:
        """By how many nats per example log p(x) of the model's own data is too low.

        True latents where the guide has (almost) no draws raise it, such as those in a mode that
        the guide misses. It is NaN if fewer than 50 rows or fewer than half of the rows are
        reliable (the others are a choice of rows), and if the model does not draw all latents of
        the guide.
        """
        rows = len(self.bridge)
        if rows < max(LEAST_ROWS, len(self.own_unreliable) / 2):
            return Missed(torch.nan, torch.nan, torch.nan, rows)
        draws, truth, bias = self.bridge.mean(0).tolist()
        truth = max(truth, draws / rows)  # what so many rows can show
        apart = self.bridge[:, 0] / draws - self.bridge[:, 1] / truth
        error = apart.std().item() / rows**0.5
        return Missed(log(draws / truth), error, bias, rows)

    @property
    def scale_nats(self) -> float:
        r"""Nats per example that a scale for all data would gain.

        They are :math:`\tfrac D2 (c - 1 - \log c)`, with c the ratio of the mean squares of the
        residuals and D the number of elements.
        """
        log_ratio = 0.0 if self.scale is None else self.scale.value
        return 0.5 * self.num_elements * (exp(log_ratio) - 1 - log_ratio)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers for metrics.json."""
        kept, own = (~(u & self.left_out) for u in (self.unreliable, self.own_unreliable))
        return {
            "num_examples": len(self.log_likelihood),
            "num_simulations": len(self.own_log_likelihood),
            "num_samples": self.num_samples,
            "given": list(self.given),
            "unreliable": int(self.unreliable.sum()),
            "own_unreliable": int(self.own_unreliable.sum()),
            "left_out": self.left_out,
            "log_likelihood": _mean(self.log_likelihood[kept]),
            "own_log_likelihood": _mean(self.own_log_likelihood[own]),
            "marginal_p": self.marginal_p,
            "missed": self.missed._asdict(),
            "codes": {name: found._asdict() for name, found in self.codes.items()},
            **{
                name: None if (found := getattr(self, name)) is None else found._asdict()
                for name in DIFFERENCES
            },
        }

    _repr_html_ = shown_html

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
        if self.given:
            lines = [*lines[:2], ("given one draw of", ", ".join(self.given))]
        if not isnan(self.missed.value):
            by = f"{self.missed.value:.3f} ± {self.missed.standard_error:.3f} nats"
            lines.append(("log p(x) is too low by", by))
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
    - of their correlations, and of what codes and context explain in them: of the decoder. The
      scale is that of the rest, so a wrong mean is not charged to it.

    Arguments:
        pair: any pair with ``template(n)``. Global and group latents are held at one draw of the
            guide. Then only ``missed`` and the ranks are measured: data that the model draws at
            this value may differ from yours although the model is right.
        x, context: held-out data, at least 50 rows. Each row of context serves one row of both
            sides; entries that are missing (NaN) in x are missing on the other side too. Copies of
            rows would count as independent data, so they are left out, except rows of whole numbers
            and data of which the model draws copies too.
        num_samples: importance samples of each row, at least 21.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    The true latents of the model's own data also show by how much log p(x) is too low because the
    guide misses a part of the posterior: ``missed`` (Meng & Wong, 1996).

    Only a guide that is worse for the data than for the model's own data can cause a difference
    too. It then has more rows with unreliable importance weights among the data, and such rows are
    left out on both sides. A model of images is almost always told from data; the sizes in nats
    say how much it matters. Raises `UsageError` for fewer rows or samples, and for a pair whose
    model cannot draw data.
    Moran, Blei & Ranganath, Holdout predictive checks, 2024; Schmitt et al., Detecting model
    misspecification in amortized Bayesian inference, 2021.

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((20,), latent_dim=1)  # before training each entry is a fair coin
    >>> found = pv.model_check(vae, torch.ones(200, 20), num_samples=30, progress=False)
    >>> bool(found.marginal_p < 0.01)  # the model never draws rows of ones only
    True
    """
    require_samples(num_samples)
    batch = whole(pair, x, context, binarize)
    _enough(batch)
    if not hasattr(pair, "template"):
        template(pair, 1)  # its error names this pair
    pair, given = at_one_draw(pair, batch, seed)
    with using(pair, seed):
        batch = _enough(without_copies(pair, batch))
        own, truth = simulate(pair, len(batch[0]), batch[1:], missing_entries(batch[0]))
    with using(pair, seed + 1), bar(progress, 2, "model check", delay=2) as shown:
        data = through_inference(pair, batch, {}, num_samples)
        shown.update()
        theirs = through_inference(pair, own, truth, num_samples)
        shown.update()
    return _compared(data, theirs, num_samples, given, seed)


def _enough(batch: Batch) -> Batch:
    """Return a batch, or raise `UsageError` for too few rows."""
    if (got := len(batch[0])) < LEAST_ROWS:
        raise UsageError(f"model_check needs at least {LEAST_ROWS} different rows, got {got}")
    return batch


def _more(data: Tensor, own: Tensor) -> bool:
    """Whether significantly more rows of the data are unreliable than of the model's own data."""
    first, second = data.double().mean().item(), own.double().mean().item()
    both = (first * len(data) + second * len(own)) / (len(data) + len(own))
    error = (both * (1 - both) * (1 / len(data) + 1 / len(own))) ** 0.5
    return first - second > SIGNIFICANT * error


def _compared(
    data: Side, own: Side, num_samples: int, given: tuple[str, ...], seed: int
) -> ModelCheck:
    left_out = _more(data.unreliable, own.unreliable)
    first, second = (side.kept(~(side.unreliable & left_out)) for side in (data, own))
    enough = min(len(first.unreliable), len(second.unreliable)) >= LEAST_ROWS and not given
    scores = own.kept(~own.unreliable).scores.values()
    return ModelCheck(
        log_likelihood=data.log_likelihood,
        own_log_likelihood=own.log_likelihood,
        unreliable=data.unreliable,
        own_unreliable=own.unreliable,
        marginal_p=_marginal_p(first, second) if enough else torch.nan,
        codes=_separations(first, second, seed) if enough else {},
        **(_differences(first, second, seed) if enough else dict.fromkeys(DIFFERENCES)),
        num_elements=_elements(data),
        units=own.units,
        weighted_scores=torch.cat([*scores, torch.zeros(int((~own.unreliable).sum()), 0)], 1),
        bridge=own.kept(~own.unreliable).bridge,
        left_out=left_out,
        num_samples=num_samples,
        given=given,
    )


def _elements(side: Side) -> float:
    return (
        0.0 if side.residuals is None else (~side.residuals.isnan()).sum(1).double().mean().item()
    )


def _marginal_p(data: Side, own: Side) -> float:
    from scipy.stats import ks_2samp

    both = data.log_likelihood.numpy(), own.log_likelihood.numpy()
    return float(ks_2samp(*both, method="asymp").pvalue)


def _separations(data: Side, own: Side, seed: int) -> dict[str, Separation]:
    """Codes are told apart beside their context, so that a prior without its effect is seen."""
    sides = {name: (data.codes[name], own.codes[name]) for name in data.codes}
    sides |= {name: _indicators(data.classes[name], own.classes[name]) for name in data.classes}
    return {
        name: separation(
            torch.cat([first, data.context], 1), torch.cat([second, own.context], 1), seed
        )
        for name, (first, second) in sides.items()
        if bool((torch.cat([first, second]).std(0) > 0).any())
    }


def _indicators(data: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return a column of zeros and ones for each unit and value of whole numbers (n, units)."""
    values = torch.cat([data, own]).unique()
    first, second = ((side[..., None] == values).flatten(1)[:, :WIDEST] for side in (data, own))
    return first.double(), second.double()


def _differences(data: Side, own: Side, seed: int) -> dict[str, Difference | None]:
    """Return the differences of residuals by name; None without residuals or without a scale.

    What codes and context explain is the decoder's. So the scale is that of what they leave.
    """
    found: dict[str, Difference | None] = dict.fromkeys(DIFFERENCES)
    if data.residuals is None or own.residuals is None:
        return found
    residuals = clipped(data.residuals, own.residuals)
    first, second = map(_causes_and_residuals, (data, own), residuals)
    width = first.shape[1] - data.residuals.shape[1]
    columns = width + some_columns(data.residuals.shape[1], seed)

    def statistics(rows: Tensor) -> Tensor:
        gain, left = explained(rows[..., :width], rows[..., width:])
        rest = [correlation_statistic(rows[..., columns]).to(gain.dtype), gain]
        return torch.cat([scale_statistics(left), torch.stack(rest, -1)], -1)

    found |= dict(zip(DIFFERENCES, difference(statistics, first, second, seed), strict=True))
    return found if data.scaled else found | dict.fromkeys(DIFFERENCES[:3])


def _causes_and_residuals(side: Side, residuals: Tensor) -> Tensor:
    """Return codes and context, which should not explain residuals, and the residuals."""
    codes = torch.cat([*side.codes.values(), side.context[:, :0]], 1)
    return torch.cat([codes[:, :WIDEST], side.context, residuals], 1).float()
