"""The history of training: a row for each epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vae.pairs.frames import installed_pandas
from pyro_vae.pairs.showing import shown_html
from pyro_vae.training.validation import Bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure


IMPROVING = 0.01
"""The least gain, in nats per example, that is worth more epochs."""


class Epoch(NamedTuple):
    """One row of a history. Bounds and their parts are in nats per example."""

    epoch: int
    objective: float
    """The value that training maximized, with the KL weight of the epoch. It is not a bound if the
    weight is below 1."""
    elbo: float
    """The ELBO, for any objective, averaged over the minibatches of the epoch."""
    reconstruction: float
    kl: dict[str, float]
    """KL of each latent site."""
    validation: Bound | None
    """The bound on the validation data after the epoch; None without validation data."""
    beta: float
    learning_rate: float
    gradient_norm: float
    """Global norm of the gradient before clipping, averaged over the steps of the epoch."""
    seconds: float
    gradient_norm_max: float = math.nan
    """The greatest of these norms; NaN in epochs of version 0.1.0, which did not record it."""
    skipped: int = 0
    """Number of minibatches that were left out because their numbers were not finite."""

    @classmethod
    def of(cls, plain: Sequence[Any]) -> "Epoch":
        """Return the epoch that `plain` gave."""
        epoch = cls(*plain)
        return epoch._replace(validation=None if plain[5] is None else Bound(*plain[5]))

    def plain(self) -> list[Any]:
        """Return the fields as numbers, lists and dictionaries, for a checkpoint."""
        return [list(field) if isinstance(field, Bound) else field for field in self]

    def row(self) -> dict[str, Any]:
        """Return the epoch as one flat row of history.csv."""
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
            "gradient_norm_max": self.gradient_norm_max,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, repr=False)
class History:
    """The result of `fit`: all epochs, and the epoch of the pair's parameters."""

    epochs: tuple[Epoch, ...]
    best_epoch: int
    """The epoch of the greatest validation bound. It is the last epoch without validation data, and
    if no bound is finite."""
    stopped_early: bool
    collapsed: tuple[str, ...] = ()
    """Latent sites whose posterior had collapsed when training ended.

    docs/diagnostics/collapse.md shows what to try."""
    inconsistent: tuple[str, ...] = ()
    """Latent sites whose KL was negative when training ended. Model and guide disagree about
    them."""

    point_estimates: tuple[str, ...] = ()
    """Latent sites whose guide is a Delta. Then ``elbo`` is log p(x, z) at a point, which is not a
    bound on log p(x), and ``-log p(z)`` takes the place of their KL."""

    def __getitem__(self, column: str) -> list[float]:
        """Return a column of history.csv as a list: ``history["validation_elbo"]``.

        ``history["kl"]`` is the KL of all latents, and ``history["kl_z2"]`` that of the site z2.
        """
        return [epoch.row()[column] for epoch in self.epochs]

    def __repr__(self) -> str:
        last = self.epochs[-1]
        what = "log joint at a point estimate" if self.point_estimates else "elbo"
        return (
            f"History({len(self)} epochs, best {self.best_epoch}, "
            f"{what} {last.elbo:.3f} in the last, stopped early: {self.stopped_early})"
        )

    _repr_html_ = shown_html

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def improving(self) -> float | None:
        """By how many nats the validation bound still improved in the last tenth of the epochs.

        The mean of the last tenth of the epochs minus the mean of the tenth before, if the
        difference is above `IMPROVING` and three of its standard errors; else None.
        """
        bounds = [epoch.validation.bound for epoch in self.epochs if epoch.validation is not None]
        n = max(len(bounds) // 10, 2)
        late, before = np.array(bounds[-n:]), np.array(bounds[-2 * n : -n])
        if len(before) < n or not np.isfinite(bounds[-2 * n :]).all():
            return None
        gain = float(late.mean() - before.mean())
        error = float(np.sqrt((late.var(ddof=1) + before.var(ddof=1)) / n))
        return gain if gain > max(IMPROVING, 3 * error) else None

    def to_frame(self) -> Any:
        """Return a pandas frame with a row for each epoch and the columns of history.csv.

        Raises `UsageError` if pandas is not installed.
        """
        rows = [epoch.row() for epoch in self.epochs]
        return installed_pandas("to_frame").DataFrame(rows).set_index("epoch")

    def plot(self) -> "Figure":
        """Return a figure of ELBO, reconstruction, KL and gradient norm by epoch."""
        from pyro_vae.training.curves import curves

        return curves({name: self[name] for name in self.epochs[0].row()})


def is_finite(measured: Bound | None) -> bool:
    """Whether there is a finite bound."""
    return measured is not None and math.isfinite(measured.bound)


def is_better(measured: Bound | None, best: Bound | None) -> bool:
    """Whether an epoch is the best so far: its bound is greater, or no bound was finite so far.

    Arguments:
        measured: the bound of the epoch.
        best: the bound of the best epoch before it.
    """
    if best is None or not is_finite(best):
        return True
    return measured is not None and is_finite(measured) and measured.bound > best.bound
