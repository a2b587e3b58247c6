"""The training loop: epochs, steps, checkpoints, and interruption."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.compat import lacks_variance
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.ranges import CURE, extreme
from pyro_vae.data.sources import Source
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import fold_plan, rng, threads
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import registered
from pyro_vae.pairs.traces import BadNumbers
from pyro_vae.runs import description
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import tensors as run_tensors
from pyro_vae.training import collapse
from pyro_vae.training.check import explain_nonfinite
from pyro_vae.training.claims import own_state
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.history import Epoch, History, best_epoch, is_finite
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.schedules import Schedule
from pyro_vae.training.settings import Settings
from pyro_vae.training.stopping import Interrupted, NonFiniteError, signals, summary_writer
from pyro_vae.training.validation import Bound, bound

UNREAD = {"cpu": 1, "cuda": 50}
"""Steps whose losses may wait on a device until they are read: a GPU is not to be waited for."""


@dataclass
class TrainingRun:
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
        self.good = run_tensors.state_dict(self.pair)

    def train(self, progress: bool, own: ExitStack) -> History:
        """All epochs that are left, then the best parameters into the pair."""
        self.shown = self._bar(progress)
        with self.shown as shown, signals() as stop, self._board() as board:
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
            fold_plan.known(self.pair).points,
        )

    def _give_way(self, own: ExitStack) -> None:
        """Let other threads run pairs, with the store and the generators of their callers."""
        now, modes = rng.state(), {module: module.training for module in self.pair.modules()}
        own.close()
        threads.give_way()
        own.enter_context(own_state(self.pair))
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
            if len(batch[0]) == 1 and lacks_variance(error):
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
            self.best = run_tensors.state_dict(self.pair) if measured is not None else None
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
        run_files.write_checkpoint(
            self.folder,
            {
                "job": self.job,
                "pair": run_tensors.state_dict(self.pair),
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
        run_folder.write_model(folder, self.best or run_tensors.state_dict(self.pair))
        run_files.write_csv(folder / run_files.HISTORY, [epoch.row() for epoch in self.epochs])

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, after checking that it is of the same job."""
        path = cast(Path, self.folder) / run_files.CHECKPOINT
        for name in _PARTS_OF_CHECKPOINT:
            if name not in saved:
                raise UsageError(f"{path} lacks '{name}': it is no checkpoint of a run")
        run_tensors.require_fit(self.pair, saved["pair"], path)
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
                was = description.renamed(was)
            if name != "settings" and None not in (was, value) and was != value:
                said = "" if len(str(was) + str(value)) > 200 else f": {was} then, {value} now"
                raise UsageError(
                    f"{path} was made with another {name}{said}; a run goes on only as it began"
                )
        if saved["best"] is not None:
            run_tensors.require_fit(self.pair, saved["best"], path)
        run_tensors.fill(self.pair, saved["pair"], path)
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
            what = "log joint" if fold_plan.known(self.pair).points else "elbo"
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
        with summary_writer()(str(cast(Path, self.folder) / run_files.TENSORBOARD)) as board:
            yield board


def _single_row(run: TrainingRun) -> str:
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
