"""The verdict: which part of a pair is at fault, by how many nats, and what to try next.

The rules are in docs/diagnostics/verdict.md, and `tests/diagnostics/test_verdict.py` holds each
of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_vae.diagnostics.global_studies import ADVICE
from pyro_vae.diagnostics.signs import (
    ERRORS,
    NATS,
    Sign,
    annealed_difference,
    annealed_higher,
    class_nats,
    guide_signs,
    model_signs,
    of_classes,
    too_low_for_truth,
)
from pyro_vae.diagnostics.study import GAP, Finding
from pyro_vae.inference.annealing import Annealing

PARTS: dict[str, tuple[str, str]] = {
    "globals": ("the guide of global latents", ADVICE),
    "encoder": (
        "the encoder",
        "a larger encoder, fitted to training data and many draws of the model "
        "(pyro_vae.refit_guide), or pyro_vae.refine for the rows that you analyze; if only some "
        "rows are wrong, look at their inputs",
    ),
    "family": (
        "the family of the guide",
        "a richer posterior family (pyro_vae.refit_guide shows the gain)",
    ),
    "prior": ("the prior", "a richer prior, such as GaussianMixture, VampPrior or FlowPrior"),
    "likelihood scale": (
        "the scale of the likelihood",
        "a learned or predicted scale, or a likelihood with heavier tails",
    ),
    "decoder": (
        "the model: its decoder or its structure",
        "a larger decoder, more latents, or KL warm-up and free bits if latents have collapsed",
    ),
    "data": (
        "too little data",
        "more data, or a smaller model if log p(x) of held-out data rises with it",
    ),
}
"""The parts that can be at fault, in words, and what to try next."""

OWN_GUIDE = {
    "encoder": "a larger encoder in your guide, fitted again, or pyro_vae.refine for the rows that "
    "you analyze; if only some rows are wrong, look at their inputs",
    "family": "a richer family of the local latents in your guide",
}
"""What to try if the pair has global latents, which pyro_vae.refit_guide refuses."""

TOGETHER = 0.3
"""Two estimates agree only if difference plus two errors is at most this many nats per example."""

MINOR = 0.2
"""Of two gaps, one that is less than this fraction of the other is not reported as a fault."""

LEAST_GAPS, SMALL_GAP = 40, 0.1
"""With fewer rows, or fewer nats per example, the two gaps do not overrule wrong means and scales.
Refinement may stop some hundredths of a nat short, and the family would be blamed for them."""

TOLD = 3
"""Number of signs that the summary tells for each part."""

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


@dataclass(frozen=True)
class Blame:
    """A part of the pair that is at fault."""

    part: str
    """A key of `PARTS`."""
    nats: float | None
    """Its size in nats per example, if a tool measured it."""
    evidence: tuple[Sign, ...]
    """What the tools found."""
    own_guide: bool = False
    """Whether the pair has global latents, so that `pyro_vae.refit_guide` refuses it."""

    @property
    def next(self) -> str:
        """The one thing to try next."""
        own = OWN_GUIDE.get(self.part) if self.own_guide else None
        return own or PARTS[self.part][1]

    @property
    def words(self) -> str:
        """The part, its size and the evidence in one sentence."""
        size = "" if self.nats is None else f" ({self.nats:.2f} nats per example)"
        told = list(dict.fromkeys(sign.words for sign in self.evidence))
        more = f" (and {len(told) - TOLD} more)" if len(told) > TOLD else ""
        return f"{PARTS[self.part][0]}{size}: {'; '.join(told[:TOLD])}{more}. Try {self.next}"

    @property
    def finding(self) -> Finding:
        """The part of the summary."""
        return Finding("fault", self.words, self.part)

    def as_dict(self) -> dict[str, Any]:
        """Return the part, its size, its evidence and the advice for metrics.json."""
        return {
            "part": self.part,
            "nats": self.nats,
            "evidence": [sign._asdict() for sign in self.evidence],
            "next": self.next,
        }


def blamed(results: Mapping[str, Any], more: Sequence[Sign] = ()) -> list[Blame]:
    """Return the parts at fault, the largest first, with the signs ``more`` of single studies.

    Faults of the guide go to encoder or family by the gaps, see `_guide_blames`. Faults of the
    model are those of the studies that compare data with the model's own data.
    """
    found = _guide_blames(results)
    by_part: dict[str, list[Sign]] = {}
    if "model_check" in results:  # it does not charge faults of the guide to the prior
        more = [sign for sign in more if sign.tool != "information"]
    if any(_misses_mass(blame) for blame in found):  # replicates rest on weighted draws
        more = [sign for sign in more if sign.tool != "predictive"]
    for sign in (*model_signs(results), *more):
        by_part.setdefault(sign.kind, []).append(sign)
    for part, signs in by_part.items():
        sizes = [sign.nats for sign in signs if sign.nats is not None]
        found.append(Blame(part, max(sizes, default=None), tuple(signs)))
    return sorted(found, key=lambda blame: -_size(blame))


def of_globals(found: Finding) -> Blame:
    """Return the fault that a finding on the guide of global latents describes."""
    return Blame("globals", None, (Sign("globals", "global_nuts", found.words),))


def _misses_mass(blame: Blame) -> bool:
    return any(sign.kind == "mass" for sign in blame.evidence)


def _size(blame: Blame) -> float:
    if _misses_mass(blame):
        return float("inf")  # all other numbers rest on its draws
    return float("-inf") if blame.nats is None else blame.nats


def _guide_blames(results: Mapping[str, Any]) -> list[Blame]:
    """Return encoder or family, or both, for the signs that the guide is wrong.

    A guide that misses a part of the posterior: the family. Else the gaps decide: what the
    refinement of each datum cures is due to the encoder, and what remains is due to the family.
    Without gaps, wrong means, scales and single rows are due to the encoder, and wrong correlations
    and tails to the family. Weights of most rows that are not reliable, while nothing else is off,
    show wrong tails.
    """
    signs = guide_signs(results)
    mass = tuple(sign for sign in signs if sign.kind == "mass")
    if mass:
        return [Blame("family", mass[0].nats, tuple(signs))]
    kinds = {sign.kind for sign in signs}
    placed = "place" in kinds and "shape" not in kinds
    if (shares := gap_shares(results)) and not (placed and too_small(results, shares)):
        told, total = _gap_words(results), inference_gap(results)
        parts = sorted(shares, key=lambda part: -shares[part])
        evidence = {parts[0]: (told, *signs)}  # the signs are told once, with the larger part
        return [Blame(p, shares[p] * total, evidence.get(p, (told,))) for p in parts]
    if not signs:
        return []
    part = "encoder" if "place" in kinds or kinds == {"rows"} else "family"
    size = inference_gap(results) if "gaps" in results else class_nats(results) or None
    return [Blame(part, size, tuple(signs))]


def too_small(results: Mapping[str, Any], shares: Mapping[str, float]) -> bool:
    """Whether the gaps are so small, or of so few rows, that wrong means and scales tell more."""
    small = inference_gap(results) < SMALL_GAP and max(shares, key=shares.__getitem__) == "family"
    return small or len(results["gaps"].pareto_k) < LEAST_GAPS


def gap_shares(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of each gap that exceeds its error, by the part that causes it.

    The errors hold the Monte Carlo error and the spread over rows.
    """
    found = results.get("gaps")
    if found is None:
        return {}
    gaps = {"encoder": found.amortization, "family": found.approximation}
    sizes = {
        part: gap.value for part, gap in gaps.items() if gap.value > NATS + ERRORS * _error(gap)
    }
    if "class_gap" in results and of_classes(results["class_gap"]):
        sizes["encoder"] = sizes.get("encoder", 0.0) + class_nats(results)
    most = max(sizes.values(), default=0.0)
    sizes = {part: size for part, size in sizes.items() if size >= MINOR * most}
    return {part: size / sum(sizes.values()) for part, size in sizes.items()}


def _error(gap: Any) -> float:
    spread = gap.per_datum.std() / len(gap.per_datum) ** 0.5
    return float((gap.standard_error**2 + spread**2) ** 0.5)


def inference_gap(results: Mapping[str, Any]) -> float:
    """Return the distance of log p(x) and the ELBO, in nats per example, from the most rows."""
    found, weighed = results["gaps"], results.get("log_likelihood")
    if weighed is None or len(weighed.per_datum) <= len(found.pareto_k):
        return float(found.inference.value) + class_nats(results)
    return float(weighed.value - weighed.elbo) + class_nats(results)


def _gap_words(results: Mapping[str, Any]) -> Sign:
    found = results["gaps"]
    whole = found.amortization.value + found.approximation.value
    share = min(max(found.amortization.value / whole, 0.0), 1.0) if whole > 0 else 0.0
    given = f" given one draw of {', '.join(found.given)}" if found.given else ""
    words = (
        f"refining the guide of {len(found.pareto_k)} data{given} closes {100 * share:.0f} % "
        "of the gap between ELBO and log p(x)"
    )
    return Sign("gaps", "gaps", words, inference_gap(results))


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
    blames = [replace(blame, own_guide=bool(shared)) for blame in blamed(results, more)]
    found = [blame.finding for blame in blames]
    parts = {blame.part for blame in blames}
    found += _on_guide(results, parts) + _on_model(results, parts)
    mass = any(_misses_mass(blame) for blame in blames)
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
        kind, words = "unchecked", f"{words}, but {NOT_LOOKED}"
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
