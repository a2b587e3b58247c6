"""The verdict: the parts at fault, and what the results say about each quantity, once.

The rules are in docs/diagnostics/verdict.md, and `tests/diagnostics/test_verdict.py` holds each
of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_vae.diagnostics.attribution import Blame, blamed, misses_mass
from pyro_vae.diagnostics.signs import (
    ERRORS,
    NATS,
    Sign,
    annealed_difference,
    annealed_higher,
    class_nats,
    guide_signs,
    masked_by_classes,
    too_low_for_truth,
)
from pyro_vae.diagnostics.study import GAP, Finding
from pyro_vae.inference.annealing import Annealing

TOGETHER = 0.3
"""Two estimates agree only if difference plus two errors is at most this many nats per example."""

FEW = 5
"""Number of unreliable rows that a finding names."""

PROPOSAL = {
    True: "pyro_vae.anneal for log p(x)",
    False: "a better guide of the local latents for log p(x); pyro_vae.anneal refuses this pair",
}
"""What to try if importance weights are not reliable, by whether annealing applies."""

NOT_LOOKED = (
    "no tool has looked for a part of the posterior that the guide misses (model_check and "
    "calibration do; they need template(n) and time)"
)
"""Why a number without a fault is not reliable."""

MASKED = (
    "the probabilities of the classes are so wrong that no tool can tell whether the guide misses "
    "a part of the posterior of the other latents"
)
"""The same, if `model_check` has looked."""


def findings(
    results: Mapping[str, Any],
    rows: Tensor,
    more: Sequence[Sign] = (),
    not_applicable: Collection[str] = (),
    shared: Collection[str] = (),
) -> tuple[list[Blame], list[Finding]]:
    """Return the parts at fault, and what the results say about each quantity, once.

    Arguments:
        results: the results of the studies by name.
        rows: the row number of each datum, to name rows.
        more: signs that single studies found.
        not_applicable: the studies that do not apply to the pair, and are not advised.
        shared: the global and group latents of the pair.
    """
    found_faults = blamed(results, more, not_applicable)
    blames = [replace(blame, own_guide=bool(shared)) for blame in found_faults]
    found = [blame.finding for blame in blames]
    parts = {blame.part for blame in blames}
    found += _on_guide(results, parts) + _on_model(results, parts)
    mass = any(misses_mass(blame) for blame in blames)
    found += _on_log_likelihood(results, rows, mass, "annealing" not in not_applicable)
    found += _on_annealing(results)
    return blames, found


def _on_guide(results: Mapping[str, Any], parts: set[str]) -> list[Finding]:
    if parts & {"encoder", "family"}:
        return []
    ran = [name for name in ("calibration", "local_calibration", "gaps") if name in results]
    if not ran:
        return []
    ran += ["class_gap"] if "class_gap" in results else []  # alone, it does not judge q(z | x, y)
    words = f"the guide of local latents: no fault found by {', '.join(ran)}"
    if looked_for_mass(results):
        return [Finding("trust", words, "guide")]
    return [Finding("unchecked", f"{words}, but {NOT_LOOKED}", "guide")]


def _on_model(results: Mapping[str, Any], parts: set[str]) -> list[Finding]:
    found = results.get("model_check")
    if found is None or parts & {"prior", "likelihood scale", "decoder"}:
        return []
    if found.given:
        words = "the model: its own data are compared with yours only if all latents are local"
        return [Finding("unchecked", words, "model")]
    what = ["log p(x)", *(["codes"] if found.codes else [])]
    what += ["residuals"] if found.dependence is not None else []
    if found.marginal_p != found.marginal_p:
        words = "the model: too few rows have reliable importance weights"
        return [Finding("unchecked", words, "model")]
    words = f"the model: no difference of data and own data was found in {', '.join(what)}"
    return [Finding("trust", f"{words} ({len(found.log_likelihood)} data)", "model")]


def on_unseen_model(
    results: Mapping[str, Any], blames: Sequence[Blame], reasons: Mapping[str, str]
) -> list[Finding]:
    """Say that no tool has compared the model's own data with yours, and why, unless it has a
    fault."""
    parts = {"prior", "likelihood scale", "decoder"} & {blame.part for blame in blames}
    if "model_check" in results or parts or "model_check" not in reasons:
        return []
    words = f"the model: its own data were not compared with yours: {reasons['model_check']}"
    return [Finding("unchecked", words, "model")]


def _on_log_likelihood(
    results: Mapping[str, Any], rows: Tensor, mass: bool, annealable: bool
) -> list[Finding]:
    """Say whether log p(x) and the gap of the ELBO, from the most rows, can be believed."""
    found = results.get("log_likelihood")
    if found is None:
        return []
    n = len(found.per_datum)
    infinite = int((found.infinite_weights > 0).sum())
    if infinite:
        words = f"log p(x) of {infinite} data: weights are infinite, because the guide gives no "
        return [Finding("doubt", words + "density to its own draws", "log p(x)")]
    value = f"{found.value:.3f} ± {found.total_error:.3f} nats per example ({n} data)"
    gap = found.value - found.elbo + class_nats(results)
    distance = f"{gap:.2f} nats per example below log p(x)"
    if why := _too_low(results, rows, mass):
        said = [
            Finding("doubt", f"log p(x) by importance weights, {value}: {why}", "log p(x)"),
            Finding("doubt", f"the ELBO as log p(x): at least {distance}", "ELBO"),
        ]
        more = Finding("next", PROPOSAL[annealable], "log p(x)")
        return [*said, more] if bool(found.unreliable.any()) else said
    kind, words = "trust", f"log p(x) = {value} by importance weights{_agreement(results)}"
    words += _resolution(results)
    if not looked_for_mass(results):
        why = MASKED if masked_by_classes(results) else NOT_LOOKED
        kind, words = "unchecked", f"{words}, but {why}"
    of_elbo = f"the ELBO is {distance} ({n} data)"
    return [
        Finding(kind, words, "log p(x)"),
        Finding(kind if gap < GAP else "doubt", of_elbo, "ELBO"),
    ]


def _too_low(results: Mapping[str, Any], rows: Tensor, mass: bool) -> str:
    """Return why log p(x) by importance weights is not reliable; an empty text if it may be."""
    found, higher = results["log_likelihood"], annealed_higher(results)
    if bool((bad := found.unreliable).any()):
        worst = found.pareto_k.masked_fill(~bad, -1).argsort(descending=True, stable=True)
        named = ", ".join(map(str, rows[worst[: min(FEW, int(bad.sum()))]].tolist()))
        more = " ..." if int(bad.sum()) > FEW else ""
        return (
            f"it may be too low, since the weights of {int(bad.sum())} data are not reliable "
            f"(rows {named}{more})"
        )
    if mass:
        return "it is too low, since the guide misses a part of the posterior"
    if (low := too_low_for_truth(results)) is not None:
        return low.words
    if higher is not None and higher[0] > 0:
        by, error, n = higher
        more = f"by {by:.2f} ± {error:.2f} nats, {n} data"
        return f"it is too low, since annealing gives a higher value ({more})"
    return ""


def _resolution(results: Mapping[str, Any]) -> str:
    """Return from which share on a missed part of the posterior would show.

    Of n true latents, a share s of which is missed, n s give the difference an error of about
    sqrt(s / n), and it must exceed three errors.
    """
    found = results["model_check"].missed if "model_check" in results else None
    if found is None or found.value != found.value:
        return ""
    least = max(NATS, ERRORS**2 / found.num_examples) + ERRORS * found.bias
    return f"; a missed part of the posterior would show from {100 * least:.0f} % on"


def looked_for_mass(results: Mapping[str, Any]) -> bool:
    """Whether a tool has looked for a part of the posterior that the guide never reaches.

    Importance weights cannot show it, and neither can annealing that agrees with them, since its
    chains start at the guide. True values of the model's own data can.
    """
    found, ranks = results.get("model_check"), results.get("calibration")
    enough = found is not None and found.missed.value == found.missed.value
    enough = enough and not masked_by_classes(results)
    return enough or (ranks is not None and not guide_signs({"calibration": ranks}))


def _agreement(results: Mapping[str, Any]) -> str:
    """Return that annealing gives the same log p(x), if it was compared and does."""
    found = annealed_difference(results)
    if found is None or annealed_higher(results) is not None:
        return ""
    by, error, n = found
    together = abs(by) + 2 * error <= TOGETHER
    return f", and annealing agrees ({by:+.2f} ± {error:.2f}, {n} data)" if together else ""


def _on_annealing(results: Mapping[str, Any]) -> list[Finding]:
    found, other = results.get("annealing"), annealed_higher(results)
    if not isinstance(found, Annealing) or other is None or other[0] > 0:
        return []
    by, error, n = other
    words = f"annealing at {found.num_temperatures} temperatures: importance weights give a higher "
    words += f"bound (by {-by:.2f} ± {error:.2f} nats, on {n} data)"
    more = "annealing with more temperatures or more time"
    return [Finding("doubt", words, "annealing"), Finding("next", more, "annealing")]
