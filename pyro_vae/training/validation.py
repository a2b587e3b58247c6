"""The bound on held-out data, without training."""

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple, cast

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Source
from pyro_vae.errors import NotTraceable, first_line
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.processes import ALONE, Team
from pyro_vae.pairs.rng import derived
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.traces import BadNumbers, require_numbers
from pyro_vae.training.graph import Named
from pyro_vae.training.kl_weight import KLWeight
from pyro_vae.training.recording import ELBOParts, recorded, surrogate
from pyro_vae.training.tracing import Graphs


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
    graph: "BoundGraph | None" = None,
) -> Bound:
    """Compute an objective with full weight on the KL, and the ELBO, without training.

    The bounds leave out the KL of latents outside the data plate. Their posterior q(w) is given, as
    for any new datum: :math:`E_{q(w)}[\\mathrm{ELBO}(x|w)] \\le \\log E_{q(w)}[p(x|w)]`.

    Arguments:
        team: the processes that share the minibatches. All of them get the same result.
        graph: computes the bound of a minibatch, for a GPU.
    """
    seed = derived(seed, "process", team.rank)

    def measured() -> _Sums:
        try:
            found = None
            if graph is not None and graph.graphs is not None:
                found = graph.sums(team.own(rows.batches(batch_size)), prepare, seed)
            if found is not None:
                return found
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


class BoundGraph:
    """The bound of a minibatch as a graph, so that validation on a GPU is a few launches.

    Arguments:
        pair: the pair.
        objective: the objective of `bound`.
    """

    def __init__(self, pair: nn.Module, objective: ELBO) -> None:
        self.pair = pair
        self.parts = ELBOParts(global_share=0.0, pair=pair)
        measured, given = recorded(objective, self.parts), KLWeight(global_weight=0.0)
        model, guide = given(cast(Pair, pair).model), given(cast(Pair, pair).guide)

        @torch.no_grad()
        def function(*batch: Tensor) -> Named:
            self.parts.clear(0.0)
            loss, _ = surrogate(measured, model, guide, batch)
            return {("loss", ""): loss, **self.parts.named()}

        self.graphs: Graphs | None = Graphs(pair, function, lambda *_: False)

    def sums(self, batches: Iterable[Batch], prepare: Preparation, seed: int) -> "_Sums | None":
        """Return the sums over minibatches; None if the eager `bound` must say what is wrong."""
        total: Named = {}
        count = 0
        try:
            with using(self.pair, seed):
                for batch in batches:
                    prepared = prepare(batch)
                    for key, value in cast(Graphs, self.graphs)(*prepared).items():
                        total[key] = total[key] + value if key in total else value
                    count += len(prepared[0])
        except NotTraceable:  # the engine has said why
            self.graphs = None
            return None
        except (ValueError, RuntimeError):  # of the programs
            return None
        numbers = {key: value.item() for key, value in total.items()}
        if not all(map(isfinite, numbers.values())):
            return None
        if any(kind == "outside" and number for (kind, _), number in numbers.items()):
            return None
        named = {
            kind: {name: number for (own, name), number in numbers.items() if own == kind}
            for kind in ("reconstruction", "kl")
        }
        return _Sums(numbers["loss", ""], count, named["reconstruction"], named["kl"])
