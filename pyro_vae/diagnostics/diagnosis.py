"""`diagnose`: everything that says whether an inference can be believed, within a time budget."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from time import perf_counter as _now
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows, parts
from pyro_vae.diagnostics.studies import STUDIES
from pyro_vae.diagnostics.study import Bench, Finding, Rung, Study
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.threads import alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAFETY = 1.5
"""What the slope of seconds over costs is multiplied by, before it is relied on."""

ROUNDS = 2
"""In the first each diagnostic has its share of the time; what is left goes to a second."""

TIMED_ROWS = 500
"""Rows on which the time of a pass is taken."""

BUDGET = 200.0
"""Seconds that `diagnose` may take by default."""


@dataclass
class Diagnosis:
    """What `diagnose` found."""

    rows: Tensor
    """The number of the row, among those that came, to which each datum of a result belongs."""
    budget: float
    """Seconds that it might take."""
    results: dict[str, Any] = field(default_factory=dict)
    """What each diagnostic returned, by its name, at the greatest size that it was run at."""
    findings: list[Finding] = field(default_factory=list)
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Diagnostics that do not apply to the pair, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Diagnostics that ended with an error which is none of use."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Diagnostics that were left out, or run at less than their full size, for lack of time."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What diagnostics warned of."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each took."""
    figures: dict[str, "Figure"] = field(default_factory=dict)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    """The names of the figures of each diagnostic."""

    @property
    def summary(self) -> str:
        """What can be trusted, what cannot, and what to try next, in plain words."""
        parts = []
        for kind, title in KINDS.items():
            words = [finding.words for finding in self.findings if finding.kind == kind]
            if words:
                parts.append(f"{title}: {'; '.join(dict.fromkeys(words))}.")
        return "\n".join(parts) or "Nothing could be measured."

    def worst(self, number: int = 10) -> Tensor:
        """The rows of the data whose log p(x) is least to be trusted, the worst first."""
        return self.rows[self.results["log_likelihood"].worst(number)]

    def as_dict(self) -> dict[str, Any]:
        """Summary and results, as metrics.json holds them."""
        return {
            "summary": self.summary,
            "findings": [finding._asdict() for finding in self.findings],
            "worst_rows": self.worst().tolist() if "log_likelihood" in self.results else [],
            "num_examples": len(self.rows),
            "budget": self.budget,
            "seconds": self.seconds,
            "results": {name: result.as_dict() for name, result in self.results.items()},
            "tables": {name: str(result) for name, result in self.results.items()},
            "not_applicable": self.not_applicable,
            "failed": self.failed,
            "left_out": self.left_out,
            "notes": self.notes,
            "pictures": self.pictures,
        }

    def __str__(self) -> str:
        lines = [fill(line, 100) for line in self.summary.split("\n")]
        for name, result in self.results.items():
            lines += ["", f"{name} ({self.seconds[name]:.0f} s)", str(result)]
            lines += [f"note: {note}" for note in self.notes.get(name, [])]
        for title, reasons in REASONS.items():
            told = [f"{name} {title}: {why}" for name, why in getattr(self, reasons).items()]
            lines += ["", *told] if told else []
        return "\n".join(lines)


@alone()
def diagnose(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    other: Tensor | Sequence[Any] | None = None,
    budget: float = BUDGET,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Diagnosis:
    """Say whether the inference of a fitted pair can be believed: all that applies, within a time.

    Each diagnostic is run small first. From the seconds that took, and from the time that is left,
    comes the size at which it is run again: rows of data, draws, steps, temperatures. What is left
    out, or done on less than all, is said; one that does not apply to the pair is named with its
    reason, and the rest goes on.

    Arguments:
        pair: any pair.
        x, context: held-out data, as `pyro_vae.evaluate` takes them; 1,000 rows are plenty.
        other: data known not to belong, for the AUROC of outlier scores: x, or a tuple of x and
            context.
        budget: seconds. What cannot be done within them, at its smallest, is left out.
        binarize, seed, engine: as in `pyro_vae.evaluate`.

    Returns a summary in words, with what each diagnostic returned, and figures.

    >>> import torch, pyro_vae as pv
    >>> found = pv.diagnose(pv.VAE.mlp((4,), latent_dim=2), torch.ones(30, 4), budget=0.1)
    >>> len(found.rows)
    30
    """
    if not budget > 0:
        raise UsageError(f"budget must be above 0 seconds, {budget} came")
    batch = _prepared(pair, x, context, binarize)
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = tuple(tensor[order.to(tensor.device)] for tensor in batch)
    others = None if other is None else parts(other)
    strangers = None if others is None else _prepared(pair, others[0], others[1:], binarize)
    end = _now() + budget
    costs = _pass_seconds(pair, shuffled, seed)
    bench = Bench(pair, shuffled, order, seed, engine, *costs, strangers)
    climbs = [_Climb(study) for make in STUDIES if (study := make(bench)) is not None]
    with bar(progress, ROUNDS * len(climbs), "diagnose") as shown:
        for _ in range(ROUNDS):
            for i, climb in enumerate(climbs):
                shown.set_postfix_str(f" {climb.study.name}")
                rest = sum(other.study.weight for other in climbs[i:] if not other.over)
                if not climb.over:
                    left = end - _now()
                    climb.go(left * climb.study.weight / rest)
                shown.update()
    found = Diagnosis(order, budget)
    for climb in climbs:
        climb.tell(found)
    return found


def _prepared(pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str) -> Batch:
    rows, prepare = held_rows(pair, x, context, binarize)
    prepared = [prepare(batch) for batch in rows.batches(1000)]
    return tuple(torch.cat(column) for column in zip(*prepared, strict=True))


def _pass_seconds(pair: nn.Module, batch: Batch, seed: int) -> tuple[float, float]:
    """Seconds of a pass of one row, and for each further one."""

    def seconds(rows: int) -> float:
        part = tuple(t[torch.arange(rows, device=t.device) % len(t)] for t in batch)
        start = _now()
        trace_model(pair, part, trace_guide(pair, part))
        return _now() - start

    with using(pair, seed):
        seconds(TIMED_ROWS)  # what is done once only is not counted
        one, many = seconds(1), seconds(TIMED_ROWS)
    return one, max(0.0, many - one) / (TIMED_ROWS - 1)


class _Climb:
    """A diagnostic run at growing sizes, while the next is sure to fit into its time."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.at, self.result, self.seconds = -1, None, 0.0
        self.known: list[tuple[float, float]] = []
        """Costs and seconds of the sizes that were run."""
        self.fault: Exception | None = None
        self.notes: dict[str, None] = {}

    @property
    def over(self) -> bool:
        """Whether there is nothing more to run."""
        return self.fault is not None or self.at == len(self.study.rungs) - 1

    def go(self, allotted: float) -> None:
        """Run further sizes within so many seconds."""
        start = _now()
        while not self.over and (fits := self._fits(start + allotted - _now())):
            self.at = fits[-1]
            self._run(self.study.rungs[self.at])
        self.seconds += _now() - start

    def _fits(self, left: float) -> list[int]:
        rungs = self.study.rungs
        if not self.known:
            return [0] if rungs[0].cost <= left else []
        larger = range(self.at + 1, len(rungs))
        return [i for i in larger if _predicted(self.known, rungs[i].cost) <= left]

    def _run(self, rung: Rung) -> None:
        start = _now()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                self.result = rung.run()
            except Exception as error:  # a user's own pair may raise anything; the rest goes on
                self.fault = error
        self.notes |= dict.fromkeys(str(warning.message) for warning in heard)
        self.known.append((rung.cost, _now() - start))

    def tell(self, found: Diagnosis) -> None:
        """Put what was found, or why nothing was, into the diagnosis."""
        study, name, sizes = self.study, self.study.name, len(self.study.rungs)
        if self.known:
            found.seconds[name] = self.seconds
        if isinstance(self.fault, UsageError):
            found.not_applicable[name] = str(self.fault)
        elif self.fault is not None:
            found.failed[name] = f"{type(self.fault).__name__}: {first_line(self.fault)}"
            found.findings.append(Finding("doubt", f"what {name} would say: it failed"))
        elif not self.known:
            found.left_out[name] = "not run"
        elif not self.over:
            found.left_out[name] = f"run at size {self.at + 1} of {sizes}"
        if self.result is not None:
            found.results[name] = self.result
            found.findings += study.judge(self.result, found.results)
            for title, figure in study.figures.items():
                found.figures[title] = figure(self.result)
                found.pictures.setdefault(name, []).append(title)
        if self.notes:
            found.notes[name] = list(self.notes)


def _predicted(known: Sequence[tuple[float, float]], cost: float) -> float:
    """The seconds of a run of this cost, from costs and seconds of those before it.

    A part of what the first took, tracing say, does not grow: at first costs are believed, then
    the slope of the last two.
    """
    last, seconds = known[-1]
    slope = 1.0
    if len(known) > 1:
        first, before = known[-2]
        slope = SAFETY * max(0.0, seconds - before) / (last - first)
    return min(seconds * cost / last, seconds + slope * (cost - last))


KINDS = {"trust": "Can be trusted", "doubt": "Cannot be trusted", "next": "To try next"}
"""The kinds of findings of `pyro_vae.diagnose`, as a reader sees them."""

REASONS = {
    "does not apply": "not_applicable",
    "failed": "failed",
    "is cut short for lack of time": "left_out",
}
"""Why a diagnostic is missing or small, and where `pyro_vae.diagnose` keeps the reasons."""
