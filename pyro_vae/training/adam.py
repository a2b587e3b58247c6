"""The update of a fused ``torch.optim.Adam`` or ``AdamW``, without the Python code of its step."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.compat import fused_adam_, fused_adamw_, has_step_hooks
from pyro_vae.training.captured import on_gpu


class FusedAdam:
    """The update of a torch optimizer, on the optimizer's own state.

    ``torch.optim.Optimizer.step`` collects and groups the state again in each step. For small
    networks this takes as long as the update itself. `step` calls torch's fused kernel. `update`
    is the same arithmetic as operations that become part of a compiled graph.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
        self.params, self.group = params, optimizer.param_groups[0]
        self.decoupled = type(optimizer) is torch.optim.AdamW
        states = [optimizer.state[p] for p in params]
        self.averages = [state["exp_avg"] for state in states]
        self.squares = [state["exp_avg_sq"] for state in states]
        # The step counts become views of one tensor, so one operation increases all of them.
        self.count = torch.stack([state["step"] for state in states])
        self.steps = list(self.count.unbind())
        for state, step in zip(states, self.steps, strict=True):
            state["step"] = step
        self._even: bool | None = None
        self.held: dict[str, Tensor] = {}
        """The state by name. A graph replaces these tensors by its inputs."""
        for i, pair in enumerate(zip(self.averages, self.squares, strict=True)):
            self.held[f"average {i}"], self.held[f"square {i}"] = pair
        if on_gpu(self.count):
            self.held["count"] = self.count

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> "FusedAdam | None":
        """Return one for this optimizer; None unless it is a fused Adam without extra options."""
        group, *others = optimizer.param_groups
        kind, hooked = type(optimizer), has_step_hooks(optimizer)
        if kind not in (torch.optim.Adam, torch.optim.AdamW) or others or hooked:
            return None
        special = ("amsgrad", "differentiable", "capturable")
        if not group["fused"] or any(group.get(name) for name in special):
            return None
        if group.get("decoupled_weight_decay") and kind is torch.optim.Adam:
            return None
        if isinstance(group["lr"], Tensor) or len({(p.dtype, p.device) for p in params}) > 1:
            return None
        if not optimizer.state:
            _start(optimizer)
        return cls(optimizer, params) if all(p in optimizer.state for p in params) else None

    def serves(self, params: list[Tensor]) -> bool:
        """Whether these are exactly the parameters that it steps."""
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    def is_even(self) -> bool:
        """Whether all parameters have taken as many steps, as `update` assumes; `step` does not.

        One that was frozen for a while has taken fewer.
        """
        if self._even is None:
            self._even = on_gpu(self.count) or bool((self.count == self.count[:1]).all())
        return self._even

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        sound: Tensor | None = None,
        rate: Tensor | None = None,
    ) -> None:
        """Update with the kernel of torch's own step.

        Arguments:
            sound: 0 on a GPU if nothing may be updated, else 1, as float32.
            rate: the learning rate as a float32 tensor on the GPU, for a captured step. The default
                is that of the optimizer.
        """
        group, self._even = self.group, None
        beta1, beta2 = group["betas"]
        self.count += 1 if sound is None else sound
        kernel = fused_adamw_ if self.decoupled else fused_adam_
        kernel(
            self.params,
            gradients,
            self.averages,
            self.squares,
            [],
            self.steps,
            lr=group["lr"] if rate is None else rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            found_inf=None if sound is None else 1 - sound,
        )

    def numbers(self) -> list[float]:
        """Return the numbers of the next step that change from step to step."""
        group, taken = self.group, self.steps[0].item() + 1
        beta1, beta2 = group["betas"]
        return [
            group["lr"] / (1 - beta1**taken),
            (1 - beta2**taken) ** -0.5,
            group["lr"] * group["weight_decay"],
        ]

    @torch.no_grad()
    def update(
        self, params: Sequence[Tensor], gradients: Sequence[Tensor], norm: Tensor, numbers: Tensor
    ) -> None:
        r"""Update the parameters and ``held`` in place, unless the norm is not finite.

        .. math::
            m \leftarrow m + (1-\beta_1)(g - m), \quad
            v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
            \theta \leftarrow \theta - \frac{\eta}{1-\beta_1^t}
            \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

        Arguments:
            params: the parameters as the graph holds them.
            norm: the global norm of the gradients.
            numbers: `numbers` as a tensor.
        """
        beta1, beta2 = self.group["betas"]
        decay, eps = self.group["weight_decay"], self.group["eps"]
        rate, root, shrink = numbers.unbind()
        sound = torch.isfinite(norm)
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            average, square = self.held[f"average {i}"], self.held[f"square {i}"]
            g = -g if self.group["maximize"] else g
            g = g + decay * p if decay and not self.decoupled else g
            m = average + (1 - beta1) * (g - average)
            v = beta2 * square + (1 - beta2) * g * g
            old = p - shrink * p if decay and self.decoupled else p
            new = old - rate * m / (v.sqrt() * root + eps)
            average.copy_(torch.where(sound, m, average))
            square.copy_(torch.where(sound, v, square))
            p.copy_(torch.where(sound, new, p))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps and overlaps, in any order."""
    return torch.empty_like(tensor).stride() == tensor.stride()


def laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the layout of its parameter in memory.

    The gradient of a transposed or expanded parameter has other strides. ``backward`` copies such a
    gradient, and ``autograd.grad`` does not. The fused kernels of torch's optimizers on a CPU read
    memory in order, so they would take the wrong numbers, without an error.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _start(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that its first step would make."""
    saved = optimizer.state_dict()
    params = optimizer.param_groups[0]["params"]
    saved["state"] = {
        i: {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
        for i, p in enumerate(params)
    }
    optimizer.load_state_dict(saved)
