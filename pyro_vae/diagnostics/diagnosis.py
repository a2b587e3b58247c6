"""`diagnose`: all checks of the inference of a pair, within a time budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows, parts
from pyro_vae.diagnostics import sizing, verdict
from pyro_vae.diagnostics.attribution import Blame, of_globals, of_prior_conflict
from pyro_vae.diagnostics.global_studies import judge_globals, judge_local, limited
from pyro_vae.diagnostics.sharing import share_out
from pyro_vae.diagnostics.signs import Sign
from pyro_vae.diagnostics.sizing import Climb, climb_all
from pyro_vae.diagnostics.studies import STUDIES
from pyro_vae.diagnostics.study import KINDS, REASONS, Bench, Finding, latent_names
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.processes import here, single
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

TIMED_ROWS = 500
"""Number of rows for the measurement of the time of a pass."""

TIMED_PASSES = 3
"""Number of measurements of the time of a pass of one row, of which the shortest counts."""

LEAST = 0.1
"""The measured rows together take at least this fraction of the pass of one row, and a draw this
fraction of a row. So a larger size always costs more, even if the measurement finds no time."""

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

    def _add(self, climb: Climb) -> None:
        """Add the result of a diagnostic, or the reason for its absence."""
        study, name, sizes = climb.study, climb.study.name, len(climb.study.rungs)
        if climb.known:
            self.seconds[name] = climb.seconds
        if climb.fault is not None:
            kind, words = climb.fault
            getattr(self, kind)[name] = words
            if kind == "failed":
                words = f"the diagnostic '{name}': it failed"
                self.findings.append(Finding("unchecked", words, f"diagnostic {name}"))
        elif not climb.known:
            self.left_out[name] = "it did not run"
        elif not climb.over:
            self.left_out[name] = f"it ran at size {climb.at + 1} of {sizes}"
        if climb.result is not None:
            self.results[name] = climb.result
            told = study.judge(climb.result)
            self.findings += [one for one in told if isinstance(one, Finding)]
            self.signs += [one for one in told if isinstance(one, Sign)]
            for title, figure in study.figures.items():
                try:
                    self.figures[title] = figure(climb.result)
                except Exception as error:  # without a picture the findings remain
                    climb.notes[f"'{title}' cannot be drawn: {first_line(error)}"] = None
                    continue
                self.pictures.setdefault(name, []).append(title)
        if climb.notes:
            self.notes[name] = list(climb.notes)

    def judge(self, shared: Sequence[str], local: Sequence[str]) -> None:
        """Add the verdict: on the parts of the pair, and on each latent.

        Findings that rest on a latent are at most as good as the verdict on it.
        """
        odd, reasons = self.not_applicable, self.not_applicable | self.left_out
        self.blamed, found = verdict.findings(self.results, self.rows, self.signs, odd, shared)
        self.findings = found + self.findings
        self.findings += verdict.on_unseen_model(self.results, self.blamed, reasons)
        verdicts = judge_globals(shared, self.results, reasons) if shared else []
        verdicts += judge_local(local, self.results)
        findings = limited(self.findings, verdicts, shared, local)
        # All numbers rest on the global latents, so a fault of their guide is the first one.
        faults = [of_globals(found) for found in verdicts if found.kind == "doubt"]
        priors = of_prior_conflict(self.results)
        self.blamed = [*faults, *self.blamed, *priors]
        told = [found for found in verdicts if not faults or found.kind in ("trust", "unchecked")]
        first, last = ([blame.finding for blame in blames] for blames in (faults, priors))
        self.findings = [*first, *told, *findings, *last]

    def worst(self, number: int = 10) -> Tensor:
        """Return the rows whose log p(x) is least reliable, the worst first.

        Raises `UsageError` if the diagnostic "log_likelihood" has no result.
        """
        if "log_likelihood" not in self.results:
            reasons = self.left_out | self.not_applicable | self.failed
            why = reasons.get("log_likelihood", "it did not run")
            raise UsageError(
                "the rows with the least reliable log p(x) come from the diagnostic "
                f"'log_likelihood', which has no result: {why}; if it lacked time, give a larger "
                "`budget`"
            )
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
        end = sizing.now() + budget
        bench = team.together(
            lambda: _bench(pair, (x, context), other, train, binarize, seed, engine)
        )
        climbs = [Climb(study) for make in STUDIES if (study := make(bench)) is not None]
        share_out(
            climbs,
            team,
            bench.batch,
            lambda own: climb_all(own, end, progress and team.first),
        )
        found = Diagnosis(bench.rows, budget)
        for climb in climbs:
            found._add(climb)
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


def _pass_seconds(pair: nn.Module, batch: Batch, seed: int) -> tuple[float, float, float]:
    """Return the seconds of a pass of one row, of each further row, and of each further draw."""

    def seconds(rows: int) -> float:
        part = _repeated(batch, rows)
        start = sizing.now()
        trace_model(pair, part, trace_guide(pair, part))
        return sizing.now() - start

    with using(pair, seed):
        seconds(TIMED_ROWS)  # the first pass includes work that is done only once
        one, many = min(seconds(1) for _ in range(TIMED_PASSES)), seconds(TIMED_ROWS)
        rate = max(LEAST * one, many - one) / (TIMED_ROWS - 1)
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
    start = sizing.now()
    log_weights(pair, part, TIMED_DRAWS, nesting)
    rest = sizing.now() - start - one - rate * len(part[0])
    return min(rate, max(LEAST * rate, rest / TIMED_ROWS))


def _repeated(batch: Batch, rows: int) -> Batch:
    return tuple(t[torch.arange(rows, device=t.device) % len(t)] for t in batch)
