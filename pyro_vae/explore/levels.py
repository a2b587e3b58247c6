"""The latent sites of a pair as planes of points: levels, and members of groups."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_POINTS = 2000
"""The largest number of points of a plane; more are thinned at random, with a fixed seed."""

COMPONENTS = ("component 1", "component 2")
"""The names of the axes of the principal components of the codes."""


@dataclass(frozen=True)
class Level:
    """The codes of one latent site: a point for each datum or for each member of a group."""

    site: str
    codes: Tensor
    """Posterior means (points, units), float64."""
    scales: Tensor | None
    """Posterior scales (points, units); None if the latent has none."""
    rows: Tensor
    """The datum of each point, (points,)."""
    members: Tensor | None
    """The member of the datum of each point, (points,); None if a point is a whole datum."""
    kl: Tensor
    """The KL of each unit, in nats per example, (units,), or its variance."""
    measured: bool
    """Whether ``kl`` is a KL, and not the variance of the codes of a latent without one."""
    movable: bool
    """Whether the units take real values, so that they can be moved."""

    @property
    def order(self) -> list[int]:
        """The units, the largest KL first."""
        return torch.argsort(self.kl, descending=True, stable=True).tolist()

    @property
    def axes(self) -> dict[str, str]:
        """The axes of the plane, in words by name: the units by KL, and two components."""
        what = "KL" if self.measured else "variance"
        found = {str(i): f"{self.site}[{i}], {what} {self.kl[i]:.3g}" for i in self.order}
        few = self.codes.shape[1] < 3 or len(self.codes) < 3
        return found if few else found | {name: f"principal {name}" for name in COMPONENTS}

    def coordinates(self, axis: str) -> Tensor:
        """The points (points,) along an axis."""
        return self.projected(axis, self.codes)

    def projected(self, axis: str, codes: Tensor) -> Tensor:
        """Other codes (n, units) of this site along an axis; components are those of the level."""
        if axis not in COMPONENTS:
            return codes[:, int(axis)]
        center = self.codes.mean(0)
        _, _, directions = torch.linalg.svd(self.codes - center, full_matrices=False)
        direction = directions[COMPONENTS.index(axis)]
        # The sign of a component is arbitrary; its largest entry is positive here.
        return (codes - center) @ (direction * direction[direction.abs().argmax()].sign())

    def first_unit(self, point: int) -> int:
        """The place of the first unit of a point in the flattened code of its datum."""
        return 0 if self.members is None else int(self.members[point]) * self.codes.shape[1]


def level(
    site: str,
    mean: Tensor,
    scale: Tensor | None,
    kl: list[float] | None,
    sizes: Tensor | None,
) -> Level:
    """The level of a site from its means (n, *event_shape).

    Arguments:
        kl: the KL of each unit of the flattened code, or None.
        sizes: the number of members of each datum, (n,), if the data are groups with members along
            the first dimension of the event; None otherwise.
    """
    split = _by_datum(mean) if sizes is None else _by_member(mean, sizes)
    rows, members = split
    codes = _picked(mean, rows, members)
    known = None if kl is None else torch.tensor(kl, dtype=torch.float64)
    units = codes.shape[1]
    if known is not None and members is not None and len(known) % units == 0:
        known = known.reshape(-1, units).sum(0)
    measured = known is not None and known.shape == (units,)
    variance = codes.var(0, unbiased=False)
    return Level(
        site,
        codes,
        None if scale is None else _picked(scale, rows, members),
        rows,
        members,
        known.nan_to_num(0.0) if measured and known is not None else variance,
        measured,
        mean.is_floating_point(),
    )


def levels(
    means: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    kl: Mapping[str, list[float]],
    sizes: Tensor | None,
    members: int | None,
) -> list[Level]:
    """The levels of all local latents; those of real numbers come first.

    Arguments:
        members: the width of the groups, if the data are groups: sites with an event of this size
            in front have a point for each member.
    """
    found = []
    for site, mean in means.items():
        each = members is not None and mean.dim() > 2 and mean.shape[1] == members
        found.append(level(site, mean, scales.get(site), kl.get(site), sizes if each else None))
    return sorted(found, key=lambda one: not one.movable)


def _by_datum(mean: Tensor) -> tuple[Tensor, None]:
    return torch.arange(len(mean)), None


def _by_member(mean: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The datum and the place of each member that counts."""
    full = sizes.where(sizes >= 0, mean.shape[1])  # -1: all members count
    counts = torch.arange(mean.shape[1]) < full.cpu()[:, None]
    rows, members = counts.nonzero(as_tuple=True)
    kept = thinned(len(rows), MOST_POINTS)
    return rows[kept], members[kept]


def thinned(n: int, most: int) -> Tensor:
    """The numbers of at most this many of n rows, in order: all, or a sample with a fixed seed."""
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _picked(values: Tensor, rows: Tensor, members: Tensor | None) -> Tensor:
    values = values.detach().cpu()
    chosen = values[rows] if members is None else values[rows, members]
    return chosen.reshape(len(rows), -1).double()
