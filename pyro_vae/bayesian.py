"""A Bayesian decoder: weights with a prior and a posterior, beside the latents of each datum."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import expm1, log, prod, sqrt
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae import enumeration, folding
from pyro_vae.data import Rows, held_rows
from pyro_vae.errors import UsageError
from pyro_vae.inference import latent_values, observation
from pyro_vae.pairs import (
    Batch,
    Pair,
    data_first,
    global_latents,
    is_category,
    mean,
    using,
)
from pyro_vae.progress import bar
from pyro_vae.threads import alone

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

START = 0.05
"""The standard deviation that a posterior starts with, as a share of the prior's."""

ROWS = 2000
"""Rows, times draws of the latents, that go through a pair at once."""


class BayesianDecoder(nn.Module):
    r"""A pair whose decoder's weights w are latent: one draw of them makes all data.

    :math:`p(w) \prod_i p(z_i)\, p(x_i \mid z_i, w)` with guide
    :math:`q(w) \prod_i q(z_i \mid x_i)`. Each weight has the prior :math:`N(0, s^2/f)`, with f
    the number of inputs of its unit (1 for a bias; of a strided transposed convolution the mean),
    and the posterior :math:`N(m, \sigma^2)` of its own (mean field). The bound on all N data is
    :math:`\sum_i E_q[\log p(x_i|z_i, w) - \mathrm{KL}_i] - \mathrm{KL}(q(w) \| p(w))`; a
    minibatch of M has the share M / N of the last term.

    Arguments:
        pair: any pair. Its decoder's own parameters become the means m.
        module: the submodule whose parameters are latent, by its name in the pair.
        prior_scale: s, the standard deviation of a unit's input when its weights are drawn from
            the prior and what comes in is of size 1.

    Sites are named by parameter, ``decoder.network.layers.0.weight``. Raises `UsageError` where the
    pair has no such module, or that has no parameters. Scaling of priors with width: Neal, 1996;
    the guide: Blundell et al., 2015 (https://arxiv.org/abs/1505.05424).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=(3,)))
    >>> history = pv.fit(pair, torch.ones(32, 4), batch_size=16, epochs=1, progress=False)
    >>> pv.sample(pair, 5).shape
    torch.Size([5, 4])
    """

    def __init__(self, pair: nn.Module, module: str = "decoder", prior_scale: float = 1.0) -> None:
        super().__init__()
        self.pair, self.module, self.prior_scale = pair, module, prior_scale
        if prior_scale <= 0:
            raise UsageError(f"prior_scale must be positive, {prior_scale} came")
        places = dict(pair.named_modules())
        if module not in places or not list(places[module].parameters()):
            known = [name for name, part in pair.named_children() if list(part.parameters())]
            raise UsageError(
                f"{type(pair).__name__} has no module '{module}' with parameters; its modules "
                f"with parameters are: {', '.join(known) or 'none'}"
            )
        self.free_scales = nn.ParameterList(
            torch.full_like(weight, log(expm1(START * self._prior_scale(name))))
            for name, weight in self._weights().items()
        )

    def model(self, *batch: Tensor) -> Any:
        drawn = {
            name: _normal(self._site(name), torch.zeros_like(own), self._prior_scale(name))
            for name, own in self._weights().items()
        }
        for name, own in self._weights().items():
            if drawn[name].shape != own.shape:
                raise UsageError(
                    f"site '{self._site(name)}' came as {tuple(drawn[name].shape)}: the decoder "
                    "takes one draw of its weights at a time (vectorize_particles=False)"
                )
        with _holding(self._decoder(), drawn):
            return cast(Pair, self.pair).model(*batch)

    def guide(self, *batch: Tensor) -> Any:
        pyro.module("means", self._decoder())  # stock SVI trains what it sees
        pyro.module("scales", self.free_scales)
        for (name, own), free in zip(self._weights().items(), self.free_scales, strict=True):
            _normal(self._site(name), own, nn.functional.softplus(free))
        return cast(Pair, self.pair).guide(*batch)

    def template(self, n: int) -> Batch:
        """A batch of n rows of the right shapes; its values mean nothing."""
        return cast(Any, self.pair).template(n)

    def recipe(self, epochs: int) -> dict[str, Any]:
        """How `pyro_vae.fit` fits the pair, if it has a way of its own."""
        return cast(Any, self.pair).recipe(epochs) if hasattr(self.pair, "recipe") else {}

    def _decoder(self) -> nn.Module:
        return self.pair.get_submodule(self.module)

    def _weights(self) -> dict[str, Tensor]:
        return dict(self._decoder().named_parameters())

    def _site(self, name: str) -> str:
        return f"{self.module}.{name}" if self.module else name

    def _prior_scale(self, name: str) -> float:
        owner = self._decoder().get_submodule(name.rpartition(".")[0])
        weight = self._weights()[name]
        inputs: float = weight[0].numel() if weight.dim() > 1 else 1
        if isinstance(owner, _Transposed) and weight.dim() > 1:  # (in, out / groups, *kernel)
            inputs = weight.numel() / weight.shape[1] / owner.groups / prod(owner.stride)
        return self.prior_scale / sqrt(inputs)


def _normal(name: str, loc: Tensor, scale: Tensor | float) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale).to_event(loc.dim()))


class _NoParameters(Messenger):
    """What a module declares of these tensors, as pyro.module does, is no parameter."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = set(map(id, tensors))

    def _pyro_param(self, msg: Any) -> None:
        given = msg["args"][1:2]
        if given and id(given[0]) in self.known:
            msg["value"], msg["done"], msg["stop"] = given[0], True, True


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with these tensors in place of its parameters, wherever it holds them."""
    drawn = {id(own): tensors[name] for name, own in module.named_parameters()}
    places: list[tuple[Any, str, Any]] = [
        (part._parameters, name, own)
        for part in module.modules()
        for name, own in part._parameters.items()
        if own is not None
    ]
    # torch's recurrent networks keep a list of their weights beside.
    lists = [(m, m._flat_weights) for m in module.modules() if isinstance(m, nn.RNNBase)]
    for held, name, own in places:
        held[name] = drawn[id(own)]
    for part, _ in lists:
        part._flat_weights = [part._parameters[name] for name in part._flat_weights_names]
    try:
        with _NoParameters(drawn.values()):
            yield
    finally:
        for held, name, own in places:
            held[name] = own
        for part, weights in lists:
            part._flat_weights = weights


@dataclass(frozen=True)
class Uncertainty:
    r"""The variance of what a pair predicts in place of each datum, told apart by its sources.

    Of shape (n, *data_shape), in squares of the data's unit; the three add up to ``total``.
    """

    mean: Tensor
    """:math:`E[x']`, over weights, latents and noise."""
    noise: Tensor
    r""":math:`E_{w,z}\,\mathrm{Var}(x' | z, w)`: what the likelihood leaves open."""
    latent: Tensor
    r""":math:`E_w\,\mathrm{Var}_z\,E[x' | z, w]`: what is unknown of the code given x."""
    weights: Tensor
    r""":math:`\mathrm{Var}_w\,E_z\,E[x' | z, w]`: what is unknown of the decoder. Unbiased, so that
    where it is near 0 it may fall below."""
    num_weights: int
    """Draws of the latents outside the data plate."""
    num_samples: int
    """Draws of those of each datum, for each of them."""

    @property
    def epistemic(self) -> Tensor:
        """What more data of the same kind would take away: ``weights``."""
        return self.weights

    @property
    def aleatoric(self) -> Tensor:
        """What they would not: ``noise + latent``."""
        return self.noise + self.latent

    @property
    def total(self) -> Tensor:
        """The variance of the prediction."""
        return self.aleatoric + self.epistemic

    def as_dict(self) -> dict[str, Any]:
        """Means over data and elements, as metrics.json holds them."""
        parts = {name: getattr(self, name) for name in ("noise", "latent", "weights", "total")}
        means = {f"{name}_variance": part.mean().item() for name, part in parts.items()}
        return means | {"num_weights": self.num_weights, "num_samples": self.num_samples}

    def __str__(self) -> str:
        whole = self.total.mean().item()
        rows = [
            ("noise", "aleatoric", self.noise),
            ("latent", "aleatoric", self.latent),
            ("weights", "epistemic", self.weights),
        ]
        lines = [
            f"{name:<10}{kind:<11}{part.mean().item():>12.4g}{part.mean().item() / whole:>8.1%}"
            for name, kind, part in rows
        ]
        return "\n".join([f"{'variance of':<21}{'mean':>12}{'share':>8}", *lines])


@alone()
def uncertainty(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_weights: int = 30,
    num_samples: int = 10,
    site: str | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> Uncertainty:
    r"""Tell apart the spread of reconstructions that comes from noise, codes and weights.

    By the law of total variance, for :math:`w \sim q(w)`, :math:`z \sim q(z|x, w)`,
    :math:`x' \sim p(x|z, w)`:

    .. math:: \mathrm{Var}(x') = E_{w,z}\mathrm{Var}(x'|z,w) + E_w\mathrm{Var}_z E[x'|z,w]
        + \mathrm{Var}_w E_z E[x'|z,w]

    Arguments:
        pair: any pair with latents outside the data plate, such as a `BayesianDecoder`.
        x, context: data, as `pyro_vae.evaluate` takes them.
        num_weights: draws of those latents, 2 or more.
        num_samples: draws of each datum's own latents, for each of them; 2 or more.
        site: which observed site; the first by default.

    All three are unbiased. Raises `UsageError` for a pair without such latents, and for data
    without a variance, as names have none. The parts: Depeweg et al., 2018
    (https://arxiv.org/abs/1710.07283), where the latents of a datum are counted as noise; Kendall &
    Gal, 2017 (https://arxiv.org/abs/1703.04977).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=(3,)))
    >>> uncertainty(pair, torch.ones(5, 4), num_weights=3, progress=False).epistemic.shape
    torch.Size([5, 4])
    """
    for name, value in (("num_weights", num_weights), ("num_samples", num_samples)):
        if value < 2:
            raise UsageError(f"{name} must be 2 or more, {value} came: a variance takes two")
    rows, prepare = held_rows(pair, x, context, binarize)
    few = prepare(rows.first(2))
    shared = global_latents(pair, few)
    if shared and set(shared) <= set(folding.plan(pair, few).points):
        raise UsageError(
            f"the guide of '{shared[0]}' is a Delta, a point estimate: it has no spread that could "
            "be told apart"
        )
    if not shared:
        raise UsageError(
            f"{type(pair).__name__} has no latent outside the data plate, whose spread could be "
            "told apart: make one by pyro_vae.BayesianDecoder"
        )
    parts, summed = [], enumeration.enumerates(pair, few)
    total = len(rows) * num_weights
    with using(pair, seed), bar(progress, total, "uncertainty", delay=2) as shown:
        for given in rows.batches(max(1, ROWS // num_samples)):
            batch = prepare(given)
            moments = []
            for _ in range(num_weights):
                moments.append(_moments(pair, batch, num_samples, site, summed))
                shown.update(len(batch[0]))
            parts.append([torch.stack(column) for column in zip(*moments, strict=True)])
    means, spreads, noise = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    latent = spreads.mean(0)
    return Uncertainty(
        means.mean(0),
        noise.mean(0),
        latent,
        means.var(0) - latent / num_samples,  # a mean of few draws varies with them, too
        num_weights,
        num_samples,
    )


def _moments(
    pair: nn.Module, batch: Batch, num_samples: int, site: str | None, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For one draw of the latents that all data share: mean and variance over draws of each
    datum's own of what is predicted, and the mean of its variance given them."""
    repeated = tuple(part.repeat(num_samples, *[1] * (part.dim() - 1)) for part in batch)
    found = observation(pair, repeated, latent_values(pair, repeated, False), site)
    fn = found["fn"]
    if is_category(fn):
        raise UsageError(f"site '{found['name']}' is of names, which have no variance")
    means, noise = (
        data_first(moment, found).unflatten(0, (num_samples, len(batch[0])))
        for moment in (mean(fn), _variance(fn))
    )
    return means.mean(0), means.var(0), noise.mean(0)


def _variance(fn: Any) -> Tensor:
    try:
        return cast(Tensor, fn.variance)
    except NotImplementedError:
        return fn.sample((100,)).to(torch.get_default_dtype()).var(0)
