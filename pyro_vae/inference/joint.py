"""log p(x, z) and log q(z|x) of any pair as functions of one vector of real numbers per datum.

What moves through the space of latents, annealing and NUTS, sees no sites, supports or plates, but
a vector z of D real numbers for each datum and each particle: every latent site of the model,
mapped from its support to the real numbers, with the Jacobian counted. Enumerated latents are
summed out and take no place in it.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform

from pyro_vae.compat import Enumerate, scale_and_mask, sum_rightmost
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import enumeration, masks, summing
from pyro_vae.pairs.folds import is_delta
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import by_datum, latents, log_prob, scored
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import structure
from pyro_vae.training.tracing import Named, traced

PROBES = 3
"""Draws at which a coordinate's gradient must be 0 to be taken for one that nothing depends on."""


class Slot(NamedTuple):
    """Where a site stands in the vector, and how its numbers are laid out.

    ``inner`` are the sizes of the plates within a datum, ``event`` the shape of one unconstrained
    value, ``event_dim`` the dimensions of a value on its support.
    """

    start: int
    inner: tuple[int, ...]
    event: tuple[int, ...]
    event_dim: int

    @property
    def width(self) -> int:
        return prod(self.inner) * prod(self.event)


class Joint:
    r"""The densities of a pair at vectors z of shape (particles, n, D), and their gradients.

    :math:`\log p(x, z) = \log \sum_e p(x, f(z), e) + \log |\det f'(z)|`, with f from the real
    numbers to the supports of the model's latents and e the enumerated ones; log q(z|x) is that of
    the guide, likewise. Nats per datum.

    Arguments:
        pair: any pair.
        batch: two rows, by which its latents are found.

    ``gradients`` and ``joint_gradient`` are run eagerly until `use` says how.
    Every method takes tensors of one batch, and is to be used within `pyro_vae.pairs.scope.using`.
    Raises `UsageError`, naming the site, for latents outside the data plate, discrete ones that
    are not enumerated, and those whose guide has a density at its own draws alone.
    """

    def __init__(self, pair: nn.Module, batch: Batch) -> None:
        self.pair = pair
        with using(pair, 0):
            guide = trace_guide(pair, batch)
            model = trace_model(pair, batch, guide)
            names = _moving(model, guide)
            self.nesting, self.vectorized, self.widest = structure(pair, batch)
            self.places = _slots(pair, batch, {name: latents(guide)[name] for name in names})
        self.enumerates = len(names) < len(latents(guide))
        self.dim = sum(place.width for place in self.places.values())
        self.gradients: Callable[..., Named] = self._gradients
        self.joint_gradient: Callable[..., Named] = self._joint_gradient

    def use(self, engine: str) -> None:
        """Compute gradients by this engine: "eager", "traced" or "compiled"."""
        self.gradients = traced(self.pair, self._gradients, engine, "moved")
        self.joint_gradient = traced(self.pair, self._joint_gradient, engine, "moved")

    def draw(self, number: int, *batch: Tensor) -> Tensor:
        """Draws of the guide, of shape (number, n, D)."""
        return self._drawn(number, batch, lambda: trace_guide(self.pair, batch))

    def draw_prior(self, number: int, *batch: Tensor) -> Tensor:
        """Draws of the model's latents, which do not know x, of shape (number, n, D)."""
        return self._drawn(number, batch, lambda: trace(cast(Pair, self.pair).model, batch))

    def unconstrained(self, values: Mapping[str, Tensor], *batch: Tensor) -> Tensor:
        """Values of the sites, as the model draws them, as vectors of shape (1, n, D)."""
        return self._read(values, batch, None)

    def constrained(self, z: Tensor, *batch: Tensor) -> dict[str, Tensor]:
        """The values of the sites at z, each of shape (particles, n, *plates within, *event)."""
        blocks = []
        for block in self._blocks(z):
            placed = _Placed(self._sites(block))
            with self._plate(len(block)), placed:
                trace(cast(Pair, self.pair).model, batch)
            blocks.append(placed.values)
        return {
            name: torch.cat([self._by_datum(block[name], place) for block in blocks])
            for name, place in self.places.items()
        }

    def log_joint(self, z: Tensor, *batch: Tensor) -> Tensor:
        """log p(x, z), of shape (particles, n)."""
        return self._densities(z, batch, guide=False)[0]

    def log_guide(self, z: Tensor, *batch: Tensor) -> Tensor:
        """log q(z|x), of shape (particles, n)."""
        return self._densities(z, batch)[1]

    def counts(self, *batch: Tensor) -> Tensor:
        """Which coordinates p(x, z) depends on, of shape (n, D): padding of sequences is none."""
        z = self.draw(PROBES, *batch)
        gradient = self._joint_gradient(z + torch.randn_like(z), *batch)["joint gradient"]
        return (gradient != 0).any(0)

    def _gradients(self, z: Tensor, *batch: Tensor) -> Named:
        """Both densities (particles, n) and their gradients (particles, n, D)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            joint, guide = self._densities(z, batch)
            (of_joint,) = torch.autograd.grad(joint.sum(), z, retain_graph=True)
            (of_guide,) = torch.autograd.grad(guide.sum(), z)
        found = {"joint": joint.detach(), "guide": guide.detach()}
        return found | {"joint gradient": of_joint, "guide gradient": of_guide}

    def _joint_gradient(self, z: Tensor, *batch: Tensor) -> Named:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            joint, _ = self._densities(z, batch, guide=False)
            (gradient,) = torch.autograd.grad(joint.sum(), z)
        return {"joint": joint.detach(), "joint gradient": gradient}

    def _densities(self, z: Tensor, batch: Batch, guide: bool = True) -> tuple[Tensor, Tensor]:
        """log p(x, z) and log q(z|x); the latter is left at 0 without ``guide``."""
        with pyro.validation_enabled(False):  # a trajectory may leave what numbers can express
            found = [self._block(block, batch, guide) for block in self._blocks(z)]
        joint, proposal = (torch.cat(column) for column in zip(*found, strict=True))
        return joint, proposal

    def _block(self, z: Tensor, batch: Batch, guide: bool) -> tuple[Tensor, Tensor]:
        typed, plate = cast(Pair, self.pair), self._plate(len(z))
        placed, first = _Placed(self._sites(z)), -1 - self.nesting - self.vectorized
        known = Trace()
        if self.enumerates:  # the model takes its values from the guide
            with plate, _Placed(self._sites(z)):
                known = trace_guide(self.pair, batch, Enumerate(first_available_dim=first))
        messenger = Enumerate(first_available_dim=None if self.enumerates else first)
        with plate, placed:
            model = trace(messenger(poutine.replay(typed.model, trace=known)), batch)
        jacobian = sum(map(self._total, placed.log_dets.values()), torch.zeros(()))
        sites = latents(model) | scored(model)
        local = {name: site for name, site in sites.items() if is_local(site)}
        joint = self._marginal(model, known, local)
        if not guide:
            return self._whole(joint + jacobian, z), self._whole(jacobian * 0, z)
        with plate, Given(placed.values):
            proposal = trace_guide(self.pair, batch, Enumerate(first_available_dim=first))
        log_q = self._marginal(model, proposal, latents(proposal), of_guide=True)
        return self._whole(joint + jacobian, z), self._whole(log_q + jacobian, z)

    def _marginal(
        self, model: Trace, guide: Trace, sites: Mapping[str, Site], of_guide: bool = False
    ) -> Tensor:
        if enumeration.enumerated(model) or enumeration.enumerated(guide):
            return (summing.proposal if of_guide else summing.joint)(model, guide)
        terms = (self._total(_scored(site, of_guide)) for site in sites.values())
        return sum(terms, torch.zeros(()))

    def _total(self, term: Tensor) -> Tensor:
        return by_datum(term, particles=self.vectorized)

    @staticmethod
    def _whole(density: Tensor, z: Tensor) -> Tensor:
        return density.expand(z.shape[:-1])

    def _drawn(self, number: int, batch: Batch, run: Callable[[], Trace]) -> Tensor:
        found = []
        for size in (number,) if self.vectorized else (1,) * number:
            with self._plate(size):
                drawn = latents(run())
            values = {name: drawn[name]["value"] for name in self.places}
            found.append(self._read(values, batch, size))
        return torch.cat(found)

    def _read(self, values: Mapping[str, Tensor], batch: Batch, size: int | None) -> Tensor:
        """The vectors (particles, n, D) of values of the sites, in a plate of this size or none."""
        read = _Read({name: values[name] for name in self.places})
        with nullcontext() if size is None else self._plate(size), read:
            trace(cast(Pair, self.pair).model, batch)
        parts = [
            self._by_datum(read.free[name], place._replace(event_dim=len(place.event)))
            for name, place in self.places.items()
        ]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def _blocks(self, z: Tensor) -> tuple[Tensor, ...]:
        """The particles that a pair takes at once."""
        return (z,) if self.vectorized else z.split(1)

    def _plate(self, size: int) -> Any:
        if not self.vectorized:
            return nullcontext()
        return pyro.plate("particles", size, dim=-1 - self.nesting)

    def _sites(self, z: Tensor) -> dict[str, Tensor]:
        """The unconstrained value of each site, laid out as the pair has it."""
        lead = (len(z),) if self.vectorized else ()
        found = {}
        for name, place in self.places.items():
            part = z[..., place.start : place.start + place.width]
            part = part.reshape(*z.shape[:2], *place.inner, *place.event)
            part = part.movedim(1, 1 + len(place.inner))
            ones = (1,) * (self.nesting - 1 - len(place.inner)) if self.vectorized else ()
            found[name] = part.reshape(*lead, *ones, *part.shape[1:])
        return found

    def _by_datum(self, value: Tensor, place: Slot) -> Tensor:
        """A value as the pair has it as (particles, n, *plates within, *event)."""
        right = len(place.inner) + 1 + place.event_dim
        value = value.reshape(-1, *value.shape[value.dim() - right :])
        return value.movedim(1 + len(place.inner), 1)


class _Placed(Messenger):
    """Latents take the values that these unconstrained ones stand for."""

    def __init__(self, free: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.free = free
        self.values: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}

    def gives(self, name: str, support: Any) -> Tensor | None:
        """The value that a site is given, if any."""
        free = self.free.get(name)
        return None if free is None else _to_support(name, None, support)(free)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.free:
            free, transform = self.free[msg["name"]], _to_support(msg["name"], msg["fn"])
            value = transform(free)
            if value.dim() - msg["fn"].event_dim > free.dim() - _free_dim(msg["fn"], transform):
                raise UsageError(
                    f"the support of site '{msg['name']}' depends on an enumerated one"
                )
            self.values[msg["name"]] = msg["value"] = value
            msg["done"] = True
            self.log_dets[msg["name"]] = _log_det(msg, transform, free)


class _Read(Given):
    """Latents are given values, and what these are without their constraints is noted."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.free: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values:
            self.free[msg["name"]] = _to_support(msg["name"], msg["fn"]).inv(msg["value"])


def _to_support(name: str, fn: Any, support: Any = None) -> Any:
    """The map from the real numbers to the support of a distribution."""
    support = support or fn.support
    try:
        return biject_to(support)
    except NotImplementedError:
        # That of a mixture is the one of its components.
        if isinstance(getattr(support, "base_constraint", None), constraints.Constraint):
            return _to_support(name, fn, support.base_constraint)
        raise UsageError(
            f"site '{name}' ({type(fn).__name__}) has a support ({support}) that is not mapped to "
            "real numbers"
        ) from None


def _log_det(site: Site, transform: Any, free: Tensor) -> Tensor:
    """The logarithm of the Jacobian of a site, of its batch shape, without what a mask hides."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    log_det = transform.log_abs_det_jacobian(free, site["value"])
    counts, events = masks.scored(site), transform.codomain.event_dim
    counts = counts.flatten(-events).all(-1) if events else counts
    own = site["value"].dim() - site["fn"].event_dim
    return sum_rightmost(scale_and_mask(log_det, mask=counts), log_det.dim() - own)


def _free_dim(fn: Any, transform: Any) -> int:
    """The event's dimensions without its constraint."""
    return fn.event_dim - transform.codomain.event_dim + transform.domain.event_dim


def _scored(site: Site, of_guide: bool) -> Tensor:
    try:
        return log_prob(site)
    except (NotImplementedError, KeyError) as error:
        raise UsageError(
            f"the density of site '{site['name']}' of the {'guide' if of_guide else 'model'} "
            f"cannot be evaluated at a value that is given: {first_line(error)}"
        ) from error


def _moving(model: Trace, guide: Trace) -> list[str]:
    """The latents that are not summed out; `UsageError` for those that have no such vector."""
    ours, theirs = latents(model), latents(guide)
    marked = enumeration.to_enumerate(model, guide)
    for name, site in (ours | theirs).items():
        if not is_local(site):
            raise UsageError(
                f"site '{name}' is outside the data plate: it is no latent of one datum"
            )
        if name in theirs and is_delta(theirs[name]["fn"]):
            raise UsageError(
                f"the guide of site '{name}' is a Delta, whose density is known at its draws alone"
            )
        if name not in marked and (site["fn"].support.is_discrete or name not in theirs):
            raise UsageError(
                f"site '{name}' is discrete and not summed out (enumerated)"
                if site["fn"].support.is_discrete
                else f"site '{name}' is none of the guide"
            )
    names = [name for name in ours if name not in marked]
    if not names:
        raise UsageError("every latent is summed out (enumerated): log p(x) is exact as it is")
    return names


def _slots(pair: nn.Module, batch: Batch, sites: Mapping[str, Site]) -> dict[str, Slot]:
    read = _Read({name: site["value"] for name, site in sites.items()})
    with read:
        model = trace(cast(Pair, pair).model, batch)
    places: dict[str, Slot] = {}
    start = 0
    for name in sites:
        free, fn = read.free[name], latents(model)[name]["fn"]
        split = free.dim() - _free_dim(fn, _to_support(name, fn))
        inner, event = tuple(free.shape[: split - 1]), tuple(free.shape[split:])
        places[name] = Slot(start, inner, event, fn.event_dim)
        start += places[name].width
    return places
