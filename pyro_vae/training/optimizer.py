"""One torch optimizer for all parameters of a pair, as a ``PyroOptim``."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.errors import UsageError, first_line
from pyro_vae.training.adam import FusedAdam, is_dense, laid_out


class Optimizer(PyroOptim):
    """A ``PyroOptim`` that steps all parameters with one torch optimizer, fused if torch can.

    Stock ``PyroOptim`` makes an optimizer for each parameter and clips each one separately. This
    optimizer steps all parameters together and clips by the global norm.

    Arguments:
        constructor: makes the torch optimizer: ``torch.optim.Adam`` or a ``functools.partial``.
        parameters: the parameters, by name.
        learning_rate: the first learning rate. Set the attribute to change it.
        clip_norm: the greatest global norm of the gradient; None for no limit.

    A gradient that is not finite moves no parameter, and raises ``FloatingPointError``. A fused
    Adam on a GPU does not raise, because a check would wait for the GPU. Read ``norm`` there.

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
        options: dict[str, Any] = {"lr": learning_rate}
        if "fused" in inspect.signature(constructor).parameters and all(
            p.is_floating_point() and is_dense(p) for p in self.parameters.values()
        ):
            options["fused"] = True
        self.torch_optimizer = _made(constructor, list(self.parameters.values()), options)
        self._strides = [p.stride() for p in self.parameters.values()]
        self._known = {id(p) for p in self.parameters.values()}
        self.norm: Tensor | float = 0.0
        self._adam: FusedAdam | None = None
        self.exchange: Callable[[], Tensor] | None = None
        """With several processes: adds up their gradients, and returns the global norm."""

    @property
    def gradient_norm(self) -> float:
        """The global norm of the last step's gradient, before clipping."""
        return float(self.norm)

    @property
    def learning_rate(self) -> float:
        return self.torch_optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.torch_optimizer.param_groups:
            group["lr"] = value

    def __call__(
        self, params: Iterable[Tensor], *args: Any, norm: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Take a step, as ``SVI`` requests it; pass the gradient ``norm`` if it is known."""
        self.require_known(params)
        if self.exchange is not None:
            norm = self.exchange()
        for p in self.parameters.values():
            if not p.requires_grad:
                p.grad = None  # a gradient of zero would still move it, by its average
        self._follow_layouts()
        present = [p for p in self.parameters.values() if p.grad is not None]
        for p in present:
            if p.grad.stride() != p.stride():  # type: ignore[union-attr]
                p.grad = laid_out(cast(Tensor, p.grad), p)
        gradients = cast(list[Tensor], [p.grad for p in present])
        if not gradients:
            return
        self.norm = norm = torch.nn.utils.get_total_norm(gradients) if norm is None else norm
        fused = self._adam if self._adam is not None and self._adam.serves(present) else None
        # A fused update on a GPU skips a gradient that is not finite without a read here.
        if not (norm.is_cuda and fused) and not math.isfinite(norm.item()):
            raise FloatingPointError("the gradient is not finite")
        if self.clip_norm is not None:
            gradients = self.clipped(gradients, norm)
            for parameter, gradient in zip(present, gradients, strict=True):
                parameter.grad = gradient
        if fused is not None:
            fused.step(gradients, norm.isfinite().float() if norm.is_cuda else None)
        else:
            self._step()
            self._adam = FusedAdam.of(self.torch_optimizer, present)

    def require_known(self, params: Iterable[Tensor]) -> None:
        """Raise `UsageError` for a parameter that the optimizer does not have."""
        if all(id(p) in self._known for p in params):
            return
        if all(p.is_contiguous() for p in self.parameters.values()):
            raise UsageError(
                "a parameter is trained that was not declared, or was frozen, at the first step; "
                "declare every pyro.param in each call of model and guide, and freeze parameters "
                "after the first epoch or before `fit`, but do not unfreeze others"
            )
        raise UsageError(
            "a parameter is not contiguous in memory, and Pyro would train a copy of it: make "
            "it from `tensor.contiguous()`"
        )

    def has_moved(self, parameter: Tensor) -> bool:
        """Whether the state of the optimizer shows that a parameter has had a gradient."""
        own = self.torch_optimizer.state.get(parameter, {})
        return bool(own) and float(own.get("step", 1)) > 0

    def for_graphs(self) -> "FusedAdam | None":
        """Return the update of all parameters that a compiled step can contain, or None."""
        frozen = any(not p.requires_grad for p in self.parameters.values())
        if frozen or self.exchange is not None:  # processes add up gradients outside of a graph
            return None
        self._follow_layouts()
        if self._adam is None or not self._adam.serves(list(self.parameters.values())):
            self._adam = FusedAdam.of(self.torch_optimizer, list(self.parameters.values()))
        return self._adam if self._adam is not None and self._adam.is_even() else None

    def _follow_layouts(self) -> None:
        """Give the state of a parameter its layout, if the parameter was replaced by another one.

        The fused kernels read parameters, gradients and state in the order of the memory.
        """
        strides = [p.stride() for p in self.parameters.values()]
        if strides == self._strides:
            return
        self._strides, self._adam = strides, None
        for p in self.parameters.values():
            for name, value in self.torch_optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    self.torch_optimizer.state[p][name] = laid_out(value, p)
        if not all(map(is_dense, self.parameters.values())):
            for group in self.torch_optimizer.param_groups:
                group["fused"] = False

    def stepped(self, norm: float) -> None:
        """Count a step that a compiled graph took, unless its gradient is not finite."""
        self.norm = norm
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        count = cast(FusedAdam, self._adam).count.numpy()  # the same memory
        count += 1  # cheaper than an operation of torch

    def clipped(self, gradients: list[Tensor], norm: Tensor) -> list[Tensor]:
        """Return the gradients, scaled so that their global norm is at most ``clip_norm``."""
        if self.clip_norm is None:
            return gradients
        # Not in place: in a graph, two parameters may share one tensor as their gradient.
        scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return [(gradient * scale).to(gradient.dtype) for gradient in gradients]

    def _step(self) -> None:
        try:
            self.torch_optimizer.step()
        except RuntimeError as error:  # for example, SparseAdam takes only sparse gradients
            raise UsageError(
                f"cannot take a step: {first_line(error)}", argument="optimizer"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """Return the state of the torch optimizer."""
        return self.torch_optimizer.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state of the torch optimizer."""
        _require_alike(state, self.torch_optimizer)
        self.torch_optimizer.load_state_dict(state)
        self._adam = None
        for p in self.parameters.values():  # as a run that was not interrupted
            p.grad = torch.zeros_like(p) if self.has_moved(p) else None


def _require_alike(state: dict[str, Any], own: torch.optim.Optimizer) -> None:
    """Raise `ValueError` if a saved state is not one that this optimizer makes.

    torch loads any state without an error, and a later step fails, or writes beyond a tensor.
    """
    groups = own.state_dict()["param_groups"]
    if len(state["param_groups"]) != len(groups):
        raise ValueError(f"{len(state['param_groups'])} groups instead of {len(groups)}")
    odd = [
        f"param_groups.{name}"
        for saved, mine in zip(state["param_groups"], groups, strict=True)
        for name in sorted(saved.keys() & mine.keys())
        if _kind(saved[name])[0] != _kind(mine[name])[0]
    ]
    expected = _stepped(own)
    for i, values in state["state"].items():
        for name in sorted(values.keys() | expected.get(i, values).keys()):
            if _kind(values.get(name)) != _kind(expected.get(i, values).get(name)):
                odd.append(f"{name} of parameter {i}")
    if odd:
        raise ValueError(f"unexpected {', '.join(odd[:3])}")


def _stepped(own: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The state of a like optimizer after a step of zeros; empty if it cannot take one."""
    try:
        like = copy.deepcopy(own)
        for group in like.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        like.step()
    except Exception:  # of a user's own optimizer; what it loads is not known then
        return {}
    return like.state_dict()["state"]


def _kind(value: Any) -> tuple[str, tuple[int, ...] | None]:
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape)
    if value is None or isinstance(value, bool):
        return "flag", None
    kinds: dict[str, Any] = {"number": (int, float), "text": str, "several": (list, tuple)}
    return next((kind for kind, types in kinds.items() if isinstance(value, types)), "other"), None


def _made(
    constructor: Callable[..., Any], parameters: list[Tensor], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return a torch optimizer that takes steps without a closure, or raise `UsageError`."""
    try:
        made = constructor(parameters, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{NEEDED}, but {name_of(constructor)} fails: {first_line(error)}", argument="optimizer"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"{NEEDED}, but it makes {type(made).__name__}", argument="optimizer")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"must take a step from gradients, but {type(made).__name__} evaluates the loss again "
            "(a closure), which is noisy here",
            argument="optimizer",
        )
    return made


NEEDED = (
    "must make a torch optimizer from parameters and lr, as torch.optim.Adam or a "
    "functools.partial of it does"
)
"""What `pyro_vae.fit` needs as its ``optimizer``."""


def name_of(part: Any) -> str:
    """Return a short name of an object: the name of a class or function, a word, or its type."""
    if isinstance(part, (str, int, float, type(None))):
        return repr(part)
    return getattr(part, "__name__", None) or f"an instance of {type(part).__name__}"
