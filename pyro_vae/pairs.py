"""The pair: how any nn.Module with ``model`` and ``guide`` is run, without asking what it is.

A pair's parameters may be plain attributes, ``PyroParam``s, or declared while it runs, by
``pyro.module`` and ``pyro.param``. Everything here runs a pair inside a parameter store of its own
(`scope`), so that two pairs never meet by name and the user's own store stays as it was.
Parameters that only ``pyro.param`` knows are adopted by the pair as ordinary ``nn.Parameter``s:
from then on ``pair.parameters()`` and ``pair.state_dict()`` hold everything that is learnt.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

from pyro_vae.errors import UsageError, first_line
from pyro_vae.rng import seeded

Batch: TypeAlias = tuple[Tensor, ...]
Site: TypeAlias = Any


class Pair(Protocol):
    """An ``nn.Module`` with a generative model and an amortised guide, both Pyro programs.

    ``batch`` is a tuple of tensors whose dimension 0 is the minibatch: the data ``x``, then
    context. Local sites sit in one ``pyro.plate("data", len(x), dim=-1)``. Every unobserved site
    of the model is a site of the guide. A pair that can be sampled without data also has
    ``template(n)``, which returns a batch of n rows whose values mean nothing. One that is best
    fitted in a way of its own may have ``recipe(epochs)``, which returns a dictionary with the
    ``objective`` and ``beta`` that `pyro_vae.fit` takes unless it is given others.
    """

    def model(self, *batch: Tensor) -> Any: ...
    def guide(self, *batch: Tensor) -> Any: ...


class _Adopted(nn.Module):
    """Parameters declared by ``pyro.param`` alone, unconstrained, and their constraints."""

    def __init__(self) -> None:
        super().__init__()
        self.constraints: dict[str, Any] = {}
        self.batch: list[tuple[list[int], str]] = []

    def state(self) -> dict[str, dict[str, Any]]:
        # Not get_parameter, which refuses what stands in for a parameter in a graph.
        params = {name: self._parameters[_key(name)] for name in self.constraints}
        return {"params": params, "constraints": dict(self.constraints)}


_ADOPTED = "pyro_param"


def _key(name: str) -> str:
    return name.replace(".", "/")


@contextmanager
def scope(pair: nn.Module) -> Iterator[None]:
    """Run inside a parameter store that belongs to this pair alone."""
    states = [module.state() for module in pair.modules() if isinstance(module, _Adopted)]
    frozen = _frozen(pair)
    states.append({"params": frozen, "constraints": dict.fromkeys(frozen, constraints.real)})
    state = {kind: _union(states, kind) for kind in ("params", "constraints")}
    with pyro.get_param_store().scope(cast(Any, state)), warnings.catch_warnings():
        # What is frozen is frozen on purpose: a decoder, while another guide is fitted to it.
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        yield


def _frozen(pair: nn.Module) -> dict[str, Any]:
    """Parameters that take no gradients, by the names under which their PyroModules declare them.

    The store would make them take gradients as it first meets them.
    """
    return {
        module._pyro_get_fullname(name): parameter
        for module in pair.modules()
        if isinstance(module, PyroModule)
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not parameter.requires_grad
        and not name.endswith("_unconstrained")
    }


def _union(states: Sequence[dict[str, dict[str, Any]]], kind: str) -> dict[str, Any]:
    return {name: value for state in states for name, value in state[kind].items()}


def adopt(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Make every parameter of the current store, which only the store knows, one of the pair.

    The row shapes of the batch are kept, for `adopted_batch`.
    """
    store = pyro.get_param_store()
    state, known = store.get_state(), {id(p) for p in pair.parameters()}
    for name, value in state["params"].items():
        if id(value) in known:
            continue
        if not hasattr(pair, _ADOPTED):
            pair.add_module(_ADOPTED, _Adopted())
        adopted, parameter = getattr(pair, _ADOPTED), nn.Parameter(value.detach())
        adopted.register_parameter(_key(name), parameter)
        adopted.constraints[name] = state["constraints"][name]
        adopted.batch = [(list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in batch]
        store.set_state({"params": {name: parameter}, "constraints": {}})


def adopted_batch(pair: nn.Module) -> list[tuple[list[int], str]]:
    """Row shapes and types of a batch on which running the pair declares what it has adopted."""
    adopted = getattr(pair, _ADOPTED, None)
    return adopted.batch if isinstance(adopted, _Adopted) else []


def registered(pair: nn.Module, program: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with every trainable parameter of the pair made a param site of its trace.

    Stock ``SVI`` steps only parameters that it sees as sites; a plain attribute is none.
    """

    def run(*batch: Tensor) -> Any:
        for name, parameter in pair.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"pair$$${name}", parameter)
        return program(*batch)

    return run


@contextmanager
def evaluation_mode(pair: nn.Module) -> Iterator[None]:
    """Every module of the pair in evaluation mode, and then each as it was."""
    training = [module for module in pair.modules() if module.training]
    pair.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def using(pair: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Use a pair without training it: its own scope, evaluation mode, no gradients, a seed."""
    draws = nullcontext() if seed is None else seeded(seed)
    with evaluation_mode(pair), scope(pair), torch.no_grad(), draws:
        yield


def trace(program: Callable[..., Any], batch: Sequence[Tensor]) -> Trace:
    """The trace of a program on a batch; an error of use stays one line."""
    try:
        return poutine.trace(program).get_trace(*batch)
    except UsageError as error:
        # Pyro writes the shapes of all sites behind the message.
        raise UsageError(first_line(error)) from None
    except IndexError as error:  # a label, say, that the pair has no place for
        raise UsageError(f"the pair fails on a value of its batch: {first_line(error)}") from error


def trace_guide(pair: nn.Module, batch: Sequence[Tensor], *handlers: Any) -> Trace:
    """The trace of the guide on a batch, inside these handlers, the innermost first.

    What it draws by way of an auxiliary site is one latent of the trace (`pyro_vae.folding`).
    """
    from pyro_vae.folding import trace_guide as folded_guide  # built on this module

    return folded_guide(pair, batch, *handlers)


def trace_model(pair: nn.Module, batch: Sequence[Tensor], guide: Trace) -> Trace:
    """The trace of the model on a batch, replayed against a trace of the guide."""
    return trace(poutine.replay(cast(Pair, pair).model, trace=guide), batch)


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace, by name, without those of plates' subsampling."""
    nodes: dict[str, Site] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def latents(trace: Trace) -> dict[str, Site]:
    """The unobserved sample sites of a trace, by name."""
    return {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}


def observed(trace: Trace) -> dict[str, Site]:
    """The observed sample sites of a trace, by name; those of an unconditioned model too.

    Without those marked ``infer={"is_auxiliary": True}``: they are terms of the objective alone, a
    classification loss say, and no part of p(x).
    """
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if (site["is_observed"] or site["infer"].get("was_observed", False))
        and not is_auxiliary(site)
    }


def is_factor(site: Site) -> bool:
    """Whether a site is a ``pyro.factor``: a term of the log density, without a value."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def factors(trace: Trace) -> dict[str, Site]:
    """The sites of ``pyro.factor`` in a trace, by name."""
    return {name: site for name, site in sample_sites(trace).items() if is_factor(site)}


def scored(trace: Trace) -> dict[str, Site]:
    """The observed sites of a model and its factors: what p(x, z) has beside its latents."""
    return observed(trace) | factors(trace)


def require_normalized(model: Trace, why: str) -> None:
    """Raise `UsageError` for a model with factors, and say why."""
    for name in factors(model):
        raise UsageError(
            f"the model has a pyro.factor, '{name}', so that its density is not normalized: {why}"
        )


def is_auxiliary(site: Site) -> bool:
    """Whether a site is a term of the objective alone; of the guide, one without a prior."""
    return bool(site["infer"].get("is_auxiliary"))


def data_site(trace: Trace, name: str | None = None) -> Site:
    """The observed site of this name, or the first one."""
    sites = observed(trace)
    if name is None and sites:
        return next(iter(sites.values()))
    if name not in sites:
        raise UsageError(
            f"the model has no observed site '{name}'; its observed sites are: "
            f"{', '.join(sites) or 'none'}"
        )
    return sites[cast(str, name)]


def template(pair: nn.Module, n: int, context: Sequence[Tensor] = ()) -> Batch:
    """A batch of n rows from the pair's template, with this context in place of the template's."""
    if not hasattr(pair, "template"):
        raise UsageError(
            f"{type(pair).__name__} has no method template(n), which returns a batch of n rows "
            "of the right shapes; sampling without data needs it"
        )
    if isinstance(context, Tensor):
        context = (context,)
    device, dtype = placement(pair)
    batch = tuple(
        tensor.to(device, dtype if tensor.is_floating_point() else None)
        for tensor in cast(Any, pair).template(n)
    )
    if not context and (len(batch) == 1 or missing_context(pair, 1)):
        return batch
    if len(context) != len(batch) - 1:
        raise UsageError(
            f"{type(pair).__name__} takes {len(batch) - 1} context tensors, {len(context)} came"
        )
    placed = []
    for given, like in zip(context, batch[1:], strict=True):
        given = torch.as_tensor(given).to(like.device, like.dtype)
        wanted = (n, *like.shape[1:])
        if tuple(given.shape) not in (wanted, (1, *wanted[1:])):
            raise UsageError(
                f"context of shape {wanted} ({n} rows, or one for all, of shape {wanted[1:]}) is "
                f"expected, a tensor of shape {tuple(given.shape)} came; labels become rows by "
                "pyro_vae.one_hot"
            )
        placed.append(given.expand(like.shape))
    return (batch[0], *placed)


def missing_context(pair: nn.Module, n: int) -> Batch:
    """The context of n rows of which nothing is known, for a pair that needs none.

    Labels say: a pair whose template gives negative whole numbers alone takes those for missing.
    """
    if not hasattr(pair, "template"):
        return ()
    context = cast(Any, pair).template(1)[1:]
    missing = all(not part.is_floating_point() and bool((part < 0).all()) for part in context)
    return tuple(part.expand(n, *part.shape[1:]) for part in context) if missing else ()


def placement(pair: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a pair's parameters are, and their floating-point type."""
    for tensor in (*pair.parameters(), *pair.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def is_local(site: Site) -> bool:
    """Whether a site sits in the data plate, at dimension -1."""
    return any(frame.vectorized and frame.dim == -1 for frame in site["cond_indep_stack"])


def global_latents(pair: nn.Module, batch: Sequence[Tensor]) -> list[str]:
    """The latent sites of a pair that are outside the data plate: all data have one of each.

    Found by running its model on two rows of a batch.
    """
    few = [tensor[:2] for tensor in batch]
    with using(pair, seed=0):
        drawn = trace(poutine.uncondition(cast(Pair, pair).model), few)
    sites = {name: site for name, site in latents(drawn).items() if not is_local(site)}
    return [name for name, site in sites.items() if not site["infer"].get("was_observed")]


def require_local(pair: nn.Module, batch: Sequence[Tensor], why: str) -> None:
    """Raise `UsageError` for a pair with a latent outside the data plate, and say why."""
    for name in global_latents(pair, batch):
        raise UsageError(f"latent site '{name}' is outside the data plate: {why}")


def log_prob(site: Site) -> Tensor:
    """The log density of a site, masked but not scaled: KL weights and subsampling left out."""
    try:
        density = site["fn"].log_prob(site["value"])
    except ValueError as error:  # a guide, say, that draws what the model's support does not hold
        reason = first_line(error).removesuffix(", but found invalid values:")
        raise UsageError(f"site '{site['name']}' cannot be scored: {reason}") from error
    return scale_and_mask(density, mask=site["mask"])


def by_datum(term: Tensor, particles: bool) -> Tensor:
    """A local log density summed over the plates between the particles, if any, and the data."""
    if particles:
        return term.flatten(1, -2).sum(1) if term.dim() > 2 else term
    return term.reshape(-1, term.shape[-1]).sum(0)


def same_order(model: Trace, guide: Trace) -> bool:
    """Whether model and guide draw the latents that they share in one order.

    Only then is each of their conditionals given what both have drawn before, so that the KL of
    the two may stand for its expectation.
    """
    shared = [name for name in latents(guide) if name in model.nodes]
    return shared == [name for name in sample_sites(model) if name in shared]


def site_kl(model_site: Site, guide_site: Site, closed: bool = True) -> Tensor:
    r"""KL of one latent site, in nats: of shape (batch, *units) where it splits over units.

    :math:`\mathrm{KL}(q \| p)` in closed form where torch knows it and ``closed`` allows it (see
    `same_order`), else the estimate :math:`\log q(z) - \log p(z)` at the draw in the trace. Where
    both distributions have independent coordinates the last dimensions are those of the event, else
    there are none.
    """
    p, q, z, mask = model_site["fn"], guide_site["fn"], guide_site["value"], guide_site["mask"]
    if factorizes(p) and factorizes(q):
        p, q = p.base_dist, q.base_dist
    try:
        kl = kl_divergence(q, p) if closed else None
    except NotImplementedError:
        kl = None
    if kl is None:
        kl = q.log_prob(z) - p.log_prob(z)
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * (kl.dim() - len(guide_site["fn"].batch_shape)))
    return scale_and_mask(kl, mask=mask)


def factorizes(fn: Any) -> bool:
    """Whether a distribution's units are independent, its ``base_dist`` being theirs."""
    return isinstance(fn, torch.distributions.Independent) and fn.reinterpreted_batch_ndims == len(
        fn.event_shape
    )


def mean(fn: Any, num_samples: int = 100) -> Tensor:
    """The mean of a distribution, by draws where it has no closed form."""
    try:
        closed = fn.mean
    except NotImplementedError:
        closed = None
    if closed is None or bool(closed.isnan().any()):  # torch's Categorical has a mean of NaN
        draws = fn.sample((num_samples,))
        return (draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())).mean(0)
    return closed


def is_category(fn: Any) -> bool:
    """Whether a distribution is over classes without order, which have a mode and no mean."""
    return bool(fn.support.is_discrete) and bool(fn.mean.isnan().any())


class Means(poutine.messenger.Messenger):
    """Every unobserved site takes its distribution's mean (a discrete one its mode), not a draw."""

    def _pyro_sample(self, msg: Any) -> None:
        free = msg["value"] is None and not msg["done"]
        if not msg["is_observed"] and (free or msg.get("folded")):
            if site_is_subsample(msg):
                return
            if msg.get("folded") == "later":
                msg["mean_later"] = True
                return
            fn = msg["fn"]
            msg["value"] = fn.mode if fn.support.is_discrete else mean(fn)
            msg["done"] = True


class Given(poutine.messenger.Messenger):
    """Some sites are given these values as if they had been drawn."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def gives(self, name: str, support: Any) -> Tensor | None:
        """The value that a site is given, if any."""
        return self.values.get(name)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
