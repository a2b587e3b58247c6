"""Simulation-based calibration: does the guide equal the posterior, on the model's own data?"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, product
from typing import Any, NamedTuple, TypeAlias, cast

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import Enumerate
from pyro_vae.diagnostics.ranks import INTERVALS as INTERVALS
from pyro_vae.diagnostics.ranks import Calibration as Calibration
from pyro_vae.diagnostics.ranks import ranked, ranks_of
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.pairs import enumeration, masks, summing
from pyro_vae.pairs.arrays import as_tensor, each_context
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import choose_rows, simulate
from pyro_vae.pairs.sites import latents, observed
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import log_density, structure

LEAST_SIMULATIONS, LEAST_DRAWS = 100, 19
"""With fewer simulations the band cannot reject. With fewer draws no interval has 95 %."""

JOINT, LIKELIHOOD = "log p(x, z)", "log p(x | z)"
"""The test quantities that are always ranked, in addition to the latents."""

Quantity: TypeAlias = Callable[[dict[str, Tensor], Tensor], Tensor]


@alone()
def calibration(
    pair: nn.Module,
    *context: Any,
    missing: Tensor | None = None,
    num_simulations: int = 2000,
    num_draws: int = 99,
    test_quantities: Mapping[str, Quantity] | None = None,
    level: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Test whether the guide equals the model's posterior, on data that the model itself draws.

    For :math:`(z, x) \sim p(z, x)` and :math:`z_1, \dots, z_L \sim q(z|x)`, the rank of
    :math:`f(z, x)` among :math:`f(z_l, x)` is uniform on 0, ..., L for every f if
    :math:`q(z|x) = p(z|x)`. The test ranks each unit of each latent, the log densities log p(x, z)
    and log p(x | z), and your own functions. The log densities detect correlations that q lacks,
    and a q that ignores x. The empirical distribution function of each quantity's ranks is compared
    with a band. Uniform ranks leave it at any point with probability level / quantities (Bonferroni
    correction over the quantities).

    Arguments:
        pair: any pair with ``template(n)``.
        context: the context tensors of a conditional pair; each simulation draws one of their rows.
        missing: booleans (n, *data_shape), such as ``x.isnan()`` of your data. Each simulation
            hides the entries of one of its rows, which is also the row of the context.
        num_simulations: number of simulated data, at least 100.
        num_draws: L for each simulated datum, at least 19.
        test_quantities: functions by name. Each takes the latents (a dictionary from sites to
            tensors (n, *event_shape)) and x (n, *data_shape), and returns a tensor of shape (n,).
        level: the largest probability that an exact guide is rejected.
        seed: random seed.
        progress: show a bar if the run takes over two seconds.

    Ties, such as those of discrete latents, are broken at random. Latents that only the model has
    are summed out of the densities and not ranked. Units are not ranked in simulations where they
    are masked.

    **The test does not cover real data.** If they differ from the model's own data, the encoder was
    trained on other data than the test uses. A guide that passes does not show that the model is
    good. With ``missing``, entries are missing independently of their values, given the context, so
    the guide is tested on holes of these shapes, and not on the reasons why entries are missing.
    Without it, simulated rows are complete, and ``left_out`` says so. Masks in the context apply.

    Raises `UsageError` for a pair without a template or with latents that are not local, for a
    model whose observations do not fit into the batch, and for ``missing`` with a pair that scores
    NaN as data.
    Talts et al., 2018 (https://arxiv.org/abs/1804.06788); Modrák et al., 2023
    (https://arxiv.org/abs/2211.02383); the bands: Säilynoja, Bürkner & Vehtari, 2022
    (https://arxiv.org/abs/2103.10522).

    >>> import pyro_vae as pv
    >>> found = calibration(pv.VAE.mlp((4,), latent_dim=1), num_simulations=200, num_draws=19)
    >>> found.names, found.ranks.shape
    (('z[0]', 'log p(x, z)', 'log p(x | z)'), torch.Size([200, 3]))
    """
    for name, value, least in (
        ("num_simulations", num_simulations, LEAST_SIMULATIONS),
        ("num_draws", num_draws, LEAST_DRAWS),
    ):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    if not 0 < level < 1:
        raise UsageError(f"must be between 0 and 1, got {level}", argument="level")
    quantities = dict(test_quantities or {})
    parts: list[Tensor] = []
    with using(pair, seed), bar(progress, num_simulations, "calibration", delay=2) as shown:
        simulated = _Simulated(pair, each_context(context), missing, num_draws, quantities)
        for start in range(0, num_simulations, simulated.rows):
            n = min(simulated.rows, num_simulations - start)
            parts.append(simulated.ranks(n))
            shown.update(n)
    ranks, left_out = torch.cat(parts), simulated.left_out
    counts = (ranks >= 0).sum(0).tolist()
    kept = [i for i, number in enumerate(counts) if number >= LEAST_SIMULATIONS]
    left_out |= {
        simulated.names[i]: f"it is masked in all{f' except {number}' * (number > 0)} simulations"
        for i, number in enumerate(counts)
        if i not in kept
    }
    names = tuple(simulated.names[i] for i in kept)
    return Calibration(names, ranks[:, kept], num_draws, level, left_out)


class _ScoredDraws(NamedTuple):
    """Latents by site, and log densities; the first dimension is that of draws, if any."""

    values: dict[str, Tensor]
    """Of shape (draws, n, *event), or (n, *event)."""
    joint: Tensor
    """log p(x, z), of shape (draws, n)."""
    likelihood: Tensor
    """log p(x | z), of shape (draws, n)."""


class _Simulated:
    """Data drawn from the model, and the ranks of their latents among draws of the guide."""

    def __init__(
        self,
        pair: nn.Module,
        context: Sequence[Any],
        missing: Tensor | None,
        num_draws: int,
        quantities: Mapping[str, Quantity],
    ) -> None:
        self.pair, self.num_draws, self.quantities = pair, num_draws, quantities
        self.context = [as_tensor(part, f"context {i}") for i, part in enumerate(context, 1)]
        self.missing = missing
        given = self.context if missing is None else [*self.context, missing]
        if len({len(part) for part in given}) > 1:
            lengths = ", ".join(str(len(part)) for part in given)
            what = "the context tensors" if missing is None else "the context and missing"
            raise UsageError(f"{what} have {lengths} rows; they must match")
        batch, truth = self._simulate(2)
        guide = latents(trace_guide(pair, batch))
        self.sites = ranked(guide, truth)
        self.left_out = dict.fromkeys(truth.keys() - guide.keys(), "the guide does not draw it")
        self.left_out |= dict.fromkeys(guide.keys() - truth.keys(), "the model does not have it")
        if missing is None and masks.takes_missing(pair, batch):
            self.left_out["rows with missing entries"] = "simulated rows are complete"
        self.nesting, self.vectorized, widest = structure(pair, batch)
        self.rows = max(1, CELLS // (widest * (num_draws if self.vectorized else 1)))
        self.event_dims = {name: guide[name]["fn"].event_dim for name in self.sites}
        units = (_units(name, self._rows_of(name, truth[name]).shape[1:]) for name in self.sites)
        self.names = (*chain.from_iterable(units), JOINT, LIKELIHOOD, *quantities)

    def ranks(self, n: int) -> Tensor:
        """Return the ranks of n simulated data, of shape (n, quantities)."""
        batch, found = self._simulate(n)
        truth = {name: found[name] for name in self.sites}
        hidden = self._hidden(batch, truth)
        one, drawn = self._scored(batch, truth, None), self._draw(batch, truth)
        pairs = [
            (
                self._rows_of(name, drawn.values[name], 1).reshape(self.num_draws, n, -1),
                self._rows_of(name, value).reshape(n, -1),
            )
            for name, value in truth.items()
        ]
        pairs += [
            (drawn.joint[..., None], one.joint.mT),
            (drawn.likelihood[..., None], one.likelihood.mT),
        ]
        pairs += [self._own(name, drawn, truth, batch[0]) for name in self.quantities]
        ranks = torch.cat([ranks_of(draws, value) for draws, value in pairs], 1)
        ranks[:, : hidden.shape[1]][hidden] = -1
        return ranks.cpu()

    def _hidden(self, batch: Batch, truth: dict[str, Tensor]) -> Tensor:
        """Return which units are masked, of shape (n, units)."""
        with Given(truth):
            sites = latents(trace(cast(Pair, self.pair).model, batch))
        hidden = {name: self._rows_of(name, ~masks.scored(sites[name])) for name in truth}
        return torch.cat([part.reshape(len(batch[0]), -1) for part in hidden.values()], 1)

    def _rows_of(self, name: str, value: Tensor, leading: int = 0) -> Tensor:
        """Return a value with the data first, after the leading dimensions of draws.

        Plates within a datum follow the data.
        """
        return value.movedim(-1 - self.event_dims[name], leading)

    def _simulate(self, n: int) -> tuple[Batch, dict[str, Tensor]]:
        context, missing = choose_rows(n, tuple(self.context), self.missing)
        return simulate(self.pair, n, context, missing)

    def _draw(self, batch: Batch, truth: dict[str, Tensor]) -> _ScoredDraws:
        """Draw from the guide: in one pass if the pair allows it, otherwise one draw at a time."""
        if self.vectorized:
            return self._guided(batch, truth, self.num_draws)
        draws = [self._guided(batch, truth, None) for _ in range(self.num_draws)]
        values = {name: torch.cat([draw.values[name] for draw in draws]) for name in truth}
        densities = zip(*[draw[1:] for draw in draws], strict=True)
        return _ScoredDraws(values, *(torch.cat(parts) for parts in densities))

    def _guided(self, batch: Batch, truth: dict[str, Tensor], number: int | None) -> _ScoredDraws:
        with self._plate(number):
            guide = latents(trace_guide(self.pair, batch))
        values = {name: guide[name]["value"] for name in truth}
        shaped = {name: value.reshape(-1, *truth[name].shape) for name, value in values.items()}
        return self._scored(batch, values, number)._replace(values=shaped)

    def _scored(self, batch: Batch, values: dict[str, Tensor], number: int | None) -> _ScoredDraws:
        """Return the densities of latents; latents that only the model has are summed out."""
        plates = self.nesting + (number is not None)
        with self._plate(number), Enumerate(first_available_dim=-1 - plates), Given(values):
            model = trace(cast(Pair, self.pair).model, batch)
        latent = model.copy()
        for name in observed(model):
            latent.remove_node(name)
        joint, prior = (_density(part, number is not None) for part in (model, latent))
        return _ScoredDraws(values, joint, joint - prior)

    def _plate(self, number: int | None) -> Any:
        if number is None:
            return nullcontext()
        return pyro.plate("draws", number, dim=-1 - self.nesting)

    def _own(
        self, name: str, drawn: _ScoredDraws, truth: dict[str, Tensor], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a user's test quantity for the draws (draws, n, 1) and the true values (n, 1)."""

        def value(z: dict[str, Tensor]) -> Tensor:
            rows = {site: self._rows_of(site, part) for site, part in z.items()}
            found = self.quantities[name](rows, x)
            if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise UsageError(
                    f"test quantity '{name}' must return a tensor of shape ({len(x)},), one number "
                    f"for each datum, got {got}"
                )
            return found[:, None]

        draws = [
            value({site: many[k] for site, many in drawn.values.items()})
            for k in range(self.num_draws)
        ]
        return torch.stack(draws), value(truth)


def _units(name: str, shape: torch.Size) -> list[str]:
    """Return the names of a site's units: z, or z[0], z[1], ..., or z[0,0], ..."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape))]


def _density(trace: Trace, drawn: bool) -> Tensor:
    """Return log p of all sites of a trace: (draws, n), or (1, n) without draws."""
    if enumeration.enumerated(trace):
        found = summing.evidence(trace, Trace())
    else:
        found = log_density(trace, drawn)
    return found if drawn else found[None]
