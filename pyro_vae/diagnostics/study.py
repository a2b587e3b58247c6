"""A study: how one diagnostic runs within a time budget, and what its result means in words."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.masks import missing_entries
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENT = 3
"""A row with its gradient takes as long as this many rows; a traced graph adds no overhead."""

GAP = 1.0
"""A gap of this many nats per example is worth an effort."""

KINDS = {
    "fault": "At fault",
    "trust": "Reliable",
    "doubt": "Not reliable",
    "unchecked": "Not checked",
    "next": "Try next",
}
"""The kinds of findings of `pyro_vae.diagnose`, with their titles for the reader."""

REASONS = {
    "does not apply": "not_applicable",
    "failed": "failed",
    "lacked time": "left_out",
}
"""Titles of the reasons why a diagnostic is missing or small, and the fields with these reasons."""


class Finding(NamedTuple):
    """A part of a sentence of the summary."""

    kind: str
    """The kind: "fault" for a part that is at fault, "trust" for a reliable result, "doubt" for an
    unreliable one, "unchecked" for what no tool has reached, "next" for advice."""
    words: str
    """The text of this part."""
    about: str = ""
    """The quantity or the part of the pair that it is about; each has findings of one kind."""


class Rung(NamedTuple):
    """One size of a study."""

    cost: float
    """Approximate seconds of its passes through the pair, one after another."""
    run: Callable[[], Any]
    """Runs the diagnostic and returns its result."""


class Study(NamedTuple):
    """A diagnostic at growing sizes."""

    name: str
    """The name of the diagnostic."""
    weight: float
    """Its share of the time, relative to the other studies."""
    rungs: Sequence[Rung]
    """Its sizes, from the smallest up."""
    judge: Callable[[Any], list[Any]] = lambda found: []
    """Returns the findings and the signs of faults that rest on its result alone. What rests on
    several studies is in `pyro_vae.diagnostics.verdict`."""
    figures: Mapping[str, Callable[[Any], "Figure"]] = MappingProxyType({})
    """Figures of its result, by name."""


class Bench(NamedTuple):
    """The pair and the data of a diagnosis, with the measured time of a pass."""

    pair: nn.Module
    batch: Batch
    """Prepared rows in random order, so that the first rows are a random subset."""
    rows: Tensor
    """The number of each row within the data that the user passed."""
    seed: int
    engine: str
    overhead: float
    """Seconds of a pass of model and guide on one row."""
    rate: float
    """Seconds for each further row."""
    draw_rate: float
    """Seconds for each further draw of a row."""
    other: Batch | None = None
    """Prepared out-of-distribution rows."""
    train: Batch | None = None
    """Prepared rows to which the guide of global latents was fitted, if they are known."""
    shared: tuple[str, ...] = ()
    """The global and group latents of the pair."""
    local: tuple[str, ...] = ()
    """The local latents of the pair."""

    def cost(self, passes: float, rows: float) -> float:
        """Return the seconds of these passes with this number of rows, or of draws of rows."""
        return passes * (self.overhead + self.rate * rows)

    def draws(self, passes: float, rows: float, draws: float) -> float:
        """Return the seconds of these passes with this number of draws for each row."""
        return self.cost(passes, rows) + passes * self.draw_rate * rows * draws

    def some(self, number: int) -> Batch:
        """Return the first rows."""
        return tuple(tensor[:number] for tensor in self.batch)

    @property
    def missing(self) -> Tensor | None:
        """Which entries of x are missing, or None if no entry is."""
        return missing_entries(self.batch[0])

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of all diagnostics; the data are already binarized."""
        return {"binarize": "none", "seed": self.seed}


def sizes(bench: Bench, *wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Limit the first number of each size to the number of rows, and drop duplicates."""
    n = len(bench.batch[0])
    return list(dict.fromkeys((min(n, rows), *rest) for rows, *rest in wanted))


def latent_names(pair: nn.Module, batch: Batch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the global and group latents of a pair, and its local latents."""
    shared = tuple(global_latents(pair, batch))
    with using(pair, 0):
        few = tuple(part[:2] for part in batch)
        sites = latents(trace_guide(pair, few))
    return shared, tuple(name for name in sites if name not in shared)
