"""The parts that a training run works with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import rng
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.processes import ALONE, Team
from pyro_vae.pairs.scope import registered
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import tensors as run_tensors
from pyro_vae.runs.history_file import write_history
from pyro_vae.training.collapse import CollapseAlarm
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.history import Epoch
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.processes import Exchange, merged, restore_generators
from pyro_vae.training.rows import TrainingData
from pyro_vae.training.schedules import Schedule
from pyro_vae.training.settings import Settings
from pyro_vae.training.state import Sums, TrainState, no_sums
from pyro_vae.training.validation import BoundGraph


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a training run, apart from its `TrainState`."""

    pair: nn.Module
    data: TrainingData
    beta: Schedule
    rate: Schedule
    """A factor on the learning rate."""
    optimizer: Optimizer
    engine: Engine
    svi: Step
    alarm: CollapseAlarm
    job: dict[str, Any]
    folder: Path | None
    fault: str | None
    """A warning about the range of the data before training."""
    shown: tqdm
    """The progress bar."""
    on_epoch: tuple[Callable[[Epoch], Any], ...]
    """Functions that see each epoch."""
    team: Team = ALONE
    """The processes that share the run."""
    graph: BoundGraph | None = None
    """The bound of a minibatch of validation data, on a GPU."""
    unread: list[tuple[list[tuple[str, str]], Tensor, Any]] = field(default_factory=list)
    """Names and values of the numbers that still wait on the device, and their steps."""

    @property
    def settings(self) -> Settings:
        return self.data.settings

    @property
    def batch_size(self) -> int:
        return cast(int, self.settings.batch_size)


@contextmanager
def exchange_of(run: "TrainingRun") -> Iterator[Exchange | None]:
    """Let the optimizer add up the gradients of all processes, if the run has several."""
    if run.team.count == 1:
        yield None
        return
    exchange = Exchange(list(run.optimizer.parameters.values()), run.team)
    with closing(exchange):
        run.optimizer.exchange = exchange
        yield exchange


def assembled(
    pair: nn.Module,
    data: TrainingData,
    beta: float | Schedule,
    rate: Schedule | None,
    constructor: Callable[..., torch.optim.Optimizer],
    job: dict[str, Any],
    folder: Path | None,
    fault: str | None,
    shown: tqdm,
    on_epoch: Sequence[Callable[[Epoch], Any]],
    team: Team = ALONE,
) -> TrainingRun:
    """Make the optimizer, the engine, SVI and the alarm of a run.

    All parameters of the pair must be known already.
    """
    settings, typed = data.settings, cast(Pair, pair)
    trained = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    optimizer = Optimizer(constructor, trained, settings.learning_rate, settings.clip_norm)
    engine = _engine(pair, data, optimizer, shown.set_postfix_str, team)
    device = data.prepare.device
    graph = BoundGraph(pair, data.objective) if device.type == "cuda" else None
    return TrainingRun(
        pair=pair,
        data=data,
        beta=beta if callable(beta) else lambda _: float(beta),
        rate=rate or (lambda _: 1.0),
        optimizer=optimizer,
        engine=engine,
        svi=Step(registered(pair, typed.model), typed.guide, optimizer, loss=engine),
        alarm=CollapseAlarm(data.units, settings.epochs, data.steps, len(data.rows), data.are_kl),
        job=job,
        folder=folder,
        fault=fault,
        shown=shown,
        on_epoch=tuple(on_epoch),
        team=team,
        graph=graph,
    )


def _engine(
    pair: nn.Module,
    data: TrainingData,
    optimizer: Optimizer,
    say: Callable[[str], None],
    team: Team,
) -> Engine:
    settings = data.settings
    size = data.rows.batch_size(cast(int, settings.batch_size))
    return Engine(
        pair,
        data.objective,
        settings.engine,
        prepare=data.prepare,
        precision=settings.precision,
        batch_size=max(1, size // team.count),
        steps=settings.epochs * (len(data.rows) // size),
        num_data=data.rows.num_data,
        declare=False,
        say=say,
        noise=True,
        optimizer=optimizer,
    )


def first_state(run: TrainingRun) -> TrainState:
    """Return the state of a run before its first step."""
    return TrainState(
        job=run.job,
        parameters=run_tensors.state_dict(run.pair),
        optimizer=run.optimizer.get_state(),
        engine=run.engine.engine,
        generators=rng.state(),
    )


def resumed(run: TrainingRun, state: TrainState) -> TrainState:
    """Put pair, optimizer, engine, alarm and generators into the state of a checkpoint."""
    path = (run.folder or Path()) / run_files.CHECKPOINT
    run_tensors.fill(run.pair, state.parameters, path)
    if state.batches > run.data.steps:
        raise UsageError(f"{path} is in step {state.batches} of {run.data.steps} in an epoch")
    try:
        run.optimizer.set_state(state.optimizer)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"{path} has the state of another optimizer ({first_line(error)})"
        ) from error
    for epoch in state.epochs:
        run.alarm.heard(epoch)
    if run.settings.engine == state.job["settings"].get("engine"):
        run.engine.engine = state.engine
    restore_generators(state, run.settings.seed, run.team)
    own = state.sums if run.team.first else no_sums()
    return replace(state, job=run.job, sums=own)


def write(run: TrainingRun, state: TrainState) -> None:
    """Write the checkpoint, the best model and the history into the run folder, if there is one."""
    saved = run.team.gather(lambda: (rng.state(), state.sums))
    run.team.together(lambda: _write(run, state, saved))


def _write(run: TrainingRun, state: TrainState, saved: list[tuple[dict[str, Any], Sums]]) -> None:
    if run.folder is None:
        return
    generators, *more = [generators for generators, _ in saved]
    now = replace(
        state,
        parameters=run_tensors.state_dict(run.pair),
        optimizer=run.optimizer.get_state(),
        engine=run.engine.engine,
        generators=generators,
        more_generators=more,
        sums=merged([sums for _, sums in saved]),
    )
    try:
        run_files.write_checkpoint(run.folder, now.to_checkpoint())
        write_model(run, state)
    except UsageError as error:
        raise UsageError(
            f"training stopped in {state.where}: {first_line(error)}; the steps since the last "
            "checkpoint are lost, and `resume` continues from it"
        ) from error


def write_model(run: TrainingRun, state: TrainState) -> None:
    """Write the best model so far, and the history."""
    folder = cast(Path, run.folder)
    run_folder.write_model(folder, state.best or run_tensors.state_dict(run.pair))
    write_history(folder / run_files.HISTORY, [epoch.row() for epoch in state.epochs])
