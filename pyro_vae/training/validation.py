"""The bound on held-out data, without training."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from pyro.infer import ELBO
from torch import nn

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Source
from pyro_vae.errors import first_line
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.processes import ALONE, Team
from pyro_vae.pairs.rng import derived
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.traces import BadNumbers, require_numbers
from pyro_vae.training.kl_weight import KLWeight
from pyro_vae.training.recording import ELBOParts, recorded


class Bound(NamedTuple):
    """An objective's bound and the ELBO with its parts, in nats per example."""

    bound: float
    """The objective with full weight on the KL. For ``Trace_ELBO`` this is the ELBO."""
    elbo: float
    reconstruction: float
    kl: dict[str, float]
    """KL of each latent site."""


class _Sums(NamedTuple):
    """Sums over rows."""

    loss: float
    rows: int
    reconstruction: dict[str, float]
    kl: dict[str, float]
    fault: str = ""
    """Why the bound of these rows has no value."""


def bound(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    objective: ELBO,
    batch_size: int = 500,
    seed: int = 0,
    team: Team = ALONE,
) -> Bound:
    """Compute an objective with full weight on the KL, and the ELBO, without training.

    The bounds leave out the KL of latents outside the data plate. Their posterior q(w) is given, as
    for any new datum: :math:`E_{q(w)}[\\mathrm{ELBO}(x|w)] \\le \\log E_{q(w)}[p(x|w)]`.

    Arguments:
        team: the processes that share the minibatches. All of them get the same result.
    """
    seed = derived(seed, "process", team.rank)

    def measured() -> _Sums:
        try:
            return _sums(pair, team.own(rows.batches(batch_size)), prepare, objective, seed)
        except BadNumbers as error:
            if team.count == 1:
                raise
            return _Sums(0.0, 0, {}, {}, first_line(error))

    parts = team.gather(measured)
    if faults := [part.fault for part in parts if part.fault]:
        raise BadNumbers(faults[0])
    count = sum(part.rows for part in parts)
    reconstruction = sum(sum(part.reconstruction.values()) for part in parts) / count
    kl: dict[str, float] = {}
    for part in parts:
        for name, value in part.kl.items():
            kl[name] = kl.get(name, 0.0) + value
    kl = {name: value / count for name, value in kl.items()}
    total = sum(part.loss for part in parts)
    return Bound(-total / count, reconstruction - sum(kl.values()), reconstruction, kl)


def _sums(
    pair: nn.Module,
    batches: Iterable[Batch],
    prepare: Preparation,
    objective: ELBO,
    seed: int,
) -> _Sums:
    total, count, sums = 0.0, 0, ELBOParts(global_share=0.0, pair=pair)
    measured, given = recorded(objective, sums), KLWeight(global_weight=0.0)
    model, guide = given(cast(Pair, pair).model), given(cast(Pair, pair).guide)
    with using(pair, seed):
        for batch in batches:
            prepared = prepare(batch)
            try:
                total += cast(Any, measured).loss(model, guide, *prepared)
            except (ValueError, RuntimeError) as error:
                require_numbers(error)
                raise
            count += len(prepared[0])
    reconstruction = {name: float(value) for name, value in sums.reconstruction.items()}
    return _Sums(total, count, reconstruction, {n: float(v) for n, v in sums.kl.items()})
