"""The training loop: epochs, steps, checkpoints and interruption."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from pyro_vae.data.order import Place
from pyro_vae.data.sources import Arrays
from pyro_vae.errors import first_line
from pyro_vae.pairs import fold_plan, rng, threads
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.traces import BadNumbers
from pyro_vae.pairs.waiting import LostError
from pyro_vae.runs import files as run_files
from pyro_vae.runs import tensors as run_tensors
from pyro_vae.training.check import bad_parameter
from pyro_vae.training.history import Epoch, History, is_better
from pyro_vae.training.history import is_finite as is_finite_bound
from pyro_vae.training.loggers import TensorBoard
from pyro_vae.training.nonfinite import stop_at_parameter
from pyro_vae.training.ownership import own_state
from pyro_vae.training.pace import Pace
from pyro_vae.training.processes import average_buffers, merged
from pyro_vae.training.run import TrainingRun, exchange_of, write
from pyro_vae.training.shared_step import shared_step
from pyro_vae.training.state import TrainState, no_sums
from pyro_vae.training.step import at_once, read, take
from pyro_vae.training.stopping import Interrupted, signals
from pyro_vae.training.validation import Bound, bound


def train(run: TrainingRun, state: TrainState, own: ExitStack) -> History:
    """Run the remaining epochs, then load the best parameters into the pair.

    Arguments:
        own: holds the run's parameter store and generators, which it puts away for other threads.
    """
    pace = Pace(run.settings.checkpoint_seconds, len(state.epochs))
    with signals() as stop, _board(run) as board, _placed(state), exchange_of(run) as exchange:
        seen_by = (*run.on_epoch, *board) if run.team.first else ()
        if not state.epochs and not state.batches:
            write(run, state)
            pace.wrote(0)
        while not _is_over(run, state):
            for batch, count in _remaining(run, state):
                stopped: Any = stop
                if exchange is None:
                    take(run, state, batch, count)
                else:
                    stopped = shared_step(run, state, batch, exchange, bool(stop))
                _show(run, state, count)
                if stopped:
                    _interrupt(run, state)
                if exchange is None and pace.is_due_within():
                    read(run, state)
                    write(run, state)
                    pace.wrote(len(state.epochs))
                if threads.waited_for():
                    _give_way(run, own)
            _end_epoch(run, state)
            _warn(run, run.alarm.heard(state.epochs[-1]))
            if _reported(run, state, seen_by, pace.is_due_after(len(state.epochs))):
                write(run, state)
                pace.wrote(len(state.epochs))
        _warn(run, run.alarm.over())
        _warn_of_validation(state)
        write(run, state)
        if state.best is not None:
            run.pair.load_state_dict(state.best, strict=False)
        run.pair.eval()
        if stop:  # during the last validation or the last writing
            _say_complete(run)
    return _history(run, state)


@contextmanager
def _placed(state: TrainState) -> Iterator[None]:
    """Say where in training another process was lost."""
    try:
        yield
    except LostError as error:
        raise LostError(
            f"training stopped in {state.where}: {first_line(error)}; `resume` continues a run "
            "folder from its last checkpoint"
        ) from error


def _is_over(run: TrainingRun, state: TrainState) -> bool:
    all_done = len(state.epochs) >= run.settings.epochs
    return all_done or state.has_run_out(run.settings.patience)


def _history(run: TrainingRun, state: TrainState) -> History:
    return History(
        tuple(state.epochs),
        state.best_epoch,
        state.has_run_out(run.settings.patience),
        run.alarm.collapsed,
        run.alarm.inconsistent,
        fold_plan.known(run.pair).points,
    )


def _remaining(run: TrainingRun, state: TrainState) -> Iterator[tuple[Batch, int]]:
    """Yield the remaining minibatches of this epoch, in its order, several joined on a GPU."""
    run.pair.train()
    place = Place(run.settings.seed, len(state.epochs), state.batches, run.team)
    rows, count = run.data.rows, at_once(run)
    if count > 1:
        yield from cast(Arrays, rows).joined(run.batch_size, place, count)
    else:
        yield from ((batch, 1) for batch in rows.epoch(run.batch_size, place))


def _end_epoch(run: TrainingRun, state: TrainState) -> None:
    """Measure the epoch, keep its parameters if it is the best, and start the next one."""
    run.data.rows.require_length(state.examples)
    read(run, state)
    state.sums = merged(run.team.gather(lambda: state.sums))
    began = time.perf_counter()
    average_buffers(run.pair, run.team)
    if (name := bad_parameter(run.pair)) is not None:
        stop_at_parameter(run, state, name)
    measured = _measured(run, state)
    better = is_better(measured, state.best_bound)
    state.epochs.append(_epoch(run, state, measured, began))
    if better:
        state.best_epoch = len(state.epochs)
        state.best = run_tensors.state_dict(run.pair) if measured is not None else None
    state.batches, state.examples, state.sums, state.seconds = 0, 0, no_sums(), 0.0
    state.parameters = run_tensors.state_dict(run.pair)


def _epoch(run: TrainingRun, state: TrainState, measured: Bound | None, began: float) -> Epoch:
    sums, skipped = state.sums, state.sums["skipped"]
    n = state.examples - skipped.get("examples", 0)
    reconstruction = sum(sums["reconstruction"].values()) / n
    kl = {name: value / n for name, value in sums["kl"].items()}
    return Epoch(
        epoch=len(state.epochs) + 1,
        objective=-sums["loss"][""] / n,
        elbo=reconstruction - sum(kl.values()),
        reconstruction=reconstruction,
        kl=kl,
        validation=measured,
        beta=float(run.engine.beta),
        learning_rate=run.optimizer.learning_rate,
        gradient_norm=sums["norm"][""] / (state.batches - skipped.get("steps", 0)),
        seconds=state.seconds + time.perf_counter() - began,
        gradient_norm_max=sums["greatest"].get("norm", math.nan),
        skipped=int(skipped.get("steps", 0)),
    )


def _measured(run: TrainingRun, state: TrainState) -> Bound | None:
    """Return the bound on the validation data; NaN if some of them have no finite bound."""
    if run.data.held is None:
        return None
    try:
        at_once = min(500, 4 * run.batch_size)  # less memory than a step, which has gradients
        graph = None if run.engine.engine == "eager" else run.graph
        objective = run.data.objective
        return bound(run.pair, *run.data.held, objective, at_once, team=run.team, graph=graph)
    except BadNumbers:
        return Bound(math.nan, math.nan, math.nan, dict.fromkeys(state.sums["kl"], math.nan))


def _give_way(run: TrainingRun, own: ExitStack) -> None:
    """Let other threads run pairs, with their callers' parameter store and generators."""
    now, modes = rng.state(), {module: module.training for module in run.pair.modules()}
    own.close()
    threads.give_way()
    own.enter_context(own_state(run.pair))
    rng.restore(now)
    for module, training in modes.items():  # other pairs may share parts without parameters
        module.training = training


def _interrupt(run: TrainingRun, state: TrainState) -> None:
    if run.folder is None and run.team.first:
        how = "a run without a folder cannot be resumed"
    else:
        how = f"resume with --resume (resume=True) on {run.folder}"
    read(run, state)
    write(run, state)
    raise Interrupted(f"stopped in {state.where}; {how}")


def _say_complete(run: TrainingRun) -> None:
    kept = "the pair has the result" if run.folder is None else f"{run.folder} has the result"
    raise Interrupted(f"stopped after the last epoch; training is complete, and {kept}")


def _warn(run: TrainingRun, sites: Sequence[str]) -> None:
    for name in sites:
        with tqdm.external_write_mode():  # on its own line, above the progress bar
            warnings.warn(run.alarm.words(name), stacklevel=5)


def _warn_of_validation(state: TrainState) -> None:
    measured = [epoch.validation for epoch in state.epochs if epoch.validation is not None]
    bad = sum(not is_finite_bound(bound) for bound in measured)
    if bad:
        kept = "the last epoch" if bad == len(measured) else f"epoch {state.best_epoch}"
        warnings.warn(
            f"the validation bound was not finite in {bad} of {len(measured)} epochs; the "
            f"pair has the parameters of {kept}; look for extreme values in the validation data",
            stacklevel=5,
        )


def _show(run: TrainingRun, state: TrainState, count: int) -> None:
    last = state.epochs[-1] if state.epochs else None
    if last is not None and state.batches == count:
        what = "log joint" if fold_plan.known(run.pair).points else "elbo"
        words = f"epoch {last.epoch}, {what} {last.elbo:.2f}"
        if last.validation is not None:
            words += f", validation {last.validation.elbo:.2f}"
        run.shown.set_postfix_str(words, refresh=False)
    run.shown.update(count)


@contextmanager
def _board(run: TrainingRun) -> Iterator[list[Callable[[Epoch], Any]]]:
    if not run.settings.tensorboard or not run.team.first:
        yield []
        return
    with TensorBoard(cast(Path, run.folder) / run_files.TENSORBOARD) as board:
        yield [board]


def _report(run: TrainingRun, state: TrainState, seen_by: Sequence[Callable[[Epoch], Any]]) -> None:
    """Show the last epoch to each of these functions."""
    for see in seen_by:
        with rng.kept():
            see(state.epochs[-1])


def _reported(
    run: TrainingRun, state: TrainState, seen_by: Sequence[Callable[[Epoch], Any]], due: bool
) -> bool:
    """Whether the first process says that a checkpoint is due; it also shows the epoch.

    An error keeps the epoch, and ends all processes.
    """
    failures: list[BaseException] = []

    def report() -> tuple[bool, bool]:
        try:
            _report(run, state, seen_by)
        except BaseException as error:
            failures.append(error)
        return due, bool(failures)

    def fail() -> None:
        for failure in failures:
            raise failure

    now, failed = run.team.from_first(report)
    if failed:
        write(run, state)
        run.team.together(fail)
    return now
