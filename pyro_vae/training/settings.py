"""The settings of training: the keywords of `pyro_vae.fit`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Literal, TypeAlias, get_args

from pyro_vae.errors import UsageError, nearest

EngineName: TypeAlias = Literal["auto", "eager", "traced", "compiled"]

ENGINES: tuple[str, ...] = get_args(EngineName)


def require_engine(name: str) -> str:
    """The name of an engine, or `UsageError` with the nearest."""
    if name not in ENGINES:
        raise UsageError(f"engine is '{name}'; {nearest(name, ENGINES)}")
    return name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How training is run: the keywords of `pyro_vae.fit`.

    Parameters
    ----------
    epochs
        Passes over the training data.
    batch_size
        Rows of a minibatch; by default 128, or all where there are fewer.
    learning_rate
        Step size of the optimiser.
    clip_norm
        Greatest global norm of the gradient; none by default.
    patience
        Stop after so many epochs without a better validation bound; never by default.
    seed
        Seeds every random draw of training.
    device
        "auto" is the GPU where there is one, else the CPU.
    precision
        "bfloat16" runs networks under autocast; parameters and densities stay in float32.
    engine
        How a step is run: as stock Pyro (eager), as a graph traced once and replayed (traced), or
        as that graph compiled; auto traces, and compiles where the steps to come repay it.
    checkpoint_seconds
        Least time between two checkpoints, which are written at the end of an epoch.
    tensorboard
        Write the history for TensorBoard too.
    """

    epochs: int = 100
    batch_size: int | None = None
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    engine: EngineName = "auto"
    checkpoint_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
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
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(
                f"must be float32 or bfloat16, got '{self.precision}'", argument="precision"
            )
        require_engine(self.engine)

    def for_rows(self, n: int) -> Settings:
        """These settings, with what goes by the number of rows decided.

        >>> Settings().for_rows(1000).batch_size, Settings().for_rows(40).batch_size
        (128, 40)
        """
        return self if self.batch_size is not None else replace(self, batch_size=min(128, n))

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> Settings:
        """Settings from keywords, an unknown one answered with the nearest known.

        >>> Settings.of({"epoch": 3})
        Traceback (most recent call last):
        ...
        pyro_vae.errors.UsageError: fit has no option 'epoch'; did you mean 'epochs'?
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise UsageError(f"fit has no option '{name}'; {nearest(name, known)}")
        return cls(**keywords)
