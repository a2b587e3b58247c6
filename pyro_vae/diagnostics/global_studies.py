"""Studies of global and group latents, and the verdict on each latent of a pair."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import log
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_vae.diagnostics import global_figures
from pyro_vae.diagnostics.study import GRADIENT, Bench, Finding, Rung, Study
from pyro_vae.errors import UsageError
from pyro_vae.inference.global_weights import GlobalWeights, global_weights
from pyro_vae.inference.joint_nuts import JointPosterior
from pyro_vae.inference.nuts import nuts

SHIFT = 0.25
"""A guide's mean may be this many posterior standard deviations off."""

SCALE = 1.25
"""A guide's standard deviation may be this factor off, in either direction."""

CORRELATION = 0.3
"""A correlation under the guide may be this far from that under the posterior."""

MOST_CORRELATED = 500
"""Importance weights of more units give no correlations: their number grows with the square."""

ERRORS = 3
"""A fault must exceed its limit by this many Monte Carlo standard errors."""

MIXED = 1.1
"""Chains with a larger R-hat show nothing, not even a fault."""

ENOUGH = 400
"""Least number of effective draws for a guide to be called reliable."""

SHARE = 20
"""The share of each of the two tools in the time, since everything rests on global latents. Weights
need the least time to call a guide reliable. If they are uneven, only NUTS tells how far it is."""

LEAPFROG = 30
"""Approximate number of gradients in a transition. A traced gradient takes about half the time of
the pass of model and guide that `diagnose` measures, so this is half of their number."""

FAR = 0.7
"""With a larger Pareto k the guide is far from the posterior, whatever the number of draws."""

SHOWN = 3
"""Number of units that a finding describes."""

UNKNOWN = (
    "the guide of global latents belongs to the data to which it was fitted, and x is not known to "
    "be all of them: pass them as `train`"
)

ADVICE = (
    "a guide in which local latents depend on the global ones, q(w) q(z | x, w), or a richer q(w) "
    "(docs/models/global-latents.md)"
)


def global_weights_study(bench: Bench) -> Study | None:
    if not bench.shared:
        return None

    def run(draws: int, samples: int) -> GlobalWeights:
        return global_weights(
            bench.pair,
            *_train(bench),
            num_draws=draws,
            num_samples=samples,
            progress=False,
            **bench.settings,
        )

    n = _rows(bench)
    rungs = [
        Rung(draws * (bench.cost(3, n) + bench.cost(1, n * k)), partial(run, draws, k))
        for draws, k in ((100, 30), (500, 100), (1000, 300))
    ]
    return Study("global_weights", SHARE, rungs)


def global_nuts_study(bench: Bench) -> Study | None:
    if not bench.shared:
        return None

    def run(draws: int, chains: int) -> JointPosterior:
        found = nuts(
            bench.pair,
            *_train(bench),
            num_draws=draws,
            warmup=draws,
            num_chains=chains,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )
        return cast(JointPosterior, found)

    n = _rows(bench)
    rungs = [
        Rung(bench.cost(LEAPFROG * 2 * d * c, GRADIENT * n), partial(run, d, c))
        for d, c in ((50, 2), (100, 4), (250, 4), (500, 4), (1000, 4))
    ]
    figures = {"global-nuts": global_figures.global_marginals}
    return Study("global_nuts", SHARE, rungs, figures=figures)


def _train(bench: Bench) -> tuple[Tensor, ...]:
    if bench.train is None:
        raise UsageError(UNKNOWN)
    return bench.train


def _rows(bench: Bench) -> int:
    return 0 if bench.train is None else len(bench.train[0])


class GlobalEvidence(NamedTuple):
    """Moments of global latents under posterior and guide, (units,), from one tool."""

    tool: str
    units: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    guide_mean: Tensor
    guide_scale: Tensor
    draws: Tensor
    """Effective draws of the posterior."""
    guide_draws: int
    sound: bool
    """Whether the tool itself finds nothing against its draws."""
    correlation: Tensor | None = None
    """Correlations of the units under the posterior, (units, units)."""
    guide_correlation: Tensor | None = None
    """The same under the guide."""

    @property
    def shift(self) -> Tensor:
        return (self.guide_mean - self.mean) / self.scale

    @property
    def log_ratio(self) -> Tensor:
        return (self.guide_scale / self.scale).log()

    @property
    def shifted(self) -> Tensor:
        """Which means are off by more than the limit and its Monte Carlo error."""
        ratio = self.guide_scale / self.scale
        error = (1 / self.draws + ratio.square() / self.guide_draws).sqrt()
        return self.shift.abs() > SHIFT + ERRORS * error

    @property
    def scaled(self) -> Tensor:
        """Which scales are off by more than the limit and its Monte Carlo error."""
        error = (0.5 / self.draws + 0.5 / self.guide_draws) ** 0.5
        return self.log_ratio.abs() > log(SCALE) + ERRORS * error

    @property
    def faulty(self) -> list[int]:
        """The units with a fault, the worst first."""
        ratio = self.log_ratio.exp()
        apart = 0.5 * (ratio.square() + self.shift.square() - 1) - self.log_ratio
        order = apart.nan_to_num(0.0, posinf=torch.inf).argsort(descending=True).tolist()
        off = self.shifted | self.scaled
        return [i for i in order if bool(off[i])]

    @property
    def apart(self) -> Tensor:
        """Absolute differences of correlations, (units, units); 0 where they are not known."""
        if self.correlation is None or self.guide_correlation is None:
            return torch.zeros(len(self.units), len(self.units))
        return (self.guide_correlation - self.correlation).abs().nan_to_num(0.0)

    @property
    def misjudged_pair(self) -> tuple[int, int] | None:
        """The two units whose correlation is off by the most, if that is more than the limit and
        its Monte Carlo error; a correlation r has the error (1 - r^2) / sqrt(draws)."""
        if self.correlation is None or self.guide_correlation is None:
            return None
        draws = self.draws.nan_to_num(torch.inf)
        own = (1 - self.correlation.square()) / torch.minimum(draws, draws[:, None]).sqrt()
        guide = (1 - self.guide_correlation.square()) / self.guide_draws**0.5
        over = self.apart - ERRORS * (own.square() + guide.square()).sqrt().nan_to_num(0.0)
        worst = int(over.argmax())
        i, j = worst // len(over), worst % len(over)
        return (min(i, j), max(i, j)) if bool(over[i, j] > CORRELATION) else None

    @property
    def enough(self) -> bool:
        """Whether the draws can show that the guide is right."""
        return self.sound and bool((self.draws.nan_to_num(torch.inf) >= ENOUGH).all())


def of_weights(found: GlobalWeights) -> GlobalEvidence:
    """GlobalEvidence from importance weights with a small Pareto k."""
    return GlobalEvidence(
        f"importance weights (Pareto k {found.pareto_k:.2f})",
        found.units,
        found.mean,
        found.standard_deviation,
        found.guide_mean,
        found.guide_standard_deviation,
        torch.full((len(found.units),), found.effective_sample_size, dtype=torch.float64),
        len(found.log_weights),
        found.reliable,
        *_correlations(found),
    )


def _correlations(found: GlobalWeights) -> tuple[Tensor | None, Tensor | None]:
    """Return the correlations of the weighted draws, and those of the draws of the guide."""
    if len(found.units) > MOST_CORRELATED:
        return None, None
    values = torch.cat([part.reshape(len(part), -1).double() for part in found.draws.values()], 1)
    equal = torch.ones_like(found.weights)
    both = [torch.cov(values.T, aweights=weights) for weights in (found.weights, equal)]
    scales = [torch.atleast_2d(one).diagonal().sqrt() for one in both]
    ours, theirs = (one / s / s[:, None] for one, s in zip(both, scales, strict=True))
    return ours, theirs


def of_nuts(found: JointPosterior) -> GlobalEvidence:
    """GlobalEvidence from NUTS on all latents."""
    shared = found.shared
    return GlobalEvidence(
        f"NUTS on all {found.num_examples} rows",
        shared.units,
        shared.moments.mean[0],
        shared.moments.standard_deviation[0],
        shared.guide_moments.mean[0],
        shared.guide_moments.standard_deviation[0],
        shared.effective_sample_size[0],
        len(next(iter(shared.guide_draws.values()))),
        found.agrees,
        shared.moments.correlation[0],
        shared.guide_moments.correlation[0],
    )


def judge_globals(
    names: Sequence[str], results: Mapping[str, Any], reasons: Mapping[str, str]
) -> list[Finding]:
    """Return the verdict on the global and group latents of a pair.

    Arguments:
        names: the latents.
        results: the results of the studies.
        reasons: why a study has no result, by its name.
    """
    weights, chains = results.get("global_weights"), results.get("global_nuts")
    evidence = [] if chains is None or not mixed(chains) else [of_nuts(chains)]
    if weights is not None and weights.reliable:
        evidence.append(of_weights(weights))
    for one in evidence:
        if one.faulty or one.misjudged_pair:
            return [Finding("doubt", _fault(one)), Finding("next", ADVICE)]
    told = ", ".join(f"'{name}'" for name in names[:SHOWN]) + (" ..." if names[SHOWN:] else "")
    for one in evidence:
        if one.enough:
            return [Finding("trust", _agreement(told, one))]
    if weights is not None and weights.pareto_k > FAR and not _noisy(weights):
        words = f"the guide of {told}: Pareto k of its weights given all {weights.num_examples} "
        words += f"rows is {weights.pareto_k:.2f}, so it is far from the posterior, or the guide "
        words += "of the local latents is"
        return [Finding("doubt", words), Finding("next", "pyro_vae.nuts on the training data")]
    return [_unchecked(told, results, reasons)]


def _noisy(found: GlobalWeights) -> bool:
    """Whether the draws of local latents may be why the weights are uneven."""
    spread = found.log_weights.std().item()
    return not found.noise <= max(NOISE, NOISE_SHARE * spread)


def mixed(found: JointPosterior) -> bool:
    """Whether the chains agree so far that they can show a fault."""
    return bool(found.shared.r_hat.nan_to_num(0.0).max() <= MIXED)


def _fault(found: GlobalEvidence) -> str:
    told = [_of_unit(found, i) for i in found.faulty[:SHOWN]]
    more = len(found.faulty) - SHOWN
    rest = f", and {more} more units" if more > 0 else ""
    if found.misjudged_pair and more <= 0:
        told.append(_of_two(found, *found.misjudged_pair))
    return f"the guide of {', of '.join(told)}{rest}, by {found.tool}"


def _of_two(found: GlobalEvidence, i: int, j: int) -> str:
    assert found.correlation is not None
    assert found.guide_correlation is not None
    return (
        f"'{found.units[i]}' and '{found.units[j]}': their correlation is "
        f"{found.guide_correlation[i, j]:.2f}, and the posterior's is {found.correlation[i, j]:.2f}"
    )


def _of_unit(found: GlobalEvidence, i: int) -> str:
    off = []
    if bool(found.scaled[i]):
        off.append(f"its scale is {found.log_ratio[i].exp():.2g} times the posterior's")
    if bool(found.shifted[i]):
        side = "high" if found.shift[i] > 0 else "low"
        off.append(
            f"its mean is {found.shift[i].abs():.1f} posterior standard deviations too {side}"
        )
    numbers = (
        f"posterior {found.mean[i]:.3g} ± {found.scale[i]:.2g}, "
        f"guide {found.guide_mean[i]:.3g} ± {found.guide_scale[i]:.2g}"
    )
    return f"'{found.units[i]}': {' and '.join(off)} ({numbers})"


def _agreement(told: str, found: GlobalEvidence) -> str:
    shift = found.shift.abs().nan_to_num(0.0).max()
    ratio = found.log_ratio.nan_to_num(0.0).exp()
    known = found.correlation is not None and len(found.units) > 1
    more = f", and its correlations are within {found.apart.max():.2f}" if known else ""
    return (
        f"the guide of {told}: its means are within {shift:.2f} posterior standard deviations, "
        f"{'' if more else 'and '}its scales are {ratio.min():.2f} to {ratio.max():.2f} times the "
        f"posterior's{more}, by {found.tool}"
    )


def _unchecked(told: str, results: Mapping[str, Any], reasons: Mapping[str, str]) -> Finding:
    start = f"the guide of {told}: "
    said = {name: reasons[name] for name in TOOLS if name in reasons and name not in results}
    if str(UsageError(UNKNOWN)) in said.values():
        return Finding("unchecked", start + str(UsageError(UNKNOWN)))
    why = [f"{name} has too few effective draws" for name in TOOLS if name in results]
    weights = results.get("global_weights")
    if weights is not None and _noisy(weights):
        why[0] = (
            f"the draws of the local latents of {weights.num_examples} rows leave a noise of "
            f"{weights.noise:.1f} nats in each weight of global_weights, which needs more samples "
            "of each row"
        )
    for reason in dict.fromkeys(said.values()):
        why.append(f"{' and '.join(n for n in said if said[n] == reason)}: {reason}")
    words = f"{start}{', '.join(why)}; a larger budget, pyro_vae.nuts or pyro_vae.global_weights "
    return Finding("unchecked", words + "checks it")


NOISE, NOISE_SHARE = 0.5, 0.5
"""Nats in a log weight by the draws of the local latents, and their share in the spread of the log
weights. Above both, Pareto k says nothing about the guide of the global latents."""

TOOLS = ("global_weights", "global_nuts")
"""The studies that check global latents."""


def judge_local(names: Sequence[str], results: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for local latents that no study has reached."""
    if not names or any(name in results for name in REACHES_LOCAL):
        return []
    told = ", ".join(f"'{name}'" for name in names)
    words = f"the guide of {told}: no tool that checks local latents has run; a larger budget runs "
    return [Finding("unchecked", f"{words}{', '.join(REACHES_LOCAL[:2])} and others")]


REACHES_LOCAL = ("calibration", "log_likelihood", "gaps", "annealing", "nuts", "global_nuts")
"""The studies that compare the guide of local latents with their posterior."""


def limited(
    findings: Sequence[Finding],
    verdicts: Sequence[Finding],
    shared: Sequence[str],
    local: Sequence[str],
) -> list[Finding]:
    """Return findings that are at most as good as the verdicts on the latents on which they rest.

    All numbers of a pair rest on its global latents. A finding that names a local latent rests on
    this latent.
    """
    return [_limited(finding, verdicts, shared, local) for finding in findings]


def _limited(
    finding: Finding, verdicts: Sequence[Finding], shared: Sequence[str], local: Sequence[str]
) -> Finding:
    if finding.kind != "trust":
        return finding
    for verdict in verdicts:
        about = [name for name in shared if f"'{name}" in verdict.words]
        named = [n for n in local if f"'{n}'" in verdict.words and f"'{n}'" in finding.words]
        if verdict.kind in ("doubt", "unchecked") and (about or named):
            on = ", ".join(f"'{name}'" for name in (about or named))
            return Finding(verdict.kind, f"given the guide of {on}, {finding.words}", finding.about)
    return finding
