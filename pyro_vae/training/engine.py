"""How a step runs: eagerly, as a graph that is traced once and replayed, or as that graph compiled.

The engine is a Pyro ``ELBO`` that runs another ELBO. Any ``pyro.infer.SVI`` accepts it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.compat import get_trace, zero_grads
from pyro_vae.errors import NotTraceable, warn
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.adam import FusedAdam
from pyro_vae.training.captured import Run, on_gpu, pinned, several
from pyro_vae.training.graph import Found
from pyro_vae.training.kl_weight import KLWeight
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.recording import ELBOParts, recorded, sums, surrogate
from pyro_vae.training.settings import require_engine
from pyro_vae.training.step_noise import StepNoise
from pyro_vae.training.tracing import Graphs, Named, fall_back
from pyro_vae.training.updates import (
    NUMBERS,
    all_numbers,
    before_update,
    in_layout,
    kept,
    require_dense,
    update_after,
    with_update,
)

COMPILE_SECONDS = 20.0
"""About how long Inductor takes to compile a step."""

NODE_SECONDS, NODE_SECONDS_ON_GPU = 1e-5, 1.4e-6
"""About how much time a compiled graph saves in each step, for each operation of the graph."""


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
        optimizer: if it is Adam or AdamW, its update is part of compiled graphs, and on a GPU of
            all graphs. Only `Step` runs such graphs.

    The attribute ``beta`` is the weight on the KL, a number or a tensor. Set it between steps. The
    engine assumes that variables of other modules, which model and guide use, stay constant.
    If a pair cannot be traced, the engine is eager from then on, and one warning gives the reason.

    After each step, ``numbers`` holds the loss, the global norm of its gradient, and the parts of
    the ELBO, summed over the minibatch. It is a tensor on the pair's device. ``names`` gives the
    kind and the site of each number. On a GPU, a step does not wait for its numbers, and the counts
    of values outside their support (kind "outside") are among them.

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
        self.precision, self.declare = precision, declare
        self.batch_size, self.steps, self.say = batch_size, steps, say
        self.num_data = num_data
        self.beta: float | Tensor = 1.0
        self.names: list[tuple[str, str]] = []
        self.numbers = torch.zeros(0)
        self._programs: tuple[Any, Any] = (None, None)
        self.optimizer = optimizer
        self._noise = StepNoise(noise, prepare or tuple)
        self._graphs: Graphs | None = None
        self._whole: Graphs | None = None
        self._update: FusedAdam | None = None
        self._refused = False
        """Whether a step together with its update cannot be a compiled graph."""
        self._chains: dict[tuple[int, int], Run | None] = {}
        """Several steps as one captured graph, by the graph of a step and their number, or None."""
        self._beta = torch.zeros(())
        self._inputs = torch.zeros(4)
        """The weight on the KL and the numbers of the update, for graphs that contain it."""
        self._given: list[float] = []
        """What `_inputs` holds on a GPU."""

    def _get_trace(self, *args: Any) -> Any:
        return get_trace(self.objective, *args)

    def loss(self, model: Any, guide: Any, *batch: Tensor) -> float:
        """Compute the objective's loss eagerly."""
        weight = self._weight(self.beta, batch)
        return self.objective.loss(weight(model), weight(guide), *self._noise.prepare(batch))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Tensor) -> Tensor | float:
        """Return the loss, on the pair's device; write gradients to the pair's parameters."""
        if self.engine != "eager":
            try:
                return self._replay(model, guide, batch)
            except NotTraceable as error:
                self._become_eager(error)
        weight = self._weight(self.beta, batch)
        if not self._programs[0]:
            self._noise.place(next(self.pair.parameters()).device)
        self._noise.draw()
        with self._autocast(batch), self._noise.of(self._noise.number) as prepare:
            loss = self.objective.loss_and_grads(weight(model), weight(guide), *prepare(batch))
        gradients = [p.grad for p in self.pair.parameters() if p.grad is not None]
        require_dense(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        total = torch.as_tensor(loss, dtype=torch.float64, device=norm.device)
        found = sums(total, norm, self.parts)
        self._keep({key: value for key, value in found.items() if key[0] in NUMBERS})
        return loss

    def _become_eager(self, error: NotTraceable) -> None:
        self.engine = "eager"
        for parameter in self.pair.parameters():  # eager gradients are added to those of a graph
            parameter.grad = kept(parameter, None, self.optimizer)
        warn(fall_back(self.pair, "trained", error))

    def whole_step(self, model: Any, guide: Any, batch: Batch) -> bool:
        """Take a step, update included, as one compiled graph; return whether there is one.

        Raises ``FloatingPointError`` if loss or gradient are not finite. Then nothing was updated.
        """
        with self._noise.spent():
            found = self._whole_graph(model, guide, batch)
        if found is None:
            return False
        if on_gpu(self._inputs):
            self._noise.draw()
            self.names, self.numbers = all_numbers(found())
            cast(Optimizer, self.optimizer).norm = self.numbers[1]
            return True
        if not found.graph.compiled:
            cast(Graphs, self._graphs).can_compile = cast(Graphs, self._whole).can_compile
            self._whole, self._refused = None, True
            return False
        self._noise.draw()
        results = found()
        self._require_inside(results)
        ((_, names), self.numbers), *_ = results.items()
        self.names = list(names)
        loss, norm, *_ = self.numbers.tolist()
        cast(Optimizer, self.optimizer).stepped(norm + 0 * loss)
        return True

    def several_steps(
        self, model: Any, guide: Any, batch: Sequence[Tensor], plan: list[tuple[float, float]]
    ) -> bool:
        """Take several steps on a GPU as one captured graph; return whether there is one.

        Then ``numbers`` has a row for each step.

        Arguments:
            batch: full minibatches, one after the other.
            plan: the weight on the KL and the learning rate of each step.
        """
        count = len(plan)
        first = tuple(tensor[: len(tensor) // count] for tensor in batch)
        found = self._whole_graph(model, guide, first, plan[0])
        if found is None or not on_gpu(self._inputs):
            return False
        rows = torch.zeros(count, 4, dtype=self._inputs.dtype)
        rows[:, :2] = torch.tensor(plan, dtype=rows.dtype)
        rows, *batch = self._placed((pinned(rows), *batch))
        key = id(found.graph), count
        if key not in self._chains:
            trial = rows, self._noise.number.repeat(count, 2), *batch
            single = cast(Run, found.graph.uncaptured)
            self._chains[key] = several(single, count, found.values, trial)
        if (chain := self._chains[key]) is None:
            return False
        (numbers,) = self._placed((pinned(self._noise.draw_several(count)),))
        self.names, self.numbers = all_numbers(chain(found.values, (rows, numbers, *batch)))
        cast(Optimizer, self.optimizer).norm = self.numbers[-1, 1]
        return True

    def _whole_graph(
        self, model: Any, guide: Any, batch: Batch, plan: tuple[float, float] | None = None
    ) -> Found | None:
        """Return the graph of a step with its update, ready to run, if there is one."""
        if self.engine == "eager" or self.optimizer is None or self._refused:
            return None
        if self._graphs is None or self._programs != (model, guide):
            self._start(model, guide)
        full = len(batch[0]) >= self.batch_size
        if not on_gpu(self._inputs) and (self.engine != "compiled" or not full):
            return None
        adam = self.optimizer.for_graphs()
        if adam is not self._update:  # the optimizer has another state
            self._start(model, guide)
        if self._whole is None or adam is None:
            return None
        self._put_inputs(adam, plan)
        try:
            found = self._whole.found(self._inputs, self._noise.number, *self._placed(batch))
        except NotTraceable:
            self._whole, self._refused = None, True
            return None
        if on_gpu(self._inputs):
            self.engine = self._choice(self._whole.first_operations)
        return found

    def _replay(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        if self._graphs is None or self._programs != (model, guide):
            self._start(model, guide)
        graphs = cast(Graphs, self._graphs)
        self._beta.fill_(self.beta)
        with self._noise.spent():
            ready = graphs.found(self._beta, self._noise.number, *self._placed(batch))
        self._noise.draw()
        found = ready()
        if self.engine == "auto":
            self.engine = self._choice(graphs.first_operations)
        self._require_inside(found)
        for i, parameter in enumerate(graphs.trained()):
            parameter.grad = kept(parameter, found.get(("gradient", i)), self.optimizer)
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
        kind: Any = {"dtype": torch.float64 if like.dtype == torch.float64 else torch.float32}
        adam = self._update = self.optimizer.for_graphs() if self.optimizer else None
        self._whole = None
        # On a GPU the numbers of the update but the learning rate are part of the graph.
        self._inputs = (
            torch.zeros(2, device=like.device, **kind) if on_gpu(like) else torch.zeros(4, **kind)
        )
        self._given = [0.0, 0.0]
        self._chains = {}
        self._noise.place(like.device)
        if (optimizer := self.optimizer) is None or adam is None:
            return
        settings: Any = {
            "tolerance": tolerance,
            "say": self.say,
            "held": adam.held,
            "updates": True,
        }
        if on_gpu(like):
            whole = before_update(function, optimizer, adam)
            settings |= {"finish": update_after(adam), "fixed": 2}
            self._whole = Graphs(self.pair, whole, self._repays, **settings)
        else:
            whole = with_update(self.pair, function, optimizer, adam)
            self._whole = Graphs(self.pair, whole, lambda *_: True, **settings)

    def _placed(self, batch: Iterable[Tensor]) -> Batch:
        return tuple(tensor.to(self._beta.device, non_blocking=True) for tensor in batch)

    def _put_inputs(self, adam: FusedAdam, plan: tuple[float, float] | None) -> None:
        """Write the numbers that change from step to step, without a wait for a GPU."""
        if not on_gpu(self._inputs):
            # NumPy writes to the same memory, without the cost of an operation of torch.
            self._inputs.numpy()[:] = [float(self.beta), *adam.numbers()]
            return
        for i, number in enumerate(plan or (float(self.beta), adam.group["lr"])):
            if number != self._given[i]:
                self._inputs[i].fill_(number)
                self._given[i] = number

    def _function(self, model: Any, guide: Any) -> Callable[..., Named]:
        """Return a function from the weight on the KL and a minibatch to all results of a step."""

        def function(beta: Tensor, number: Tensor, *batch: Tensor) -> Named:
            weight = self._weight(beta, batch)
            with self._autocast(batch), self._noise.of(number) as prepare:
                loss, differentiable = surrogate(
                    self.objective, weight(model), weight(guide), prepare(batch)
                )
                trained = [p for p in self.pair.parameters() if p.requires_grad]
                direct = torch.autograd.grad(differentiable, trained, allow_unused=True)
            gradients = in_layout(direct, trained)
            present = [gradient for gradient in gradients if gradient is not None]
            norm = torch.nn.utils.get_total_norm(present, foreach=present[0].is_cuda)
            found: Named = sums(loss.detach(), norm, self.parts)
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
        saved = operations * (NODE_SECONDS_ON_GPU if on_gpu(self._inputs) else NODE_SECONDS)
        repays = self.steps * saved > COMPILE_SECONDS
        return "compiled" if repays else "traced"

    def _compiles(self, inputs: Sequence[Tensor], operations: int) -> bool:
        return self._whole is None and self._repays(inputs, operations)

    def _repays(self, inputs: Sequence[Tensor], operations: int) -> bool:
        """Whether to compile the graph of a minibatch."""
        return len(inputs[2]) >= self.batch_size and self._choice(operations) == "compiled"
