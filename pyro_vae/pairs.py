"""The pair: how any nn.Module with ``model`` and ``guide`` is run, without asking what it is.

A pair's parameters may be plain attributes, ``PyroParam``s, or declared while it runs, by
``pyro.module`` and ``pyro.param``. Everything here runs a pair inside a parameter store of its own
(`scope`), so that two pairs never meet by name and the user's own store stays as it was.
Parameters that only ``pyro.param`` knows are adopted by the pair as ordinary ``nn.Parameter``s:
from then on ``pair.parameters()`` and ``pair.state_dict()`` hold everything that is learnt.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

from pyro_vae import places
from pyro_vae.arrays import as_tensor
from pyro_vae.errors import UsageError, first_line
from pyro_vae.places import is_local
from pyro_vae.rng import seeded
from pyro_vae.threads import alone

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
    """Run inside a parameter store that belongs to this pair alone, while other threads wait."""
    with alone(), _store(pair), places.in_use(pair), warnings.catch_warnings():
        # What is frozen is frozen on purpose: a decoder, while another guide is fitted to it.
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        # `check` says in words where model and guide do not go together.
        warnings.filterwarnings("ignore", message="Found plate statements in guide but not model")
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide but not model")
        yield


def _store(pair: nn.Module) -> Any:
    states = [module.state() for module in pair.modules() if isinstance(module, _Adopted)]
    frozen = _frozen(pair)
    states.append({"params": frozen, "constraints": dict.fromkeys(frozen, constraints.real)})
    state = {kind: _union(states, kind) for kind in ("params", "constraints")}
    return pyro.get_param_store().scope(cast(Any, state))


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
    with alone(), evaluation_mode(pair), scope(pair), torch.no_grad(), draws, _AllRows():
        yield


class _AllRows(poutine.messenger.Messenger):
    """``plate("data", N, subsample_size=len(x))`` takes any number of rows, more than N too.

    The rows that a tool gives are the subsample; which of the N data they are does not matter.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and not msg["done"]:
            size = msg["fn"].subsample_size
            if size is not None and size > msg["fn"].size:
                msg["value"], msg["done"] = torch.arange(size), True


def trace(program: Callable[..., Any], batch: Sequence[Tensor]) -> Trace:
    """The trace of a program on a batch; an error of use stays one line."""
    try:
        return poutine.trace(program).get_trace(*batch)
    except UsageError as error:
        # Pyro writes the shapes of all sites behind the message.
        raise UsageError(first_line(error)) from None
    except IndexError as error:  # a label, say, that the pair has no place for
        raise UsageError(f"the pair fails on a value of its batch: {first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        require_numbers(error)
        raise


class BadNumbers(UsageError):
    """A pair gave a distribution numbers that it cannot have."""


def require_numbers(error: Exception) -> None:
    """Raise `BadNumbers` where an error says that a distribution was given numbers it cannot have,
    such as a scale that is infinite or NaN."""
    said = first_line(error)
    if said.startswith(("Expected parameter", "normal expects")):
        said = said.split(" (", 1)[0]
        raise BadNumbers(
            f"the pair gives a distribution numbers that it cannot have ({said}): look for extreme "
            "values in the data, and bound its scales"
        ) from error


def trace_guide(pair: nn.Module, batch: Sequence[Tensor], *handlers: Any) -> Trace:
    """The trace of the guide on a batch, inside these handlers, the innermost first.

    What it draws by way of an auxiliary site is one latent of the trace (`pyro_vae.folding`).
    """
    from pyro_vae.folding import trace_guide as folded_guide  # built on this module

    find_places(pair, batch)
    return folded_guide(pair, batch, *handlers)


def trace_model(pair: nn.Module, batch: Sequence[Tensor], guide: Trace) -> Trace:
    """The trace of the model on a batch, replayed against a trace of the guide."""
    find_places(pair, batch)
    return trace(poutine.replay(cast(Pair, pair).model, trace=guide), batch)


class _Run(NamedTuple):
    """One run of a pair on some rows."""

    batch: Sequence[Tensor]
    model: Trace
    guide: Trace | None
    """None where the guide fails, or does not go with the model."""
    shapes: dict[str, torch.Size]
    """Those of the parameters that ``pyro.param`` declared."""


def find_places(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Find the data plate of a pair and what its sites observe, by runs on two and three rows.

    A pair that cannot be run leaves them unknown; the run that follows says what is wrong. Raises
    `UsageError` for a guide with a parameter that has a row for each datum.
    """
    if places.known(pair) is not None:
        return
    sizes = (2, 3 if len(batch[0]) > 2 else 1)
    runs = [_run(pair, [tensor[:rows] for tensor in batch]) for rows in sizes]
    first, other = runs if runs[0] is not None else reversed(runs)
    first = first or _run(pair, batch)
    if first is None:
        return
    if other is not None:
        _require_amortized(first, other)
    located = places.locate(
        observed(first.model), None if other is None else observed(other.model), first.batch
    )
    if located is not None:
        guide = first.model if first.guide is None else first.guide
        places.keep(pair, located._replace(plates=_with_guides(located.plates, first.model, guide)))


def _run(pair: nn.Module, batch: Sequence[Tensor]) -> _Run | None:
    """A run of model and guide; of the model alone where they fail together; None if it fails."""
    model, guide = cast(Pair, pair).model, cast(Pair, pair).guide
    with using(pair, seed=0), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = None
        # A user's own code may raise anything.
        with suppress(Exception):
            drawn = trace(guide, batch)
            together = trace(poutine.replay(model, trace=drawn), batch)
            held = pyro.get_param_store().get_state()["params"]
            return _Run(batch, together, drawn, {name: p.shape for name, p in held.items()})
        with suppress(Exception):
            return _Run(batch, trace(model, batch), None, {})
    return None


def _require_amortized(first: _Run, other: _Run) -> None:
    """Raise `UsageError` where the guide has a parameter with a row for each datum.

    Such a parameter grows with the rows; or the guide keeps its plate at the rows of its first run.
    """
    whole, cut = (
        {f.name: f.size == f.full_size for s in observed(run.model).values() for f in _at_data(s)}
        for run in (first, other)
    )
    kept = [f"the plate '{name}' keeps" for name in cut if whole.get(name) and not cut[name]]
    grown = [n for n, shape in other.shapes.items() if first.shapes.get(n, shape) != shape]
    kept += [f"parameter '{name}' has" for name in grown]
    if kept and first.guide is not None:
        rows = len(first.batch[0])
        raise UsageError(
            f"the guide has a parameter with a row for each datum ({kept[0]} {rows} rows where x "
            f"has {len(other.batch[0])}): give the guide an encoder of x, or pass the row numbers "
            "as context, torch.arange(len(x)), and index a parameter of fixed size by them"
        )


def data_plates(model: Trace, guide: Trace) -> frozenset[str]:
    """The names of the data plate: those of the pair in use, or else of the observed sites."""
    if (found := places.known()) is not None:
        return found.plates
    plates = frozenset(f.name for site in observed(model).values() for f in _at_data(site))
    return _with_guides(plates, model, guide)


def _with_guides(plates: frozenset[str], model: Trace, guide: Trace) -> frozenset[str]:
    """These names, and those that the guide has for the plate of the same latents."""
    inside = [name for name, site in latents(model).items() if is_local(site, plates)]
    return plates | {f.name for name in inside for f in _at_data(latents(guide).get(name))}


def _at_data(site: Site | None) -> list[Any]:
    """The plates at dimension -1 around a site."""
    frames = [] if site is None else site["cond_indep_stack"]
    return [frame for frame in frames if frame.vectorized and frame.dim == -1]


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace, by name.

    Without those of plates' subsampling, and without ``pyro.deterministic``, which has a value and
    no density.
    """
    nodes: dict[str, Site] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
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


def unconditioned(pair: nn.Module) -> Callable[..., Any]:
    """The model of a pair, which draws the data that it would observe."""
    return cast(Callable[..., Any], _Uncondition()(cast(Pair, pair).model))


class _Uncondition(UnconditionMessenger):
    """Pyro's ``uncondition``, but for ``pyro.deterministic``, which computes its value anew."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


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
    """The observed site of this name, or the one that observes x.

    Raises `UsageError` where no site is named and several sites observe parts of x.
    """
    sites = observed(trace)
    if name is None and (only := x_site(trace)) is not None:
        return only
    if name is None and sites:
        raise UsageError(
            f"the model observes parts of x at several sites ({', '.join(sites)}): pass one of "
            "these names as site"
        )
    if name not in sites:
        raise UsageError(
            f"the model has no observed site '{name}'; its observed sites are: "
            f"{', '.join(sites) or 'none'}"
        )
    return sites[cast(str, name)]


def x_site(trace: Trace) -> Site | None:
    """The observed site that observes x, None where several sites observe parts of it."""
    sites, found = observed(trace), places.known()
    if len(sites) == 1:
        return next(iter(sites.values()))
    return None if found is None or found.x is None else sites.get(found.x)


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
    if not context and (len(batch) == 1 or missing_context(pair, 1) or _draws_all(pair, batch)):
        return batch
    if len(context) != len(batch) - 1:
        raise UsageError(
            f"{type(pair).__name__} takes {len(batch) - 1} context tensors, {len(context)} came"
        )
    placed = []
    for given, like in zip(context, batch[1:], strict=True):
        given = as_tensor(given, "context").to(like.device, like.dtype)
        wanted = (n, *like.shape[1:])
        if tuple(given.shape) not in (wanted, (1, *wanted[1:])):
            raise UsageError(
                f"context of shape {wanted} ({n} rows, or one for all, of shape {wanted[1:]}) is "
                f"expected, a tensor of shape {tuple(given.shape)} came; labels become rows by "
                "pyro_vae.one_hot"
            )
        placed.append(given.expand(like.shape))
    return (batch[0], *placed)


def _draws_all(pair: nn.Module, batch: Sequence[Tensor]) -> bool:
    """Whether the model observes every tensor of a batch, and so can draw them all."""
    find_places(pair, batch)
    found = places.known(pair)
    return found is not None and set(found.observes.values()) == set(range(len(batch)))


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
    """Where a pair's parameters are, and their floating-point type.

    Raises `UsageError` for a type of 16 bits, in which sums of log densities keep three digits.
    """
    for tensor in (*pair.parameters(), *pair.buffers()):
        if tensor.is_floating_point():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise UsageError(
                    f"the pair's parameters are {tensor.dtype}, in which log densities lose their "
                    "digits: call pair.float(); fit(..., precision='bfloat16') runs its networks "
                    "in 16 bits"
                )
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def global_latents(pair: nn.Module, batch: Sequence[Tensor]) -> list[str]:
    """The latent sites of a pair that are outside the data plate: all data have one of each.

    Found by running its model on two rows of a batch.
    """
    few = [tensor[:2] for tensor in batch]
    find_places(pair, few)
    with using(pair, seed=0):
        drawn = trace(unconditioned(pair), few)
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


def data_first(value: Tensor, site: Site) -> Tensor:
    """A value of a local site with the data as dimension 0, the plates within a datum after it."""
    return value.movedim(-1 - site["fn"].event_dim, 0)


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
    if not isinstance(kl, Tensor):  # a number where a mask within the distributions hides all
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
    closed = _closed_mean(fn)
    if closed is None or bool(closed.isnan().any()):  # torch's Categorical has a mean of NaN
        draws = fn.sample((num_samples,))
        return (draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())).mean(0)
    return closed


def _closed_mean(fn: Any) -> Tensor | None:
    try:
        return cast(Tensor, fn.mean)
    except NotImplementedError:
        return None


def is_category(fn: Any) -> bool:
    """Whether a distribution is over classes without order, which have a mode and no mean."""
    closed = _closed_mean(fn) if fn.support.is_discrete else None
    return closed is not None and bool(closed.isnan().any())


def typical(fn: Any) -> Tensor:
    """The mean of a distribution; of one that has none, as of classes, the most probable value.

    Where a class is a row of zeros with a one, the mean is its probability.
    """
    closed = _closed_mean(fn)
    if closed is None:
        return mean(fn)
    return mode(fn) if bool(closed.isnan().any()) else closed


def mode(fn: Any) -> Tensor:
    """The most probable value of a distribution."""
    if type(fn).__name__ in ("Independent", "MaskedDistribution"):
        return mode(fn.base_dist)
    try:
        return fn.mode
    except NotImplementedError:
        pass
    if fn.event_shape or not num_values(fn):
        raise UsageError(f"{type(fn).__name__} has neither a mode nor a list of values")
    values = [torch.full_like(fn.mean, k) for k in range(num_values(fn))]
    return torch.stack([fn.log_prob(value) for value in values]).argmax(0)


def num_values(fn: Any) -> int:
    """How many values each element has of a distribution over 0, 1, ..., else 0."""
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not isinstance(support, constraints.integer_interval) or int(support.lower_bound) != 0:
        return 0
    return int(support.upper_bound) + 1


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
            msg["value"] = mode(fn) if fn.support.is_discrete else mean(fn)
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


class DataFirst(Given):
    """`Given` for values with the data as dimension 0, as `data_first` gives them."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and is_local(msg):
            msg["value"] = msg["value"].movedim(0, -1 - msg["fn"].event_dim)
