"""NUTS on the same model: the exact posterior of a datum, compared with the guide."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.chains import PER_UNIT, STARTS, compared, energy
from pyro_vae.inference.chains import Moments as Moments
from pyro_vae.inference.chains import Posterior as Posterior
from pyro_vae.inference.chains import rank_r_hat as rank_r_hat
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.joint import Joint
from pyro_vae.inference.joint_nuts import JointPosterior, joint_nuts
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import held_out_rows
from pyro_vae.training.settings import require_engine


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
) -> Posterior | JointPosterior:
    r"""Draw from the exact posterior of a few data by NUTS, with the same model.

    Pyro's NUTS moves the latents of one datum, mapped to the real numbers, under
    :math:`-\log p(x, z)`. Enumerated latents are summed out. Chains start at draws of the prior,
    so they are far from each other and independent of the guide.

    If the pair has global or group latents w, NUTS moves them together with the local latents of
    all rows, under :math:`-\log p(w) - \sum_i \log p(x_i, z_i \mid w)`. The result is then a
    `JointPosterior`, which compares the guide of w with p(w | x). Pass all rows to which the guide
    was fitted, because more or other rows have another posterior of w. This takes minutes for a few
    hundred rows; above 5,000 numbers it is refused.

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

    Returns a `Posterior`, or a `JointPosterior` for a pair with global or group latents. Warns if
    the guide of global latents was fitted to other rows. Raises `UsageError` for discrete latents
    that are not enumerated, and for local latents whose guide has no density; the error names the
    site. Also raises it for fewer than two chains or four draws, and for too many latents.
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
    batch = whole(pair, x, context, binarize)
    engine = "traced" if require_engine(engine) == "auto" else engine
    lengths = num_draws, warmup, num_chains
    if global_latents(pair, batch):
        _warn_of_other_rows(pair, x)
        return joint_nuts(pair, batch, *lengths, target_acceptance, seed, engine, progress)
    return _local_nuts(pair, batch, *lengths, target_acceptance, seed, engine, progress)


def _warn_of_other_rows(pair: nn.Module, x: Rows) -> None:
    if held_out_rows.fitted_to(pair, x) is False:
        warnings.warn(
            "the guide was fitted to other rows than these, so the posteriors of the global "
            "latents differ: pass the training data to compare the guide with NUTS",
            stacklevel=3,
        )


def _local_nuts(
    pair: nn.Module,
    batch: Batch,
    num_draws: int,
    warmup: int,
    num_chains: int,
    target_acceptance: float,
    seed: int,
    engine: str,
    progress: bool,
) -> Posterior:
    joint = Joint(pair, tuple(tensor[:2] for tensor in batch))
    joint.use(engine)
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
    return compared(by_chain, guide, divergences, joint.angles)


def _potential(
    joint: Joint, datum: Batch, start: Tensor, counts: Tensor
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return -log p(x, z) as a function of the used coordinates; the others stay fixed."""

    def potential(params: dict[str, Tensor]) -> Tensor:
        z = start.clone()
        z[counts] = params["z"].detach()
        found = joint.joint_gradient(z[None, None], *datum)
        gradient = found["joint gradient"][0, 0][counts]
        return energy(params["z"], -found["joint"][0, 0], -gradient)

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
