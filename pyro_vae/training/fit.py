"""`fit`: stochastic variational inference on any pair, by an explicit ``pyro.infer.SVI``."""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import nn

from pyro_vae.data.ranges import range_fault
from pyro_vae.data.sources import Arrays, Rows, parts, source
from pyro_vae.errors import UsageError
from pyro_vae.pairs.contract import no_pair
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import description, held_out_rows, seals
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.training.claims import claimed, own_state, require_free
from pyro_vae.training.elbo import require_weighable
from pyro_vae.training.history import History
from pyro_vae.training.loop import TrainingRun
from pyro_vae.training.rows import training_rows, validation_rows
from pyro_vae.training.schedules import Schedule
from pyro_vae.training.settings import Settings
from pyro_vae.training.stopping import summary_writer


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
        beta: weight on the KL, or a schedule of it (`pyro_vae.training.schedules`); by default the
            one that ``pair.recipe`` gives, else 1.
        learning_rate_schedule: a factor on the learning rate, by epoch.
        optimizer: makes the torch optimiser from parameters and ``lr``.
        binarize: "dynamic", "fixed" or "none": see `pyro_vae.data.preparation.Preparation`.
        out: a run folder for checkpoints and the best model; nothing is written without.
        resume: go on from the checkpoint in ``out``; a run that was stopped before its first one
            begins anew.
        overwrite: replace a run that is in ``out``.
        progress: show a progress bar.
        config: what else config.json of the run shall hold.
        settings: the fields of `pyro_vae.training.settings.Settings`: epochs, batch_size,
            learning_rate, clip_norm, patience, seed, device, precision, engine, checkpoint_seconds,
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
        summary_writer()
    if fault := no_pair(pair):
        raise UsageError(fault)
    _require_parts(objective, beta, learning_rate_schedule, optimizer)
    require_free(pair)
    saved = None
    if folder is not None and resume:
        run_folder.read_config(folder)
        saved = None if run_folder.begun(folder) else run_files.read_checkpoint(folder)
    pair.to(device(chosen.device))
    recipe = cast(Any, pair).recipe(chosen.epochs) if hasattr(pair, "recipe") else {}
    objective = objective or recipe.get("objective")
    beta = recipe.get("beta", 1.0) if beta is None else beta
    require_weighable(objective, beta)
    with seeded(chosen.seed):  # a loader draws as it begins
        rows = source(x, context, pair)
        chosen = chosen.for_rows(len(rows))
        rows, prepare, objective, units, are_kl = training_rows(
            pair, rows, objective, binarize, chosen
        )
        held = None
        if validation is not None:
            held = validation_rows(pair, parts(validation), rows, binarize)
        elif chosen.patience is not None:
            raise UsageError("patience needs validation data to measure: give validation=")
    job = {
        "settings": asdict(chosen),
        "objective": _words(objective),
        "beta": _words(beta),
        "learning_rate_schedule": _words(learning_rate_schedule),
        "optimizer": _words(optimizer),
        "binarize": binarize,
        "data": seals.checksum(rows.tensors) if isinstance(rows, Arrays) else None,
        "validation": seals.checksum(held[0].tensors)
        if held is not None and isinstance(held[0], Arrays)
        else None,
        "pair": json.dumps(description.recipe(pair), sort_keys=True),
    }
    if folder is not None and saved is None:
        if not resume:
            run_folder.start(folder, overwrite)
        run_folder.write_config(
            pair, folder, {**job, "pair": description.recipe(pair), **(config or {})}
        )
        held_out_rows.write_rows(folder, {"train": x, "validation": _first(validation)})
    fault = range_fault(pair, rows, prepare) if saved is None else None
    if fault is not None:
        warnings.warn(fault, stacklevel=3)
    with claimed(pair), ExitStack() as own:
        own.enter_context(own_state(pair))
        own.enter_context(seeded(chosen.seed))
        run = TrainingRun(
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
