"""What the page shows: everything that is computed from the pair and its held-out data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.evaluation import evaluate
from pyro_vae.errors import UsageError, first_line
from pyro_vae.explore.levels import Level, levels
from pyro_vae.inference.encoding import encode_parts
from pyro_vae.inference.generation import reconstruct, require_inside, supports_of
from pyro_vae.inference.importance import LogLikelihood, log_likelihood
from pyro_vae.inference.passes import generate, prepared_batches
from pyro_vae.inference.refinement import refine
from pyro_vae.pairs.given_globals import pools
from pyro_vae.pairs.scope import using
from pyro_vae.plots.canvas import alike


class HeldOut(NamedTuple):
    """HeldOut-out data, and what is known about them."""

    x: Tensor
    context: Sequence[Tensor] = ()
    ids: Sequence[Any] | None = None
    """The id of each row; its number by default."""
    labels: Sequence[str] | None = None
    """The label of each row in words."""
    sizes: Tensor | None = None
    """The number of members of each row, if a row is a group of members, (n,)."""
    binarize: str = "dynamic"


class Change(NamedTuple):
    """What the refinement of the posterior of one datum changes."""

    before: LogLikelihood
    after: LogLikelihood
    means: tuple[dict[str, Tensor], dict[str, Tensor]]
    """The posterior means of each local latent before and after, (1, *event_shape)."""
    scales: tuple[dict[str, Tensor], dict[str, Tensor]]
    reconstructions: tuple[Tensor, Tensor]
    """The reconstructions of the datum before and after, of the shape of the datum."""


@dataclass(frozen=True)
class View:
    """A pair with held-out data, its codes, and its reconstructions.

    Values of single data are computed when the page asks for them.
    """

    pair: nn.Module
    held: HeldOut
    levels: list[Level]
    means: dict[str, Tensor]
    """The posterior means of each local latent, (n, *event_shape)."""
    shared: dict[str, tuple[Tensor, Tensor | None]]
    """The means and scales of global and group latents, by site."""
    reconstructions: Tensor
    likelihood: LogLikelihood | None
    notes: list[str] = field(default_factory=list)
    """What could not be computed, and why."""

    @property
    def ids(self) -> list[str]:
        """The id of each row, in words."""
        given = self.held.ids
        return [str(one) for one in (range(len(self.held.x)) if given is None else given)]

    def moved(
        self, row: int, site: str, units: Mapping[int, float], hold: bool = True, seed: int = 0
    ) -> Tensor:
        """The mean of the data given the code of a datum, with some units of a latent changed.

        Arguments:
            units: the new value of each unit of the flattened code.
            hold: keep the other local latents at the code of the datum; otherwise the model draws
                them given this latent.

        Raises `UsageError` for a value outside the support of the latent.
        """
        x, context = self._one(row)
        with using(self.pair, seed):
            (batch,) = prepared_batches(self.pair, x, context, self.held.binarize, at_once=True)
            code = self._code(row, site, units)
            require_inside(site, supports_of(self.pair, batch).get(site), code)
            held = self.means if hold else {}
            given = {name: mean[row : row + 1] for name, mean in held.items()} | {site: code}
            given |= {name: mean for name, (mean, _) in self.shared.items()}
            made = generate(self.pair, batch, given, True, None)
        return alike(made, x)[0].cpu()

    def _code(self, row: int, site: str, units: Mapping[int, float]) -> Tensor:
        """The code of a datum (1, *event_shape) with some units changed."""
        code = self.means[site][row : row + 1].clone()
        flat = code.view(-1)
        for unit, value in units.items():
            flat[unit] = value
        return code

    def refined(self, row: int, num_samples: int = 500, steps: int = 300, seed: int = 0) -> Change:
        """Refine the posterior of one datum (see `pyro_vae.refine`), and return what changes."""
        x, context = self._one(row)
        self._require_alone()
        found = refine(
            self.pair,
            x,
            *context,
            steps=steps,
            num_samples=num_samples,
            binarize=self.held.binarize,
            seed=seed,
            engine="eager",  # a click does not wait for a compilation
            progress=False,
        )
        both = [(self.pair, found.batch[:-1]), (found.pair, found.batch)]
        coded = {
            what: tuple(
                encode_parts(pair, batch[0], batch[1:], what, self.held.binarize)[0]
                for pair, batch in both
            )
            for what in ("mean", "scale")
        }
        made = [
            alike(reconstruct(pair, *batch, binarize=self.held.binarize), x)[0].cpu()
            for pair, batch in both
        ]
        return Change(
            found.before,
            found.after,
            (coded["mean"][0], coded["mean"][1]),
            (coded["scale"][0], coded["scale"][1]),
            (made[0], made[1]),
        )

    def _require_alone(self) -> None:
        """Raise `UsageError` if the guide of one datum depends on the others."""
        few = [one[:4] for one in (self.held.x, *self.held.context)]
        (batch,) = prepared_batches(self.pair, few[0], few[1:], self.held.binarize, at_once=True)
        with using(self.pair, 0):
            if pools(self.pair, batch):
                raise UsageError(
                    "the guide infers a global latent from all data together, so the posterior of "
                    "one datum cannot be refined by itself; pyro_vae.refine takes all data"
                )

    def _one(self, row: int) -> tuple[Tensor, list[Tensor]]:
        part = slice(row, row + 1)
        return self.held.x[part], [one[part] for one in self.held.context]


def view(pair: nn.Module, held: HeldOut, num_samples: int = 200, progress: bool = False) -> View:
    """Encode, reconstruct and score the data.

    Raises `UsageError` for no data, and for a pair without local latents.
    """
    if not len(held.x):
        raise UsageError("the data have no row to show")
    notes: list[str] = []
    means, shared_means = encode_parts(pair, held.x, held.context, "mean", held.binarize)
    scales, shared_scales = encode_parts(pair, held.x, held.context, "scale", held.binarize)
    if not means:
        raise UsageError(f"{type(pair).__name__} has no local latent, so it has no plane to show")
    made = alike(reconstruct(pair, held.x, *held.context, binarize=held.binarize), held.x)
    members = None if held.sizes is None else held.x.shape[1]
    return View(
        pair,
        held,
        levels(means, scales, _kl(pair, held, notes), held.sizes, members),
        means,
        {name: (mean, shared_scales.get(name)) for name, mean in shared_means.items()},
        made.cpu(),
        _scored(pair, held, num_samples, progress, notes),
        notes,
    )


def _kl(pair: nn.Module, held: HeldOut, notes: list[str]) -> dict[str, list[float]]:
    """The KL of each unit by site; none if the pair does not define it."""
    try:
        found = evaluate(pair, held.x, *held.context, num_samples=1, binarize=held.binarize)
    except UsageError as error:
        notes.append(f"The units are in the order of their variance: {first_line(error)}.")
        return {}
    return found.kl_by_unit


def _scored(
    pair: nn.Module, held: HeldOut, num_samples: int, progress: bool, notes: list[str]
) -> LogLikelihood | None:
    """log p(x) and Pareto k of each datum; None with a note if the pair does not define them."""
    try:
        found = log_likelihood(
            pair,
            held.x,
            *held.context,
            num_samples=num_samples,
            binarize=held.binarize,
            progress=progress,
        )
    except UsageError as error:
        notes.append(f"log p(x) and Pareto k are not shown: {first_line(error)}.")
        return None
    if torch.isnan(found.pareto_k).all():
        notes.append(f"Pareto k is not shown: {num_samples} importance samples have no tail.")
    return found
