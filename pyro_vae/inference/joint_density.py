"""log p(x, z, w) of a whole data set as a function of all its latents, as one vector.

Local latents z of all rows, group latents and global latents w move together. The vector holds the
used coordinates of each site, mapped from its support to the real numbers; the density includes the
Jacobian. Enumerated latents are summed out.
"""

from collections.abc import Callable, Mapping
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import Enumerate
from pyro_vae.errors import UsageError
from pyro_vae.inference.joint import PROBES, Placed, Read, angles
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first, latents, log_prob, scored
from pyro_vae.pairs.traces import trace
from pyro_vae.training.tracing import Named, traced


class Whole:
    r"""log p(x, z, w) of a batch and its gradient, at vectors of all latents of shape (D,).

    :math:`\log p(w) + \sum_i \log p(x_i, z_i \mid w) + \log |\det f'|`, where f maps the real
    numbers to the supports. The global and group latents come first in the vector.

    Arguments:
        pair: any pair whose latents are continuous or enumerated.
        batch: all rows.

    ``gradient`` runs eagerly until you call `use`. Call every method within
    `pyro_vae.pairs.scope.using`. Raises `UsageError` for other latents.
    """

    def __init__(self, pair: nn.Module, batch: Batch) -> None:
        self.pair, self.batch = pair, batch
        with using(pair, 0):
            guide = trace_guide(pair, batch)
            model = trace_model(pair, batch, guide)
            names = _moving(model, guide)
            self.sites = {name: latents(model)[name] for name in names}
            self.shared = [name for name in names if not is_local(self.sites[name])]
            self.local = [name for name in names if name not in self.shared]
            self.angles = angles(self.sites)
            self.nesting = enumeration.nesting_of(model, guide)
            self.enumerates = bool(enumeration.to_enumerate(guide))
            free = self._free({name: latents(guide)[name]["value"] for name in names})
            self.shapes = {name: free[name].shape for name in (*self.shared, *self.local)}
        self.dim = sum(shape.numel() for shape in self.shapes.values())
        self.shared_dim = sum(self.shapes[name].numel() for name in self.shared)
        self.gradient: Callable[..., Named] = self._gradient

    def use(self, engine: str) -> None:
        """Compute gradients with this engine: "eager", "traced" or "compiled"."""
        self.gradient = traced(self.pair, self._gradient, engine, "evaluated")

    def draw_prior(self) -> Tensor:
        """Draw all latents from their prior; returns shape (D,)."""
        drawn = latents(trace(cast(Pair, self.pair).model, self.batch))
        for name in self.shapes:
            if name not in drawn:
                raise UsageError(
                    f"the model does not draw latent site '{name}' in every run, so NUTS has no "
                    "fixed set of latents to move: draw it always, and use it where you need it"
                )
        return self._vector(self._free({name: drawn[name]["value"] for name in self.shapes}))

    def counts(self) -> Tensor:
        """Return which coordinates have an effect on the density (D,); not those of padding."""
        found = torch.zeros(self.dim, dtype=torch.bool)
        for _ in range(PROBES):
            z = self.draw_prior()
            found |= self._gradient(z + torch.randn_like(z), *self.batch)["gradient"].cpu() != 0
        return found

    def constrained(self, z: Tensor) -> dict[str, Tensor]:
        """Return the value of each site at z; those of local sites have the data first."""
        placed = Placed(self._split(z))
        with placed:
            trace(cast(Pair, self.pair).model, self.batch)
        return {
            name: data_first(value, self.sites[name]) if name in self.local else value
            for name, value in placed.values.items()
        }

    def log_joint(self, z: Tensor, *batch: Tensor) -> Tensor:
        """Return log p(x, z, w) as a number."""
        free, first = self._split(z), -1 - self.nesting
        with pyro.validation_enabled(False):  # a trajectory may overflow
            known = Trace()
            if self.enumerates:
                with Placed(free):
                    known = trace_guide(self.pair, batch, Enumerate(first_available_dim=first))
            placed = Placed(free)
            handler = Enumerate(first_available_dim=None if self.enumerates else first)
            with placed:
                program = poutine.replay(cast(Pair, self.pair).model, trace=known)
                model = trace(handler(program), batch)
        sites = latents(model) | scored(model)
        terms = [log_prob(site).sum() for site in sites.values() if not is_local(site)]
        if enumeration.enumerated(model):
            terms.append(summing.joint(model, known).sum())
        else:
            terms += [log_prob(site).sum() for site in sites.values() if is_local(site)]
        return torch.stack([*terms, *(term.sum() for term in placed.log_dets.values())]).sum()

    def _gradient(self, z: Tensor, *batch: Tensor) -> Named:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            joint = self.log_joint(z, *batch)
            (gradient,) = torch.autograd.grad(joint, z)
        return {"joint": joint.detach(), "gradient": gradient}

    def _free(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = Read(dict(values))
        with read:
            trace(cast(Pair, self.pair).model, self.batch)
        return read.free

    def _vector(self, free: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([free[name].flatten() for name in self.shapes])

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        parts = z.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.reshape(shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }


def _moving(model: Trace, guide: Trace) -> list[str]:
    """Return the latents that are not summed out; raise `UsageError` for unsupported latents."""
    enumeration.require_placed(guide, model)
    marked = enumeration.to_enumerate(model, guide)
    for name in marked:
        if not is_local((latents(guide) | latents(model))[name]):
            raise UsageError(
                f"latent site '{name}' is discrete and shared by all data, so NUTS can neither "
                "move it nor sum it out"
            )
    names = [name for name in latents(model) if name not in marked]
    for name in names:
        if latents(model)[name]["fn"].support.is_discrete:
            raise UsageError(f"latent site '{name}' is discrete, so it must be enumerated")
        if name not in latents(guide):
            raise UsageError(f"latent site '{name}' is not a site of the guide")
    return names
