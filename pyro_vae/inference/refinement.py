"""`refine`: an approximate posterior for each datum alone, within the guide's family."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vae.data.preparation import held_rows, joined
from pyro_vae.data.sources import Arrays, Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import LogLikelihood, all_log_weights, estimate
from pyro_vae.inference.pareto import LEAST
from pyro_vae.inference.passes import in_chunks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import evaluation_mode, registered, scope, using
from pyro_vae.pairs.sites import latents
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import trace
from pyro_vae.pairs.weights import structure
from pyro_vae.training.elbo import elbo
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.schedules import CosineSchedule

REFINED_ROWS = 1000
"""Number of data that are refined in one block."""

COMPARED_DRAWS = 500
"""The largest number of draws that compare the refined q of a datum with that of the guide."""

CLEAR = 3.0
"""A gain is clear if it is more than this many standard errors from 0."""


class Refinement(NamedTuple):
    """The results of `refine`, in nats per example."""

    before: LogLikelihood
    """ELBO and log p(x) of each datum under the amortized guide."""
    after: LogLikelihood
    """The same under the refined guide, with the same number of draws."""
    pair: "Refined"
    """The pair with the refined guide."""
    batch: Batch
    """The data to pass to other tools with this pair: x, the context and the row numbers."""

    @property
    def gain(self) -> Tensor:
        """The increase of each datum's ELBO, (n,): a lower bound on its amortization gap."""
        return self.after.elbo_per_datum - self.before.elbo_per_datum


class Location(NamedTuple):
    """The place of an offset: a latent site, a parameter of its distribution, and the dimension of
    that parameter, counted from the right, that belongs to the data."""

    site: str
    parameter: str
    dim: int


class Refined(nn.Module):
    r"""A pair whose guide adds a separate offset for each row to its parameters.

    If the guide draws a latent from a distribution with parameters :math:`\lambda`, row i uses
    :math:`t(t^{-1}(\lambda) + \delta_i)` instead, where :math:`t` maps real numbers to the
    constraint of the parameter. A Cholesky factor L of D units becomes :math:`L\,t(\delta_i)`, with
    the entries of :math:`\delta_i` below the diagonal times 2 / D. With :math:`\delta = 0` this is
    the guide itself. Dependence between latents stays: the offset is added after the guide has used
    the earlier latents.

    Arguments:
        pair: any pair.
        offsets: the offsets of all rows, by location.

    The batch of this pair is the batch of the original pair, followed by the row numbers, a tensor
    of integers. Raises `UsageError` for a batch without them. It has no ``template``: the offsets
    belong to the refined rows, so tools that simulate data, such as `calibration`, do not apply.
    """

    def __init__(self, pair: nn.Module, offsets: Mapping[Location, Tensor]) -> None:
        super().__init__()
        self.pair = pair
        self.places = list(offsets)
        self.offsets = nn.ParameterList(offsets.values())

    def model(self, *batch: Tensor) -> Any:
        return cast(Pair, self.pair).model(*batch[:-1])

    def guide(self, *batch: Tensor) -> Any:
        *given, rows = batch
        if not given or rows.dim() != 1 or rows.is_floating_point():
            raise UsageError(
                "the batch of a refined pair must end with the row numbers; pass *result.batch"
            )
        own = {
            place: offset.index_select(place.dim, rows)
            for place, offset in zip(self.places, self.offsets, strict=True)
        }
        with _Moved(own):
            return cast(Pair, self.pair).guide(*given)


@alone()
def refine(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    steps: int = 300,
    learning_rate: float = 0.05,
    num_particles: int = 8,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Refinement:
    r"""Optimize the variational parameters of each datum separately, with the model fixed.

    SVI maximizes :math:`\mathrm{ELBO}_i(\delta_i)` for all data at once, starting at the guide.
    :math:`\delta_i` is added to the unconstrained parameters of each latent's distribution (see
    `Refined`), so the family stays that of the guide. The parameters of a normal are mean and
    scale. A `FlowPosterior` also has a context. A transformed distribution has those of its base.

    The noise of the optimization can make a good q worse. So a datum keeps :math:`\delta_i = 0` if
    its ELBO does not rise, by draws that serve only this comparison. A gain or loss within three
    standard errors is decided by the typical datum: if the median gain of all data is over
    its standard error, the datum is refined, and otherwise it keeps the guide.

    Arguments:
        pair: any pair; its parameters and buffers do not change.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        steps: number of steps of Adam.
        learning_rate: the rate of the first step; it falls to 0 along a cosine.
        num_particles: draws for each datum at each step.
        num_samples: draws for each datum in the bounds before and after.
        binarize: as in `pyro_vae.evaluate`.
        seed: random seed.
        engine: as in `pyro_vae.fit`.
        progress: show a bar if the run takes over two seconds.

    Latents that are discrete or not local stay as the guide has them. Raises `UsageError` if no
    parameter can be refined, and if a gradient is not finite.
    Kim et al., Semi-amortized variational autoencoders, 2018 (https://arxiv.org/abs/1802.02550).

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4)
    >>> result = refine(vae, x, steps=5, num_samples=20, progress=False)
    >>> result.gain.shape, pv.encode(result.pair, *result.batch)["z"].shape
    (torch.Size([8]), torch.Size([8, 2]))
    """
    for name, value in (("steps", steps), ("num_particles", num_particles)):
        if value < 1:
            raise UsageError(f"must be at least 1, got {value}", argument=name)
    rows, prepare = held_rows(pair, x, context, binarize)
    batch = joined(rows, prepare)
    parts = list(in_chunks(batch, REFINED_ROWS))
    whole = (*batch, torch.arange(len(batch[0]), device=batch[0].device))
    require_refinable(pair, tuple(part[:2] for part in parts[0]))
    ready = replace(prepare, binarize=False, whole=True)
    before = estimate(pair, Arrays(batch), ready, num_samples, seed, engine, False)
    with frozen(pair), seeded(seed), bar(progress, steps * len(parts), "refine", 2) as shown:
        ascent = _Ascent(pair, parts[0], num_particles, steps, engine)
        found = [ascent(block, learning_rate, shown.update) for block in parts]
    moved = {place: torch.cat([own[place] for own in found], place.dim) for place in found[0]}
    draws = max(LEAST, min(steps * num_particles, COMPARED_DRAWS))  # at most the cost of the steps
    better = _better(*_gains(pair, Refined(pair, moved), whole, draws, seed + 2))
    refined = Refined(pair, {place: _kept(moved[place], place, better) for place in moved})
    after = estimate(refined, Arrays(whole), ready, num_samples, seed, engine, False)
    return Refinement(before, after, refined, whole)


def require_refinable(pair: nn.Module, few: Batch) -> None:
    """Raise `UsageError` before the bounds, which may take long."""
    with using(pair, 0):
        structure(pair, few)
        _locations(latents(trace(cast(Pair, pair).guide, few)))


def _gains(
    pair: nn.Module, refined: nn.Module, whole: Batch, num_samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the gain of each datum's ELBO and its standard error, (n,), from shared draws."""
    found = []
    for batch in in_chunks(whole, REFINED_ROWS):
        weights = []
        for one, rows in ((refined, batch), (pair, batch[:-1])):
            with using(one, seed), torch.no_grad():
                weights.append(all_log_weights(one, rows, num_samples))
        found.append(weights[0] - weights[1])
    change = torch.cat(found, 1)
    return change.mean(0), (change.std(0) / num_samples**0.5).nan_to_num(0.0)


def _better(gain: Tensor, error: Tensor) -> Tensor:
    """Return which data to refine, (n,): those that gain clearly; and if the typical one does, all
    that do not lose clearly. A gain that is not a number is not better."""
    error_of_median = 1.25 * error.median() / len(gain) ** 0.5
    # The noise of the optimization lowers the ELBO of a good q, so one error above 0 is enough.
    typical = gain.median() > error_of_median
    return (gain > CLEAR * error) | (typical & (gain > -CLEAR * error))


def _kept(offset: Tensor, place: Location, better: Tensor) -> Tensor:
    """Return the offsets of these data, and 0 for the others."""
    return torch.where(better.to(offset.device).reshape(-1, *[1] * (-place.dim - 1)), offset, 0.0)


class _Ascent:
    """Stochastic variational inference over the offsets of one block of rows at a time."""

    def __init__(
        self, pair: nn.Module, first: Batch, num_particles: int, steps: int, engine: str
    ) -> None:
        with using(pair):
            _, vectorized, _ = structure(pair, first)
            self.pair = Refined(pair, _locations(latents(trace(cast(Pair, pair).guide, first))))
        n = len(first[0])
        named = (*first, torch.arange(n, device=first[0].device))
        objective = elbo(self.pair, named, num_particles, vectorized)
        self.engine = Engine(self.pair, objective, engine, batch_size=n, steps=steps, declare=False)
        self.model, self.steps = registered(self.pair, self.pair.model), steps

    def __call__(
        self, block: Batch, learning_rate: float, done: Callable[[], Any]
    ) -> dict[Location, Tensor]:
        pair, n, rate = self.pair, len(block[0]), CosineSchedule(self.steps)
        for offset in pair.offsets:
            nn.init.zeros_(offset)
        named = dict(pair.offsets.named_parameters())
        optimizer = Optimizer(torch.optim.Adam, named, learning_rate)
        svi = Step(self.model, pair.guide, optimizer, self.engine)
        batch = (*block, torch.arange(n, device=block[0].device))
        with evaluation_mode(pair), scope(pair):
            for step in range(self.steps):
                optimizer.learning_rate = learning_rate * rate(step)
                try:
                    svi.step(*batch)
                except FloatingPointError as error:
                    hint = "try a smaller `learning_rate`"
                    raise UsageError(
                        f"the gradient is not finite at step {step + 1} of the refinement: "
                        + (hint if step else "the guide's ELBO of some datum has no gradient")
                    ) from error
                done()
        own = zip(pair.places, pair.offsets, strict=True)
        return {place: offset.detach().narrow(place.dim, 0, n).clone() for place, offset in own}


class _Moved(Messenger):
    """Draws latents from their distributions with offsets added to the parameters."""

    def __init__(self, offsets: Mapping[Location, Tensor]) -> None:
        super().__init__()
        self.offsets: dict[str, dict[str, Tensor]] = {}
        for place, offset in offsets.items():
            self.offsets.setdefault(place.site, {})[place.parameter] = offset

    def _pyro_sample(self, msg: Any) -> None:
        own = self.offsets.get(msg["name"])
        if own is not None:
            msg["fn"] = _changed(
                msg["fn"],
                lambda name, value, constraint: (
                    _moved(value, own[name], constraint) if name in own else value
                ),
            )


def _moved(value: Tensor, offset: Tensor, constraint: Any) -> Tensor:
    to_constrained = transform_to(constraint)
    if constraint is not constraints.lower_cholesky:
        return to_constrained(to_constrained.inv(value) + offset)
    # Each step moves all D (D - 1) / 2 entries below the diagonal. So their noise would grow with
    # D and hide the gain. With smaller steps it is that of two units.
    smaller = offset.tril(-1) * min(1.0, 2 / value.shape[-1])
    return value @ to_constrained(smaller + offset.diagonal(dim1=-2, dim2=-1).diag_embed())


def _changed(fn: Any, change: Callable[[str, Tensor, Any], Tensor]) -> Any:
    """Rebuild a distribution with changed parameters; a derived one with a changed base."""
    if hasattr(fn, "base_dist"):
        around = copy.copy(fn)
        around.base_dist = _changed(fn.base_dist, change)
        return around
    takes = inspect.signature(type(fn).__init__).parameters
    said = {name for one, others in _SAME.items() if one in takes for name in others}
    arguments = {
        name: getattr(fn, name) for name in takes if name not in said and hasattr(fn, name)
    }
    for name, constraint in fn.arg_constraints.items():
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = change(name, arguments[name], constraint)
    if "validate_args" in takes:
        arguments["validate_args"] = False
    return type(fn)(**arguments)


_SAME = {"scale_tril": ("covariance_matrix", "precision_matrix"), "logits": ("probs",)}
"""Parameters with equivalents. A distribution is rebuilt from the first one."""


def _locations(sites: Mapping[str, Site]) -> dict[Location, Tensor]:
    """Return offsets of 0 for all parameters that `refine` can change."""
    offsets: dict[Location, Tensor] = {}
    for name, site in sites.items():
        fn = site["fn"]
        if is_local(site) and fn.has_rsample and not isinstance(fn, dist.Delta):
            offsets |= _zeros(name, fn.expand(fn.batch_shape), site["value"])
    if not offsets:
        raise UsageError(
            "the guide has no latent whose parameters can be refined; refine needs a local latent "
            "that is reparametrized"
        )
    return offsets


def _zeros(site: str, fn: Any, value: Tensor) -> dict[Location, Tensor]:
    offsets: dict[Location, Tensor] = {}

    def note(parameter: str, held: Tensor, constraint: Any) -> Tensor:
        with suppress(NotImplementedError):  # for example, bounds that depend on each other
            free = transform_to(constraint).inv(held)
            dim = len(fn.batch_shape) - free.dim() - 1
            # Pyro would copy a parameter that is not contiguous, and train the copy.
            contiguous = torch.contiguous_format
            offsets[Location(site, parameter, dim)] = torch.zeros_like(
                free, memory_format=contiguous
            )
        return held

    if not torch.allclose(_changed(fn, note).log_prob(value), fn.log_prob(value), 1e-3, 1e-3):
        raise UsageError(
            f"the distribution of site '{site}' ({type(fn).__name__}) cannot be rebuilt from its "
            "parameters"
        )
    return offsets


@contextmanager
def frozen(pair: nn.Module) -> Iterator[None]:
    """Turn off gradients of all parameters of the pair, and restore them afterwards."""
    trained = [parameter for parameter in pair.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
