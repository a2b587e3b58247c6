"""A study: how one diagnostic is run within a time, and what its result means in words."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pyro_vae.pairs.pair import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENT = 3
"""How many rows of a pass one with its gradient takes as long as; a graph spares its overhead."""

GAP = 1.0
"""Nats per example from which on a gap is worth an effort."""


class Finding(NamedTuple):
    """A part of a sentence of the summary."""

    kind: str
    """What can be trusted ("trust"), what cannot ("doubt"), or what to try ("next")."""
    words: str


class Rung(NamedTuple):
    """One size of a study."""

    cost: float
    """Seconds that its passes through the pair would take one by one, about."""
    run: Callable[[], Any]


class Study(NamedTuple):
    """A diagnostic, at sizes that grow."""

    name: str
    weight: float
    """Its part of the time, in proportion to those of the studies after it."""
    rungs: Sequence[Rung]
    judge: Callable[[Any, Mapping[str, Any]], list[Finding]]
    """What is to be said of its result, and of those before it."""
    figures: Mapping[str, Callable[[Any], "Figure"]] = MappingProxyType({})
    """Figures of its result, by name."""


class Bench(NamedTuple):
    """What is diagnosed."""

    pair: nn.Module
    batch: Batch
    """Prepared rows, in an order without meaning: the first are as good as any."""
    rows: Tensor
    """The number of each among the rows that came."""
    seed: int
    engine: str
    overhead: float
    """Seconds of a pass of model and guide on one row."""
    rate: float
    """Seconds for each further row."""
    other: Batch | None = None
    """Prepared rows of which it is known that they do not belong."""

    def cost(self, passes: float, rows: float) -> float:
        """Seconds of so many passes of so many rows, or draws for rows."""
        return passes * (self.overhead + self.rate * rows)

    def some(self, number: int) -> Batch:
        """So many rows."""
        return tuple(tensor[:number] for tensor in self.batch)

    @property
    def settings(self) -> dict[str, Any]:
        """What every diagnostic is told: data are binarised already, and nobody looks."""
        return {"binarize": "none", "seed": self.seed}


def sizes(bench: Bench, *wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes whose first number, of rows, is no more than there are; none comes twice."""
    n = len(bench.batch[0])
    return list(dict.fromkeys((min(n, rows), *rest) for rows, *rest in wanted))
