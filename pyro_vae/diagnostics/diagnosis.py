"""`diagnose`: all checks of the inference of a pair, within a time budget."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from time import perf_counter as _now
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows, parts
from pyro_vae.diagnostics import verdict
from pyro_vae.diagnostics.attribution import Blame, of_globals
from pyro_vae.diagnostics.global_studies import judge_globals, judge_local, limited
from pyro_vae.diagnostics.sharing import share_out
from pyro_vae.diagnostics.signs import Sign
from pyro_vae.diagnostics.studies import STUDIES
from pyro_vae.diagnostics.study import KINDS, REASONS, Bench, Finding, Rung, Study, latent_names
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.processes import here, single
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import require_seed
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.weights import log_weights, structure
from pyro_vae.runs import held_out_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMED_DRAWS = 10
"""Number of draws of each row for the measurement of the time of a draw."""

SAFETY = 1.5
"""Safety factor on the slope of seconds over cost."""

ROUNDS = 3
"""In the first round each diagnostic runs at its smallest size. In the second round it gets its
share of the rest of the time. The third uses what is left."""

FIRST = 0.2
"""The smallest size of a diagnostic may take this fraction of the time, even if that is more than
its share."""

TIMED_ROWS = 500
"""Number of rows for the measurement of the time of a pass."""

BUDGET = 200.0
"""Default time budget of `diagnose`, in seconds."""


@dataclass
class Diagnosis:
    """The results of `diagnose`."""

    rows: Tensor
    """The row numbers of the data in the results, within the data that you passed."""
    budget: float
    """The time budget in seconds."""
    results: dict[str, Any] = field(default_factory=dict)
    """The result of each diagnostic at its largest finished size, by name."""
    blamed: list[Blame] = field(default_factory=list)
    """The parts of the pair that are at fault, the largest first, with their evidence."""
    findings: list[Finding] = field(default_factory=list)
    """The parts of the summary."""
    signs: list[Sign] = field(default_factory=list)
    """Signs of faults that rest on a single diagnostic."""
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Diagnostics that do not apply to the pair, with the reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """Diagnostics that failed with an unexpected error."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Diagnostics that lacked time: they did not run, or not at full size."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """The warnings of each diagnostic."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The time of each diagnostic."""
    figures: dict[str, "Figure"] = field(default_factory=dict)
    """The figures, by name."""
    pictures: dict[str, list[str]] = field(default_factory=dict)
    """The names of the figures of each diagnostic."""

    @property
    def summary(self) -> str:
        """Which results are reliable, which are not, and what to try next, in words."""
        parts = []
        for kind, title in KINDS.items():
            words = [finding.words for finding in self.findings if finding.kind == kind]
            if words:
                parts.append("\n".join([f"{title}:", *(f"- {w}." for w in dict.fromkeys(words))]))
        if parts and not self.blamed:
            parts.insert(0, "At fault: no part, as far as the diagnostics have checked.")
        return "\n".join(parts) or "No diagnostic gave a result."

    def judge(self, shared: Sequence[str], local: Sequence[str]) -> None:
        """Add the verdict: on the parts of the pair, and on each latent.

        Findings that rest on a latent are at most as good as the verdict on it.
        """
        odd, reasons = self.not_applicable, self.not_applicable | self.left_out
        self.blamed, found = verdict.findings(self.results, self.rows, self.signs, odd, shared)
        self.findings = found + self.findings
        verdicts = judge_globals(shared, self.results, reasons) if shared else []
        verdicts += judge_local(local, self.results)
        findings = limited(self.findings, verdicts, shared, local)
        # All numbers rest on the global latents, so a fault of their guide is the first one.
        faults = [of_globals(found) for found in verdicts if found.kind == "doubt"]
        self.blamed = [*faults, *self.blamed]
        told = [found for found in verdicts if not faults or found.kind in ("trust", "unchecked")]
        self.findings = [*(blame.finding for blame in faults), *told, *findings]

    def worst(self, number: int = 10) -> Tensor:
        """Return the rows whose log p(x) is least reliable, the worst first."""
        return self.rows[self.results["log_likelihood"].worst(number)]

    def as_dict(self) -> dict[str, Any]:
        """Return summary and results for metrics.json."""
        return {
            "summary": self.summary,
            "blamed": [blame.as_dict() for blame in self.blamed],
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

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [fill(line, 100, subsequent_indent="  ") for line in self.summary.split("\n")]
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
    train: Tensor | Sequence[Any] | None = None,
    budget: float = BUDGET,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Diagnosis:
    """Run all diagnostics that apply to a fitted pair, within a time budget.

    Each diagnostic runs at its smallest size first. From this time and the remaining time,
    `diagnose` chooses the size of the next run: rows of data, draws, steps, temperatures. The
    result lists diagnostics that lacked time, and diagnostics that do not apply to the pair, with
    the reason. The others continue. Latents that no diagnostic has reached are listed as not
    checked, and numbers that rest on them are never called reliable.

    Arguments:
        pair: any pair.
        x, context: held-out data, as `pyro_vae.evaluate` takes them; 1,000 rows are enough.
        other: out-of-distribution data for the AUROC of outlier scores: x, or a tuple of x and
            context.
        train: the training data: x, or a tuple of x and context. Their ELBO is compared with that
            of x. For a pair with global or group latents they must be all data to which the guide
            was fitted, since the guide of these latents is compared with their posterior given
            these data; then, by default x, if `pyro_vae.fit` has just fitted the pair to exactly
            these rows.
        budget: time in seconds. A diagnostic whose smallest size does not fit is left out.
        binarize, seed, engine: as in `pyro_vae.evaluate`.
        progress: show a bar.

    Several processes (torchrun) share the diagnostics: each runs some of them, within its budget,
    and all return the same results. Each process must call it, with the same data.

    Returns a summary in words, the result of each diagnostic, and figures. Raises `UsageError` if
    ``budget`` is not positive.

    >>> import torch, pyro_vae as pv
    >>> found = pv.diagnose(pv.VAE.mlp((4,), latent_dim=2), torch.ones(30, 4), budget=0.1)
    >>> len(found.rows)
    30
    """
    if not budget > 0:
        raise UsageError(f"must be above 0 seconds, got {budget}", argument="budget")
    require_seed(seed)
    team = here()
    with single():
        end = _now() + budget
        bench = team.together(
            lambda: _bench(pair, (x, context), other, train, binarize, seed, engine)
        )
        climbs = [_Climb(study) for make in STUDIES if (study := make(bench)) is not None]
        share_out(
            climbs,
            team,
            budget,
            bench.batch,
            lambda own: _climb(own, end, progress and team.first),
        )
        found = Diagnosis(bench.rows, budget)
        for climb in climbs:
            climb.tell(found)
        found.judge(bench.shared, bench.local)
    return found


def _bench(
    pair: nn.Module,
    data: tuple[Rows, tuple[Any, ...]],
    other: Tensor | Sequence[Any] | None,
    train: Tensor | Sequence[Any] | None,
    binarize: str,
    seed: int,
    engine: str,
) -> Bench:
    """Prepare the data of a diagnosis, and measure the time of a pass."""
    batch = whole(pair, *data, binarize)
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = tuple(tensor[order.to(tensor.device)] for tensor in batch)
    others = None if other is None else parts(other)
    strangers = None if others is None else whole(pair, others[0], others[1:], binarize)
    costs = _pass_seconds(pair, shuffled, seed)
    shared, local = latent_names(pair, batch)
    fitted = None
    if train is not None:
        fitted = whole(pair, parts(train)[0], parts(train)[1:], binarize)
    elif shared and held_out_rows.fitted_to(pair, data[0]):
        fitted = batch
    return Bench(pair, shuffled, order, seed, engine, *costs, strangers, fitted, shared, local)


def _climb(climbs: Sequence["_Climb"], end: float, progress: bool) -> None:
    """Run diagnostics at growing sizes until the time is over."""
    with bar(progress, ROUNDS * len(climbs), "diagnose") as shown:
        for turn in range(ROUNDS):
            for i, climb in enumerate(climbs):
                shown.set_postfix_str(f" {climb.study.name}")
                rest = sum(other.study.weight for other in climbs[i:] if not other.over)
                if not climb.over:
                    left = end - _now()
                    share = left * climb.study.weight / rest
                    if turn == 0:
                        climb.go(max(share, FIRST * left), 1)
                    else:
                        climb.go(share)
                shown.update()


def _pass_seconds(pair: nn.Module, batch: Batch, seed: int) -> tuple[float, float, float]:
    """Return the seconds of a pass of one row, of each further row, and of each further draw."""

    def seconds(rows: int) -> float:
        part = _repeated(batch, rows)
        start = _now()
        trace_model(pair, part, trace_guide(pair, part))
        return _now() - start

    with using(pair, seed):
        seconds(TIMED_ROWS)  # the first pass includes work that is done only once
        one, many = seconds(1), seconds(TIMED_ROWS)
        rate = max(0.0, many - one) / (TIMED_ROWS - 1)
        return one, rate, _draw_seconds(pair, batch, one, rate)


def _draw_seconds(pair: nn.Module, batch: Batch, one: float, rate: float) -> float:
    """Return the seconds of a draw of a row: less than a row, since the encoder runs once."""
    part = _repeated(batch, TIMED_ROWS // TIMED_DRAWS)
    try:
        nesting, vectorized, _ = structure(pair, tuple(tensor[:2] for tensor in part))
    except UsageError:  # the pair has no importance weights
        return rate
    if not vectorized:
        return one / len(part[0]) + rate
    start = _now()
    log_weights(pair, part, TIMED_DRAWS, nesting)
    rest = _now() - start - one - rate * len(part[0])
    return min(rate, max(0.0, rest) / TIMED_ROWS)


def _repeated(batch: Batch, rows: int) -> Batch:
    return tuple(t[torch.arange(rows, device=t.device) % len(t)] for t in batch)


class _Climb:
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

    def go(self, allotted: float, most: int | None = None) -> None:
        """Run further sizes within the allotted seconds, at most this number of them."""
        start, ran = _now(), 0
        while not self.over and ran != most and (fits := self._fits(start + allotted - _now())):
            ran += 1
            self.at = fits[-1]
            self._run(self.study.rungs[self.at])
        self.seconds += _now() - start

    def _fits(self, left: float) -> list[int]:
        """Return the sizes that are expected to fit.

        After one run, the part of its time that grows with size is not known. So a size beyond the
        next one must fit even if all of this time grows.
        """
        rungs = self.study.rungs
        if not self.known:
            return [0] if rungs[0].cost <= left else []
        larger = range(self.at + 1, len(rungs))
        fits = [i for i in larger if _predicted(self.known, rungs[i].cost) <= left]
        if len(self.known) > 1:
            return fits
        cost, seconds = self.known[0]
        return [i for i in fits if i == larger[0] or seconds * rungs[i].cost <= left * cost]

    def _run(self, rung: Rung) -> None:
        start = _now()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                self.result = rung.run()
            except UsageError as error:
                self.fault = "not_applicable", str(error)
            except Exception as error:  # a user's pair may raise anything; the others continue
                self.fault = "failed", f"{type(error).__name__}: {first_line(error)}"
        self.notes |= dict.fromkeys(str(warning.message) for warning in heard)
        self.known.append((rung.cost, _now() - start))

    def tell(self, found: Diagnosis) -> None:
        """Put the result, or the reason for its absence, into the diagnosis."""
        study, name, sizes = self.study, self.study.name, len(self.study.rungs)
        if self.known:
            found.seconds[name] = self.seconds
        if self.fault is not None:
            kind, words = self.fault
            getattr(found, kind)[name] = words
            if kind == "failed":
                words = f"the diagnostic '{name}': it failed"
                found.findings.append(Finding("unchecked", words, f"diagnostic {name}"))
        elif not self.known:
            found.left_out[name] = "it did not run"
        elif not self.over:
            found.left_out[name] = f"it ran at size {self.at + 1} of {sizes}"
        if self.result is not None:
            found.results[name] = self.result
            told = study.judge(self.result)
            found.findings += [one for one in told if isinstance(one, Finding)]
            found.signs += [one for one in told if isinstance(one, Sign)]
            for title, figure in study.figures.items():
                try:
                    found.figures[title] = figure(self.result)
                except Exception as error:  # without a picture the findings remain
                    self.notes[f"'{title}' cannot be drawn: {first_line(error)}"] = None
                    continue
                found.pictures.setdefault(name, []).append(title)
        if self.notes:
            found.notes[name] = list(self.notes)


def _predicted(known: Sequence[tuple[float, float]], cost: float) -> float:
    """Predict the seconds of a run from costs and seconds of earlier runs.

    A part of the first run, such as tracing, does not grow with size. So the first prediction uses
    the costs, and later ones use the slope of the last two runs.
    """
    last, seconds = known[-1]
    slope = 1.0
    if len(known) > 1:
        first, before = known[-2]
        slope = SAFETY * max(0.0, seconds - before) / (last - first)
    return min(seconds * cost / last, seconds + slope * (cost - last))
