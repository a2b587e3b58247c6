"""Run the studies of `diagnose` at growing sizes, within a time budget."""

import warnings
from collections.abc import Sequence
from time import perf_counter as now

from pyro_vae.diagnostics.study import Rung, Study
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.waiting import sign_of_life

SAFETY = 1.5
"""Safety factor on the slope of seconds over cost."""

FIRST = 0.2
"""The smallest size of a diagnostic may take this fraction of the time, even if that is more than
its share."""


class Climb:
    """Runs one diagnostic at growing sizes, as long as the next size fits into its time."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.at, self.result, self.seconds = -1, None, 0.0
        self.known: list[tuple[float, float]] = []
        """Costs and seconds of the finished sizes."""
        self.fault: tuple[str, str] | None = None
        """The field of `Diagnosis` for an error, and the error in words."""
        self.notes: dict[str, None] = {}

    @property
    def over(self) -> bool:
        """Whether the diagnostic failed or ran at its largest size."""
        return self.fault is not None or self.at == len(self.study.rungs) - 1

    @property
    def next_seconds(self) -> float:
        """The expected seconds of its next size."""
        cost = self.study.rungs[self.at + 1].cost
        return predicted(self.known, cost) if self.known else cost

    def go(self, allotted: float, most: int | None = None) -> None:
        """Run further sizes within the allotted seconds, at most this number of them."""
        end, ran = now() + allotted, 0
        while not self.over and ran != most and (sizes := self.fits(end - now())):
            ran += 1
            self.grow(sizes[-1])

    def grow(self, size: int) -> None:
        """Run this size."""
        start = now()
        self.at = size
        self._run(self.study.rungs[size])
        self.seconds += now() - start

    def fits(self, left: float) -> list[int]:
        """Return the sizes that are expected to fit.

        While the part of its time that grows with size is not known, a size beyond the next one
        must cost more and fit even if all of this time grows.
        """
        rungs = self.study.rungs
        if not self.known:
            return [0] if rungs[0].cost <= left else []
        larger = range(self.at + 1, len(rungs))
        fits = [i for i in larger if predicted(self.known, rungs[i].cost) <= left]
        if grew(self.known):
            return fits
        last, seconds = self.known[-1]
        most = left * last / max(seconds, 1e-9)
        return [i for i in fits if i == larger[0] or last < rungs[i].cost <= most]

    def _run(self, rung: Rung) -> None:
        start = now()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                self.result = rung.run()
            except UsageError as error:
                self.fault = "not_applicable", str(error)
            except Exception as error:  # a user's pair may raise anything; the others continue
                self.fault = "failed", f"{type(error).__name__}: {first_line(error)}"
        self.notes |= dict.fromkeys(str(warning.message) for warning in heard)
        self.known.append((rung.cost, now() - start))
        sign_of_life()


def climb_all(climbs: Sequence[Climb], end: float, progress: bool) -> None:
    """Run diagnostics at growing sizes until the time is over.

    First each diagnostic runs at its smallest size. Then each gets its share of the time that is
    left. A share may be too small for the next size, or larger than the largest one. So at last the
    next size that costs least for its weight runs, of any diagnostic, as long as one fits.
    """
    with bar(progress, 3 * len(climbs), "diagnose") as shown:

        def running(climb: Climb) -> None:
            shown.set_postfix_str(f" {climb.study.name}")

        for i, climb in enumerate(climbs):
            running(climb)
            left = end - now()
            rest = sum(other.study.weight for other in climbs[i:])
            climb.go(max(left * climb.study.weight / rest, FIRST * left), 1)
            shown.update()
        left = end - now()
        rest = sum(climb.study.weight for climb in climbs if not climb.over)
        for climb in climbs:
            running(climb)
            climb.go(min(left * climb.study.weight / rest, end - now()) if rest else 0.0)
            shown.update()
        while ready := [climb for climb in climbs if not climb.over and climb.fits(end - now())]:
            cheapest = min(ready, key=lambda climb: climb.next_seconds / climb.study.weight)
            running(cheapest)
            cheapest.grow(cheapest.at + 1)
        shown.update(len(climbs))


def grew(known: Sequence[tuple[float, float]]) -> bool:
    """Whether the last run cost more than the one before it, and took longer.

    A first run that compiles may take longer than the second.
    """
    return len(known) > 1 and all(b > a for a, b in zip(*known[-2:], strict=True))


def predicted(known: Sequence[tuple[float, float]], cost: float) -> float:
    """Predict the seconds of a run from costs and seconds of earlier runs.

    A part of the first run, such as tracing, does not grow with size. So the prediction uses the
    slope of the last two runs, or the costs until this slope is known.
    """
    last, seconds = known[-1]
    slope = 1.0
    if grew(known):
        first, before = known[-2]
        slope = SAFETY * (seconds - before) / (last - first)
    return min(seconds * cost / last, seconds + slope * (cost - last))
