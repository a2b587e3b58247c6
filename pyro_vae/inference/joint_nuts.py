"""NUTS on all latents of a data set at once: global, group and local."""

from dataclasses import dataclass
from time import perf_counter as _now
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.inference.chains import ENOUGH_DRAWS, PER_UNIT, STARTS, Posterior, compared, energy
from pyro_vae.inference.joint_density import Whole
from pyro_vae.inference.posterior import joint_draws
from pyro_vae.inference.prior_tail import PriorTails, in_metrics, prior_tails
from pyro_vae.pairs.formatting import in_words
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html

MOST_NUMBERS = 5000
"""The largest number of coordinates that NUTS moves at once."""

GRADIENTS = 60
"""Approximate number of gradients in a transition."""

GUIDE_DRAWS = 1000
"""The largest number of draws of the guide for the comparison."""


@dataclass(frozen=True)
class JointPosterior:
    """Draws of the posterior of all latents of a data set by NUTS, and draws of the guide.

    Both parts belong to the same chains. See `pyro_vae.inference.chains.Posterior` for the measures
    of each part.
    """

    shared: Posterior
    """The global and group latents, as the latents of one datum: n is 1."""
    local: Posterior | None
    """The local latents of each row, given the data of all rows; None for a pair without any."""
    num_examples: int
    """The number of rows."""
    prior_tails: PriorTails | None = None
    """How far the draws of global and group latents lie in the tail of their prior."""

    @property
    def agrees(self) -> bool:
        """Whether the chains agree on all global and group latents, and none diverged."""
        return bool(self.shared.agrees.all())

    @property
    def too_few_draws(self) -> bool:
        """Whether the least bulk or tail effective sample size of global and group latents is below
        400."""
        return bool(self.shared.too_few_draws.any())

    def as_dict(self) -> dict[str, Any]:
        """Return the results for metrics.json, by unit for global and group latents."""
        found, of, by = self.shared, self.shared.moments, self.shared.guide_moments
        columns = {
            "mean": of.mean,
            "standard_deviation": of.standard_deviation,
            "guide_mean": by.mean,
            "guide_standard_deviation": by.standard_deviation,
            "shift": found.shift,
            "scale_ratio": found.scale_ratio,
            "r_hat": found.r_hat,
            "effective_sample_size": found.effective_sample_size,
            "bulk_effective_sample_size": found.bulk_effective_sample_size,
            "tail_effective_sample_size": found.tail_effective_sample_size,
            "mean_standard_error": found.mean_standard_error,
            "standard_deviation_error": found.standard_deviation_error,
        }
        by_unit = {
            unit: {
                name: value[0, i].item() if bool(value[0, i].isfinite()) else None
                for name, value in columns.items()
            }
            for i, unit in enumerate(found.units)
        }
        return {
            "num_examples": self.num_examples,
            "agree": self.agrees,
            "too_few_draws": self.too_few_draws,
            "divergences": int(found.divergences.sum()),
            "global": found.as_dict() | {"num_examples": self.num_examples},
            **in_metrics(self.prior_tails),
            "by_unit": by_unit,
            "local": None if self.local is None else self.local.as_dict(),
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        found, of, by = self.shared, self.shared.moments, self.shared.guide_moments
        chains, draws = next(iter(found.draws.values())).shape[:2]
        width = max(map(len, found.units)) + 2
        lines = [
            f"NUTS on all latents of {self.num_examples} rows: {chains} chains of {draws} draws, "
            f"{int(found.divergences.sum())} divergences",
            f"{'':<{width}}{'posterior':>18}{'guide':>18}{'shift':>8}{'scale':>7}{'R-hat':>7}{'bulk':>7}{'tail':>7}",
        ]
        for i in found.shift[0].abs().nan_to_num(-1.0).argsort(descending=True)[:SHOWN].tolist():
            lines.append(
                f"{found.units[i]:<{width}}{_pair(of, i):>18}{_pair(by, i):>18}"
                f"{found.shift[0, i]:>8.2f}{found.scale_ratio[0, i]:>7.2f}"
                f"{found.r_hat[0, i]:>7.3f}{found.bulk_effective_sample_size[0, i]:>7.0f}"
                f"{found.tail_effective_sample_size[0, i]:>7.0f}"
            )
        if len(found.units) > SHOWN:
            lines.append(f"the {SHOWN} of {len(found.units)} units with the largest shift")
        if self.too_few_draws:
            lines.append(f"too few draws: bulk and tail should be at least {ENOUGH_DRAWS}")
        if self.prior_tails is not None:
            lines.append(str(self.prior_tails))
        if self.local is not None:
            of_rows = self.local
            lines.append(
                f"local latents: mean shift {of_rows.shift.abs().nanmean():.2f}, mean scale "
                f"{of_rows.scale_ratio.nanmean():.2f}, R-hat at most "
                f"{of_rows.r_hat.nan_to_num(0.0).max():.3f}"
            )
        return "\n".join(lines)


SHOWN = 20
"""Number of units in the printed table."""


def _pair(moments: Any, i: int) -> str:
    return f"{moments.mean[0, i]:.3f} ± {moments.standard_deviation[0, i]:.3f}"


def joint_nuts(
    pair: nn.Module,
    batch: Batch,
    num_draws: int,
    warmup: int,
    num_chains: int,
    target_acceptance: float,
    seed: int,
    engine: str,
    progress: bool,
) -> JointPosterior:
    """Run `pyro_vae.nuts` on all latents of a prepared batch."""
    whole = Whole(pair, batch)
    transitions = num_chains * (warmup + num_draws)
    if whole.dim > MOST_NUMBERS:
        raise UsageError(_too_large(whole, transitions))
    whole.use(engine)
    full = PER_UNIT * whole.dim <= warmup
    shared = [("shared",)] if 0 < PER_UNIT * whole.shared_dim <= warmup else False
    with using(pair, seed), bar(progress, transitions, "NUTS", delay=2) as shown:
        counts = whole.counts()
        starts = _starts(whole, num_chains)
        z = torch.stack([torch.where(counts, start, starts[0]) for start in starts])
        z = z[:, None].repeat(1, num_draws, 1)
        divergences = 0
        for chain in range(num_chains):
            moving = _Moving(whole, counts, z[chain, 0])
            kernel = NUTS(
                potential_fn=moving.potential,
                full_mass=full or shared,
                target_accept_prob=target_acceptance,
            )
            mcmc = MCMC(
                kernel,
                num_draws,
                warmup,
                moving.start,
                hook_fn=lambda *_: shown.update(),
                disable_progbar=True,
            )
            with torch.enable_grad():
                mcmc.run()
            z[chain][:, counts] = moving.vector(mcmc.get_samples())
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
        values = [whole.constrained(one) for one in z.flatten(0, 1)]
        guide = joint_draws(pair, batch, min(GUIDE_DRAWS, num_chains * num_draws))
        stacked = {name: torch.stack([one[name] for one in values]) for name in whole.shapes}
        tails = prior_tails(pair, batch, {name: stacked[name] for name in whole.shared})
    draws = {name: value.cpu().unflatten(0, z.shape[:2]) for name, value in stacked.items()}
    count = torch.tensor([divergences])
    n = len(batch[0])
    return JointPosterior(
        compared(
            {name: draws[name][:, :, None] for name in whole.shared},
            {name: guide[name][:, None].cpu() for name in whole.shared},
            count,
            whole.angles,
        ),
        compared(
            {name: draws[name] for name in whole.local},
            {name: guide[name].cpu() for name in whole.local},
            count.expand(n),
            whole.angles,
        )
        if whole.local
        else None,
        n,
        tails,
    )


class _Moving:
    """The used coordinates of one chain, in two blocks: shared by all rows, and local."""

    def __init__(self, whole: Whole, counts: Tensor, start: Tensor) -> None:
        self.whole, self.counts, self.fixed = whole, counts, start
        self.split = int(counts[: whole.shared_dim].sum())
        used = start[counts]
        blocks = {"shared": used[: self.split], "local": used[self.split :]}
        self.start = {name: block for name, block in blocks.items() if len(block)}

    def vector(self, blocks: dict[str, Tensor]) -> Tensor:
        return torch.cat([blocks[name] for name in self.start], -1)

    def potential(self, blocks: dict[str, Tensor]) -> Tensor:
        moving = self.vector(blocks)
        z = self.fixed.clone()
        z[self.counts] = moving.detach()
        found = self.whole.gradient(z, *self.whole.batch)
        return energy(moving, -found["joint"], -found["gradient"][self.counts])


def _starts(whole: Whole, num_chains: int) -> list[Tensor]:
    """Return draws of the prior at which the density is finite."""
    found: list[Tensor] = []
    for _ in range(STARTS * num_chains):
        z = whole.draw_prior()
        if bool(whole.log_joint(z, *whole.batch).isfinite()):
            found.append(z)
        if len(found) == num_chains:
            return found
    raise UsageError(
        "log p(x, z) is not finite at draws of the prior, where chains of NUTS must start"
    )


def seconds_of(whole: Whole, transitions: int) -> float:
    """Return the approximate seconds of these transitions, from the time of one gradient."""
    with using(whole.pair, 0):
        z = whole.draw_prior()
        start = _now()
        whole.gradient(z, *whole.batch)
        return (_now() - start) * transitions * GRADIENTS


def _too_large(whole: Whole, transitions: int) -> str:
    cost = in_words(seconds_of(whole, transitions))
    return (
        f"NUTS on all latents would move {whole.dim:,} numbers at once ({len(whole.batch[0]):,} "
        f"rows, {whole.shared_dim:,} numbers of global latents) and take about {cost}, but it "
        f"serves up to {MOST_NUMBERS:,}: fit and check on fewer rows, or use "
        "pyro_vae.global_weights"
    )
