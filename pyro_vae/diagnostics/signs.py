"""Signs of faults in the results of the tools: what is wrong with the guide, and with the model."""

from collections.abc import Callable, Mapping
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.diagnostics.calibration import JOINT, LIKELIHOOD
from pyro_vae.diagnostics.model_check import Missed

ERRORS = 3
"""A sign must exceed its limit by this many standard errors."""

SHIFT = 0.1
"""A guide's mean may be this many posterior standard deviations off."""

SCALE = 1.15
"""A guide's standard deviation may be this factor off, in either direction."""

CORRELATION = 0.15
"""A correlation under the guide may be this far from that under the posterior."""

SCATTER = 0.3
"""Means of single rows may be this many posterior standard deviations off (root mean square)."""

MISSING, MISSING_SHIFT = 1.3, 0.3
"""If scores of true values among weighted draws spread by this factor, or have a mean this far from
0, the guide misses a part of the posterior."""

LEAST_SCORES, MOSTLY = 50, 2 / 3
"""Least number of true values for this judgment, and the largest fraction of unreliable rows."""

MUCH = 0.3
"""If log p(x) of the model's own data is too low by more nats than this, the guide misses a part.
If it is less, another fault of the guide may be the cause."""

LEAST_ANNEALED = 5
"""Least number of rows with reliable weights for the comparison with annealing."""

ROWS, LEAST_BAD = 0.01, 3
"""Unreliable rows are a sign if they are at least this fraction of the data, and this many."""

MANY = 0.2
"""If this fraction of the rows is unreliable, and nothing else is off, the tails of q are light."""

NATS = 0.02
"""A part of this many nats per example, or less, is not reported as a fault."""

DEVIATIONS = 4
"""A difference between data and the model's own data counts from this many standard deviations.
If log p(x) differs, `ERRORS` suffice to tell the part."""

MARGINAL = 1e-4
"""log p(x) of data and of the model's own data differ if the p-value is below this."""

SHOWN = 3
"""Number of units that a sign names."""


class Sign(NamedTuple):
    """One thing that is wrong, as one tool sees it."""

    kind: str
    """Of the guide: "place" (mean or scale), "shape" (correlations, tails), "rows" (some rows
    only), "tails" (many rows), "mass" (a part of the posterior is missed). Of the model: a part of
    `PARTS`."""
    tool: str
    """The name of the study."""
    words: str
    """What was found, with its number."""
    nats: float | None = None
    """Its size, in nats per example, if the tool measures it."""


def guide_signs(results: Mapping[str, Any]) -> list[Sign]:
    """Return the signs of faults of the guide of local latents."""
    found = []
    for name, read in GUIDE_TOOLS.items():
        if name in results:
            found += read(results[name])
    mass = missing_mass(results)
    return found if mass is None else [mass, *found]


def model_signs(results: Mapping[str, Any]) -> list[Sign]:
    """Return the signs of faults of the model, by part."""
    found = []
    for name, read in MODEL_TOOLS.items():
        if name in results:
            found += read(results[name])
    return found


def units_off(found: Any) -> Tensor:
    """Which ranked quantities of a `Calibration` are off, (quantities,)."""
    mean, spread = found.score_means, found.score_deviations
    far = mean.abs() > SHIFT + ERRORS * found.score_mean_errors
    off = (spread - 1).abs() > ERRORS * found.score_deviation_errors
    return far | (off & (spread.log().abs() > log(SCALE) + found.score_deviation_errors))


def _of_ranks(found: Any) -> list[Sign]:
    """Effect sizes of the ranks: they see a bias that the coverage of intervals does not show."""
    mean, spread, wrong = found.score_means, found.score_deviations, units_off(found)
    densities = torch.tensor([name in (JOINT, LIKELIHOOD) for name in found.names])
    signs = []
    for which, kind, start in (
        (~densities, "place", "on the model's own data, the guide"),
        (densities, "shape", "on the model's own data, the density of draws"),
    ):
        bad = which & wrong
        if bool(bad.any()):
            worst = (mean.abs() / SHIFT).maximum(spread.log().abs() / log(SCALE)) * bad
            order = worst.argsort(descending=True)[:SHOWN].tolist()
            told = [_rank_words(found, i) for i in order if bad[i]]
            signs.append(Sign(kind, "calibration", f"{start} is off: {', '.join(told)}"))
    return signs


def _rank_words(found: Any, i: int) -> str:
    mean, spread = found.score_means[i].item(), found.score_deviations[i].item()
    name = found.names[i]
    # Of true values beyond all draws the scores are alike, and tell only the location.
    if abs(mean) > 1 or abs(mean) / SHIFT > abs(log(spread)) / log(SCALE):
        side = "low" if mean > 0 else "high"
        error = found.score_mean_errors[i].item()
        return f"{name} is too {side} (scores of ranks {mean:+.2f} ± {error:.2f})"
    side = "narrow" if spread > 1 else "wide"
    return f"{name} is too {side} (scores of ranks spread by {spread:.2f})"


def _of_moments(found: Any) -> list[Sign]:
    """Moments of the guide against those of weighted draws, at the data."""
    signs = []
    shift, scatter = found.mean_shift, found.rms_shift
    far = _over(shift.value.abs(), SHIFT, shift.standard_error)
    loose = _over(scatter.value, SCATTER, scatter.standard_error)
    ratio = found.scale_ratio
    scaled = _over(ratio.value.log().abs(), log(SCALE), ratio.standard_error / ratio.value)
    for bad, size, words in (
        (far, shift.value, "its mean is off by {:+.2f} posterior sd"),
        (loose & ~far, scatter.value, "means of rows are off by {:.2f} posterior sd"),
        (scaled, ratio.value, "its scale is {:.2f} times the posterior's"),
    ):
        if bool(bad.any()):
            distance = size.log() if size is ratio.value else size
            i = int((distance.abs() * bad).nan_to_num(0.0).argmax())
            told = f"at the data, '{found.names[i]}': {words.format(size[i])}"
            signs.append(Sign("place", "local_calibration", told))
    related = found.rms_correlation
    apart = _over(related.value, CORRELATION, related.standard_error)
    if bool(apart.any()):
        i = int((related.value * apart).nan_to_num(0.0).argmax())
        a, b = (found.names[j] for j in found.pairs[i])
        told = f"at the data, the correlation of '{a}' and '{b}' is off by {related.value[i]:.2f}"
        signs.append(Sign("shape", "local_calibration", told))
    return signs


def _over(value: Tensor, limit: float, error: Tensor) -> Tensor:
    return value > limit + ERRORS * error.nan_to_num(torch.inf)


def _of_weights(found: Any) -> list[Sign]:
    over = int(found.unreliable.sum())
    if over < max(LEAST_BAD, ROWS * len(found.unreliable)):
        return []
    percent = 100 * over / len(found.unreliable)
    words = f"importance weights of {over} data ({percent:.0f} %) are not reliable"
    kind = "tails" if over >= MANY * len(found.unreliable) else "rows"
    return [Sign(kind, "log_likelihood", words)]


def of_classes(found: Any) -> list[Sign]:
    """Signs of a wrong q(y | x) of enumerated latents: weights sum over y, and do not see it."""
    if not found.value > NATS + ERRORS * found.standard_error:  # one row has no error
        return []
    named = ", ".join(f"'{name}'" for name in found.sites)
    by = f"{found.value:.2f} ± {found.standard_error:.2f} nats"
    words = f"other probabilities of {named} would raise the ELBO by {by}"
    return [Sign("place", "class_gap", words, found.value)]


def class_nats(results: Mapping[str, Any]) -> float:
    """How much the ELBO is below that with enumerated latents summed out, nats per example."""
    return float(results["class_gap"].value) if "class_gap" in results else 0.0


def _of_chains(found: Any) -> list[Sign]:
    """Guide against NUTS; only data whose chains agree and have enough draws count."""
    sound = found.agrees & ~found.too_few_draws
    size = found.bulk_effective_sample_size.nan_to_num(torch.inf).amin(1)
    error = size[sound].clamp(max=1e6).rsqrt()[:, None]
    signs = []
    shift, ratio = found.shift[sound].abs(), found.scale_ratio[sound].log().abs()
    if bool(_over(shift, 2 * SCATTER, error).any()):
        words = f"against NUTS, its mean is off by {shift.nan_to_num(0.0).max():.2f} posterior sd"
        signs.append(Sign("place", "nuts", words))
    if bool(_over(ratio, 2 * log(SCALE), error).any()):
        worst = found.scale_ratio[sound].flatten()[int(ratio.nan_to_num(0.0).argmax())]
        signs.append(
            Sign("place", "nuts", f"against NUTS, its scale is {worst:.2f} times the posterior's")
        )
    apart = (found.guide_moments.correlation - found.moments.correlation)[sound].abs()
    if bool(_over(apart, 2 * CORRELATION, error[..., None]).any()):
        words = f"against NUTS, a correlation is off by {apart.nan_to_num(0.0).max():.2f}"
        signs.append(Sign("shape", "nuts", words))
    return signs


def missing_mass(results: Mapping[str, Any]) -> Sign | None:
    """Return the sign of a guide that misses a part of the posterior, such as a mode.

    Draws of the guide never reach that part, so importance weights do not see it. True values of
    the model's own data do: their ranks are off even among weighted draws, or their weights show
    that log p(x) is too low. And so do annealed chains. A little may also be missing because means,
    scales or correlations are off. So if the weights at the data show that, it is the fault.
    """
    far = None if masked_by_classes(results) else _far_from_weighted_draws(results)
    if far is not None and results["model_check"].own_unreliable.double().mean() <= MOSTLY:
        return far
    seen, low = _seen_at_the_data(results), too_low_for_truth(results)
    if low is not None and not (seen and low.value <= MUCH + ERRORS * low.standard_error):
        words = f"the guide misses a part of the posterior: {low.words}"
        return Sign("mass", "model_check", words, low.value)
    higher = annealed_higher(results)
    if higher is not None and higher[0] > 0 and not seen:
        by, error, n = higher
        words = f"annealing gives a higher log p(x) (by {by:.2f} ± {error:.2f} nats, {n} data)"
        return Sign("mass", "annealing", words, by)
    return None


def _far_from_weighted_draws(results: Mapping[str, Any]) -> Sign | None:
    if (found := results.get("model_check")) is None:
        return None
    scores = found.weighted_scores
    n = (~scores.isnan()).sum(0)  # a masked unit has no score
    mean = scores.nanmean(0)
    spread = ((scores - mean).square().nansum(0) / (n - 1)).sqrt()
    far = (mean.abs() > MISSING_SHIFT + ERRORS / n.sqrt()) | (
        spread > MISSING + ERRORS / (2 * n).sqrt()
    )
    far &= n >= LEAST_SCORES
    if not bool(far.any()):
        return None
    i = int(torch.where(far, scores.square().nanmean(0), 0.0).argmax())
    words = (
        f"true values of '{found.units[i]}' are far from the guide's draws, also after "
        "weighting: the guide misses a part of the posterior"
    )
    return Sign("mass", "model_check", words)


def masked_by_classes(results: Mapping[str, Any]) -> bool:
    """Whether wrong q(y | x) of enumerated latents may be why true latents are far from draws.

    `model_check` draws y, and weights sum over y. With all mass in S, KL(q, p) is over -log p(S).
    """
    if "class_gap" not in results or not of_classes(results["class_gap"]):
        return False
    far = _far_from_weighted_draws(results) or _too_low_if_drawn(results)
    return far is not None and not results["model_check"].missed.value > class_nats(results)


def too_low_for_truth(results: Mapping[str, Any]) -> Missed | None:
    """Return by how much log p(x) of the model's own data is too low, if true latents show it."""
    return None if masked_by_classes(results) else _too_low_if_drawn(results)


def _too_low_if_drawn(results: Mapping[str, Any]) -> Missed | None:
    found = results["model_check"].missed if "model_check" in results else None
    if found is None:
        return None
    least = max(NATS, ERRORS * found.standard_error) + ERRORS * found.bias
    return found if found.value > least else None


def _seen_at_the_data(results: Mapping[str, Any]) -> bool:
    """Whether the weights show that the guide is off: low weights have a cause within its reach."""
    return "local_calibration" in results and bool(_of_moments(results["local_calibration"]))


AGREE = 0.1
"""Two estimates of log p(x) that differ by more nats per example disagree."""


def annealed_difference(results: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Return by how much annealing exceeds importance weights, with its error and the number of
    rows; None if they were not compared.

    Rows with unreliable weights are left out, since their weights say so themselves.
    """
    found, weighed = results.get("annealing"), results.get("log_likelihood")
    if found is None or weighed is None or len(weighed.per_datum) < len(found.per_datum):
        return None
    n = len(found.per_datum)
    kept = ~weighed.unreliable[:n]
    m = int(kept.sum())
    if m < LEAST_ANNEALED:
        return None
    by = (found.per_datum - weighed.per_datum[:n])[kept].mean().item()
    squares = found.standard_errors.square() + weighed.standard_errors[:n].square()
    return by, squares[kept].sum().item() ** 0.5 / m, m


def annealed_higher(results: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Return `annealed_difference` if it is significant; it is negative if weights are higher."""
    found = annealed_difference(results)
    if found is None or abs(found[0]) <= max(AGREE, ERRORS * found[1]) + _bias(results):
        return None
    return found


def _bias(results: Mapping[str, Any]) -> float:
    """How much log p(x) by weights may be too low: about half the variance of the mean weight,
    which heavy tails hide, so three times as much."""
    weighed = results["log_likelihood"]
    kept = weighed.standard_errors[~weighed.unreliable]
    return ERRORS * kept.square().mean().item() / 2


def _of_model(found: Any) -> list[Sign]:
    """Data against the model's own data.

    If log p(x) shows that the model is wrong, a smaller difference suffices to tell the part.
    """
    signs = _of_parts(found, DEVIATIONS)
    if signs or not found.marginal_p < MARGINAL:
        return signs
    words = f"log p(x) of data and of the model's own data differ (p {found.marginal_p:.1g})"
    return _of_parts(found, ERRORS) or [Sign("decoder", "model_check", words)]


def _of_parts(found: Any, limit: float) -> list[Sign]:
    return [
        *_of_codes(found, limit),
        *_of_scale(found, limit),
        *_of_structure(found, limit),
    ]


def _of_codes(found: Any, limit: float) -> list[Sign]:
    words = "a classifier tells codes '{}' of data from those of the model's own data (AUC {:.2f})"
    return [
        Sign("prior", "model_check", words.format(name, one.auc), one.nats)
        for name, one in found.codes.items()
        if one.deviations > limit and one.nats > NATS
    ]


def _of_scale(found: Any, limit: float) -> list[Sign]:
    signs = []
    if found.scale is not None and abs(found.scale.deviations) > limit:
        factor = 2.718281828459045 ** (found.scale.value / 2)
        side = "wide" if factor < 1 else "narrow"
        words = f"the likelihood is too {side}: residuals are {factor:.2f} times its scale"
        signs.append(Sign("likelihood scale", "model_check", words, found.scale_nats))
    for what, each in ((found.row_scale, "row"), (found.column_scale, "element")):
        if what is not None and what.deviations > limit:
            words = f"the scale of residuals differs by {each} more than the likelihood allows"
            signs.append(Sign("likelihood scale", "model_check", words, what.value))
    return [sign for sign in signs if sign.nats is not None and sign.nats > NATS]


def _of_structure(found: Any, limit: float) -> list[Sign]:
    return [
        Sign("decoder", "model_check", words, what.value)
        for what, words in (
            (found.dependence, "residuals of different elements are correlated"),
            (found.regression, "residuals still depend on the codes or the context"),
        )
        if what is not None and what.deviations > limit and what.value > NATS
    ]


def _of_train(found: Any) -> list[Sign]:
    if found.value <= NATS + ERRORS * found.standard_error:
        return []
    by = f"{found.value:.2f} ± {found.standard_error:.2f} nats"
    words = f"the ELBO of training data is {by} per example higher"
    return [Sign("data", "train_gap", words, found.value)]


GUIDE_TOOLS: dict[str, Callable[[Any], list[Sign]]] = {
    "calibration": _of_ranks,
    "local_calibration": _of_moments,
    "log_likelihood": _of_weights,
    "class_gap": of_classes,
    "nuts": _of_chains,
}
"""The studies that see faults of the guide."""

MODEL_TOOLS: dict[str, Callable[[Any], list[Sign]]] = {
    "model_check": _of_model,
    "train_gap": _of_train,
}
"""The studies that see faults of the model."""
