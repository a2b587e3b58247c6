"""How a step is run: eagerly, as a graph traced once and replayed, or as that graph compiled.

The engine is a Pyro ``ELBO`` that runs another one, and any ``pyro.infer.SVI`` takes it.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.compat import get_trace, zero_grads
from pyro_vae.errors import NotTraceable
from pyro_vae.pairs import places
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.kl_weight import KLWeight
from pyro_vae.training.recording import ELBOParts, recorded, surrogate
from pyro_vae.training.settings import require_engine
from pyro_vae.training.tracing import Graphs, Named

COMPILE_SECONDS = 20.0
"""What Inductor takes for a step, about."""

NODE_SECONDS = 1e-5
"""What compiling saves at each step for each operation of the graph, about."""


class Step(SVI):
    """``SVI`` whose step leaves the loss on its device, and hands the gradient's norm on."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: "Engine") -> None:
        super().__init__(model, guide, optim, loss)
        self.engine = loss

    def step(self, *batch: Tensor) -> Any:
        with poutine.trace(param_only=True) as capture:
            loss = self.loss_and_grads(self.model, self.guide, *batch)
        sites: Any = capture.trace.nodes.values()
        params = {site["value"].unconstrained() for site in sites}
        params = {parameter for parameter in params if parameter.requires_grad}
        self.optim(params, norm=self.engine.numbers[1])
        zero_grads(params)
        return loss


class Engine(ELBO):
    r"""A Pyro ELBO that runs another one as a graph: the same loss, the same gradients, less time.

    Arguments:
        pair: the pair that is trained.
        objective: a Pyro ELBO; ``Trace_ELBO()`` by default.
        engine: "eager" is stock Pyro; "traced" replays a graph; "compiled" runs it through
            Inductor; "auto" is the second, and the third where the steps repay the compilation.
        prepare: what is done to a minibatch before the pair sees it, within the graph.
        precision: "bfloat16" runs the networks under autocast.
        batch_size: rows of a full minibatch; shorter ones are never compiled.
        steps: how many full minibatches are to come, for "auto".
        num_data: how many data there are, of which each batch has its share of the KL of latents
            outside the data plate; by default each batch is all data, as for ``Trace_ELBO``.
        declare: make every parameter a site that SVI sees. An optimiser that knows its parameters,
            such as `pyro_vae.training.optimizer.Optimizer`, needs none.
        say: shows a few words while something takes seconds.

    The attribute ``beta``, a number or a tensor, weighs the KL; set it between steps. What else
    model and guide use that is no attribute of the pair is taken to stay as it is.
    What cannot be traced is run eagerly from then on, and one warning says why. After each step
    ``numbers`` holds the loss, the global norm of its gradient, and the parts of the ELBO, summed
    over the minibatch and named by ``names``, on the pair's device.

    >>> import torch, pyro.optim, pyro_vae as pv
    >>> from pyro.infer import SVI
    >>> vae = pv.VAE.mlp((4,))
    >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Engine(vae))
    >>> loss = svi.step(torch.ones(8, 4))
    """

    def __init__(
        self,
        pair: nn.Module,
        objective: ELBO | None = None,
        engine: str = "auto",
        *,
        prepare: Callable[[Sequence[Tensor]], Batch] | None = None,
        precision: str = "float32",
        batch_size: int = 0,
        steps: int = 0,
        num_data: int | None = None,
        declare: bool = True,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        objective = objective or Trace_ELBO()
        super().__init__(num_particles=objective.num_particles)
        self.pair, self.engine = pair, require_engine(engine)
        self.parts = ELBOParts(pair=pair)
        self.objective: Any = recorded(objective, self.parts)
        self.weight = KLWeight()
        self.prepare = prepare or tuple
        self.precision, self.declare = precision, declare
        self.batch_size, self.steps, self.say = batch_size, steps, say
        self.num_data = num_data
        self.names: list[tuple[str, str]] = []
        self.numbers = torch.zeros(0)
        self._programs: tuple[Any, Any] = (None, None)
        self._graphs: Graphs | None = None
        self._beta = torch.zeros(())

    @property
    def beta(self) -> float | Tensor:
        """The weight on the KL."""
        return self.weight.weight

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self.weight.weight = value

    def _get_trace(self, *args: Any) -> Any:
        return get_trace(self.objective, *args)

    def loss(self, model: Any, guide: Any, *batch: Tensor) -> float:
        """The objective's loss, eagerly."""
        self._take_share(batch)
        return self.objective.loss(self.weight(model), self.weight(guide), *self.prepare(batch))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Tensor) -> Tensor | float:
        """The loss, as a tensor on the pair's device; gradients go to the pair's parameters."""
        if self.engine != "eager":
            try:
                return self._replay(model, guide, batch)
            except NotTraceable as error:
                self.engine = "eager"
                for parameter in self.pair.parameters():
                    parameter.grad = None  # those of a graph, which nobody adds to
                warnings.warn(
                    f"{type(self.pair).__name__} is trained by the eager engine, because {error}",
                    stacklevel=2,
                )
        self.parts.clear()
        self._take_share(batch)
        programs = (self.weight(model), self.weight(guide))
        with self._autocast(batch):
            loss = self.objective.loss_and_grads(*programs, *self.prepare(batch))
        gradients = [p.grad for p in self.pair.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.names, numbers = self._sums(
            torch.as_tensor(loss, dtype=torch.float64, device=norm.device), norm
        )
        self.numbers = torch.stack(numbers)
        return loss

    def _replay(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        if self._graphs is None or self._programs != (model, guide):
            self._programs = (model, guide)
            function = self._function(self.weight(model), self.weight(guide))
            tolerance = 1e-5 if self.precision == "float32" else 2e-2
            self._graphs = Graphs(self.pair, function, self._compiles, tolerance)
            like = next(self.pair.parameters())
            self._beta = torch.zeros((), dtype=like.dtype, device=like.device)
        self._beta.fill_(self.beta)
        found = self._graphs(self._beta, *(t.to(self._beta.device) for t in batch))
        self.numbers = found["numbers"]
        for name in self.parts.outside:
            if found[f"outside {name}"].item():
                raise ValueError(f"site '{name}' observes values outside its support")
        for i, parameter in enumerate(self._graphs.trained()):
            parameter.grad = found.get(f"gradient {i}")
            if self.declare:
                pyro.param(f"pair$$${i}", parameter)
        return self.numbers[0]

    def _function(self, model: Any, guide: Any) -> Callable[..., Named]:
        def function(beta: Tensor, *batch: Tensor) -> Named:
            before, self.beta = self.beta, beta
            self.parts.clear()
            self._take_share(batch)
            try:
                with self._autocast(batch):
                    loss, differentiable = surrogate(
                        self.objective, model, guide, self.prepare(batch)
                    )
                    trained = [p for p in self.pair.parameters() if p.requires_grad]
                    gradients = torch.autograd.grad(differentiable, trained, allow_unused=True)
            finally:
                self.beta = before
            present = [gradient for gradient in gradients if gradient is not None]
            norms = [torch.linalg.vector_norm(gradient) for gradient in present]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            self.names, numbers = self._sums(loss.detach(), norm)
            found = {"numbers": torch.stack(numbers)}
            found |= {f"outside {name}": n for name, n in self.parts.outside.items()}
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    found[f"gradient {i}"] = gradient
            return found

        return function

    def _take_share(self, batch: Sequence[Tensor]) -> None:
        """Set what of the KL of latents outside the data plate is this batch's."""
        found = places.known(self.pair)
        declared = None if found is None else found.num_data
        num_data = declared or self.num_data
        if num_data is not None:
            share = len(batch[0]) / num_data
            self.parts.global_share = self.weight.global_weight = share

    def _sums(self, loss: Tensor, norm: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """The names and values of ``numbers``."""
        named = {("loss", ""): loss, ("norm", ""): norm}
        named |= {("reconstruction", name): v for name, v in self.parts.reconstruction.items()}
        named |= {("kl", name): v for name, v in self.parts.kl.items()}
        return list(named), [value.to(loss.dtype) for value in named.values()]

    def _autocast(self, batch: Sequence[Tensor]) -> Any:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(batch[0].device.type, dtype=torch.bfloat16)

    def _compiles(self, inputs: Sequence[Tensor], operations: int) -> bool:
        if self.engine == "auto":
            repays = self.steps * operations * NODE_SECONDS > COMPILE_SECONDS
            self.engine = "compiled" if repays else "traced"
        chosen = self.engine == "compiled" and len(inputs[1]) >= self.batch_size
        if chosen:
            self.say("compiling the step")
        return chosen
