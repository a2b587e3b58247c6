"""A training step of several processes, which all succeed or all stop."""

import math
import time
from typing import NoReturn, cast

from pyro_vae.pairs.pair import Batch
from pyro_vae.training.nonfinite import Taken, meet
from pyro_vae.training.processes import Exchange
from pyro_vae.training.run import TrainingRun
from pyro_vae.training.state import TrainState
from pyro_vae.training.step import begin, explain_error, read


def shared_step(
    run: TrainingRun, state: TrainState, batch: Batch, exchange: Exchange, stop: bool
) -> bool:
    """Take one step of SVI on this process's part of a minibatch.

    Arguments:
        stop: whether this process was asked to stop.

    Returns whether a process was asked to stop, in which case all stop after this step.
    """
    began, failure = time.perf_counter(), None
    begin(run, state)
    state.batches += 1
    taken = Taken(state.batches, state.examples, batch)
    exchange.begin(len(batch[0]), stop)
    try:
        if len(batch[0]):
            run.svi.step(*batch)
        else:
            run.optimizer([])
            exchange.clear()
    except FloatingPointError:
        pass  # the norm below says so in every process
    except Exception as error:
        failure = error
        if exchange.done:
            raise
        exchange.fail()
    norm = run.optimizer.gradient_norm
    if exchange.failed or not math.isfinite(norm):
        _stop_all(run, state, taken, failure)
    state.examples += exchange.rows
    if len(batch[0]):
        numbers = run.engine.numbers.clone()
        numbers[1] = norm
        run.unread.append((run.engine.names, numbers, taken))
    read(run, state)
    state.seconds += time.perf_counter() - began
    return exchange.stop


def _stop_all(
    run: TrainingRun, state: TrainState, taken: Taken, failure: Exception | None
) -> NoReturn:
    """Raise an error in all processes, with the words of the process that has the cause."""
    batch = cast(Batch, taken.batch)

    def explain() -> None:
        if isinstance(failure, (ValueError, IndexError)):
            explain_error(run, state.where, batch, failure)
            meet(run, state, "loss", taken, {}, failure)
        if failure is not None:
            raise failure
        own = run.engine.numbers[:2].tolist() if len(batch[0]) else []
        if not all(map(math.isfinite, own)):
            numbers = dict(zip(run.engine.names, run.engine.numbers.tolist(), strict=True))
            meet(run, state, "gradient" if math.isfinite(own[0]) else "loss", taken, numbers)

    run.team.together(explain)
    meet(run, state, "gradient", taken, {})
    raise AssertionError("fit accepts on_nonfinite='skip' for one process only")
