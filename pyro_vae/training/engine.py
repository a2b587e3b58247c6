"""How a step runs: eagerly, as a graph that is traced once and replayed, or as that graph compiled.

The engine is a Pyro ``ELBO`` that runs another ELBO. Any ``pyro.infer.SVI`` accepts it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.compat import get_trace, zero_grads
from pyro_vae.errors import NotTraceable, warn
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.noise import CounterDraws, SiteNoise, new_key
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.adam import FusedAdam
from pyro_vae.training.kl_weight import KLWeight
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.recording import ELBOParts, recorded, surrogate
from pyro_vae.training.settings import require_engine
from pyro_vae.training.tracing import Graphs, Named, fall_back

COMPILE_SECONDS = 20.0
"""About how long Inductor takes to compile a step."""

NODE_SECONDS = 1e-5
"""About how much time a compiled graph saves in each step, for each operation of the graph."""

NUMBERS = ("loss", "norm", "reconstruction", "kl")
"""The kinds of ``Engine.numbers``."""


class Step(SVI):
    """An ``SVI`` whose step leaves the loss on its device, and passes the gradient norm on."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: "Engine") -> None:
        super().__init__(model, guide, optim, loss)
        self.engine = loss

    def step(self, *batch: Tensor) -> Any:
        if self.engine.whole_step(self.model, self.guide, batch):
            return self.engine.numbers[0]
        with poutine.trace(param_only=True) as capture:
            loss = self.loss_and_grads(self.model, self.guide, *batch)
        sites: Any = capture.trace.nodes.values()
        params = {site["value"].unconstrained() for site in sites}
        params = {parameter for parameter in params if parameter.requires_grad}
        total, norm = self.engine.numbers[:2]
        self.optim(params, norm=norm + 0 * total)  # a loss that is not finite moves no parameter
        zero_grads(params)
        return loss


class Engine(ELBO):
    r"""A Pyro ELBO that runs another one as a graph: the same loss and gradients in less time.

    Arguments:
        pair: the pair to train.
        objective: a Pyro ELBO; the default is ``Trace_ELBO()``.
        engine: "eager" is stock Pyro. "traced" replays a graph. "compiled" runs the graph through
            Inductor. "auto" is "traced", or "compiled" if the steps repay the compilation.
        prepare: the preparation of a minibatch for the pair. It is part of the graph.
        precision: "bfloat16" runs the networks under autocast.
        batch_size: rows of a full minibatch. Smaller minibatches are never compiled.
        steps: how many steps with full minibatches follow, for "auto".
        num_data: the number of training data. Each minibatch has its share of the KL of global
            latents. By default each minibatch has the whole KL, as in ``Trace_ELBO``.
        declare: make every parameter a site that SVI sees. An optimizer that knows its parameters,
            such as `pyro_vae.training.optimizer.Optimizer`, does not need this.
        say: shows a few words before a wait of several seconds.
        noise: draw the values of sample sites, and binarize, by `pyro_vae.pairs.noise`. A compiled
            graph computes this noise in its own kernels. Each step has a new key, which is drawn
            from torch's generator. By default all draws use torch's generator, as in stock Pyro.
        optimizer: compiled graphs contain its update, if it is Adam or AdamW on a CPU. Only `Step`
            runs such graphs.

    The attribute ``beta`` is the weight on the KL, a number or a tensor. Set it between steps. The
    engine assumes that everything else outside the pair which model and guide use stays constant.
    If a pair cannot be traced, the engine is eager from then on, and one warning gives the reason.

    After each step, ``numbers`` holds the loss, the global norm of its gradient, and the parts of
    the ELBO, summed over the minibatch. It is a tensor on the pair's device. ``names`` gives the
    kind and the site of each number.

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
        noise: bool = False,
        optimizer: Optimizer | None = None,
    ) -> None:
        objective = objective or Trace_ELBO()
        super().__init__(num_particles=objective.num_particles)
        self.pair, self.engine = pair, require_engine(engine)
        self.parts = ELBOParts(pair=pair)
        self.objective: Any = recorded(objective, self.parts)
        self.prepare = prepare or tuple
        self.precision, self.declare = precision, declare
        self.batch_size, self.steps, self.say = batch_size, steps, say
        self.num_data = num_data
        self.beta: float | Tensor = 1.0
        self.names: list[tuple[str, str]] = []
        self.numbers = torch.zeros(0)
        self._programs: tuple[Any, Any] = (None, None)
        self.noise, self.optimizer = noise, optimizer
        self._graphs: Graphs | None = None
        self._whole: Graphs | None = None
        self._update: FusedAdam | None = None
        self._refused = False
        """Whether a step together with its update cannot be a compiled graph."""
        self._beta = torch.zeros(())
        self._inputs = torch.zeros(4)
        """The weight on the KL and the numbers of the update, for graphs that contain it."""

    def _get_trace(self, *args: Any) -> Any:
        return get_trace(self.objective, *args)

    def loss(self, model: Any, guide: Any, *batch: Tensor) -> float:
        """Compute the objective's loss eagerly."""
        weight = self._weight(self.beta, batch)
        return self.objective.loss(weight(model), weight(guide), *self.prepare(batch))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Tensor) -> Tensor | float:
        """Return the loss, on the pair's device; write gradients to the pair's parameters."""
        if self.engine != "eager":
            try:
                return self._replay(model, guide, batch)
            except NotTraceable as error:
                self._become_eager(error)
        weight = self._weight(self.beta, batch)
        with self._autocast(batch), self._noise(batch) as prepare:
            loss = self.objective.loss_and_grads(weight(model), weight(guide), *prepare(batch))
        gradients = [p.grad for p in self.pair.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        total = torch.as_tensor(loss, dtype=torch.float64, device=norm.device)
        self._keep(_sums(total, norm, self.parts))
        return loss

    def _become_eager(self, error: NotTraceable) -> None:
        self.engine = "eager"
        for parameter in self.pair.parameters():
            parameter.grad = None  # eager gradients would be added to those of a graph
        warn(fall_back(self.pair, "trained", error))

    def whole_step(self, model: Any, guide: Any, batch: Batch) -> bool:
        """Take a step, update included, as one compiled graph; return whether there is one.

        Raises ``FloatingPointError`` if loss or gradient are not finite. Then nothing was updated.
        """
        full = len(batch[0]) >= self.batch_size
        if self.engine != "compiled" or self.optimizer is None or self._refused or not full:
            return False
        if self._graphs is None or self._programs != (model, guide):
            self._start(model, guide)
        adam = self.optimizer.for_graphs()
        if adam is not self._update:  # the optimizer has another state
            self._start(model, guide)
        if self._whole is None or adam is None:
            return False
        # NumPy writes to the same memory, without the cost of an operation of torch.
        self._inputs.numpy()[:] = [float(self.beta), *adam.numbers()]
        try:
            found = self._whole.found(self._inputs, *batch)
        except NotTraceable:
            self._whole, self._refused = None, True
            return False
        if not found.graph.compiled:
            cast(Graphs, self._graphs).can_compile = self._whole.can_compile
            self._whole, self._refused = None, True
            return False
        results = found()
        self._require_inside(results)
        ((_, names), self.numbers), *_ = results.items()
        self.names = list(names)
        loss, norm, *_ = self.numbers.tolist()
        self.optimizer.stepped(norm + 0 * loss)
        return True

    def _replay(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        if self._graphs is None or self._programs != (model, guide):
            self._start(model, guide)
        graphs = cast(Graphs, self._graphs)
        self._beta.fill_(self.beta)
        found = graphs(self._beta, *(t.to(self._beta.device) for t in batch))
        if self.engine == "auto":
            self.engine = self._choice(graphs.first_operations)
        self._require_inside(found)
        for i, parameter in enumerate(graphs.trained()):
            parameter.grad = found.get(("gradient", i))
            if self.declare:
                pyro.param(f"pair$$${i}", parameter)
        self._keep({key: value for key, value in found.items() if key[0] in NUMBERS})
        return self.numbers[0]

    def _require_inside(self, found: Named) -> None:
        for (kind, name), value in found.items():
            if kind == "outside" and value.item():
                raise ValueError(f"site '{name}' observes values outside its support")

    def _start(self, model: Any, guide: Any) -> None:
        """Prepare the graphs of these programs."""
        self._programs = (model, guide)
        like = next(self.pair.parameters())
        self._beta = torch.zeros((), dtype=like.dtype, device=like.device)
        tolerance = 1e-5 if self.precision == "float32" else 2e-2
        function = self._function(model, guide)
        self._graphs = Graphs(self.pair, function, self._compiles, tolerance, self.say)
        double = like.dtype == torch.float64
        self._inputs = torch.zeros(4, dtype=torch.float64 if double else torch.float32)
        adam = self.optimizer.for_graphs() if self.optimizer and not like.is_cuda else None
        self._whole, self._update = None, adam
        if adam is not None:
            whole = self._whole_function(function, adam)
            self._whole = Graphs(
                self.pair, whole, lambda *_: True, tolerance, self.say, adam.held, updates=True
            )

    def _whole_function(
        self, function: Callable[..., Named], adam: FusedAdam
    ) -> Callable[..., Named]:
        """Return a function that also updates the parameters, and has no gradients as results."""

        def whole(numbers: Tensor, *batch: Tensor) -> Named:
            found = function(numbers[0], *batch)
            trained = [p for p in self.pair.parameters() if p.requires_grad]
            if len(trained) != len(adam.params):
                raise NotTraceable("a parameter was frozen")
            if any(("gradient", i) not in found for i in range(len(trained))):
                raise NotTraceable("a parameter has no gradient")
            gradients = [found.pop(("gradient", i)) for i in range(len(trained))]
            kept = {key: found.pop(key) for key in list(found) if key[0] in NUMBERS}
            squares = [(g * g).sum(0).sum() for g in gradients]  # cheaper in Inductor than one sum
            norm = kept["norm", ""] = torch.stack(squares).sum().sqrt()
            # A loss that is not finite, and a value outside its support, move no parameter.
            outside = [value for (kind, _), value in found.items() if kind == "outside"]
            bad = [torch.where(count > 0, torch.nan, torch.zeros_like(norm)) for count in outside]
            sound = torch.stack([*squares, 0 * kept["loss", ""].to(norm.dtype), *bad]).sum()
            gradients = cast(Optimizer, self.optimizer).clipped(gradients, norm)
            adam.update(trained, gradients, sound, numbers[1:])
            return {("numbers", tuple(kept)): torch.stack(list(kept.values())), **found}

        return whole

    def _function(self, model: Any, guide: Any) -> Callable[..., Named]:
        """Return a function from the weight on the KL and a minibatch to all results of a step."""

        def function(beta: Tensor, *batch: Tensor) -> Named:
            weight = self._weight(beta, batch)
            with self._autocast(batch), self._noise(batch) as prepare:
                loss, differentiable = surrogate(
                    self.objective, weight(model), weight(guide), prepare(batch)
                )
                trained = [p for p in self.pair.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(differentiable, trained, allow_unused=True)
            present = [gradient for gradient in gradients if gradient is not None]
            norms = [torch.linalg.vector_norm(gradient) for gradient in present]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            found: Named = _sums(loss.detach(), norm, self.parts)
            found |= {("outside", name): number for name, number in self.parts.outside.items()}
            found |= {("gradient", i): g for i, g in enumerate(gradients) if g is not None}
            return found

        return function

    def _weight(self, beta: float | Tensor, batch: Sequence[Tensor]) -> KLWeight:
        """Return the weight on the KL for a minibatch, with an empty record of the ELBO's parts."""
        found = data_plate.known(self.pair)
        declared = None if found is None else found.num_data
        num_data = declared or self.num_data
        share = 1.0 if num_data is None else len(batch[0]) / num_data
        self.parts.clear(share)
        return KLWeight(beta, share)

    @contextmanager
    def _noise(self, batch: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], Batch]]:
        """Draw the noise of a step as ``noise`` says, and give the preparation of a minibatch."""
        if not self.noise:
            yield self.prepare
            return
        draws = CounterDraws(new_key(self._beta.device))

        def prepare(batch: Sequence[Tensor]) -> Batch:
            with draws:
                return self.prepare(batch)

        with SiteNoise(draws):
            yield prepare

    def _keep(self, numbers: dict[tuple[str, str], Tensor]) -> None:
        # The stack is a copy. A captured graph writes each step's results to the same memory.
        self.names, self.numbers = list(numbers), torch.stack(list(numbers.values()))

    def _autocast(self, batch: Sequence[Tensor]) -> Any:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(batch[0].device.type, dtype=torch.bfloat16)

    def _choice(self, operations: int) -> str:
        """Return the engine that "auto" means for a graph of so many operations."""
        if self.engine != "auto":
            return self.engine
        repays = self.steps * operations * NODE_SECONDS > COMPILE_SECONDS
        return "compiled" if repays else "traced"

    def _compiles(self, inputs: Sequence[Tensor], operations: int) -> bool:
        full = len(inputs[1]) >= self.batch_size
        return full and self._whole is None and self._choice(operations) == "compiled"


def _sums(loss: Tensor, norm: Tensor, parts: ELBOParts) -> dict[tuple[str, str], Tensor]:
    """Return the numbers of a step by kind and site, all of the loss's type."""
    named = {("loss", ""): loss, ("norm", ""): norm}
    named |= {("reconstruction", name): value for name, value in parts.reconstruction.items()}
    named |= {("kl", name): value for name, value in parts.kl.items()}
    return {key: value.to(loss.dtype) for key, value in named.items()}
