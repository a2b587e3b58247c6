"""Which part of a pair is at fault, by how many nats, and what to try next.

The rules are in docs/diagnostics/verdict.md, and `tests/diagnostics/test_blame.py` holds each of
them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vae.diagnostics.calibration import JOINT, LIKELIHOOD
from pyro_vae.diagnostics.global_studies import ADVICE, mixed
from pyro_vae.diagnostics.signs import (
    ERRORS,
    NATS,
    Sign,
    class_nats,
    guide_signs,
    masked_by_classes,
    model_signs,
    of_classes,
    units_off,
)
from pyro_vae.diagnostics.study import Finding
from pyro_vae.inference.prior_tail import in_tail

REFINE = ", or pyro_vae.refine for the rows that you analyze"

PARTS: dict[str, tuple[str, str]] = {
    "globals": ("the guide of global latents", ADVICE),
    "prior of globals": (
        "the prior of global latents",
        "a prior that allows such values, or a model that explains them",
    ),
    "encoder": (
        "the encoder",
        "a larger encoder, fitted to training data and many draws of the model "
        f"(pyro_vae.refit_guide){REFINE}; if only some rows are wrong, look at their inputs",
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

BY_REPLICATES = (
    "the model: its likelihood, its decoder or its prior",
    "a likelihood with another spread, a larger decoder or a richer prior: the replicates do not "
    "tell which of them",
)
"""The words for the decoder if only replicates differ from the data. A variance that is too large
may come from any of these parts; `model_check` would tell, but not for pairs with global latents.
"""

OWN_GUIDE = {
    "encoder": f"a larger encoder in your guide, fitted again{REFINE}; if only some rows are "
    "wrong, look at their inputs",
    "family": "a richer family of the local latents in your guide",
}
"""What to try if pyro_vae.refit_guide refuses the pair: with global latents, and with latents that
cannot be refined."""

MINOR = 0.2
"""Of two gaps, one that is less than this fraction of the other is not reported as a fault."""

LEAST_GAPS, SMALL_GAP = 40, 0.1
"""With fewer rows, or fewer nats per example, the two gaps do not overrule wrong means and scales.
Refinement may stop some hundredths of a nat short, and the family would be blamed for them."""

CLEARLY = 2
"""A decoder comes before the prior if it has more than this many times its nats. Those of the prior
are a lower bound, and codes off the prior also leave structure in the residuals."""

TOLD = 3
"""Number of signs that the summary tells for each part."""


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
    refinable: bool = True
    """Whether the guide has latents that `pyro_vae.refine` serves."""

    @property
    def _in_words(self) -> tuple[str, str]:
        """The part, and what to try next."""
        if self.part == "decoder" and {sign.tool for sign in self.evidence} == {"predictive"}:
            return BY_REPLICATES
        return PARTS[self.part]

    @property
    def next(self) -> str:
        """The one thing to try next."""
        own = OWN_GUIDE.get(self.part) if self.own_guide or not self.refinable else None
        words = own or self._in_words[1]
        return words if self.refinable else words.replace(REFINE, "")

    @property
    def words(self) -> str:
        """The part, its size and the evidence in one sentence."""
        size = "" if self.nats is None else f" ({self.nats:.2f} nats per example)"
        told = list(dict.fromkeys(sign.words for sign in self.evidence))
        more = f" (and {len(told) - TOLD} more)" if len(told) > TOLD else ""
        return f"{self._in_words[0]}{size}: {'; '.join(told[:TOLD])}{more}. Try {self.next}"

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


def blamed(
    results: Mapping[str, Any], more: Sequence[Sign] = (), not_applicable: Collection[str] = ()
) -> list[Blame]:
    """Return the parts at fault, the largest first, with the signs ``more`` of single studies.

    Faults of the guide go to encoder or family by the gaps, see `_guide_blames`. Faults of the
    model are those of the studies that compare data with the model's own data.
    """
    refinable = "gaps" not in not_applicable
    found = _guide_blames(results) if refinable else _blames_of_discrete(results)
    by_part: dict[str, list[Sign]] = {}
    if "model_check" in results:  # it does not charge faults of the guide to the prior
        more = [sign for sign in more if sign.tool != "information"]
    # Replicates rest on weighted draws.
    if any(misses_mass(blame) for blame in found) or masked_by_classes(results):
        more = [sign for sign in more if sign.tool != "predictive"]
    for sign in (*model_signs(results), *more):
        by_part.setdefault(sign.kind, []).append(sign)
    for part, signs in by_part.items():
        sizes = [sign.nats for sign in signs if sign.nats is not None]
        found.append(Blame(part, max(sizes, default=None), tuple(signs)))
    prior = next((blame.nats or 0.0 for blame in found if blame.part == "prior"), 0.0)
    return sorted(found, key=lambda blame: -_place(blame, prior))


def of_globals(found: Finding) -> Blame:
    """Return the fault that a finding on the guide of global latents describes."""
    return Blame("globals", None, (Sign("globals", "global_nuts", found.words),))


def of_prior_conflict(results: Mapping[str, Any]) -> list[Blame]:
    """Return the fault that global or group latents lie in the tail of their prior, if they do.

    It needs draws of the posterior: those of NUTS, or those of the guide with reliable weights.
    """
    chains, weights = results.get("global_nuts"), results.get("global_weights")
    if chains is not None and not mixed(chains):
        chains = None
    for tool, found in (("global_nuts", chains), ("global_weights", weights)):
        tails = None if found is None else found.prior_tails
        if tails is not None and tails.conflicts:
            sign = Sign("prior of globals", tool, in_tail(tails.conflicts))
            return [Blame(sign.kind, None, (sign,))]
    return []


def misses_mass(blame: Blame) -> bool:
    return any(sign.kind == "mass" for sign in blame.evidence)


def _size(blame: Blame) -> float:
    if misses_mass(blame):
        return float("inf")  # all other numbers rest on its draws
    return float("-inf") if blame.nats is None else blame.nats


def _place(blame: Blame, prior: float) -> float:
    """Return the size by which a part is sorted. A decoder that is not clearly larger than the
    prior comes after it."""
    size = _size(blame)
    return min(size, prior) if blame.part == "decoder" and size <= CLEARLY * prior else size


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


def _blames_of_discrete(results: Mapping[str, Any]) -> list[Blame]:
    """Return encoder or family for a guide without latents that can be refined, such as discrete
    ones: no tool has gaps.

    If log p(x) is reliable, its distance from the ELBO is itself the sign. A table of probabilities
    can be any q, so bad weights of most rows are the encoder's too; only a wrong joint density is
    the family's.
    """
    signs = guide_signs(results)
    mass = tuple(sign for sign in signs if sign.kind == "mass")
    if not mass and (far := _far_from_log_likelihood(results)) is not None:
        signs = [far, *signs]
    if not signs:
        return []
    part = "family" if mass or {sign.kind for sign in signs} == {"shape"} else "encoder"
    parts = sum(sign.nats for sign in signs if sign.nats is not None)  # of y, and of the others
    return [Blame(part, mass[0].nats if mass else parts or None, tuple(signs), refinable=False)]


def _far_from_log_likelihood(results: Mapping[str, Any]) -> Sign | None:
    found = results.get("log_likelihood")
    if found is None or bool(found.unreliable.any() | (found.infinite_weights > 0).any()):
        return None
    gap = found.value - found.elbo
    error = (found.total_error**2 + found.elbo_standard_error**2) ** 0.5
    if not gap > NATS + ERRORS * error:
        return None
    words = f"the ELBO is {gap:.2f} ± {error:.2f} nats below log p(x)"
    return Sign("place", "log_likelihood", words, gap)


def too_small(results: Mapping[str, Any], shares: Mapping[str, float]) -> bool:
    """Whether the gaps are so small, or of so few rows, that wrong means and scales tell more."""
    small = inference_gap(results) < SMALL_GAP and max(shares, key=shares.__getitem__) == "family"
    return small or len(results["gaps"].pareto_k) < LEAST_GAPS


def gap_shares(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of each gap that exceeds its error, by the part that causes it.

    The errors hold the Monte Carlo error and the spread over rows. If probabilities that refinement
    does not reach are off, what it leaves is the encoder's too: they can be any q.
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
    if drawn_classes_off(results):
        sizes = {"encoder": sum(sizes.values())} if sizes else {}
    most = max(sizes.values(), default=0.0)
    sizes = {part: size for part, size in sizes.items() if size >= MINOR * most}
    return {part: size / sum(sizes.values()) for part, size in sizes.items()}


def drawn_classes_off(results: Mapping[str, Any]) -> bool:
    """Whether the ranks of a latent are off that refinement leaves as it is: a class that the guide
    draws."""
    refined, ranked = results["gaps"].refinement, results.get("calibration")
    if refined is None or ranked is None:
        return False
    reached = {place.site for place in refined.pair.places} | {JOINT, LIKELIHOOD}
    reached |= set(results["class_gap"].sites) if "class_gap" in results else set()
    wrong = zip(ranked.names, units_off(ranked).tolist(), strict=True)
    return any(off and name.split("[")[0] not in reached for name, off in wrong)


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
