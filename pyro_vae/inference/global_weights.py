"""Importance weights of global and group latents: how far is their guide from the posterior?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.inference_data import unit_names
from pyro_vae.inference.pareto import LEAST, pareto_shape, threshold
from pyro_vae.inference.passes import in_chunks
from pyro_vae.inference.prior_tail import DRAWS, PriorTails, in_metrics, prior_tails, resampled
from pyro_vae.pairs import fold_plan
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.given_globals import GivenGlobals, global_values, pools, spread_rows
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model
from pyro_vae.pairs.pair import Batch, placement
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import factors, latents, log_prob
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given
from pyro_vae.pairs.weights import log_weights, log_weights_alone, structure


@dataclass(frozen=True)
class GlobalWeights:
    """The results of `global_weights`. A unit is one number of a global or group latent."""

    draws: dict[str, Tensor]
    """Draws of the guide, of shape (draws, *event), or (draws, groups, *event) for groups."""
    log_weights: Tensor
    """The log weight of each draw, of shape (draws,), in nats for the whole data set."""
    units: tuple[str, ...]
    """The names of the units, such as "w" or "u[0]"."""
    pareto_k: float
    """The Pareto shape of the weights. Over ``k_threshold`` the guide is so far from the posterior
    that neither ``mean`` nor ``standard_deviation`` is reliable."""
    num_samples: int
    """Importance samples of the local latents of each row, for each draw."""
    num_examples: int
    """The number of rows."""
    noise: float
    """The standard deviation of a log weight that is due to the draws of the local latents, in nats
    for the whole data set. If it is not small, it enlarges ``pareto_k`` however right the guide of
    the global latents is. It falls with the root of ``num_samples``. NaN for one sample."""
    prior_tails: PriorTails | None = None
    """How far the weighted draws lie in the tail of their prior; None if ``pareto_k`` is too
    large."""

    @property
    def k_threshold(self) -> float:
        """The largest k with reliable results (`pyro_vae.inference.pareto.threshold`)."""
        return threshold(len(self.log_weights))

    @property
    def reliable(self) -> bool:
        """Whether the weights correct the guide: Pareto k is at most its threshold."""
        return self.pareto_k <= self.k_threshold

    @property
    def weights(self) -> Tensor:
        """The weights, of sum 1, of shape (draws,)."""
        return self.log_weights.softmax(0)

    @property
    def effective_sample_size(self) -> float:
        """The number of draws that the weights leave: 1 / sum of squared weights."""
        return 1 / self.weights.square().sum().item()

    @property
    def mean(self) -> Tensor:
        """The posterior mean of each unit, by the weights, of shape (units,)."""
        return self.weights @ self._values

    @property
    def mean_standard_error(self) -> Tensor:
        """The Monte Carlo error of ``mean``, of shape (units,)."""
        off = self._values - self.mean
        return (self.weights.square() @ off.square()).sqrt()

    @property
    def standard_deviation(self) -> Tensor:
        """The posterior standard deviation of each unit, by the weights, of shape (units,)."""
        return (self.weights @ (self._values - self.mean).square()).sqrt()

    @property
    def guide_mean(self) -> Tensor:
        """The mean of each unit under the guide, of shape (units,)."""
        return self._values.mean(0)

    @property
    def guide_standard_deviation(self) -> Tensor:
        """The standard deviation of each unit under the guide, of shape (units,)."""
        return self._values.std(0)

    @property
    def shift(self) -> Tensor:
        """Means of the guide minus those of the posterior, in posterior standard deviations."""
        return (self.guide_mean - self.mean) / self.standard_deviation

    @property
    def scale_ratio(self) -> Tensor:
        """Standard deviations of the guide divided by those of the posterior, (units,)."""
        return self.guide_standard_deviation / self.standard_deviation

    @property
    def _values(self) -> Tensor:
        parts = [value.reshape(len(value), -1) for value in self.draws.values()]
        return torch.cat([part.double() for part in parts], 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the results for metrics.json; posterior moments are None if k is too large."""
        columns = {"guide_mean": self.guide_mean, "guide_sd": self.guide_standard_deviation}
        if self.reliable:
            columns |= {"mean": self.mean, "sd": self.standard_deviation}
            columns |= {"shift": self.shift, "scale_ratio": self.scale_ratio}
        finite = self.pareto_k < float("inf")
        return {
            "num_examples": self.num_examples,
            "num_draws": len(self.log_weights),
            "num_samples": self.num_samples,
            "noise": self.noise if isfinite(self.noise) else None,
            "pareto_k": self.pareto_k if finite else None,
            "k_threshold": self.k_threshold,
            "effective_sample_size": self.effective_sample_size if finite else None,
            **in_metrics(self.prior_tails),
            "by_unit": {
                unit: {name: value[i].item() for name, value in columns.items()}
                for i, unit in enumerate(self.units)
            },
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        draws, k = len(self.log_weights), f"{self.pareto_k:.2f}"
        bad = f" > {self.k_threshold:.2f}: the weighted moments are not reliable"
        verdict = "" if self.reliable else bad
        lines = [
            f"{draws} draws of the global latents, {self.num_samples} samples of each of "
            f"{self.num_examples} rows; Pareto k {k}{verdict}; "
            f"{self.effective_sample_size:.0f} effective draws; noise of a log weight by the local "
            f"latents {self.noise:.2f} nats"
        ]
        width = max(map(len, self.units)) + 2
        by_weights = "posterior" if self.reliable else "weighted draws"
        lines.append(f"{'':<{width}}{by_weights:>18}{'guide':>18}{'shift':>8}{'scale':>7}")
        for i in self.shift.abs().argsort(descending=True)[:SHOWN].tolist():
            by = f"{self.mean[i]:.3f} ± {self.standard_deviation[i]:.3f}"
            guide = f"{self.guide_mean[i]:.3f} ± {self.guide_standard_deviation[i]:.3f}"
            lines.append(
                f"{self.units[i]:<{width}}{by:>18}{guide:>18}{self.shift[i]:>8.2f}"
                f"{self.scale_ratio[i]:>7.2f}"
            )
        if len(self.units) > SHOWN:
            lines.append(f"the {SHOWN} of {len(self.units)} units with the largest shift")
        if self.prior_tails is not None:
            lines.append(str(self.prior_tails))
        return "\n".join(lines)


SHOWN = 20
"""Number of units in the printed table."""


@alone()
def global_weights(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_draws: int = 500,
    num_samples: int = 100,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> GlobalWeights:
    r"""Weigh draws of the global and group latents by their posterior, given all data.

    A draw :math:`w \sim q(w)` has the weight

    .. math:: \frac{p(w)}{q(w)} \prod_i \frac1K \sum_k \frac{p(x_i, z_{ik} | w)}{q(z_{ik}|x_i, w)},
        \qquad z_{ik} \sim q(z | x_i, w).

    So the local latents are integrated out by K importance samples for each row. Their noise stays
    in the weights, which have the right mean for every K. A joint draw of z of all rows would
    leave no weight of use. The weighted draws have the moments of p(w | x) if Pareto k is small. If
    it is large, the guide is far from the posterior, or K is too small: try more samples, or
    `pyro_vae.nuts`.

    Arguments:
        pair: any pair with global or group latents that have a density.
        x, context: all rows to which the guide was fitted; other rows have another posterior.
        num_draws: number of draws of the global latents, at least 21.
        num_samples: K. Each draw takes one pass of K samples for every row. A pair without local
            latents needs none.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    Raises `UsageError` for a pair without global latents, and for point estimates of latents.
    Vehtari et al., Pareto smoothed importance sampling, 2024
    (https://arxiv.org/abs/1507.02646); the weights are not smoothed here.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=()))
    >>> found = pv.global_weights(pair, torch.ones(3, 4), num_draws=21, num_samples=5)
    >>> found.log_weights.shape, len(found.units)
    (torch.Size([21]), 12)
    """
    for name, value, least in (("num_draws", num_draws, LEAST), ("num_samples", num_samples, 1)):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    batch = whole(pair, x, context, binarize)
    names = _weighable(pair, batch)
    with using(pair, seed), bar(progress, num_draws, "global latents", delay=2) as shown:
        evidence = _Evidence(pair, batch, names, num_samples)
        few = tuple(part[:4] for part in batch)
        of = batch if pools(pair, spread_rows(batch), names) else few
        draws: list[dict[str, Tensor]] = []
        weights: list[Tensor] = []
        noise: list[float] = []
        for _ in range(num_draws):
            values, ratio = _drawn(pair, of, batch, names)
            of_rows, variance = evidence(values)
            weights.append((ratio + of_rows).cpu())
            noise.append(variance.item())
            draws.append(values)
            shown.update()
        values = {name: torch.stack([one[name] for one in draws]) for name in names}
        log_weights = torch.stack(weights)
        k = _shape(log_weights, torch.finfo(placement(pair)[1]).eps)
        tails = None
        if k <= threshold(num_draws):
            chosen = resampled(log_weights.softmax(0), min(num_draws, DRAWS))
            tails = prior_tails(pair, batch, {n: value[chosen] for n, value in values.items()})
    found = {name: value.cpu() for name, value in values.items()}
    units = [unit for name in names for unit in unit_names(name, found[name].shape[1:])]
    n, spread = len(batch[0]), (sum(noise) / len(noise)) ** 0.5
    return GlobalWeights(found, log_weights, tuple(units), k, evidence.number, n, spread, tails)


def _shape(log_weights: Tensor, rounding: float) -> float:
    """Return the shape of the tail; 0 if the weights differ only by rounding."""
    spread = log_weights.max() - log_weights.min()
    size = log_weights.max().abs().clamp(min=1)
    constant = bool(spread <= 100 * rounding * size)
    return 0.0 if constant else pareto_shape(log_weights[None]).item()


def _weighable(pair: nn.Module, batch: Batch) -> list[str]:
    """Return the global latents of a pair. Raises `UsageError` if they have no weights."""
    names, kind = global_latents(pair, batch), type(pair).__name__
    if not names:
        raise UsageError(f"{kind} has no global latent, but global_weights needs one")
    for name in set(names) & set(fold_plan.plan(pair, batch).points):
        raise UsageError(
            f"the guide of '{name}' is a Delta, a point estimate, which cannot be weighed; give "
            "the site a distribution with a positive variance"
        )
    return names


def _drawn(
    pair: nn.Module, of: Batch, batch: Batch, names: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a draw of the global latents, and log p(w) - log q(w)."""
    drawn = trace_guide(pair, of)
    guide, values = latents(drawn), global_values(drawn, names)
    with Given(values):
        model = trace_model(pair, batch, trace_guide(pair, batch))
    ours = latents(model) | factors(model)
    log_p = [log_prob(site).double().sum() for site in ours.values() if not is_local(site)]
    log_q = [log_prob(guide[name]).double().sum() for name in names]
    return values, torch.stack(log_p).sum() - torch.stack(log_q).sum()


class _Evidence:
    """An estimate of log p(x | w) of all rows, with the local latents integrated out."""

    def __init__(
        self, pair: nn.Module, batch: Batch, names: Sequence[str], num_samples: int
    ) -> None:
        few = tuple(part[:2] for part in batch)
        guide = trace_guide(pair, batch)
        self.batch = batch
        self.fixed = GivenGlobals(pair, global_values(guide, names))
        self.nesting, self.vectorized, widest = structure(self.fixed, few)
        self.local = len(latents(guide)) > len(names)
        self.number = num_samples if self.local else 1
        self.rows = max(1, CELLS // (widest * self.number))

    def __call__(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the estimate and its Monte Carlo variance (delta method)."""
        self.fixed.hold(values)
        parts = [self._of(part) for part in in_chunks(self.batch, self.rows)]
        value, variance = (torch.cat(column).sum() for column in zip(*parts, strict=True))
        return value, variance

    def _of(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Return the estimates of some rows and their variances, of shape (n,)."""
        if self.vectorized:
            found = log_weights(self.fixed, part, self.number, self.nesting)
        else:
            found = torch.stack(
                [log_weights_alone(self.fixed, part, self.nesting) for _ in range(self.number)]
            )
        found = found.double()
        # One draw of a local latent does not show its spread.
        variance = found.new_full(found.shape[1:], torch.nan if self.local else 0.0)
        if self.number > 1:
            relative = (found - found.amax(0)).exp()
            variance = (relative / relative.mean(0)).var(0) / self.number
        return found.logsumexp(0) - log(self.number), variance
