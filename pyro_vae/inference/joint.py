"""log p(x, z) and log q(z|x) of any pair as functions of one vector of real numbers per datum.

Annealing and NUTS move through the space of latents. They do not see sites, supports or plates,
but a vector z of D real numbers for each datum and each particle. The vector contains every latent
site of the model, mapped from its support to the real numbers; the densities include the Jacobian.
Enumerated latents are summed out and are not part of the vector.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
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
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.folds import is_delta
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import is_discrete, support_of
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import by_datum, latents, log_prob, scored
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import structure
from pyro_vae.training.tracing import Named, traced

PROBES = 3
"""Number of draws. A coordinate counts as unused if its gradient is 0 at all of them."""

CIRCULAR = (torch.distributions.VonMises, dist.SineBivariateVonMises)
"""Distributions of angles."""


class Slot(NamedTuple):
    """The position of a site in the vector, and the layout of its numbers.

    ``inner`` contains the sizes of the plates within a datum. ``event`` is the shape of one
    unconstrained value. ``event_dim`` is the number of event dimensions of a value on its support.
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

    :math:`\log p(x, z) = \log \sum_e p(x, f(z), e) + \log |\det f'(z)|`, where f maps the real
    numbers to the supports of the model's latents and e are the enumerated latents. log q(z|x) is
    defined in the same way for the guide. Densities are in nats per datum.

    Arguments:
        pair: any pair.
        batch: two rows, which serve to find the latents.

    ``gradients`` and ``joint_gradient`` run eagerly until you call `use`. Every method takes the
    tensors of one batch; call it within `pyro_vae.pairs.scope.using`. Raises `UsageError` for
    latents that are not local, for discrete latents that are not enumerated, and for latents whose
    guide knows its density only at its own draws; the error names the site.
    """

    def __init__(self, pair: nn.Module, batch: Batch) -> None:
        self.pair = pair
        with using(pair, 0):
            guide = trace_guide(pair, batch)
            model = trace_model(pair, batch, guide)
            names = _moving(model, guide)
            self.nesting, self.vectorized, self.widest = structure(pair, batch)
            self.places = _slots(pair, batch, {name: latents(guide)[name] for name in names})
            self.angles = angles(latents(model))
        self.enumerates = len(names) < len(latents(guide))
        self.dim = sum(place.width for place in self.places.values())
        self.gradients: Callable[..., Named] = self._gradients
        self.joint_gradient: Callable[..., Named] = self._joint_gradient

    def use(self, engine: str) -> None:
        """Compute gradients with this engine: "eager", "traced" or "compiled"."""
        self.gradients = traced(self.pair, self._gradients, engine, "evaluated")
        self.joint_gradient = traced(self.pair, self._joint_gradient, engine, "evaluated")

    def draw(self, number: int, *batch: Tensor) -> Tensor:
        """Draw from the guide; returns shape (number, n, D)."""
        return self._drawn(number, batch, lambda: trace_guide(self.pair, batch))

    def draw_prior(self, number: int, *batch: Tensor) -> Tensor:
        """Draw the model's latents from their prior; returns shape (number, n, D)."""
        return self._drawn(number, batch, lambda: trace(cast(Pair, self.pair).model, batch))

    def unconstrained(self, values: Mapping[str, Tensor], *batch: Tensor) -> Tensor:
        """Map values of the sites, as the model draws them, to vectors of shape (1, n, D)."""
        return self._read(values, batch, None)

    def constrained(self, z: Tensor, *batch: Tensor) -> dict[str, Tensor]:
        """Return values of the sites at z, each of shape (particles, n, *inner plates, *event)."""
        blocks = []
        for block in self._blocks(z):
            placed = Placed(self._sites(block))
            with self._plate(len(block)), placed:
                trace(cast(Pair, self.pair).model, batch)
            blocks.append(placed.values)
        return {
            name: torch.cat([self._by_datum(block[name], place) for block in blocks])
            for name, place in self.places.items()
        }

    def log_joint(self, z: Tensor, *batch: Tensor) -> Tensor:
        """Return log p(x, z), of shape (particles, n)."""
        return self._densities(z, batch, guide=False)[0]

    def log_guide(self, z: Tensor, *batch: Tensor) -> Tensor:
        """Return log q(z|x), of shape (particles, n)."""
        return self._densities(z, batch)[1]

    def counts(self, *batch: Tensor) -> Tensor:
        """Return whether p(x, z) depends on each coordinate, (n, D); false for padding."""
        z = self.draw(PROBES, *batch)
        gradient = self._joint_gradient(z + torch.randn_like(z), *batch)["joint gradient"]
        return (gradient != 0).any(0)

    def _gradients(self, z: Tensor, *batch: Tensor) -> Named:
        """Return both densities (particles, n) and their gradients (particles, n, D)."""
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
        """Return log p(x, z) and log q(z|x); log q is 0 if ``guide`` is false."""
        with pyro.validation_enabled(False):  # a trajectory may overflow
            found = [self._block(block, batch, guide) for block in self._blocks(z)]
        joint, proposal = (torch.cat(column) for column in zip(*found, strict=True))
        return joint, proposal

    def _block(self, z: Tensor, batch: Batch, guide: bool) -> tuple[Tensor, Tensor]:
        typed, plate = cast(Pair, self.pair), self._plate(len(z))
        placed, first = Placed(self._sites(z)), -1 - self.nesting - self.vectorized
        known = Trace()
        if self.enumerates:  # the model takes its values from the guide
            with plate, Placed(self._sites(z)):
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
        """Map values of the sites to vectors (particles, n, D), in a plate of this size if any."""
        read = Read({name: values[name] for name in self.places})
        with nullcontext() if size is None else self._plate(size), read:
            trace(cast(Pair, self.pair).model, batch)
        parts = [
            self._by_datum(read.free[name], place._replace(event_dim=len(place.event)))
            for name, place in self.places.items()
        ]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def _blocks(self, z: Tensor) -> tuple[Tensor, ...]:
        """Split z into the particles that fit into one pass."""
        return (z,) if self.vectorized else z.split(1)

    def _plate(self, size: int) -> Any:
        if not self.vectorized:
            return nullcontext()
        return pyro.plate("particles", size, dim=-1 - self.nesting)

    def _sites(self, z: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained value of each site, in the layout of the pair."""
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
        """Move a value from the layout of the pair to (particles, n, *inner plates, *event)."""
        right = len(place.inner) + 1 + place.event_dim
        value = value.reshape(-1, *value.shape[value.dim() - right :])
        return value.movedim(1 + len(place.inner), 1)


class Placed(Messenger):
    """Sets latents to the values of these unconstrained numbers."""

    def __init__(self, free: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.free = free
        self.values: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}

    def gives(self, name: str, support: Any) -> Tensor | None:
        """Return the value for a site, if this handler sets one."""
        free = self.free.get(name)
        return None if free is None else _to_support(name, None, support)(free)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.free:
            free, transform = self.free[msg["name"]], _to_support(msg["name"], msg["fn"])
            value = _on_circle(msg["fn"], transform(free))
            if value.dim() - msg["fn"].event_dim > free.dim() - _free_dim(msg["fn"], transform):
                raise UsageError(
                    f"the support of site '{msg['name']}' depends on an enumerated site; annealing "
                    "and NUTS need one support for all values"
                )
            self.values[msg["name"]] = msg["value"] = value
            msg["done"] = True
            self.log_dets[msg["name"]] = _log_det(msg, transform, free)


class Read(Given):
    """Sets latents to given values and records the unconstrained numbers for them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.free: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values:
            self.free[msg["name"]] = _to_support(msg["name"], msg["fn"]).inv(msg["value"])


def angles(sites: Mapping[str, Site]) -> frozenset[str]:
    """Return the sites whose values are angles."""
    return frozenset(name for name, site in sites.items() if _is_circular(site["fn"]))


def _is_circular(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, CIRCULAR)


def _on_circle(fn: Any, value: Tensor) -> Tensor:
    """Map angles to [-pi, pi); torch says that the support of a von Mises is the whole line."""
    return (value + torch.pi) % (2 * torch.pi) - torch.pi if _is_circular(fn) else value


def _to_support(name: str, fn: Any, support: Any = None) -> Any:
    """Return the map from the real numbers to the support of a distribution."""
    support = support or support_of(fn)
    try:
        return biject_to(support)
    except NotImplementedError:
        # The support of a mixture is the support of its components.
        if isinstance(getattr(support, "base_constraint", None), constraints.Constraint):
            return _to_support(name, fn, support.base_constraint)
        raise UsageError(
            f"site '{name}' ({type(fn).__name__}) has a support ({support}) that torch cannot map "
            "to real numbers"
        ) from None


def _log_det(site: Site, transform: Any, free: Tensor) -> Tensor:
    """Return the log Jacobian of a site, of its batch shape, without masked entries."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    log_det = transform.log_abs_det_jacobian(free, site["value"])
    counts, events = masks.scored(site), transform.codomain.event_dim
    counts = counts.flatten(-events).all(-1) if events else counts
    own = site["value"].dim() - site["fn"].event_dim
    return sum_rightmost(scale_and_mask(log_det, mask=counts), log_det.dim() - own)


def _free_dim(fn: Any, transform: Any) -> int:
    """Return the number of event dimensions of the unconstrained value."""
    return fn.event_dim - transform.codomain.event_dim + transform.domain.event_dim


def _scored(site: Site, of_guide: bool) -> Tensor:
    try:
        return log_prob(site)
    except (NotImplementedError, KeyError) as error:
        raise UsageError(
            f"the density of site '{site['name']}' of the {'guide' if of_guide else 'model'} "
            f"cannot be evaluated at a given value: {first_line(error)}"
        ) from error


def _moving(model: Trace, guide: Trace) -> list[str]:
    """Return the latents that are not summed out; raise `UsageError` for unsupported latents."""
    ours, theirs = latents(model), latents(guide)
    marked = enumeration.to_enumerate(model, guide)
    for name, site in (ours | theirs).items():
        if not is_local(site):
            raise UsageError(
                f"latent site '{name}' is not local, but this tool needs latents of one datum"
            )
        if name in theirs and is_delta(theirs[name]["fn"]):
            raise UsageError(
                f"the guide of site '{name}' is a Delta, whose density is known only at its draws"
            )
        if name not in marked and (is_discrete(site["fn"]) or name not in theirs):
            raise UsageError(
                f"latent site '{name}' is discrete, so it must be enumerated"
                if is_discrete(site["fn"])
                else f"latent site '{name}' is not a site of the guide"
            )
    names = [name for name in ours if name not in marked]
    if not names:
        raise UsageError(
            "all latents are summed out (enumerated), so log p(x) from log_likelihood is exact"
        )
    return names


def _slots(pair: nn.Module, batch: Batch, sites: Mapping[str, Site]) -> dict[str, Slot]:
    read = Read({name: site["value"] for name, site in sites.items()})
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
