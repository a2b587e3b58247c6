"""The update of Adam as part of a training step's graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import NotTraceable, UsageError
from pyro_vae.training.adam import FusedAdam, laid_out
from pyro_vae.training.graph import Named
from pyro_vae.training.optimizer import Optimizer

NUMBERS = ("loss", "norm", "reconstruction", "kl")
"""The kinds of the numbers of a step, see ``Engine.numbers``."""


def in_layout(gradients: Sequence[Tensor | None], trained: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients, or None, with the layouts of their parameters."""
    require_dense(gradients)
    both = zip(gradients, trained, strict=True)
    return [None if gradient is None else laid_out(gradient, p) for gradient, p in both]


def require_dense(gradients: Sequence[Tensor | None]) -> None:
    """Raise `UsageError` for a sparse gradient: torch computes no norm of several such tensors."""
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        raise UsageError("a parameter has a sparse gradient: use nn.Embedding with sparse=False")


def kept(parameter: Tensor, gradient: Tensor | None, optimizer: Optimizer | None) -> Tensor | None:
    """Return the gradient of a step; zeros in a step without a parameter that had one before.

    Stock ``SVI`` keeps such zeros, and the averages of Adam still move the parameter.
    """
    if gradient is not None:
        if optimizer is not None:
            optimizer.require_known([parameter])
        return gradient
    had = parameter.grad is not None or (optimizer is not None and optimizer.has_moved(parameter))
    return torch.zeros_like(parameter) if had else None


def with_update(
    pair: nn.Module, function: Callable[..., Named], optimizer: Optimizer, adam: FusedAdam
) -> Callable[..., Named]:
    """Return a function that also updates the parameters, and has no gradients as results.

    The arithmetic of the update becomes part of a compiled graph.
    """

    def whole(numbers: Tensor, *given: Tensor) -> Named:
        found = function(numbers[0], *given)
        trained = [p for p in pair.parameters() if p.requires_grad]
        gradients = _gradients(found, adam)
        kept = _numbers(found)
        squares = [(g * g).sum(0).sum() for g in gradients]  # cheaper in Inductor than one sum
        norm = kept["norm", ""] = torch.stack(squares).sum().sqrt()
        sound = torch.stack([*squares, *_zeros(kept, found, norm)]).sum()
        adam.update(trained, optimizer.clipped(gradients, norm), sound, numbers[1:])
        return {("numbers", tuple(kept)): torch.stack(list(kept.values())), **found}

    return whole


def before_update(
    function: Callable[..., Named], optimizer: Optimizer, adam: FusedAdam
) -> Callable[..., Named]:
    """Return a function for a GPU, with all that `update_after` needs as results.

    The counts of values outside their support become numbers of the step, so that nothing waits for
    the GPU. They have a name of their own, because an eager run has none: it raises an error.
    """

    def whole(numbers: Tensor, *given: Tensor) -> Named:
        found = function(numbers[0], *given)
        gradients = _gradients(found, adam)
        kept = _numbers(found)
        loss, norm = kept["loss", ""], kept["norm", ""]
        sound = torch.isfinite(torch.stack([norm, *_zeros(kept, found, norm)])).all()
        counts = {key: count.to(loss.dtype) for key, count in found.items()}
        gradients = optimizer.clipped(gradients, norm)
        outside = {("outside", tuple(counts)): torch.stack(list(counts.values()))} if counts else {}
        return {
            ("numbers", tuple(kept)): torch.stack(list(kept.values())),
            "sound": sound.float(),
            "rate": numbers[1].float(),
            **dict(enumerate(gradients)),
            **outside,
        }

    return whole


def update_after(adam: FusedAdam) -> Callable[..., Named]:
    """Return what follows the graph of `before_update` on a GPU: torch's own fused kernel."""

    def finish(found: Named, *inputs: Tensor) -> Named:
        adam.step([found[i] for i in range(len(adam.params))], found["sound"], found["rate"])
        return {key: found[key] for key in found if isinstance(key, tuple)}

    return finish


def all_numbers(results: Named) -> tuple[list[tuple[str, str]], Tensor]:
    """Return the names of all numbers of captured steps, and the numbers."""
    return [name for _, names in results for name in names], torch.cat(list(results.values()), -1)


def _gradients(found: Named, adam: FusedAdam) -> list[Tensor]:
    """Take the gradients of all parameters that Adam updates out of the results of a step."""
    gradients = [found.pop(key) for key in list(found) if key[0] == "gradient"]
    if len(gradients) != len(adam.params):
        raise NotTraceable("a parameter was frozen, or has no gradient")
    return gradients


def _numbers(found: Named) -> dict[Any, Tensor]:
    """Take the numbers of a step out of its results; the counts of bad values stay."""
    return {key: found.pop(key) for key in list(found) if key[0] in NUMBERS}


def _zeros(kept: Named, counts: Named, like: Tensor) -> list[Tensor]:
    """Return zeros, or NaN for a loss that is not finite and for values outside their support.

    A sum of these with the norm is not finite in such a step, which then moves no parameter.
    """
    bad = [torch.where(count > 0, torch.nan, torch.zeros_like(like)) for count in counts.values()]
    return [0 * kept["loss", ""].to(like.dtype), *bad]
