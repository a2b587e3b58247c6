"""`refit_guide` fits another guide to a fixed model; `bounds_table` compares guides."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows, spread
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import LogLikelihood
from pyro_vae.inference.refinement import frozen
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import is_discrete
from pyro_vae.pairs.pair import Batch, Pair, placement
from pyro_vae.pairs.scope import evaluation_mode, using
from pyro_vae.pairs.sites import latents
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.factors import Factor, Family
from pyro_vae.parts.networks import MLP, Shape
from pyro_vae.training.fit import fit


class Grafted(nn.Module):
    """The model of one pair with the guide of another.

    Arguments:
        pair: the pair that gives ``model``, and ``template`` if it has one.
        inference: the module that gives ``guide``.

    Both are shared and not copied. While no parameter of ``pair`` is trained, it stays in
    evaluation mode.
    """

    def __init__(self, pair: nn.Module, inference: nn.Module) -> None:
        super().__init__()
        self.pair, self.inference = pair, inference

    def model(self, *batch: Tensor) -> Any:
        return cast(Pair, self.pair).model(*batch)

    def guide(self, *batch: Tensor) -> Any:
        return cast(Pair, self.inference).guide(*batch)

    @property
    def template(self) -> Callable[[int], Batch]:
        """The pair's own ``template``. A pair without one makes this an ``AttributeError``."""
        return cast(Any, self.pair).template

    def train(self, mode: bool = True) -> "Grafted":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.pair.parameters()):
            self.pair.eval()
        return self


class Encoders(nn.Module):
    r"""A guide with one encoder for each latent site, :math:`\prod_s q_s(z_s \mid x, c)`.

    Arguments:
        sites: the names of the latent sites, in the model's order.
        encoders: one module for each site that maps the batch to a distribution, such as a
            `Factor`.
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
    x: Rows,
    *context: Any,
    posterior: Family | type[Family] | nn.Module,
    hidden: Sequence[int] = (128, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    **settings: Any,
) -> Grafted:
    r"""Fit another guide to a pair while its model stays fixed.

    Arguments:
        pair: any pair whose latents are continuous and local.
        x, context: the training data of the new guide.
        posterior: a family or its class; or an encoder that maps x and the context to a
            distribution over the latent, such as a `Factor` of your own network.
        hidden, activation: settings of the encoder's multilayer perceptron, if you pass a family.
        settings: the keywords of `pyro_vae.fit`.

    If the model has several latents, each has its own encoder, so the latents are independent
    given x. Returns a pair that shares the model of the first. You can use and save it like any
    pair. Raises `UsageError` for latents that are discrete or not local.

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(32, 4)
    >>> other = pv.refit_guide(vae, x, posterior=pv.FullRankNormal, epochs=1, progress=False)
    >>> other.pair is vae, pv.encode(other, x)["z"].shape
    (True, torch.Size([32, 2]))
    """
    x, context = spread(pair, x, context)
    rows, prepare = held_rows(pair, x, context)
    batch = prepare(next(iter(rows.batches(2))))
    with using(pair, 0):
        guide = trace_guide(pair, batch)
        sites = latents(trace_model(pair, batch, guide))
    for name, site in sites.items():
        if not is_local(site) or is_discrete(site["fn"]):
            raise UsageError(
                f"latent site '{name}' is discrete or not local, but refit_guide serves only "
                "continuous local latents; write your own guide for this pair"
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
    """Return a table of bounds by guide.

    Arguments:
        results: the result of `pyro_vae.log_likelihood` for each guide, on the same data, by name.

    The columns are the ELBO; the importance-sampled bound on log p(x); the difference between
    them; and the median relative effective sample size. All except the last are in nats per
    example, and both bounds have Monte Carlo standard errors. All guides share one model, so the
    highest bound is the closest to its log p(x). The distance of an ELBO from log p(x) is the KL
    from the guide to the posterior.
    """
    title = f"{'guide':<24}{'ELBO':>17}{'log p(x) >=':>19}{'diff.':>8}{'effective':>11}"
    lines = [
        f"{name:<24}{with_error(one.elbo, one.elbo_standard_error, 10):<18}"
        f"{with_error(one.value, one.standard_error, 12):<20}{one.value - one.elbo:>8.3f}"
        f"{100 * (one.effective_sample_size / one.num_samples).median().item():>9.1f} %"
        for name, one in results.items()
    ]
    return "\n".join([title, *lines])
