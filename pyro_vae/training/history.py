"""What training leaves a record of: a row for each epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro_vae.training.validation import Bound


class Epoch(NamedTuple):
    """One row of a history; bounds and their parts in nats per example."""

    epoch: int
    objective: float
    """What was maximised, with the KL weight of the time: no bound while that is below 1."""
    elbo: float
    """The ELBO itself, whatever the objective, averaged over the epoch's minibatches."""
    reconstruction: float
    kl: dict[str, float]
    """KL of each latent site."""
    validation: Bound | None
    """On the validation data after the epoch; None without them."""
    beta: float
    learning_rate: float
    gradient_norm: float
    """Mean over the epoch's steps of the gradient's global norm, before clipping."""
    seconds: float

    @classmethod
    def of(cls, plain: Sequence[Any]) -> "Epoch":
        """The epoch that `plain` gave."""
        epoch = cls(*plain)
        return epoch._replace(validation=None if plain[5] is None else Bound(*plain[5]))

    def plain(self) -> list[Any]:
        """The fields as numbers, lists and dictionaries, for a checkpoint."""
        return [list(field) if isinstance(field, Bound) else field for field in self]

    def row(self) -> dict[str, Any]:
        """The epoch as one flat row of history.csv."""
        flat = {
            "epoch": self.epoch,
            "objective": self.objective,
            "elbo": self.elbo,
            "reconstruction": self.reconstruction,
            "kl": sum(self.kl.values()),
            **{f"kl_{name}": value for name, value in self.kl.items()},
        }
        if self.validation is not None:
            flat |= {
                "validation_bound": self.validation.bound,
                "validation_elbo": self.validation.elbo,
                "validation_reconstruction": self.validation.reconstruction,
                "validation_kl": sum(self.validation.kl.values()),
            }
        return flat | {
            "beta": self.beta,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, repr=False)
class History:
    """What `fit` returns: its epochs, and which of them the pair's parameters are from."""

    epochs: tuple[Epoch, ...]
    best_epoch: int
    """The epoch of the greatest validation bound; the last one where no bound is finite, or without
    validation data."""
    stopped_early: bool
    collapsed: tuple[str, ...] = ()
    """Latent sites whose posterior had collapsed when training ended; see docs/collapse.md."""
    inconsistent: tuple[str, ...] = ()
    """Latent sites whose KL was negative then, as none is: model and guide disagree about them."""

    point_estimates: tuple[str, ...] = ()
    """Latent sites whose guide is a Delta: what stands as ``elbo`` is then log p(x, z) at a point,
    which is not a bound on log p(x), and ``-log p(z)`` stands in the place of their KL."""

    def __getitem__(self, column: str) -> list[float]:
        """A column of history.csv as a list: ``history["validation_elbo"]``."""
        return [epoch.row()[column] for epoch in self.epochs]

    def __repr__(self) -> str:
        last = self.epochs[-1]
        what = "log joint at a point estimate" if self.point_estimates else "elbo"
        return (
            f"History({len(self)} epochs, best {self.best_epoch}, "
            f"{what} {last.elbo:.3f} at the last, stopped early: {self.stopped_early})"
        )

    def __len__(self) -> int:
        return len(self.epochs)


def is_finite(measured: Bound | None) -> bool:
    """Whether there is a bound that others can be held against."""
    return measured is not None and math.isfinite(measured.bound)


def best_epoch(validation: Sequence[Bound | None]) -> int:
    """The first epoch, from 1, of the greatest finite bound; the last one where none is finite."""
    bounds = [m.bound if m is not None and is_finite(m) else None for m in validation]
    finite = [bound for bound in bounds if bound is not None]
    return 1 + bounds.index(max(finite)) if finite else len(bounds)
