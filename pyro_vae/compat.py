"""Every private or unstable name of torch and Pyro that the package uses, and why it uses it.

Nothing outside this file names one: `tests/test_compat.py` reads the package and fails otherwise.
A new version of torch or Pyro may change what is here, and nothing else.
Tried: `tests/test_compat.py` passes with torch 2.6.0 and Pyro 1.9.1, and with torch 2.14.1 and Pyro
1.9.2.
"""

import copy
import linecache
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DispatchMode",
    # What tensors are while `make_fx` traces.
    "FakeTensor",
    # What a node of a graph calls.
    "OpOverload",
    # Whether Pyro checks values; no public function tells.
    "is_validation_enabled",
    # Masks a density in the same way as `Trace.compute_log_prob`.
    "scale_and_mask",
    # Pyro does not document another way to recognize the subsampling site of a plate.
    "site_is_subsample",
    # Sums over event dimensions.
    "sum_rightmost",
    # Resets gradients in the same way as `SVI.step`.
    "zero_grads",
]

PROTOCOL = {
    "_pyro_sample": "a handler's own part of pyro.sample, as Pyro's tutorials define it",
    "_pyro_post_sample": "the same, after the value is drawn",
    "_pyro_param": "a handler's own part of pyro.param",
    "_get_trace": "where every Pyro ELBO takes its pair of traces",
    "_get_traces": "the pairs of traces of all particles of a Pyro ELBO",
    "_extended_shape": "the shape of draws; torch tells writers of distributions to call it",
    "_validate_args": "whether a distribution checks values",
    "_validate_sample": "that check",
}
"""What a subclass defines, or calls on itself, as the base classes of torch and Pyro do."""


# Sites and plates


def is_deterministic(site: Any) -> bool:
    """Whether a site is a ``pyro.deterministic``; Pyro marks it by this entry alone."""
    return bool(site["infer"].get("_deterministic"))


def enumerate_dim(site: Any) -> Any:
    """The dimension in which a site has all of its values; `EnumMessenger` notes it here alone."""
    return site["infer"].get("_enumerate_dim")


def was_observed(site: Any) -> bool:
    """Whether ``pyro.poutine.uncondition`` made a latent of an observed site."""
    return bool(site["infer"].get("was_observed"))


OBSERVED_PART, UNOBSERVED_PART = "_observed", "_unobserved"
"""How the names of the two sites end that ``pyro.sample(name, fn, obs_mask=...)`` makes."""


def enumerated_ids(site: Any) -> dict[int, int]:
    """The number of the enumerated site that each dimension belongs to, at one site.

    In ``pyro.markov`` one dimension belongs to different sites at different places of the program.
    """
    return site["infer"].get("_dim_to_id", {})


class Enumerate(EnumMessenger):
    """Pyro's ``EnumMessenger`` that also records the dimensions of sites with given values.

    Pyro skips such a site, although its density may depend on enumerated sites, and fails at the
    next site in ``pyro.markov``.

    Arguments:
        first_available_dim: as in Pyro.
        where: says whether a marked site is enumerated; other sites are drawn.
    """

    def __init__(
        self, first_available_dim: int | None = None, where: Callable[[Any], bool] | None = None
    ) -> None:
        super().__init__(first_available_dim)
        self.where = where or (lambda site: True)

    def _pyro_sample(self, msg: Any) -> None:
        for name, depth in (msg["infer"].get("_markov_scope") or {}).items():
            self._markov_depths.setdefault(name, depth)
            self._value_dims.setdefault(name, {})
        state = msg["done"], msg["is_observed"]
        if msg["done"] or not self.where(msg):
            msg["done"], msg["is_observed"] = False, True  # Pyro then only records dimensions
        super()._pyro_sample(msg)
        if msg["is_observed"]:
            msg["done"], msg["is_observed"] = state


@contextmanager
def free_plate_dims() -> Iterator[None]:
    """Let plates inside take dimensions of plates around them; Pyro has one allocator for all."""
    taken = list(_DIM_ALLOCATOR._stack)
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack[:] = taken


def full_size(frame: Any) -> int | None:
    """The size of a plate before subsampling; a field of its frame that Pyro does not document."""
    return frame.full_size


def active_handlers() -> Iterator[Any]:
    """The handlers that are active, the innermost first; Pyro has no public list."""
    return reversed(_PYRO_STACK)


# Objectives


def get_trace(objective: Any, *args: Any) -> tuple[Trace, Trace]:
    """One pair of traces, of the model and of the guide, as an ELBO takes it."""
    return objective._get_trace(*args)


def particle_traces(
    objective: Any, model: Any, guide: Any, batch: Sequence[Tensor]
) -> Iterator[tuple[Trace, Trace]]:
    """A pair of traces for each particle of an ELBO."""
    return objective._get_traces(model, guide, batch, {})


def particle_loss(objective: Any, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
    """The loss of a ``Trace_ELBO`` for one particle, and what it differentiates."""
    return objective._differentiable_loss_particle(model_trace, guide_trace)


def tapped(objective: Any, tap: Callable[[Trace, Trace], None]) -> Any:
    """A copy of an ELBO that shows each pair of traces to ``tap`` as it takes it."""
    copied = copy.copy(objective)
    take = copied._get_trace

    def get_trace(*args: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = take(*args)
        tap(model_trace, guide_trace)
        return model_trace, guide_trace

    copied._get_trace = get_trace
    return copied


# Parameters and modules


def declared_parameters(store: Any) -> Iterable[Tensor]:
    """The unconstrained parameters of a store; its public methods give constrained values."""
    return store._params.values()


def full_name(module: Any, name: str) -> str:
    """The name in the parameter store of a parameter of a ``PyroModule``.

    Pyro's own ``_pyro_get_fullname`` refuses to give it before the module's first call.
    """
    return f"{module._pyro_name}.{name}" if module._pyro_name else name


def is_unconstrained(name: str) -> bool:
    """Whether a ``PyroModule`` keeps the unconstrained value of a parameter under this name."""
    return name.endswith("_unconstrained")


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, to be replaced by tensors that are not parameters."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, to be replaced as its parameters are."""
    return module._buffers


@contextmanager
def flat_weights_renewed(module: nn.Module) -> Iterator[None]:
    """Let recurrent networks use the parameters that they hold now.

    They keep a list of their weights for their kernels, which is the old one again at the end.
    """
    networks = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    kept = [network._flat_weights for network in networks]
    for network in networks:
        network._flat_weights = [network._parameters[name] for name in network._flat_weights_names]
    try:
        yield
    finally:
        for network, weights in zip(networks, kept, strict=True):
            network._flat_weights = weights


# Distributions and tensors


def mask_of(fn: Any) -> Any:
    """The mask of a ``MaskedDistribution``, and True for other distributions."""
    return getattr(fn, "_mask", True)


def validates(fn: Any) -> bool:
    """Whether a distribution checks the values that it scores."""
    return bool(fn._validate_args)


def version(tensor: Tensor) -> int:
    """A count that rises whenever a tensor is changed in place."""
    return tensor._version


def leaf_of(node: Any) -> Tensor | None:
    """The leaf tensor that a node of the autograd graph adds gradients to, if it is such a node."""
    return getattr(node, "variable", None)


# The optimizer

DispatchMode = TorchDispatchMode
"""Sees every operation inside its context. ``TorchFunctionMode`` sees only calls from Python, and
so not the draws that a distribution makes inside torch."""

fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_
"""The kernels that ``torch.optim.Adam(fused=True)`` and ``AdamW(fused=True)`` call."""


def has_step_hooks(optimizer: Any) -> bool:
    """Whether something is called before or after each step of an optimizer."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


# Graphs

RECENT = torch.__version__ >= "2.14"  # by number: it is a TorchVersion
"""Whether Inductor draws in the order of the graph, and its wrapper in C++ was tried."""

Formulas: TypeAlias = Mapping[OpOverload, Callable[..., Any]]
"""What replaces an operation."""


def make_graph(
    function: Callable[..., Any], inputs: Sequence[Tensor], formulas: Formulas | None = None
) -> torch.fx.GraphModule:
    """The graph of a function; public ``torch.export`` gives none if it calls ``autograd.grad``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    options: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    return owning_source(make_fx(function, dict(formulas or {}), **options)(*inputs))


def owning_source(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let the source of a compiled graph go with it; ``torch.fx`` keeps it, 20 kB for each."""
    from torch.fx.graph_module import _loader

    name = type(graph).forward.__code__.co_filename
    for cache in (_loader.eval_cache, linecache.cache):
        weakref.finalize(graph, cache.pop, name, None)
    return graph


def schema(target: OpOverload) -> Any:
    """The schema of an operation: its name, what it changes and what it returns a view of."""
    return target._schema


def value_in_graph(node: torch.fx.Node) -> Any:
    """The fake tensor that ``make_fx`` notes for a node, None if there is none."""
    return node.meta.get("val")


def has_fast_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX-512)."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # from torch 2.6 on


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by oneDNN, which the public function uses only for other types."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_values(tensor: Tensor) -> bool:
    """Whether a program may read the values of a tensor; it may not while a graph is traced."""
    return not isinstance(tensor, FakeTensor)


def with_formulas(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor], formulas: Formulas
) -> torch.fx.GraphModule:
    """A graph in which Inductor's own formulas, and these, replace operations."""
    from torch._inductor.decomposition import select_decomp_table

    return make_graph(graph, examples, {**select_decomp_table(), **formulas})


def compile_graph(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor], in_c: dict[OpOverload, list[str]]
) -> Callable[..., list[Tensor]]:
    """A graph as compiled by Inductor, whose public face, torch.compile, would trace once more.

    Inductor keeps compiled graphs on disk, so that a later process waits for two seconds only.
    This works only if a context knows the shapes, and without formulas (see `with_formulas`).
    ``in_c`` declares C functions for operations of our own.
    """
    import torch._inductor.config
    from torch._dynamo.utils import get_metrics_context  # torch 2.6 needs one to find a graph
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    options: dict[str, Any] = {"fallback_random": True}  # the draws are those of the eager step
    options |= {"cpp_wrapper": RECENT, "reorder_for_locality": RECENT}
    options |= {"aot_inductor.custom_ops_to_c_shims": in_c} if RECENT else {}
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
    with torch._inductor.config.patch(options), tracing(context), get_metrics_context():
        return cast(Callable[..., list[Tensor]], compile_fx(graph, list(examples)))


# Processes


def group_store() -> Any:
    """The store in which the processes of the default group have met."""
    return torch.distributed.distributed_c10d._get_default_store()


def group_timeout() -> float:
    """How many seconds the processes of the default group wait for each other."""
    device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    group: Any = torch.distributed.group.WORLD
    return group._get_backend(device).options._timeout.total_seconds()


# Errors that have no type of their own. `tests/test_compat.py` raises each of them.


def depends_on_values(error: Exception) -> bool:
    """Whether `make_graph` failed at an ``item()``: `make_fx` may raise a plain RuntimeError."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds) or "data-dependent" in str(error)


_MISMATCH = r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim -1, (\d+) vs (\d+)"


def plate_mismatch(message: str) -> "re.Match[str] | None":
    """Groups: the plate at dimension -1, the site, the size of the plate, and that of the site.

    A plate raises a plain ValueError before any handler sees the site.
    """
    return re.match(_MISMATCH, message)


def bad_parameter(error: Exception) -> str | None:
    """What a distribution says of numbers that it cannot have, None for other errors.

    The distribution is not made then: torch raises a ValueError, and ``normal_`` a RuntimeError.
    """
    said = str(error).strip().partition("\n")[0].partition(" (")[0]
    return said if said.startswith(("Expected parameter", "normal expects")) else None


def lacks_variance(error: Exception) -> bool:
    """Whether batch normalization was given one value for each channel, a plain ValueError."""
    return "more than 1 value per channel" in str(error)
