"""The Bayesian decoder: its weights are global latents with a prior and a posterior."""

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
"""The initial standard deviation of the posterior, as a fraction of the prior's."""


class BayesianDecoder(nn.Module):
    r"""A pair in which the weights w of the decoder are global latents, shared by all data.

    :math:`p(w) \prod_i p(z_i)\, p(x_i \mid z_i, w)` with the guide
    :math:`q(w) \prod_i q(z_i \mid x_i)`. Each weight has the prior :math:`N(0, s^2/f)`, where f is
    the number of inputs of its unit: 1 for a bias, and the mean number for a strided transposed
    convolution. Each weight has its own posterior :math:`N(m, \sigma^2)` (mean field). The bound on
    all N data is
    :math:`\sum_i E_q[\log p(x_i|z_i, w) - \mathrm{KL}_i] - \mathrm{KL}(q(w) \| p(w))`. A minibatch
    of M data gets the share M / N of the last term.

    Arguments:
        pair: any pair. The parameters of its decoder become the means m.
        module: the name of the submodule of the pair whose parameters become latents.
        prior_scale: s, the standard deviation of a unit's output before the nonlinearity, if its
            weights are drawn from the prior and its inputs have size 1.

    The sites have the names of the parameters, such as ``decoder.network.layers.0.weight``. Raises
    `UsageError` if ``prior_scale`` is not positive, or if the pair does not have this module or the
    module does not have parameters. Neal, 1996, for priors scaled with the width; Blundell et al.,
    2015 (https://arxiv.org/abs/1505.05424), for the guide.

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
            raise UsageError(f"must be positive, got {prior_scale}", argument="prior_scale")
        places = dict(pair.named_modules())
        if module not in places or not list(places[module].parameters()):
            known = [name for name, part in pair.named_children() if list(part.parameters())]
            raise UsageError(
                f"{type(pair).__name__} does not have a module '{module}' with parameters; its "
                f"modules with parameters are: {', '.join(known) or 'none'}"
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
                    f"site '{self._site(name)}' must have shape {tuple(own.shape)}, got "
                    f"{tuple(drawn[name].shape)}: the decoder needs one draw of its weights at a "
                    "time (vectorize_particles=False)"
                )
        with _holding(self._decoder(), drawn):
            return cast(Pair, self.pair).model(*batch)

    def guide(self, *batch: Tensor) -> Any:
        pyro.module("means", self._decoder())  # stock SVI trains only what the guide declares
        pyro.module("scales", self.free_scales)
        for (name, own), free in zip(self._weights().items(), self.free_scales, strict=True):
            _normal(self._site(name), own, nn.functional.softplus(free))
        return cast(Pair, self.pair).guide(*batch)

    def template(self, n: int) -> Batch:
        """A batch of n rows of the right shapes; the values have no meaning."""
        return cast(Any, self.pair).template(n)

    def recipe(self, epochs: int) -> dict[str, Any]:
        """The defaults of `pyro_vae.fit` for the wrapped pair, if it has any."""
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
    """Keeps these tensors from becoming parameters if a module declares them in pyro.module."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = set(map(id, tensors))

    def _pyro_param(self, msg: Any) -> None:
        given = msg["args"][1:2]
        if given and id(given[0]) in self.known:
            msg["value"], msg["done"], msg["stop"] = given[0], True, True


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the parameters of a module by these tensors, wherever the module holds them."""
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
