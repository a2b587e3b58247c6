"""One training step: its numbers, and the errors that stop training."""

import math
import time
from typing import NoReturn

import torch

from pyro_vae.compat import lacks_variance
from pyro_vae.data.ranges import CURE, extreme
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.check import explain_nonfinite
from pyro_vae.training.run import TrainingRun, write_model
from pyro_vae.training.state import TrainState
from pyro_vae.training.stopping import NonFiniteError

UNREAD = {"cpu": 1, "cuda": 50}
"""How many steps' numbers may wait on a device. Each reading waits for the GPU."""


def step(run: TrainingRun, state: TrainState, batch: Batch) -> None:
    """Take one step of SVI, and add its numbers to the state."""
    began = time.perf_counter()
    begin(run, state)
    state.batches += 1
    state.examples += len(batch[0])
    wait = UNREAD.get(run.data.prepare.device.type, 1)
    try:
        run.svi.step(*batch)
    except FloatingPointError:
        wait = 1  # the gradient is not finite; the reading below names the site
    except (ValueError, IndexError) as error:  # IndexError: a label beyond the pair's classes
        explain_stop(run, state, batch, error)
    run.unread.append((run.engine.names, run.engine.numbers))
    if len(run.unread) >= wait:
        read(run, state, batch)
    state.seconds += time.perf_counter() - began


def begin(run: TrainingRun, state: TrainState) -> None:
    """Set the weight on the KL and the learning rate of a step."""
    epoch = len(state.epochs) + state.examples / len(run.data.rows)
    run.engine.beta = run.beta(epoch)
    run.optimizer.learning_rate = run.settings.learning_rate * run.rate(epoch)


def read(run: TrainingRun, state: TrainState, batch: Batch | None = None) -> None:
    """Read the numbers that wait on the device, and add them to the sums.

    Raises `NonFiniteError` if a loss or a gradient is not finite; ``batch`` helps to explain it.
    """
    unread = list(run.unread)
    run.unread.clear()
    if not unread:
        return
    rows = torch.stack([numbers for _, numbers in unread]).tolist()
    for (names, _), row in zip(unread, rows, strict=True):
        numbers = dict(zip(names, row, strict=True))
        loss, norm = numbers["loss", ""], numbers["norm", ""]
        if not math.isfinite(loss + norm):
            what = "gradient" if math.isfinite(loss) else "loss"
            stop_nonfinite(run, state, what, numbers, batch)
        for (kind, name), value in numbers.items():
            state.sums[kind][name] = state.sums[kind].get(name, 0.0) + value


def is_finite(run: TrainingRun) -> bool:
    """Whether all parameters of the pair are finite."""
    return all(bool(torch.isfinite(p).all()) for p in run.pair.parameters())


def stop_nonfinite(
    run: TrainingRun,
    state: TrainState,
    what: str,
    numbers: dict[tuple[str, str], float],
    batch: Batch | None = None,
    cause: Exception | None = None,
) -> NoReturn:
    """Restore the last good parameters, and raise `NonFiniteError` with the site and a remedy.

    Arguments:
        what: the value that is not finite.
        numbers: the numbers of the step.
        batch: the minibatch of the step, if it is known.
    """
    site = _first_bad_site(run, numbers, batch)
    if not is_finite(run):
        run.pair.load_state_dict(state.best or state.parameters, strict=False)
    kept = ""
    if run.folder is not None:
        # The checkpoint stays unchanged, since optimizer and generators have moved on.
        write_model(run, state)
        kept = f"; the last good model is in {run.folder}"
    where = f" at site '{site}'" if site else ""
    raise NonFiniteError(
        f"training stopped in {state.where}: the {what} is not finite{where}{kept}; "
        f"{_remedy(run, batch)}"
    ) from cause


def _first_bad_site(
    run: TrainingRun, numbers: dict[tuple[str, str], float], batch: Batch | None
) -> str | None:
    for wanted in ("kl", "reconstruction"):
        for (kind, name), value in numbers.items():
            if kind == wanted and not math.isfinite(value):
                return name
    return None if batch is None else explain_nonfinite(run.pair, run.data.prepare(batch))


def _remedy(run: TrainingRun, batch: Batch | None) -> str:
    outlier = None if batch is None else extreme(run.data.prepare(batch)[0])
    if outlier is not None:
        return f"{outlier}: leave out such rows, or {CURE}"
    return run.fault or "a smaller `learning_rate` or `clip_norm` may help"


def explain_stop(run: TrainingRun, state: TrainState, batch: Batch, error: Exception) -> NoReturn:
    """Raise `UsageError` for an error of the pair's programs."""
    if isinstance(error, UsageError):
        raise UsageError(first_line(error)) from None
    if len(batch[0]) == 1 and lacks_variance(error):
        raise UsageError(
            f"training stopped in {state.where}: batch normalization cannot compute the variance "
            "of a minibatch with one row; choose a `batch_size` that leaves no single row of "
            f"{len(run.data.rows)} at the end, or pass a DataLoader with drop_last=True"
        ) from error
    if explain_nonfinite(run.pair, run.data.prepare(batch)) is not None:
        stop_nonfinite(run, state, "loss", {}, batch, error)
    said = " ".join(" ".join(str(error).splitlines()[:2]).split())[:300]
    raise UsageError(f"training stopped in {state.where}: {said}") from error
