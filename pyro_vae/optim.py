"""One torch optimiser for all parameters of a pair, as a ``PyroOptim``."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.errors import UsageError


class Optimizer(PyroOptim):
    """A ``PyroOptim`` that steps all parameters with one torch optimiser, fused where torch can.

    Stock ``PyroOptim`` makes an optimiser for each parameter and clips each by itself; this one
    steps them together and clips by the global norm.

    Arguments:
        constructor: makes the torch optimiser, ``torch.optim.Adam`` or a ``functools.partial``.
        parameters: the parameters, by name.
        learning_rate: its first learning rate; set the attribute to change it.
        clip_norm: the greatest global norm of the gradient, or None.

    A gradient that is not finite raises ``FloatingPointError`` before any parameter has moved.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = Optimizer(torch.optim.SGD, {"weight": weight}, 0.5)
    >>> weight.sum().backward()
    >>> optimizer([weight])
    >>> weight.tolist(), round(optimizer.gradient_norm, 4)
    ([-0.5, -0.5], 1.4142)
    """

    def __init__(
        self,
        constructor: Callable[..., torch.optim.Optimizer],
        parameters: Mapping[str, Tensor],
        learning_rate: float,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(constructor, {"lr": learning_rate})
        self.parameters = dict(parameters)
        self.clip_norm = clip_norm
        self.gradient_norm = 0.0
        options: dict[str, Any] = {"lr": learning_rate}
        if "fused" in inspect.signature(constructor).parameters and all(
            p.is_floating_point() for p in self.parameters.values()
        ):
            options["fused"] = True
        self.torch_optimizer = constructor(list(self.parameters.values()), **options)
        self._known = {id(p) for p in self.parameters.values()}

    @property
    def learning_rate(self) -> float:
        return self.torch_optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.torch_optimizer.param_groups:
            group["lr"] = value

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if any(id(p) not in self._known for p in params):
            raise UsageError(
                "the pair declared a parameter after its first step: declare every pyro.param at "
                "each call of model and guide"
            )
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.gradient_norm = norm.item()
        if not torch.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        self.torch_optimizer.step()

    def get_state(self) -> dict[str, Any]:
        """The state of the torch optimiser."""
        return self.torch_optimizer.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Put the torch optimiser into a saved state."""
        self.torch_optimizer.load_state_dict(state)
