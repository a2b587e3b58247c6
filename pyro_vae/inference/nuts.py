"""NUTS on the same model: the exact posterior of a datum, compared with the guide."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.joint import Joint
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.threads import alone
from pyro_vae.training.settings import require_engine

STARTS = 10
"""Draws of the prior for each chain. Chains start at the first draws with a finite density."""

PER_UNIT = 5
"""Least number of warm-up transitions for each unit to adapt a full mass matrix."""

AGREEING_R_HAT = 1.01
"""Chains agree up to this R-hat (Vehtari et al., 2021, https://arxiv.org/abs/1903.08008)."""


class Moments(NamedTuple):
    """Moments of draws for each unit."""

    mean: Tensor
    """Means, of shape (n, units)."""
    standard_deviation: Tensor
    """Standard deviations, of shape (n, units)."""
    correlation: Tensor
    """Correlations, of shape (n, units, units)."""


@dataclass(frozen=True)
class Posterior:
    """Draws of the posterior of a few data by NUTS, and draws of the guide for comparison.

    A unit is one number of a latent site. The units of all sites are concatenated; ``units`` has
    their names. Units that do not vary (padding of sequences and masked entries) have NaN in all
    results.
    """

    draws: dict[str, Tensor]
    """Draws of each latent site by NUTS, of shape (chains, draws, n, *event)."""
    guide_draws: dict[str, Tensor]
    """The same total number of draws of the guide, of shape (draws, n, *event)."""
    units: tuple[str, ...]
    """The names of the units, such as "z[0]"."""
    r_hat: Tensor
    """Rank-normalized split R-hat of the draws and of their distances from the median (folded),
    the larger of the two, of shape (n, units). Over 1.01 the chains do not agree."""
    effective_sample_size: Tensor
    """Number of independent draws with the same information about a mean, of shape (n, units)."""
    divergences: Tensor
    """Number of transitions after the warm-up that diverged, for each datum, of shape (n,)."""

    @cached_property
    def moves(self) -> Tensor:
        """Which units vary, of shape (n, units): those on which p(x, z) depends."""
        return _vary(_flat(self.draws, 2))

    @cached_property
    def moments(self) -> Moments:
        """The moments of the posterior."""
        return _moments(_flat(self.draws, 2).flatten(0, 1), self.moves)

    @cached_property
    def guide_moments(self) -> Moments:
        """The moments of the guide."""
        return _moments(_flat(self.guide_draws, 1), self.moves)

    @property
    def mean_standard_error(self) -> Tensor:
        """The Monte Carlo error of the posterior means, of shape (n, units)."""
        return self.moments.standard_deviation / self.effective_sample_size.sqrt()

    @property
    def shift(self) -> Tensor:
        """Means of the guide minus those of the posterior, of shape (n, units), in standard
        deviations of the posterior."""
        p, q = self.moments, self.guide_moments
        return (q.mean - p.mean) / p.standard_deviation

    @property
    def scale_ratio(self) -> Tensor:
        """Standard deviations of the guide divided by those of the posterior, (n, units)."""
        return self.guide_moments.standard_deviation / self.moments.standard_deviation

    @property
    def disagreement(self) -> Tensor:
        r"""The distance between guide and posterior, in nats, of shape (n, units).

        It is :math:`\tfrac12 (r^2 + d^2 - 1) - \log r` with r the ``scale_ratio`` and d the
        ``shift``: the KL of two normals with these moments.
        """
        ratio = self.scale_ratio
        return 0.5 * (ratio.square() + self.shift.square() - 1) - ratio.log()

    @property
    def agrees(self) -> Tensor:
        """Whether the chains of each datum agree and none diverged, of shape (n,)."""
        return (_greatest(self.r_hat) <= AGREEING_R_HAT) & (self.divergences == 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the results over data and units for metrics.json; NaN becomes None."""
        chains, draws, n = next(iter(self.draws.values())).shape[:3]
        correlated = self.guide_moments.correlation - self.moments.correlation
        found = {
            "greatest_r_hat": _greatest(self.r_hat).max(),
            "least_effective_sample_size": self.effective_sample_size.nan_to_num(torch.inf).min(),
            "mean_shift": self.shift.abs().nanmean(),
            "mean_scale_ratio": self.scale_ratio.nanmean(),
            "mean_correlation_error": correlated.abs().nanmean(),
            "mean_disagreement": self.disagreement.nanmean(),
        }
        return {
            "num_examples": n,
            "num_chains": chains,
            "num_draws": draws,
            "agree": int(self.agrees.sum()),
            "divergences": int(self.divergences.sum()),
            **{k: v.item() if bool(v.isfinite()) else None for k, v in found.items()},
        }

    def __str__(self) -> str:
        found = self.as_dict()
        n, chains, draws = (found[f"num_{name}"] for name in ("examples", "chains", "draws"))

        def number(name: str) -> str:
            return "infinite" if found[name] is None else f"{found[name]:.3f}"

        size = found["least_effective_sample_size"]
        lines = [
            ("chains", f"{chains} of {draws} draws for each of {n} data"),
            ("data whose chains agree", f"{found['agree']} of {n}"),
            ("R-hat", f"{number('greatest_r_hat')} (maximum)"),
            ("effective draws", f"{0 if size is None else size:.0f} (minimum)"),
            ("divergences", f"{found['divergences']}"),
            ("guide's mean off by", f"{number('mean_shift')} standard deviations"),
            ("guide's scale", f"{number('mean_scale_ratio')} times the posterior's"),
            ("guide's correlations", f"off by {number('mean_correlation_error')}"),
            ("disagreement", f"{number('mean_disagreement')} nats for each unit"),
        ]
        return "\n".join(f"{name:<26}{value}" for name, value in lines)


@alone()
def nuts(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_draws: int = 500,
    warmup: int = 500,
    num_chains: int = 4,
    target_acceptance: float = 0.8,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Posterior:
    r"""Draw from the exact posterior of a few data by NUTS, with the same model.

    Pyro's NUTS moves the latents of one datum, mapped to the real numbers, under
    :math:`-\log p(x, z)`. Enumerated latents are summed out. Chains start at draws of the prior,
    so they are far from each other and independent of the guide.

    Arguments:
        pair: any pair whose latents are continuous or enumerated.
        x, context: a few data. Each datum needs chains times (warm-up + draws) transitions. A
            transition evaluates the gradient from a few to some hundred times, about a millisecond
            each.
        num_draws: number of draws of each chain.
        warmup: number of transitions before them, which adapt the step size and the mass matrix.
            The matrix is full if there are five transitions for each unit, and diagonal otherwise.
        num_chains: number of chains.
        target_acceptance: larger values give smaller steps, which reduces divergences.
        binarize, seed: as in `pyro_vae.evaluate`.
        engine: how gradients are computed; "auto" traces a graph of them.
        progress: show a bar if the run takes over two seconds.

    Raises `UsageError` for latents that are not local, for discrete latents that are not
    enumerated, and for latents whose guide has no density; the error names the site. Also raises
    it for fewer than two chains or four draws.
    Hoffman & Gelman, The No-U-Turn sampler, 2014 (https://arxiv.org/abs/1111.4246).

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2, hidden=()), torch.ones(1, 4)
    >>> result = nuts(vae, x, num_draws=4, warmup=4, num_chains=2, progress=False)
    >>> result.draws["z"].shape, result.moments.mean.shape
    (torch.Size([2, 4, 1, 2]), torch.Size([1, 2]))
    """
    for name, value, least in (
        ("num_chains", num_chains, 2),
        ("num_draws", num_draws, 4),
        ("warmup", warmup, 1),
    ):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    rows, prepare = held_rows(pair, x, context, binarize)
    parts = [prepare(batch) for batch in rows.batches(len(rows))]
    batch = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    joint = Joint(pair, tuple(tensor[:2] for tensor in batch))
    joint.use("traced" if require_engine(engine) == "auto" else engine)
    kernel = {
        "target_accept_prob": target_acceptance,
        "full_mass": PER_UNIT * joint.dim <= warmup,
    }
    n, steps = len(batch[0]), num_chains * (warmup + num_draws)
    with using(pair, seed), bar(progress, n * steps, "NUTS", delay=2) as shown:
        starts, counts = _starts(joint, batch, num_chains), joint.counts(*batch)
        z, divergences = starts.new_zeros(num_chains, num_draws, n, joint.dim), torch.zeros(n)
        for i in range(n):
            datum = tuple(tensor[i : i + 1] for tensor in batch)
            for chain in range(num_chains):
                # Unused coordinates are equal in all chains, so `moves` finds them.
                start = torch.where(counts[i], starts[chain, i], starts[0, i])
                z[chain, :, i] = start
                if not counts[i].any():
                    shown.update(warmup + num_draws)
                    continue
                potential = _potential(joint, datum, start, counts[i])
                mcmc = MCMC(
                    NUTS(potential_fn=potential, **kernel),
                    num_draws,
                    warmup,
                    {"z": start[counts[i]]},
                    hook_fn=lambda *_: shown.update(),
                    disable_progbar=True,
                )
                with torch.enable_grad():
                    mcmc.run()
                z[chain, :, i, counts[i]] = mcmc.get_samples()["z"]
                divergences[i] += len(mcmc.diagnostics()["divergences"]["chain 0"])
        draws = _constrained(joint, z.flatten(0, 1), batch)
        guide = _constrained(joint, joint.draw(num_chains * num_draws, *batch), batch)
    by_chain = {k: v.unflatten(0, (num_chains, num_draws)) for k, v in draws.items()}
    flat = _flat(by_chain, 2)
    return Posterior(
        by_chain,
        guide,
        _names(guide),
        _measured(rank_r_hat, flat),
        _measured(lambda draws: effective_sample_size(draws, 0, 1), flat),
        divergences.long(),
    )


def rank_r_hat(draws: Tensor) -> Tensor:
    """Return the rank-normalized, folded split R-hat (Vehtari et al., 2021) of draws.

    Draws have shape (chains, draws, ...). The result is the larger of the R-hats of location and
    of spread.
    """
    apart = (draws - draws.flatten(0, 1).quantile(0.5, 0)).abs()
    by_rank = [split_gelman_rubin(_normal_scores(part), 0, 1) for part in (draws, apart)]
    return torch.maximum(*by_rank)


def _normal_scores(draws: Tensor) -> Tensor:
    """Return normal quantiles of the ranks of draws among all chains; ties share a rank."""
    values = draws.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = values.sort(-1).values
    least, most = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    scores = torch.special.ndtri(((least + most + 1) / 2 - 0.375) / (values.shape[-1] + 0.25))
    return scores.to(draws.dtype).movedim(-1, 0).reshape(draws.shape)


class _Energy(torch.autograd.Function):
    """A value with a gradient that is already known."""

    @staticmethod
    def forward(ctx: Any, moving: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.gradient, None, None


def _potential(
    joint: Joint, datum: Batch, start: Tensor, counts: Tensor
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return -log p(x, z) as a function of the used coordinates; the others stay fixed."""

    def potential(params: dict[str, Tensor]) -> Tensor:
        z = start.clone()
        z[counts] = params["z"].detach()
        found = joint.joint_gradient(z[None, None], *datum)
        gradient = found["joint gradient"][0, 0][counts]
        return _Energy.apply(params["z"], -found["joint"][0, 0], -gradient)

    return potential


def _starts(joint: Joint, batch: Batch, num_chains: int) -> Tensor:
    """Return draws of the prior (chains, n, D) at which log p(x, z) is finite."""
    drawn = joint.draw_prior(STARTS * num_chains, *batch)
    finite = joint.log_joint(drawn, *batch).isfinite()
    if bool((finite.sum(0) < num_chains).any()):
        row = int((finite.sum(0) < num_chains).nonzero()[0])
        raise UsageError(
            f"log p(x, z) of row {row} is not finite at draws of the prior, where chains must start"
        )
    order = finite.long().argsort(dim=0, descending=True, stable=True)[:num_chains]
    return drawn.gather(0, order[..., None].expand(-1, -1, joint.dim))


def _constrained(joint: Joint, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return values of the sites at many z, in chunks."""
    size = max(1, CELLS // (joint.widest * z.shape[1]))
    parts = [joint.constrained(part, *batch) for part in z.split(size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _flat(sites: dict[str, Tensor], leading: int) -> Tensor:
    """Concatenate all units to (*leading, n, units), in float64."""
    parts = [value.double().reshape(*value.shape[: leading + 1], -1) for value in sites.values()]
    return torch.cat(parts, -1)


def _names(sites: dict[str, Tensor]) -> tuple[str, ...]:
    """Return a name for each unit of draws (draws, n, *event)."""
    return tuple(
        name + "".join(f"[{i}]" for i in index)
        for name, value in sites.items()
        for index in product(*map(range, value.shape[2:]))
    )


def _measured(measure: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """Measure draws (chains, draws, n, units) by unit; NaN for units that do not vary."""
    moves = _vary(draws)
    found = draws.new_full(moves.shape, torch.nan)
    if moves.any():  # with one NaN, Pyro's measures return only NaN
        found[moves] = measure(draws[:, :, moves])
    return found


def _vary(draws: Tensor) -> Tensor:
    """Return which units of draws (chains, draws, n, units) are not constant."""
    return draws.amax((0, 1)) != draws.amin((0, 1))


def _moments(draws: Tensor, moves: Tensor) -> Moments:
    """Return moments of draws (draws, n, units); NaN for units that do not vary."""
    draws = torch.where(moves, draws, torch.nan)
    off = draws - draws.mean(0)
    scaled = off / off.square().sum(0).sqrt()
    return Moments(draws.mean(0), draws.std(0), torch.einsum("sni,snj->nij", scaled, scaled))


def _greatest(by_unit: Tensor) -> Tensor:
    return by_unit.nan_to_num(-torch.inf, posinf=torch.inf).amax(1)
