"""`refit_guide`: another guide for a model that stays; `bounds_table` compares guides."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import LogLikelihood
from pyro_vae.inference.refinement import frozen
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair, placement
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import evaluation_mode, using
from pyro_vae.pairs.sites import latents
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.factors import Factor, Family
from pyro_vae.parts.networks import MLP, Shape
from pyro_vae.training.fit import fit


class Grafted(nn.Module):
    """The model of one pair with the guide of another.

    Arguments:
        pair: whose ``model``, and ``template`` if it has one, are taken.
        inference: whose ``guide`` is taken.

    Both are shared, not copied. While no parameter of ``pair`` is trained, it stays in evaluation
    mode.
    """

    def __init__(self, pair: nn.Module, inference: nn.Module) -> None:
        super().__init__()
        self.pair, self.inference = pair, inference

    def model(self, *batch: Tensor) -> Any:
        return cast(Pair, self.pair).model(*batch)

    def guide(self, *batch: Tensor) -> Any:
        return cast(Pair, self.inference).guide(*batch)

    def template(self, n: int) -> Batch:
        """A batch of n rows of the right shapes; its values mean nothing."""
        return cast(Any, self.pair).template(n)

    def train(self, mode: bool = True) -> "Grafted":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.pair.parameters()):
            self.pair.eval()
        return self


class Encoders(nn.Module):
    r"""A guide of one encoder for each latent site, :math:`\prod_s q_s(z_s \mid x, c)`.

    Arguments:
        sites: the names of the latent sites, in the model's order.
        encoders: for each a module that maps the batch to a distribution, such as a `Factor`.
    """

    def __init__(self, sites: Sequence[str], encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sites, self.encoders = tuple(sites), nn.ModuleList(encoders)

    def guide(self, *batch: Tensor) -> None:
        with pyro.plate("data", len(batch[0]), dim=-1):
            for site, encoder in zip(self.sites, self.encoders, strict=True):
                pyro.sample(site, encoder(*batch))


@alone()
def refit_guide(
    pair: nn.Module,
    posterior: Family | type[Family] | nn.Module,
    x: Rows,
    *context: Any,
    hidden: Sequence[int] = (128, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    **settings: Any,
) -> Grafted:
    r"""Fit another guide to a pair whose model stays as it is.

    Arguments:
        pair: any pair whose latents are continuous and in the data plate.
        posterior: a family, or its class; or an encoder, which maps x and the context to a
            distribution over the latent, such as a `Factor` of your own network.
        x, context: the data it is fitted to.
        hidden, activation: of the multilayer perceptron that is the encoder's network where a
            family is given.
        settings: the keywords of `pyro_vae.fit`.

    A model of several latents gets an encoder for each, so that they are independent given x.
    Returns a pair that shares the model of the first, and can be used and saved as any. Raises
    `UsageError` for latents that are discrete or outside the data plate.

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(32, 4)
    >>> other = pv.refit_guide(vae, pv.FullRankNormal, x, batch_size=16, epochs=1, progress=False)
    >>> other.pair is vae, pv.encode(other, x)["z"].shape
    (True, torch.Size([32, 2]))
    """
    rows, prepare = held_rows(pair, x, context)
    batch = prepare(next(iter(rows.batches(2))))
    with using(pair, 0):
        guide = trace_guide(pair, batch)
        sites = latents(trace_model(pair, batch, guide))
    for name, site in sites.items():
        if not is_local(site) or site["fn"].support.is_discrete:
            raise UsageError(
                f"latent site '{name}' is discrete or outside the data plate: give the pair a "
                "guide of your own for it"
            )
    shapes = [tuple(tensor.shape[1:]) for tensor in batch]

    def encoder(shape: Shape) -> nn.Module:
        if isinstance(posterior, nn.Module) and not isinstance(posterior, Family):
            return posterior if len(sites) == 1 else copy.deepcopy(posterior)
        family = posterior() if isinstance(posterior, type) else copy.deepcopy(posterior)
        return Factor(MLP(shapes, hidden, family.outputs(shape), activation), family, shape)

    encoders = [encoder(tuple(site["fn"].event_shape)) for site in sites.values()]
    grafted = Grafted(pair, Encoders(list(sites), encoders).to(*placement(pair)))
    with frozen(pair), evaluation_mode(pair):
        fit(grafted, x, *context, **settings)
    return grafted


def bounds_table(results: Mapping[str, LogLikelihood]) -> str:
    """A table of bounds by guide, from the `pyro_vae.log_likelihood` of each on the same data.

    Its columns: the ELBO; the importance-sampled bound on log p(x), both with their Monte Carlo
    standard errors; how far they are apart; and the median share of the samples that count. All but
    the last in nats per example. The model being one, the greatest bound is the nearest to its
    log p(x), and an ELBO's distance from it is the KL from the guide to the posterior.
    """
    title = f"{'guide':<24}{'ELBO':>17}{'log p(x) >=':>19}{'apart':>8}{'effective':>11}"
    lines = [
        f"{name:<24}{with_error(one.elbo, one.elbo_standard_error, 10):<18}"
        f"{with_error(one.value, one.standard_error, 12):<20}{one.value - one.elbo:>8.3f}"
        f"{100 * (one.effective_sample_size / one.num_samples).median().item():>9.1f} %"
        for name, one in results.items()
    ]
    return "\n".join([title, *lines])
