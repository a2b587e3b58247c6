"""Sums over enumerated sites one at a time, for sites in markov contexts and in inner plates.

The log densities of a trace are factors. The sum over all sites eliminates one site after another:
it adds the factors that depend on the site, and takes the logarithm of the sum of exponentials over
its values. Sites in inner plates are eliminated first; then their factors are summed over these
plates. This is the tensor variable elimination of Obermeyer et al., 2019
(https://arxiv.org/abs/1902.03210), which Pyro's ``TraceEnum_ELBO`` uses too. Here every sum is a
stable logsumexp, and the steps can be traced and sampled backward.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.compat import enumerated_ids
from pyro_vae.errors import UsageError
from pyro_vae.pairs.data_plate import in_data_plate
from pyro_vae.pairs.enumeration import SAMPLE_PLATES
from pyro_vae.pairs.pair import Site

DATA, SAMPLES = "data", "samples"
"""The labels of the data plate, whatever its name, and of a plate of samples around the pair."""

Label = str | int
"""A plate, or the number that Pyro gives to an enumerated site."""


class LogFactor(NamedTuple):
    """A log density without dimensions of size 1."""

    values: Tensor
    dims: tuple[Label, ...]
    """The label of each dimension."""
    plates: frozenset[str]
    """All plates of its site, also those of size 1."""

    @property
    def sites(self) -> list[int]:
        """The enumerated sites on which it depends."""
        return [dim for dim in self.dims if isinstance(dim, int)]


class SumStep(NamedTuple):
    """The elimination of one site, from the sum of the factors that depend on it."""

    site: int
    joint: LogFactor


def label(frame: Any) -> str:
    """The label of a plate."""
    if frame.name in SAMPLE_PLATES:
        return SAMPLES
    return DATA if in_data_plate(frame) else f"plate {frame.name}"


def plates_of(site: Site) -> dict[int, str]:
    """The label of the plate at each dimension of a site."""
    return {f.dim: label(f) for f in site["cond_indep_stack"] if f.vectorized}


def factor(site: Site, term: Tensor) -> LogFactor:
    """A log density of a site as a factor."""
    plates = plates_of(site)
    labels: dict[int, Label] = {**enumerated_ids(site), **plates}
    dims = [dim for dim in range(-term.dim(), 0) if term.shape[dim] > 1]
    for dim in dims:
        if dim not in labels:
            raise UsageError(
                f"the log density of site '{site['name']}' has size {term.shape[dim]} at dimension "
                f"{dim}, which belongs neither to a plate nor to an enumerated site: declare the "
                "dimensions to the right of the plates as event dimensions with .to_event(1)"
            )
    return LogFactor(term.squeeze(), tuple(labels[dim] for dim in dims), frozenset(plates.values()))


def eliminate(
    factors: Iterable[LogFactor], over: Iterable[int], plates: Mapping[int, frozenset[str]]
) -> tuple[list[LogFactor], list[SumStep]]:
    """Sum over some enumerated sites; returns the factors that remain, and the steps.

    Arguments:
        factors: log densities, whose sum is the log of a joint density.
        over: the sites to sum over.
        plates: the plates of every enumerated site.

    Raises `UsageError` if a site depends on sites of two plates that are not nested.
    """
    left, waiting, steps = list(factors), set(over), []
    while waiting:
        site = _next(waiting, left, plates)
        waiting.remove(site)
        own = [part for part in left if site in part.dims]
        left = [part for part in left if site not in part.dims]
        if own:
            joint = joined([_summed_to(part, plates[site], plates) for part in own])
            steps.append(SumStep(site, joint))
            at = joint.dims.index(site)
            rest = (*joint.dims[:at], *joint.dims[at + 1 :])
            left.append(LogFactor(joint.values.logsumexp(at), rest, plates[site]))
    return left, steps


def _next(
    waiting: set[int], left: Sequence[LogFactor], plates: Mapping[int, frozenset[str]]
) -> int:
    """The next site: of the sites in the most plates, the one that depends on the fewest others."""
    deepest = max(len(plates[site]) for site in waiting)
    others: dict[int, set[int]] = {s: set() for s in sorted(waiting) if len(plates[s]) == deepest}
    for part in left:
        for site in part.sites:
            if site in others:
                others[site].update(part.sites)
    return min(others, key=lambda site: len(others[site]))


def _summed_to(
    part: LogFactor, to: frozenset[str], plates: Mapping[int, frozenset[str]]
) -> LogFactor:
    """Sum a factor over the plates that are not in ``to``."""
    extra = [dim for dim in part.dims if isinstance(dim, str) and dim not in to]
    if extra and any(not plates[site] <= to for site in part.sites):
        names = sorted(name.removeprefix("plate ") for name in part.plates)
        raise UsageError(
            "an enumerated site depends on enumerated sites of plates that are not nested "
            f"({', '.join(names)}), so the sum over their values does not factorize: write one of "
            "the plates as a loop, for i in pyro.plate(...)"
        )
    return without(part, extra)


def without(part: LogFactor, extra: Sequence[Label]) -> LogFactor:
    """A factor summed over some of its dimensions."""
    at = [part.dims.index(dim) for dim in extra]
    kept = tuple(dim for dim in part.dims if dim not in extra)
    values = part.values.sum(at) if at else part.values
    return LogFactor(values, kept, part.plates - set(extra))


def joined(factors: Sequence[LogFactor]) -> LogFactor:
    """The sum of factors, which keeps all of their dimensions."""
    dims = tuple(dict.fromkeys(dim for part in factors for dim in part.dims))
    values = [aligned(part, dims) for part in factors]
    total = sum(values[1:], values[0])
    return LogFactor(total, dims, frozenset().union(*(part.plates for part in factors)))


def aligned(part: LogFactor, dims: Sequence[Label]) -> Tensor:
    """The values of a factor with these dimensions, of size 1 where it does not have them."""
    order = sorted(range(len(part.dims)), key=lambda i: dims.index(part.dims[i]))
    sizes = dict(zip(part.dims, part.values.shape, strict=True))
    return part.values.permute(order).reshape([sizes.get(dim, 1) for dim in dims])


def total(factors: Sequence[LogFactor], keep: Sequence[str]) -> Tensor:
    """The sum of factors over all plates except ``keep``, which are its dimensions, in order."""
    parts = [without(part, [dim for dim in part.dims if dim not in keep]) for part in factors]
    return aligned(joined(parts), keep)


def draw(steps: Sequence[SumStep]) -> dict[int, LogFactor]:
    """Draw the eliminated sites jointly; the values of a factor are the numbers of its values."""
    drawn: dict[int, LogFactor] = {}
    for site, joint in reversed(steps):
        for other in joint.sites:
            if other != site:
                joint = _taken(joint, other, drawn[other])
        dims = tuple(dim for dim in joint.dims if dim != site)
        logits = aligned(joint, (*dims, site))
        found = torch.distributions.Categorical(logits=logits).sample()
        drawn[site] = LogFactor(found, dims, joint.plates)
    return drawn


def _taken(part: LogFactor, site: int, index: LogFactor) -> LogFactor:
    """A factor at given values of one of its sites."""
    own = [dim for dim in part.dims if dim != site]
    dims = tuple(dict.fromkeys([*own, *index.dims]))
    values, at = aligned(part, (*dims, site)), aligned(index, dims)
    shape = torch.broadcast_shapes(values.shape[:-1], at.shape)
    values = values.expand(*shape, values.shape[-1])
    taken = values.gather(-1, at.expand(shape)[..., None]).squeeze(-1)
    return LogFactor(taken, dims, part.plates | index.plates)
