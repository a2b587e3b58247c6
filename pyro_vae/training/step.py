"""One training step: its numbers, and the errors that stop training."""

import math
import time

import torch
from torch import Tensor

from pyro_vae.compat import lacks_variance
from pyro_vae.data.sources import Arrays
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import rng
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.captured import on_gpu
from pyro_vae.training.check import nonfinite_rows
from pyro_vae.training.nonfinite import Taken, meet, minibatch
from pyro_vae.training.run import TrainingRun
from pyro_vae.training.state import TrainState

UNREAD = {"cpu": 1, "cuda": 50}
"""How many steps' numbers may wait on a device. Each reading waits for the GPU."""


SEVERAL = 8
"""How many steps with full minibatches a GPU takes at once, so that it does not wait for Python."""


def at_once(run: TrainingRun) -> int:
    """Return how many minibatches to gather at once."""
    resident = isinstance(run.data.rows, Arrays) and on_gpu(run.data.rows.tensors[0])
    left_out = run.settings.on_nonfinite == "skip" and any(True for _ in run.pair.buffers())
    several = resident and run.team.count == 1 and not left_out and run.engine.engine != "eager"
    return SEVERAL if several else 1


def take(run: TrainingRun, state: TrainState, batch: Batch, count: int) -> None:
    """Take ``count`` steps, with as many minibatches one after the other."""
    if count > 1 and _several(run, state, batch, count):
        return
    for part in zip(*(tensor.chunk(count) for tensor in batch), strict=True):
        step(run, state, part)


def _several(run: TrainingRun, state: TrainState, batch: Batch, count: int) -> bool:
    """Take several steps at once, and return whether that was possible."""
    began, before = time.perf_counter(), (state.batches, state.examples)
    plan, taken = [], []
    for _ in range(count):
        begin(run, state)
        plan.append((float(run.engine.beta), run.optimizer.learning_rate))
        taken.append(Taken(state.batches + 1, state.examples, None))
        state.batches += 1
        state.examples += len(batch[0]) // count
    try:
        done = run.engine.several_steps(run.svi.model, run.svi.guide, batch, plan)
    except (ValueError, IndexError):  # of the programs; the single step names the rows
        done = False
    if not done:
        state.batches, state.examples = before
        return False
    numbers = run.engine.numbers.unbind()
    names = run.engine.names
    run.unread.extend((names, *each) for each in zip(numbers, taken, strict=True))
    if len(run.unread) >= UNREAD["cuda"]:
        read(run, state)
    state.seconds += time.perf_counter() - began
    return True


def step(run: TrainingRun, state: TrainState, batch: Batch) -> None:
    """Take one step of SVI, and add its numbers to the state."""
    began = time.perf_counter()
    begin(run, state)
    wait = UNREAD.get(run.data.prepare.device.type, 1)
    buffers = _buffers(run)
    if buffers:
        wait = 1  # a minibatch that is left out must leave no trace in them
    # Rows in memory are found again by their numbers, so that a GPU does not keep many minibatches.
    kept = None if wait > 1 and isinstance(run.data.rows, Arrays) else batch
    taken = Taken(state.batches + 1, state.examples, kept)
    state.batches += 1
    state.examples += len(batch[0])
    try:
        run.svi.step(*batch)
    except FloatingPointError:
        wait = 1  # the gradient is not finite; the reading below names the site
    except (ValueError, IndexError) as error:  # IndexError: a label beyond the pair's classes
        explain_error(run, state.where, batch, error)
        meet(run, state, "loss", taken, {}, error)
        _restore(buffers)
        return
    run.unread.append((run.engine.names, run.engine.numbers, taken))
    if len(run.unread) >= wait and read(run, state):
        _restore(buffers)
    state.seconds += time.perf_counter() - began


def _buffers(run: TrainingRun) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers of the pair with copies, if a minibatch may be left out."""
    if run.settings.on_nonfinite == "stop":
        return []
    return [(buffer, buffer.detach().clone()) for buffer in run.pair.buffers()]


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def begin(run: TrainingRun, state: TrainState) -> None:
    """Set the weight on the KL and the learning rate of a step."""
    epoch = len(state.epochs) + state.examples / len(run.data.rows)
    run.engine.beta = run.beta(epoch)
    run.optimizer.learning_rate = run.settings.learning_rate * run.rate(epoch)


def read(run: TrainingRun, state: TrainState) -> bool:
    """Read the numbers that wait on the device, and add them to the sums.

    Returns whether a minibatch was left out. Raises `NonFiniteError` if a loss or a gradient is not
    finite, unless the settings leave out such minibatches.
    """
    unread = list(run.unread)
    run.unread.clear()
    if not unread:
        return False
    waiting = [numbers for _, numbers, _ in unread]
    values = iter((torch.cat(waiting) if len(waiting) > 1 else waiting[0]).tolist())
    left_out = False
    for names, _, taken in unread:
        numbers = {name: next(values) for name in names}
        loss, norm = numbers["loss", ""], numbers["norm", ""]
        outside = [name for (kind, name), count in numbers.items() if kind == "outside" and count]
        if outside:
            error = ValueError(f"site '{outside[0]}' observes values outside its support")
            where = f"epoch {len(state.epochs) + 1}, step {taken.step}"
            explain_error(run, where, minibatch(run, state, taken), error)
            meet(run, state, "loss", taken, {}, error)
            left_out = True
            continue
        if not math.isfinite(loss + norm):
            meet(run, state, "gradient" if math.isfinite(loss) else "loss", taken, numbers)
            left_out = True
            continue
        for (kind, name), value in numbers.items():
            if kind == "outside":
                continue
            state.sums[kind][name] = state.sums[kind].get(name, 0.0) + value
        greatest = state.sums["greatest"]
        greatest["norm"] = max(norm, greatest.get("norm", 0.0))
    return left_out


def explain_error(run: TrainingRun, where: str, batch: Batch | None, error: Exception) -> None:
    """Raise `UsageError` for an error of the pair's programs, unless its numbers are the cause."""
    if isinstance(error, UsageError):
        raise UsageError(first_line(error)) from None
    if batch is not None and len(batch[0]) == 1 and lacks_variance(error):
        raise UsageError(
            f"training stopped in {where}: batch normalization cannot compute the variance "
            "of a minibatch with one row; choose a `batch_size` that leaves no single row of "
            f"{len(run.data.rows)} at the end, or pass a DataLoader with drop_last=True"
        ) from error
    with rng.kept():
        found = batch is not None and nonfinite_rows(run.pair, run.data.prepare(batch))[0]
    if not found:
        said = " ".join(" ".join(str(error).splitlines()[:2]).split())[:300]
        raise UsageError(f"training stopped in {where}: {said}") from error
