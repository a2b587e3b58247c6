"""`fit`: stochastic variational inference on any pair, by an explicit ``pyro.infer.SVI``."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Never, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import nn

from pyro_vae.data.ranges import range_fault
from pyro_vae.data.sources import Arrays, Rows, parts, spread
from pyro_vae.data.streams import Stream
from pyro_vae.errors import UsageError, nearest
from pyro_vae.pairs.contract import no_pair
from pyro_vae.pairs.memory import smaller, told_smaller
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.processes import here, local_device, restarts, single
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import description, held_out_rows
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs.lock import writing
from pyro_vae.training.elbo import require_weighable
from pyro_vae.training.history import Epoch, History
from pyro_vae.training.job import job_in_words, require_same
from pyro_vae.training.loop import train
from pyro_vae.training.optimizer import NEEDED, name_of
from pyro_vae.training.ownership import claimed, own_state, require_free
from pyro_vae.training.processes import another_number, noise_seed, start_alike
from pyro_vae.training.rows import TrainingData, place, training_data
from pyro_vae.training.run import assembled, first_state, resumed
from pyro_vae.training.schedules import Schedule
from pyro_vae.training.settings import EngineName, OnNonfinite, Precision, Settings
from pyro_vae.training.state import TrainState
from pyro_vae.training.stopping import summary_writer

_UNREPEATABLE = (
    "the loader draws the order of its rows from a generator of its own, which the checkpoint does "
    "not hold: the order from here on differs from that of an uninterrupted run. Pass the data set "
    "itself, which fit shuffles, or a loader without a generator"
)


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
    on_epoch: Sequence[Callable[[Epoch], Any]] = (),
    epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    clip_norm: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    mask_rate: float = 0.0,
    engine: EngineName = "auto",
    checkpoint_seconds: float = 30.0,
    on_nonfinite: OnNonfinite = "stop",
    skip_limit: int = 10,
    tensorboard: bool = False,
    **unknown: Never,
) -> History:
    r"""Fit a pair by stochastic variational inference, and leave the best parameters in it.

    Each step is ``svi.step(*batch)`` of ``SVI(pair.model, pair.guide, optimizer, objective)``. It
    maximizes :math:`E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)` over minibatches.

    Arguments:
        pair: any ``nn.Module`` with ``model`` and ``guide``; see `pyro_vae.check`.
        x: the data: a tensor or an array with a row for each datum, which keeps its type (uint8
            stays uint8); or a torch ``Dataset`` or ``DataLoader`` that gives x, or x and context.
            A dictionary by the names of the model's arguments takes the place of x and context,
            here and in every other tool.
        context: further tensors with as many rows as x. Model and guide receive them.
        validation: held-out x, or a tuple of x and context, of the same kinds.
        objective: a Pyro ELBO. The default is that of ``pair.recipe``, else ``Trace_ELBO()``, or
            `pyro_vae.EnumeratedELBO` for a pair with latents to enumerate.
        beta: the weight on the KL, or a function of the epoch such as `pyro_vae.LinearSchedule`.
            The default is that of ``pair.recipe``, else 1.
        learning_rate_schedule: a factor on the learning rate, as a function of the epoch.
        optimizer: makes the torch optimizer from parameters and ``lr``.
        binarize: "dynamic", "fixed" or "none"; see `pyro_vae.data.preparation.Preparation`.
        out: a run folder for checkpoints and the best model. Without it, nothing is written.
        resume: continue from the checkpoint in ``out``. A run that was stopped before its first
            checkpoint starts again.
        overwrite: replace a run in ``out``.
        progress: show a progress bar.
        config: further content for config.json of the run.
        on_epoch: functions that are called after each epoch with its row of the history, such as
            the loggers of `pyro_vae.training.loggers`. They may use the pair, and their random
            draws do not change training. If one raises an error, training ends; with ``out``, the
            checkpoint of this epoch is written first.
        epochs: number of passes over the training data.
        batch_size: number of rows of a minibatch. The default is 128, or all rows if there are
            fewer.
        learning_rate: step size of the optimizer.
        clip_norm: greatest global norm of the gradient. The default does not limit it.
        patience: stop after this many epochs without a better validation bound.
        seed: random seed of training.
        device: "auto" is the GPU if there is one, else the CPU.
        precision: "bfloat16" runs the networks under autocast. "auto" is bfloat16 for large
            networks on a processor that multiplies in it, else float32. A resumed run keeps it.
        mask_rate: probability with which an entry of the data is hidden at a visit.
        engine: "eager" (stock Pyro), "traced", "compiled", or "auto"; see docs/how-to/engine.md.
        checkpoint_seconds: shortest time between two checkpoints.
        on_nonfinite: "stop", or "skip" to leave out a minibatch whose loss or gradient is not
            finite. It then moves no parameter and no buffer.
        skip_limit: greatest number of minibatches that "skip" leaves out in an epoch.
        tensorboard: also write the history for TensorBoard.

    You choose the pair's first parameters: to repeat a run, also seed torch before you make the
    pair. All random draws of training use generators that `fit` seeds. The checkpoint keeps them,
    and afterwards your own generators are as they were. On a CPU, a resumed run ends bit-identical
    to an uninterrupted one.

    A warning reports a latent site whose posterior has collapsed, or whose KL is negative. A
    negative KL means that model and guide disagree (docs/diagnostics/collapse.md).

    Raises `UsageError` for data or a pair that cannot be trained, `NonFiniteError` if a loss or a
    gradient is not finite, and `Interrupted` (a ``KeyboardInterrupt``) after Ctrl-C or SIGTERM.

    >>> import torch, pyro_vae as pv
    >>> x = torch.rand(64, 4).round()
    >>> history = pv.fit(pv.VAE.mlp((4,)), x, epochs=2, batch_size=32, progress=False)
    >>> len(history["elbo"])
    2
    """
    reject_unknown(unknown)
    chosen = Settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        patience=patience,
        seed=seed,
        device=device,
        precision=precision,
        mask_rate=mask_rate,
        on_nonfinite=on_nonfinite,
        skip_limit=skip_limit,
        engine=engine,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
    )
    folder = None if out is None else Path(out)
    resume, overwrite = after_restart(folder, resume, overwrite)
    _require_choices(folder, resume, overwrite, chosen)
    if chosen.patience is not None and validation is None:
        raise UsageError("needs validation data: pass `validation`", argument="patience")
    if fault := no_pair(pair):
        raise UsageError(fault)
    _require_parts(objective, beta, learning_rate_schedule, optimizer, on_epoch)
    require_free(pair)
    team = here()
    if team.count > 1 and chosen.on_nonfinite == "skip":
        raise UsageError(
            f"'skip' needs one process, got {team.count}; use 'stop'", argument="on_nonfinite"
        )
    folder = folder if team.first else None
    if folder is not None and resume:
        run_folder.read_config(folder)
    with single(), writing(folder), told_smaller(lambda: _smaller(batch_size or 128, folder)):
        state = team.from_first(lambda: _saved(folder) if folder and resume else None)
        if state is not None and chosen.precision == "auto":
            chosen = replace(chosen, precision=state.job["settings"]["precision"])
        x, context = spread(pair, x, context)
        place(pair, local_device() or torch_device(chosen.device), (x, context), chosen.seed)
        objective, beta = _with_recipe(pair, chosen.epochs, objective, beta)
        require_weighable(objective, beta)
        data = team.together(
            lambda: training_data(pair, (x, context), validation, objective, binarize, chosen)
        )
        job = job_in_words(pair, data, beta, learning_rate_schedule, optimizer, binarize)
        start_alike(pair, job, data.rows, chosen.seed, team)

        def begin() -> None:
            if state is not None:
                require_same(state, pair, job, (folder or Path()) / run_files.CHECKPOINT)
            elif folder is not None:
                if not resume:
                    run_folder.start(folder, overwrite)
                own_words = {"pair": description.recipe(pair), **(config or {})}
                run_folder.write_config(pair, folder, {**job, **own_words})
                held = {"train": x, "validation": _first(pair, validation)}
                held_out_rows.write_rows(folder, held)

        team.together(begin)
        fault = range_fault(pair, data.rows, data.prepare) if state is None else None
        if fault is not None:
            warnings.warn(fault, stacklevel=3)
        if state is not None and (changed := another_number(state, team)):
            warnings.warn(changed, stacklevel=3)
        if state is not None and isinstance(data.rows, Stream) and data.rows.unrepeatable:
            warnings.warn(_UNREPEATABLE, stacklevel=3)
        done = 0 if state is None else len(state.epochs) * data.steps + state.batches
        shown = bar(progress and team.first, chosen.epochs * data.steps, "fit", initial=done)
        used = data.rows.batch_size(cast(int, data.settings.batch_size))
        known = told_smaller(lambda: _smaller(used, folder))
        with claimed(pair), shown, known, ExitStack() as own:
            own.enter_context(own_state(pair))
            own.enter_context(seeded(noise_seed(chosen.seed, team)))
            run = assembled(
                pair,
                data,
                beta,
                learning_rate_schedule,
                optimizer,
                job,
                folder,
                fault,
                shown,
                on_epoch,
                team,
            )
            history = train(run, first_state(run) if state is None else resumed(run, state), own)
            held_out_rows.remember(pair, x if _has_globals(pair, data) else None)
            return history


def _smaller(batch_size: int, folder: Path | None) -> str:
    """What to make smaller if the memory does not suffice, and what is kept."""
    words = smaller(batch_size)
    if folder is None:
        return words
    kept = (folder / run_files.CHECKPOINT).exists()
    words += ", in a new run, because a resumed run keeps its `batch_size`"
    return f"{words}; {folder} keeps its last checkpoint" if kept else words


def after_restart(folder: Path | None, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether to resume and to overwrite: after torchrun restarts the processes, a run goes on."""
    if folder is None or not restarts() or not (folder / run_files.CONFIG).exists():
        return resume, overwrite
    return True, False


def _has_globals(pair: nn.Module, data: TrainingData) -> bool:
    """Whether the rows are in memory, and the guide of global latents belongs to exactly them."""
    in_memory = isinstance(data.rows, Arrays)
    return in_memory and bool(global_latents(pair, data.prepare(data.rows.first(2))))


def reject_unknown(unknown: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a misspelled argument of `fit`, with the nearest name."""
    known = [name for name in inspect.signature(fit).parameters if name != "unknown"]
    for name in unknown:
        raise UsageError(f"fit has no option '{name}'; {nearest(name, known)}")


def torch_device(name: str) -> torch.device:
    """Return the torch device of this name; "auto" is the GPU if there is one.

    >>> torch_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen).cpu()  # "meta" has no data
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device '{name}' is not available here ({str(error).splitlines()[0][:100]}); "
            "'cpu' always is"
        ) from error
    return chosen


def _require_parts(objective: Any, beta: Any, schedule: Any, optimizer: Any, on_epoch: Any) -> None:
    """Raise `UsageError` for words in place of objects, as the command line takes them."""
    if not isinstance(on_epoch, (list, tuple)) or not all(map(callable, on_epoch)):
        raise UsageError(
            f"must be a list of functions, such as on_epoch=[print], got {on_epoch!r}",
            argument="on_epoch",
        )
    if objective is not None and not isinstance(objective, ELBO):
        raise UsageError(
            f"must be a Pyro ELBO, such as Trace_ELBO(), got {objective!r}", argument="objective"
        )
    if not (beta is None or callable(beta) or isinstance(beta, (int, float))):
        raise UsageError(
            f"must be a number or a function of the epoch, got {beta!r}", argument="beta"
        )
    if schedule is not None and not callable(schedule):
        raise UsageError(
            "must be a function of the epoch, such as pyro_vae.CosineSchedule(epochs), got "
            f"{schedule!r}",
            argument="learning_rate_schedule",
        )
    if not callable(optimizer) or isinstance(optimizer, (PyroOptim, torch.optim.Optimizer)):
        raise UsageError(
            f"{NEEDED}, got {name_of(optimizer)}",
            argument="optimizer",
        )


def _require_choices(
    folder: Path | None, resume: bool, overwrite: bool, settings: Settings
) -> None:
    if folder is None and (resume or overwrite or settings.tensorboard):
        raise UsageError("`resume`, `overwrite` and `tensorboard` need a run folder: pass `out`")
    if resume and overwrite:
        raise UsageError("`resume` continues a run and `overwrite` replaces it: choose one")
    if settings.tensorboard:
        summary_writer()


def _saved(folder: Path) -> TrainState | None:
    """Return the state of a run's checkpoint; None if the run has no checkpoint yet."""
    if run_folder.begun(folder):
        return None
    saved = run_files.read_checkpoint(folder)
    return TrainState.of_checkpoint(saved, folder / run_files.CHECKPOINT)


def _with_recipe(
    pair: nn.Module, epochs: int, objective: ELBO | None, beta: float | Schedule | None
) -> tuple[ELBO | None, float | Schedule]:
    """Return objective and weight on the KL, from the pair's recipe where they are not given."""
    recipe = cast(Any, pair).recipe(epochs) if hasattr(pair, "recipe") else {}
    objective = objective or recipe.get("objective")
    return objective, recipe.get("beta", 1.0) if beta is None else beta


def _first(pair: nn.Module, rows: Any) -> Any:
    """Return the data without their context."""
    first, *others = parts(rows)
    return spread(pair, first, others)[0]
