"""The settings of training, as `pyro_vae.fit` takes them. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real
from typing import Literal, TypeAlias, get_args

from pyro_vae.errors import UsageError, nearest

EngineName: TypeAlias = Literal["auto", "eager", "traced", "compiled"]
Precision: TypeAlias = Literal["float32", "bfloat16", "auto"]
OnNonfinite: TypeAlias = Literal["stop", "skip"]

_NUMBERS = ((Integral, int), (Real, float))

ENGINES: tuple[str, ...] = get_args(EngineName)


def require_engine(name: str) -> str:
    """Return the name of an engine, or raise `UsageError` with the nearest name."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}'; {nearest(name, ENGINES)}")
    return name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How training is run. `pyro_vae.fit` has a keyword for each of these fields.

    Parameters
    ----------
    epochs
        Number of passes over the training data.
    batch_size
        Number of rows of a minibatch. The default is 128, or all rows if there are fewer.
    learning_rate
        Step size of the optimizer.
    clip_norm
        Greatest global norm of the gradient. The default does not limit it.
    patience
        Stop after this many epochs without a better validation bound. The default is never.
    seed
        Random seed of training.
    device
        "auto" is the GPU if there is one, else the CPU.
    precision
        "bfloat16" runs the networks under autocast; parameters and densities stay in float32.
        "auto" is bfloat16 for large networks on a processor that multiplies in it, else float32.
    mask_rate
        Probability with which an entry of the data is hidden at a visit, for complete data of which
        parts will be missing later. The likelihood must leave out missing entries.
    engine
        How a step runs: as stock Pyro (eager), as a graph that is traced once and replayed
        (traced), or as that graph compiled (compiled). "auto" traces, and compiles if the
        remaining steps repay the compilation.
    checkpoint_seconds
        Shortest time between two checkpoints. They are written at the ends of epochs, and within an
        epoch after the longer of this time and 10 seconds.
    on_nonfinite
        What to do with a minibatch whose loss or gradient is not finite: stop training (stop), or
        leave the minibatch out (skip).
    skip_limit
        Greatest number of minibatches that --on-nonfinite skip leaves out in an epoch.
    tensorboard
        Also write the history for TensorBoard.
    """

    epochs: int = 100
    batch_size: int | None = None
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = "float32"
    mask_rate: float = 0.0
    engine: EngineName = "auto"
    checkpoint_seconds: float = 30.0
    on_nonfinite: OnNonfinite = "stop"
    skip_limit: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            # A grid search gives numbers of NumPy. Those of Python stay as they are.
            kind = next((kind for number, kind in _NUMBERS if isinstance(value, number)), None)
            if kind is not None and not isinstance(value, int | float):
                object.__setattr__(self, name, kind(value))
        for name in ("epochs", "batch_size", "patience", "skip_limit"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise UsageError(
                    f"must be a whole number of at least 1, got {value}", argument=name
                )
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < inf):
                raise UsageError(f"must be positive and finite, got {value}", argument=name)
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise UsageError(
                f"must be a whole number from 0 to 2^63 - 1, got {self.seed}", argument="seed"
            )
        if not (isinstance(self.mask_rate, (int, float)) and 0 <= self.mask_rate < 1):
            raise UsageError(
                f"must be at least 0 and below 1, got {self.mask_rate}", argument="mask_rate"
            )
        if self.precision not in get_args(Precision):
            raise UsageError(
                f"must be float32, bfloat16 or auto, got '{self.precision}'", argument="precision"
            )
        if self.on_nonfinite not in ("stop", "skip"):
            raise UsageError(
                f"must be stop or skip, got '{self.on_nonfinite}'", argument="on_nonfinite"
            )
        require_engine(self.engine)

    def for_rows(self, n: int) -> Settings:
        """Return these settings with a batch size for n rows.

        >>> Settings().for_rows(1000).batch_size, Settings().for_rows(40).batch_size
        (128, 40)
        """
        return self if self.batch_size is not None else replace(self, batch_size=min(128, n))
