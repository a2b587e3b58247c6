"""`fit`: stochastic variational inference on any pair, by an explicit ``pyro.infer.SVI``."""

import itertools
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae import collapse, folding, held_out_rows, rng, runs, threads
from pyro_vae.config import Settings
from pyro_vae.data import (
    Arrays,
    Preparation,
    Rows,
    Source,
    held_out,
    parts,
    preparation,
    record_divisor,
    require_masks,
    source,
)
from pyro_vae.engine import Engine, Step
from pyro_vae.errors import UsageError, first_line
from pyro_vae.evaluation import Bound, bound
from pyro_vae.history import Epoch, History, best_epoch, is_finite
from pyro_vae.objectives import elbo, require_weighable
from pyro_vae.optim import Optimizer
from pyro_vae.pairs import BadNumbers, Batch, Pair, placement, registered, scope
from pyro_vae.preflight import explain_nonfinite, no_pair, require
from pyro_vae.progress import bar
from pyro_vae.ranges import CURE, extreme, range_fault
from pyro_vae.rng import seeded
from pyro_vae.schedules import Schedule
from pyro_vae.threads import alone


class NonFiniteError(UsageError):
    """Training met a loss or a gradient that is not finite; the message names the site."""


UNREAD = {"cpu": 1, "cuda": 50}
"""Steps whose losses may wait on a device until they are read: a GPU is not to be waited for."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; the message says how to go on."""


@alone()
def fit(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    validation: Any = None,
    objective: ELBO | None = None,
    beta: float | Schedule | None = None,
    learning_rate_schedule: Schedule | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    binarize: str = "dynamic",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> History:
    r"""Fit a pair by stochastic variational inference, and leave the best parameters in it.

    Each step is ``svi.step(*batch)`` of ``SVI(pair.model, pair.guide, optimizer, objective)``,
    which maximises :math:`E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)` over minibatches.

    Arguments:
        pair: any ``nn.Module`` with ``model`` and ``guide``; see `pyro_vae.check`.
        x: the data, a tensor or array with a row for each datum, held as it came (uint8 stays
            uint8); or a torch ``Dataset`` or ``DataLoader`` that gives x, or x and context.
        context: further tensors of as many rows, passed on to model and guide.
        validation: held-out x, or a tuple of x and context, of the same kinds.
        objective: a Pyro ELBO; by default that of ``pair.recipe``, else ``Trace_ELBO()``,
            or `pyro_vae.EnumeratedELBO` for a pair with latents to enumerate.
        beta: weight on the KL, or a schedule of it (`pyro_vae.schedules`); by default the one that
            ``pair.recipe`` gives, else 1.
        learning_rate_schedule: a factor on the learning rate, by epoch.
        optimizer: makes the torch optimiser from parameters and ``lr``.
        binarize: "dynamic", "fixed" or "none": see `pyro_vae.data.Preparation`.
        out: a run folder for checkpoints and the best model; nothing is written without.
        resume: go on from the checkpoint in ``out``; a run that was stopped before its first one
            begins anew.
        overwrite: replace a run that is in ``out``.
        progress: show a progress bar.
        config: what else config.json of the run shall hold.
        settings: the fields of `pyro_vae.config.Settings`: epochs, batch_size, learning_rate,
            clip_norm, patience, seed, device, precision, engine, checkpoint_seconds,
            tensorboard.

    The pair's first parameters are the caller's: seed torch before making it, too, to repeat a run.
    Every random draw of training comes from generators that are seeded here, kept in the
    checkpoint, and given back to the caller as they were: a resumed run ends, on a CPU,
    bit-identical to one that was never interrupted.

    A warning says where the posterior of a latent site has collapsed, or its KL is negative, which
    shows that model and guide disagree (docs/collapse.md).

    Raises `UsageError` for data or a pair that cannot be trained, `NonFiniteError` where loss or
    gradient stop being finite, `Interrupted` (a ``KeyboardInterrupt``) after Ctrl-C or SIGTERM.

    >>> import torch, pyro_vae as pv
    >>> x = torch.rand(64, 4).round()
    >>> history = pv.fit(pv.VAE.mlp((4,)), x, epochs=2, batch_size=32, progress=False)
    >>> len(history["elbo"])
    2
    """
    chosen = Settings.of(settings)
    folder = None if out is None else Path(out)
    if folder is None and (resume or overwrite or chosen.tensorboard):
        raise UsageError("resume, overwrite and tensorboard need a run folder: give out=")
    if resume and overwrite:
        raise UsageError("resume goes on with a run and overwrite replaces it: choose one")
    if chosen.tensorboard:
        _summary_writer()
    if fault := no_pair(pair):
        raise UsageError(fault)
    _require_parts(objective, beta, learning_rate_schedule, optimizer)
    _require_free(pair)
    saved = None
    if folder is not None and resume:
        runs.read_config(folder)
        saved = None if runs.begun(folder) else runs.read_checkpoint(folder)
    pair.to(device(chosen.device))
    recipe = cast(Any, pair).recipe(chosen.epochs) if hasattr(pair, "recipe") else {}
    objective = objective or recipe.get("objective")
    beta = recipe.get("beta", 1.0) if beta is None else beta
    require_weighable(objective, beta)
    with seeded(chosen.seed):  # a loader draws as it begins
        rows = source(x, context, pair)
        chosen = chosen.for_rows(len(rows))
        rows, prepare, objective, units, are_kl = _training_rows(
            pair, rows, objective, binarize, chosen
        )
        held = None
        if validation is not None:
            held = _validation_rows(pair, parts(validation), rows, binarize)
        elif chosen.patience is not None:
            raise UsageError("patience needs validation data to measure: give validation=")
    job = {
        "settings": asdict(chosen),
        "objective": _words(objective),
        "beta": _words(beta),
        "learning_rate_schedule": _words(learning_rate_schedule),
        "optimizer": _words(optimizer),
        "binarize": binarize,
        "data": runs.checksum(rows.tensors) if isinstance(rows, Arrays) else None,
        "validation": runs.checksum(held[0].tensors)
        if held is not None and isinstance(held[0], Arrays)
        else None,
        "pair": json.dumps(runs.recipe(pair), sort_keys=True),
    }
    if folder is not None and saved is None:
        if not resume:
            runs.start(folder, overwrite)
        runs.write_config(pair, folder, {**job, "pair": runs.recipe(pair), **(config or {})})
        held_out_rows.write_rows(folder, {"train": x, "validation": _first(validation)})
    fault = range_fault(pair, rows, prepare) if saved is None else None
    if fault is not None:
        warnings.warn(fault, stacklevel=3)
    with _claimed(pair), ExitStack() as own:
        own.enter_context(_own(pair))
        own.enter_context(seeded(chosen.seed))
        run = _Run(
            pair,
            rows,
            prepare,
            held,
            units,
            are_kl,
            objective,
            beta if callable(beta) else lambda _: float(cast(float, beta)),
            learning_rate_schedule or (lambda _: 1.0),
            optimizer,
            chosen,
            folder,
            job,
            fault,
        )
        if saved is not None:
            run.restore(saved)
        return run.train(progress, own)


def device(name: str) -> torch.device:
    """The torch device of this name; "auto" is the GPU where there is one.

    >>> device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device '{name}' cannot be used here ({str(error).splitlines()[0][:100]}); "
            "'cpu' always can"
        ) from error
    return chosen


def _require_parts(objective: Any, beta: Any, schedule: Any, optimizer: Any) -> None:
    """Raise `UsageError` for words in the place of objects, as the command line takes them."""
    if objective is not None and not isinstance(objective, ELBO):
        raise UsageError(f"objective must be a Pyro ELBO, as Trace_ELBO(), got {objective!r}")
    if not (beta is None or callable(beta) or isinstance(beta, (int, float))):
        raise UsageError(f"beta must be a number or a function of the epoch, got {beta!r}")
    if schedule is not None and not callable(schedule):
        raise UsageError(
            "learning_rate_schedule must be a function of the epoch, as pyro_vae.Cosine(epochs), "
            f"got {schedule!r}"
        )
    if not callable(optimizer) or isinstance(optimizer, (PyroOptim, torch.optim.Optimizer)):
        raise UsageError(
            "optimizer must make a torch optimizer from parameters and lr, as torch.optim.Adam or "
            f"a functools.partial of it does, got {optimizer!r}".splitlines()[0]
        )


@dataclass
class _Run:
    """The state of a training run: everything that a checkpoint holds."""

    pair: nn.Module
    rows: Source
    prepare: Preparation
    held: tuple[Source, Preparation] | None
    units: dict[str, float]
    are_kl: bool
    objective: ELBO
    beta: Schedule
    rate: Schedule
    constructor: Callable[..., torch.optim.Optimizer]
    settings: Settings
    folder: Path | None
    job: dict[str, Any]
    fault: str | None
    """What was wrong with the range of the data before training."""

    def __post_init__(self) -> None:
        """Make optimiser and SVI; the pair's parameters are all known by now."""
        pair, settings = cast(Pair, self.pair), self.settings
        trained = {k: p for k, p in self.pair.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(
            self.constructor, trained, settings.learning_rate, settings.clip_norm
        )
        self.batch_size = cast(int, settings.batch_size)
        size = self.rows.batch_size(self.batch_size)
        self.engine = Engine(
            self.pair,
            self.objective,
            settings.engine,
            prepare=self.prepare,
            precision=settings.precision,
            batch_size=size,
            steps=settings.epochs * (len(self.rows) // size),
            num_data=self.rows.num_data,
            declare=False,
            say=self._say,
        )
        self.svi = Step(
            registered(self.pair, pair.model), pair.guide, self.optimizer, loss=self.engine
        )
        self.alarm = collapse.CollapseAlarm(
            self.units, settings.epochs, self._steps(), len(self.rows), self.are_kl
        )
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.written = 0.0
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.batches = self.examples = 0
        self.seconds = 0.0
        kinds = ("loss", "norm", "reconstruction", "kl")
        self.sums: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
        self.unread: list[tuple[list[tuple[str, str]], Tensor]] = []
        self.generators = rng.state()
        self.good = runs.state_dict(self.pair)

    def train(self, progress: bool, own: ExitStack) -> History:
        """All epochs that are left, then the best parameters into the pair."""
        self.shown = self._bar(progress)
        with self.shown as shown, _signals() as stop, self._board() as board:
            if self.folder is not None and not self.epochs and not self.batches:
                self.write()
            while len(self.epochs) < self.settings.epochs and not self._waited():
                for batch in self._remaining():
                    self._step(batch)
                    self._show(shown)
                    if stop:
                        self._interrupt()
                    if threads.waited_for():
                        self._give_way(own)
                self._end_epoch()
                self._warn(self.alarm.heard(self.epochs[-1]))
                if board is not None:
                    for name, value in self.epochs[-1].row().items():
                        board.add_scalar(name, value, len(self.epochs))
                if time.monotonic() - self.written > self.settings.checkpoint_seconds:
                    self.write()
        self._warn(self.alarm.over())
        self._warn_of_validation()
        self.write()
        if self.best is not None:
            self.pair.load_state_dict(self.best, strict=False)
        self.pair.eval()
        return History(
            tuple(self.epochs),
            self.best_epoch,
            self._waited(),
            self.alarm.collapsed,
            self.alarm.inconsistent,
            folding.known(self.pair).points,
        )

    def _give_way(self, own: ExitStack) -> None:
        """Let other threads run pairs, with the store and the generators of their callers."""
        now, modes = rng.state(), {module: module.training for module in self.pair.modules()}
        own.close()
        threads.give_way()
        own.enter_context(_own(self.pair))
        rng.restore(now)
        for module, training in modes.items():  # parts without parameters may be others' too
            module.training = training

    def _warn(self, collapsed: Sequence[str]) -> None:
        for name in collapsed:
            with tqdm.external_write_mode():  # a line of its own, above the bar
                warnings.warn(self.alarm.words(name), stacklevel=5)

    def _warn_of_validation(self) -> None:
        measured = [epoch.validation for epoch in self.epochs if epoch.validation is not None]
        bad = sum(not is_finite(bound) for bound in measured)
        if bad:
            kept = "the last epoch" if bad == len(measured) else f"epoch {self.best_epoch}"
            warnings.warn(
                f"the validation bound was not finite in {bad} of {len(measured)} epochs: the "
                f"parameters of {kept} are kept; look for extreme values in the validation data",
                stacklevel=4,
            )

    def _remaining(self) -> Iterator[Batch]:
        """The minibatches of this epoch that are left, whether it begins or is gone on with."""
        now = rng.state()
        rng.restore(self.generators)
        self.pair.train()
        batches = iter(self.rows.batches(self.batch_size, shuffle=True))
        if self.batches:
            for _ in itertools.islice(batches, self.batches):
                pass
            rng.restore(now)
        yield from batches

    def _step(self, batch: Batch) -> None:
        began = time.perf_counter()
        epoch = len(self.epochs) + self.examples / len(self.rows)
        self.engine.beta = self.beta(epoch)
        self.optimizer.learning_rate = self.settings.learning_rate * self.rate(epoch)
        self.batches += 1
        self.examples += len(batch[0])
        wait = UNREAD.get(self.prepare.device.type, 1)
        try:
            self.svi.step(*batch)
        except FloatingPointError:
            wait = 1  # the gradient is not finite: the reading below names the site
        except (
            ValueError,
            IndexError,
        ) as error:  # an index: a label that the pair has no place for
            if isinstance(error, UsageError):
                raise UsageError(first_line(error)) from None
            if len(batch[0]) == 1 and "more than 1 value per channel" in str(error):
                raise UsageError(_single_row(self)) from error
            if explain_nonfinite(self.pair, self.prepare(batch)) is not None:
                self._nonfinite("loss", {}, batch, error)
            raise UsageError(
                f"training stopped in epoch {len(self.epochs) + 1}, step {self.batches}: "
                f"{' '.join(' '.join(str(error).splitlines()[:2]).split())[:300]}"
            ) from error
        self.unread.append((self.engine.names, self.engine.numbers))
        if len(self.unread) >= wait:
            self._read(batch)
        self.seconds += time.perf_counter() - began

    def _read(self, batch: Batch | None = None) -> None:
        """Add up what the steps since the last reading have left on the device."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        rows = torch.stack([numbers for _, numbers in unread]).tolist()
        for (names, _), row in zip(unread, rows, strict=True):
            numbers = dict(zip(names, row, strict=True))
            loss, norm = numbers["loss", ""], numbers["norm", ""]
            if not math.isfinite(loss + norm):
                self._nonfinite("gradient" if math.isfinite(loss) else "loss", numbers, batch)
            for (kind, name), value in numbers.items():
                self.sums[kind][name] = self.sums[kind].get(name, 0.0) + value

    def _nonfinite(
        self,
        what: str,
        numbers: dict[tuple[str, str], float],
        batch: Batch | None = None,
        cause: Exception | None = None,
    ) -> None:
        parts = [key for kind in ("kl", "reconstruction") for key in numbers if key[0] == kind]
        site = next((key[1] for key in parts if not math.isfinite(numbers[key])), None)
        if site is None and batch is not None:
            site = explain_nonfinite(self.pair, self.prepare(batch))
        if not self._finite():
            self.pair.load_state_dict(self.best or self.good, strict=False)
        kept = ""
        if self.folder is not None:
            # The checkpoint stays as it was: optimiser and generators have gone on.
            self._write_model()
            kept = f"; the last good model is in {self.folder}"
        where = f" at site '{site}'" if site else ""
        outlier = None if batch is None else extreme(self.prepare(batch)[0])
        cure = self.fault or "a smaller learning_rate or clip_norm may help"
        if outlier is not None:
            cure = f"{outlier}: leave out such rows, or {CURE}"
        raise NonFiniteError(
            f"training stopped in epoch {len(self.epochs) + 1}, step {self.batches}: the "
            f"{what} is not finite{where}{kept}; {cure}"
        ) from cause

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.pair.parameters())

    def _end_epoch(self) -> None:
        self.rows.require_length(self.examples)
        self._read()
        began, n = time.perf_counter(), self.examples
        if not self._finite():
            self._nonfinite("value of a parameter", {})
        measured = None
        if self.held is not None:
            measured = self._measured(*self.held)
        reconstruction = sum(self.sums["reconstruction"].values()) / n
        kl = {name: value / n for name, value in self.sums["kl"].items()}
        self.epochs.append(
            Epoch(
                len(self.epochs) + 1,
                -self.sums["loss"][""] / n,
                reconstruction - sum(kl.values()),
                reconstruction,
                kl,
                measured,
                float(self.engine.beta),
                self.optimizer.learning_rate,
                self.sums["norm"][""] / self.batches,
                self.seconds + time.perf_counter() - began,
            )
        )
        best = best_epoch([epoch.validation for epoch in self.epochs])
        if best == len(self.epochs):
            self.best_epoch = best
            self.best = runs.state_dict(self.pair) if measured is not None else None
        self._new_epoch()

    def _measured(self, rows: Source, prepare: Preparation) -> Bound:
        """The bound on the validation data, NaN where the pair has none for some of them."""
        try:
            return bound(self.pair, rows, prepare, self.objective)
        except BadNumbers:
            return Bound(math.nan, math.nan, math.nan, dict.fromkeys(self.sums["kl"], math.nan))

    def _waited(self) -> bool:
        """Whether the validation bound has not improved for as many epochs as patience has."""
        patience, measured = self.settings.patience, [epoch.validation for epoch in self.epochs]
        improved = self.best_epoch if any(is_finite(bound) for bound in measured) else 0
        return patience is not None and len(self.epochs) - improved >= patience

    def _interrupt(self) -> None:
        place = f"epoch {len(self.epochs) + 1}, step {self.batches}"
        if self.folder is None:
            raise Interrupted(f"stopped in {place}; without a run folder it cannot be gone on with")
        self.write()
        raise Interrupted(f"stopped in {place}; go on with --resume (resume=True) on {self.folder}")

    def write(self) -> None:
        """Write checkpoint, best model and history into the run folder."""
        self._read()
        if self.folder is None:
            return
        runs.write_checkpoint(
            self.folder,
            {
                "job": self.job,
                "pair": runs.state_dict(self.pair),
                "best": self.best,
                "best_epoch": self.best_epoch,
                "optimizer": self.optimizer.get_state(),
                "epochs": [epoch.plain() for epoch in self.epochs],
                "batches": self.batches,
                "examples": self.examples,
                "sums": self.sums,
                "engine": self.engine.engine,
                "seconds": self.seconds,
                "generators_of_epoch": self.generators,
                "generators": rng.state(),
            },
        )
        self._write_model()
        self.written = time.monotonic()

    def _write_model(self) -> None:
        folder = cast(Path, self.folder)
        runs.write_model(folder, self.best or runs.state_dict(self.pair))
        runs.write_csv(folder / runs.HISTORY, [epoch.row() for epoch in self.epochs])

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, after checking that it is of the same job."""
        path = cast(Path, self.folder) / runs.CHECKPOINT
        for name in _PARTS_OF_CHECKPOINT:
            if name not in saved:
                raise UsageError(f"{path} lacks '{name}': it is no checkpoint of a run")
        runs.require_fit(self.pair, saved["pair"], path)
        free = {"epochs", "patience", "checkpoint_seconds", "tensorboard", "engine"}
        for name, value in saved["job"]["settings"].items():
            if name not in free and self.job["settings"][name] != value:
                raise UsageError(
                    f"{path} was made with {name} = {value}, {self.job['settings'][name]} came: a "
                    "run goes on only as it began"
                )
        for name, value in self.job.items():
            was = saved["job"].get(name)
            if name == "pair" and was is not None:
                was = runs.renamed(was)
            if name != "settings" and None not in (was, value) and was != value:
                said = "" if len(str(was) + str(value)) > 200 else f": {was} then, {value} now"
                raise UsageError(
                    f"{path} was made with another {name}{said}; a run goes on only as it began"
                )
        if saved["best"] is not None:
            runs.require_fit(self.pair, saved["best"], path)
        runs.fill(self.pair, saved["pair"], path)
        self.optimizer.set_state(saved["optimizer"])
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]
        self.epochs = [Epoch.of(epoch) for epoch in saved["epochs"]]
        for epoch in self.epochs:
            self.alarm.heard(epoch)
        for name in ("batches", "examples", "sums", "seconds"):
            setattr(self, name, saved[name])
        if self.settings.engine == saved["job"]["settings"].get("engine"):
            self.engine.engine = saved["engine"]
        self.generators, self.good = saved["generators_of_epoch"], saved["pair"]
        rng.restore(saved["generators"])

    def _say(self, words: str) -> None:
        self.shown.set_postfix_str(words)

    def _steps(self) -> int:
        """The steps of an epoch."""
        return max(1, self.rows.steps(self.batch_size))

    def _bar(self, progress: bool) -> tqdm:
        steps = self._steps()
        done = len(self.epochs) * steps + self.batches
        return bar(progress, self.settings.epochs * steps, "fit", initial=done)

    def _show(self, shown: tqdm) -> None:
        last = self.epochs[-1] if self.epochs else None
        if last is not None and self.batches == 1:
            what = "log joint" if folding.known(self.pair).points else "elbo"
            words = f"epoch {last.epoch}, {what} {last.elbo:.2f}"
            if last.validation is not None:
                words += f", validation {last.validation.elbo:.2f}"
            shown.set_postfix_str(words, refresh=False)
        shown.update()

    @contextmanager
    def _board(self) -> Iterator[Any]:
        if not self.settings.tensorboard:
            yield None
            return
        with _summary_writer()(str(cast(Path, self.folder) / runs.TENSORBOARD)) as board:
            yield board


def _single_row(run: _Run) -> str:
    """What to do where batch normalization met a minibatch of one row."""
    return (
        f"training stopped in epoch {len(run.epochs) + 1}, step {run.batches}: a minibatch has one "
        "row, of which batch normalization has no variance; choose a batch_size that leaves no "
        f"single row of {len(run.rows)} at the end, or pass a DataLoader with drop_last=True"
    )


_PARTS_OF_CHECKPOINT = (
    *("job", "pair", "best", "best_epoch", "optimizer", "epochs", "batches", "examples", "sums"),
    *("seconds", "engine", "generators_of_epoch", "generators"),
)


def _first(rows: Any) -> Any:
    """The data among data and context."""
    return rows[0] if isinstance(rows, (tuple, list)) else rows


def _words(part: Any) -> str | None:
    """A part of the job in words that stay the same from run to run, None where there are none."""
    if isinstance(part, ELBO):
        fields = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str))}
        return f"{type(part).__name__}({fields})"
    if isinstance(part, type):
        return part.__name__
    return repr(part) if isinstance(part, (int, float)) or is_dataclass(part) else None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed: pip install 'pyro-vae[tensorboard]'"
        ) from error
    return SummaryWriter


def _training_rows(
    pair: nn.Module, rows: Source, objective: ELBO | None, binarize: str, settings: Settings
) -> tuple[Source, Preparation, ELBO, dict[str, float], bool]:
    """The training data, checked together with the pair, how they are prepared, the objective, and
    for the alarm how many units each latent site has, and whether the term of each is a KL."""
    if len(rows) < 2:
        raise UsageError(f"{len(rows)} row of data came, 2 or more are expected")
    if isinstance(rows, Arrays) and len(rows) < cast(int, settings.batch_size):
        raise UsageError(
            f"batch_size is {settings.batch_size}, the data have {len(rows)} rows: "
            "choose at most that"
        )
    plain = Preparation(*placement(pair))
    first = plain(rows.first(16))
    require(pair, first, objective)
    require_masks(pair, rows, plain)
    prepare = preparation(pair, rows, binarize)
    record_divisor(pair, rows, prepare)
    if prepare.binarize and binarize == "fixed":
        rows, prepare = held_out(rows, prepare)
    if binarize == "none" and preparation(pair, rows).binarize:
        warnings.warn(
            "grey intensities are scored under a likelihood on {0, 1}: the numbers reported are "
            "not log-likelihoods",
            stacklevel=4,
        )
    rows = rows.to(prepare.device) if isinstance(rows, Arrays) else rows
    units = collapse.units(pair, plain(rows.first(500)))
    return rows, prepare, objective or elbo(pair, first), units, collapse.are_kl(pair, first)


def _validation_rows(
    pair: nn.Module,
    given: Sequence[Any],
    rows: Source,
    binarize: str,
) -> tuple[Source, Preparation]:
    """The validation data, checked as training data are, and how they are prepared."""
    try:
        held = source(given[0], given[1:], pair)
        if isinstance(held, Arrays) and isinstance(rows, Arrays):
            wanted, came = len(rows.tensors) - 1, len(held.tensors) - 1
            if came != wanted:
                raise UsageError(
                    f"as many context tensors as for training, {wanted}, are expected, {came} came"
                )
        prepare = preparation(pair, held, binarize)
        require_masks(pair, held, prepare)
        return held_out(held, prepare)
    except UsageError as error:
        raise UsageError(f"validation: {error}") from error


_FITTED: set[int] = set()
"""The tensors of the pairs that threads of this process are fitting."""


def _require_free(pair: nn.Module) -> None:
    """Refuse a pair that another thread is fitting, in whole or in part."""
    if not _FITTED.isdisjoint(map(id, (*pair.parameters(), *pair.buffers()))):
        raise UsageError(
            f"another thread is fitting this {type(pair).__name__}, or a part of it: wait until it "
            "ends, or fit a copy"
        )


@contextmanager
def _claimed(pair: nn.Module) -> Iterator[None]:
    """Let no other thread fit the pair meanwhile."""
    tensors = set(map(id, (*pair.parameters(), *pair.buffers())))
    _FITTED.update(tensors)
    try:
        yield
    finally:
        _FITTED.difference_update(tensors)


@contextmanager
def _own(pair: nn.Module) -> Iterator[None]:
    """What is the process's, not the thread's, and belongs to a run while it trains."""
    with scope(pair), rng.kept(), warnings.catch_warnings():
        # The library says itself where a loss is not finite, with the site's name.
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM makes non-empty, so that training ends after its step."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {
        number: signal.signal(number, lambda received, _: caught.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
