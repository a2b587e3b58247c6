"""A Bayesian decoder: weights with a prior and a posterior, beside the latents of each datum."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import expm1, log, prod, sqrt
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.compat import flat_weights_renewed, parameters_of
from pyro_vae.errors import UsageError
from pyro_vae.pairs.pair import Batch, Pair

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

START = 0.05
"""The standard deviation that a posterior starts with, as a share of the prior's."""


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
        (parameters_of(part), name, own)
        for part in module.modules()
        for name, own in parameters_of(part).items()
        if own is not None
    ]
    for held, name, own in places:
        held[name] = drawn[id(own)]
    try:
        with flat_weights_renewed(module), _NoParameters(drawn.values()):
            yield
    finally:
        for held, name, own in places:
            held[name] = own
