"""The bound on held-out data, without training."""

from typing import Any, NamedTuple, cast

from pyro.infer import ELBO
from torch import nn

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Source
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.traces import require_numbers
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


def bound(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    objective: ELBO,
    batch_size: int = 500,
    seed: int = 0,
) -> Bound:
    """Compute an objective with full weight on the KL, and the ELBO, without training.

    The bounds leave out the KL of latents outside the data plate. Their posterior q(w) is given, as
    for any new datum: :math:`E_{q(w)}[\\mathrm{ELBO}(x|w)] \\le \\log E_{q(w)}[p(x|w)]`.
    """
    total, count, sums = 0.0, 0, ELBOParts(global_share=0.0, pair=pair)
    measured, given = recorded(objective, sums), KLWeight(global_weight=0.0)
    model, guide = given(cast(Pair, pair).model), given(cast(Pair, pair).guide)
    with using(pair, seed):
        for batch in rows.batches(batch_size):
            prepared = prepare(batch)
            try:
                total += cast(Any, measured).loss(model, guide, *prepared)
            except (ValueError, RuntimeError) as error:
                require_numbers(error)
                raise
            count += len(prepared[0])
    reconstruction, kl = sums.per_example(count)
    return Bound(-total / count, reconstruction - sum(kl.values()), reconstruction, kl)
