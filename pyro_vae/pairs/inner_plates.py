"""Programs whose data plate is to the left of plates within the datum.

The tools read a data plate at dimension -1. `data_plate_at` turns the plates to its right into
event dimensions of each site, and moves the data plate there. Values keep their shapes, so the
program does not change.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.compat import enumerate_dim, free_plate_dims, site_is_subsample
from pyro_vae.errors import UsageError

Program = TypeVar("Program", bound=Callable[..., Any])


def data_plate_at(dim: int) -> Callable[[Program], Program]:
    r"""Decorate a model or guide whose data plate is at ``dim``, with plates of the datum inside.

    For the tools, each site in the data plate has the dimensions to the right of this plate as
    event dimensions, and the data plate is at dimension -1. A site without inner plates has event
    dimensions of size 1. Masks become masks of single entries. The log density of each datum does
    not change, so loss and gradients are those of the program without the decorator.

    Arguments:
        dim: the dimension of the data plate, -2 or less.

    Decorate both model and guide. Raises `UsageError` for another ``dim``, and when the program
    runs: for a latent outside the data plate, for a site that is marked for enumeration, and for a
    scale that is not a number.

    >>> import pyro, pyro.distributions as dist, torch, pyro_vae as pv
    >>> class Visits(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.slope = torch.nn.Parameter(torch.tensor(0.5))
    ...     @data_plate_at(-2)
    ...     def model(self, x):
    ...         with pyro.plate("patients", len(x), dim=-2):
    ...             u = pyro.sample("u", dist.Normal(0.0, 1.0))
    ...             with pyro.plate("visits", x.shape[1], dim=-1):
    ...                 pyro.sample("x", dist.Normal(u, 1.0), obs=x)
    ...     @data_plate_at(-2)
    ...     def guide(self, x):
    ...         with pyro.plate("patients", len(x), dim=-2):
    ...             pyro.sample("u", dist.Normal(self.slope * x.mean(1, keepdim=True), 0.5))
    >>> pv.log_likelihood(Visits(), torch.ones(7, 3), num_samples=5).per_datum.shape
    torch.Size([7])
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or dim > -2:
        raise UsageError(f"must be -2 or less, got {dim}", argument="dim")

    def decorated(program: Program) -> Program:
        @wraps(program)
        def run(*args: Any, **kwargs: Any) -> Any:
            # The dimensions of the program's plates and of those around it mean different places.
            with free_plate_dims(), _Inner(dim):
                return program(*args, **kwargs)

        return cast(Program, run)

    return decorated


class _Inner(Messenger):
    """Turns the dimensions to the right of the data plate into event dimensions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.right = dim, -1 - dim

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if not any(f.vectorized and f.dim == self.dim for f in msg["cond_indep_stack"]):
            _require_no_latent(msg, self.dim)
            return
        _require_plain(msg)
        fn = msg["fn"]
        if isinstance(msg["mask"], Tensor):
            fn, msg["mask"] = fn.mask(msg["mask"]), None
        msg["fn"] = fn.to_event(self.right)
        msg["cond_indep_stack"] = tuple(
            f._replace(dim=f.dim + self.right) if f.vectorized else f
            for f in msg["cond_indep_stack"]
            if not f.vectorized or f.dim <= self.dim
        )


def _require_no_latent(msg: Any, dim: int) -> None:
    if not msg["is_observed"]:
        raise UsageError(
            f"latent site '{msg['name']}' is outside the data plate at dim={dim}, but "
            "`pyro_vae.data_plate_at` serves only latents of one datum: exchange the plates, so "
            "that the data plate is at dim=-1"
        )


def _require_plain(msg: Any) -> None:
    """Raise `UsageError` for a site whose mark or scale cannot become part of an event."""
    if msg["infer"].get("enumerate") or enumerate_dim(msg) is not None:
        raise UsageError(
            f"site '{msg['name']}' is marked for enumeration, which `pyro_vae.data_plate_at` does "
            "not support: exchange the plates, so that the data plate is at dim=-1"
        )
    if isinstance(msg["scale"], Tensor) and msg["scale"].dim():
        raise UsageError(
            f"site '{msg['name']}' has a scale of shape {tuple(msg['scale'].shape)}, which "
            "`pyro_vae.data_plate_at` does not support: use a number"
        )
