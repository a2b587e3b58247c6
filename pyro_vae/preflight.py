"""Pre-flight: run a pair once on a batch and say in words what would go wrong."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae import enumeration, folding, masks
from pyro_vae.data import Preparation
from pyro_vae.errors import UsageError, first_line
from pyro_vae.objectives import EnumeratedELBO, ImportanceWeightedELBO, takes_guide_terms
from pyro_vae.pairs import (
    Pair,
    Site,
    adopt,
    evaluation_mode,
    factors,
    is_auxiliary,
    is_local,
    latents,
    log_prob,
    observed,
    placement,
    sample_sites,
    scope,
    trace,
)
from pyro_vae.pairs import trace_model as run_model
from pyro_vae.places import NO_SIZE
from pyro_vae.rng import seeded
from pyro_vae.threads import alone


def run_guide(pair: nn.Module, batch: Sequence[Tensor]) -> Trace:
    """The trace of the guide as it is written, before any of its sites are folded."""
    return trace(cast(Pair, pair).guide, batch)


@dataclass(frozen=True)
class Report:
    """What `check` found: ``errors`` make inference fail or lie, ``notes`` may be intended."""

    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"error: {line}" for line in self.errors] + [
            f"note: {line}" for line in self.notes
        ]
        return "\n".join(lines or ["the pair is sound"])


@alone()
def check(
    pair: nn.Module, batch: Tensor | Sequence[Tensor], objective: ELBO | None = None
) -> Report:
    """Run a pair once on a batch, and report each fault with its remedy in words.

    Checked are: that model and guide run; that every latent site of the model is in the guide, and
    none of the guide's is missing from the model; that shapes of sites, plate and events agree;
    that model and guide mask and scale latents alike, and that nothing depends on what a mask
    hides; that every parameter the loss depends on is one of the pair's; and that ``objective``, if
    given, is valid for the pair.

    Arguments:
        pair: any ``nn.Module`` with ``model`` and ``guide``.
        batch: the tensors that model and guide take, two rows of each at least (or x alone);
            8-bit intensities become floats in [0, 1], as in `pyro_vae.fit`.

    Nothing is trained; parameters, random generators and the parameter store stay as they were.

    >>> import torch, pyro_vae as pv
    >>> print(check(pv.VAE.mlp((4,)), (torch.ones(2, 4),)))
    the pair is sound
    """
    if fault := no_pair(pair):
        return Report((fault,))
    batch = Preparation(*placement(pair))((batch,) if isinstance(batch, Tensor) else batch)
    with (
        evaluation_mode(pair),
        scope(pair),
        seeded(0),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            guide = _run("guide", lambda: run_guide(pair, batch), batch)
            try:
                model = _run("model", lambda: run_model(pair, batch, guide), batch)
            except UsageError:
                # The model alone may run, and its sites say why the two do not go together.
                alone = _run("model", lambda: trace(cast(Pair, pair).model, batch), batch)
                found = [*_sites(alone, guide), *_shapes(alone, guide, batch)]
                if not found:
                    raise
                return Report(tuple(found))
        except UsageError as error:
            return Report((str(error),))
        adopt(pair, batch)
        # Anew, so that the traces know adopted parameters as the pair's own.
        guide = run_guide(pair, batch)
        model = run_model(pair, batch, guide)
        errors = [*_sites(model, guide), *_shapes(model, guide, batch)]
        errors = errors or list(folding.plan(pair, batch).faults)
        errors = errors or _masks(pair, batch, model, guide)
        errors = errors or folding.misplaced_factors(pair, batch)
        errors = errors or _enumerated(pair, batch, model, guide)
        notes: list[str] = []
        if not errors:
            errors, notes = _parameters(pair, model, guide)
            errors += _objective(pair, objective, batch, model, guide)
            notes += _named(pair, model, guide)
    return Report(tuple(errors), tuple(notes))


def require(pair: nn.Module, batch: Sequence[Tensor], objective: ELBO | None = None) -> Report:
    """`check`, raising `UsageError` with the first error."""
    report = check(pair, batch, objective)
    if report.errors:
        raise UsageError(report.errors[0])
    return report


def no_pair(pair: Any) -> str | None:
    """Why this is no pair at all, or None."""
    name = type(pair).__name__
    if not isinstance(pair, nn.Module):
        return f"a pair is an nn.Module with model and guide, {name} is none"
    for method in ("model", "guide"):
        if not callable(getattr(pair, method, None)):
            return f"{name} has no method '{method}(*batch)'"
    return None


_MISMATCH = re.compile(
    r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim -1, (\d+) vs (\d+)"
)


def _run(what: str, run: Callable[[], Trace], batch: Sequence[Tensor]) -> Trace:
    try:
        return run()
    except UsageError:
        raise
    except Exception as error:  # a user's own code may raise anything
        message, n = first_line(error), len(batch[0])
        found = _MISMATCH.match(message)
        if found and int(found[3]) == n:
            raise UsageError(
                f"site '{found[2]}' of the {what} has size {found[4]} where the plate "
                f"'{found[1]}' has {n}: declare what is right of the data as an event by "
                ".to_event(1)"
            ) from error
        if found:
            raise UsageError(
                f"the data plate of the {what} has size {found[3]}, the batch {n} rows: "
                'use pyro.plate("data", len(x), dim=-1)'
            ) from error
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
        raise UsageError(
            f"the {what} fails on a batch of shapes {shapes}: {type(error).__name__}: {message}"
        ) from error


def _sites(model: Trace, guide: Trace) -> list[str]:
    errors = []
    if not observed(model):
        errors.append("the model observes nothing: give one pyro.sample the data, as obs=x")
    in_model, in_guide = sample_sites(model), latents(guide)
    for name in [name for name in sample_sites(guide) if name not in in_guide]:
        if name in latents(model) or not is_auxiliary(sample_sites(guide)[name]):
            errors.append(
                f"the guide observes site '{name}': a guide samples latents, drop obs=; or mark a "
                'term of the loss alone, of a name of its own, infer={"is_auxiliary": True}'
            )
    summed = enumeration.to_enumerate(model, guide)
    for name in summed:
        errors += _summable((latents(model) | latents(guide))[name])
    for name in latents(model):
        if name not in in_guide and name not in summed and not errors:
            errors.append(masks.missing(name, model))
    for name, site in latents(guide).items():
        if name not in in_model and not site["infer"].get("is_auxiliary"):
            errors.append(
                f"site '{name}' of the guide is missing from the model: add it to the model, or "
                "take it out of the guide"
            )
        elif name in in_model and in_model[name]["is_observed"]:
            errors.append(f"site '{name}' is sampled by the guide and observed by the model")
    return errors


def _named(pair: nn.Module, model: Trace, guide: Trace) -> list[str]:
    """What the numbers of a pair are, where they are not what their names say."""
    notes, found = [], folding.known(pair)
    if found.local_points:
        notes.append(
            f"the guide of {', '.join(found.local_points)} is a Delta: what is maximized is log "
            "p(x, z) at a point estimate, not a bound on log p(x)"
        )
    if found.global_points:
        notes.append(
            f"the guide of {', '.join(found.global_points)} is a Delta, a point estimate: bounds "
            "on log p(x) are given it"
        )
    notes += [
        f"log p(x) includes the factor '{name}': it is that of a density which is not normalized"
        for name in factors(model)
    ]
    notes += [
        f"site '{name}' that the guide observes is a term of the loss, plus its log density, and "
        "not a part of q"
        for name, site in sample_sites(guide).items()
        if site["is_observed"]
    ]
    return notes


def _summable(site: Site) -> list[str]:
    """Why a site that is marked so cannot be summed out."""
    name, fn = site["name"], site["fn"]
    start = f"latent site '{name}' is to be enumerated, "
    if site["infer"]["enumerate"] != "parallel" or site["infer"].get("num_samples"):
        return [start + 'which is served as infer={"enumerate": "parallel"} alone: nothing else']
    if site["infer"].get("is_auxiliary"):
        return [start + "and the guide alone has it: drop the mark, or add it to the model"]
    if fault := enumeration.misplaced(site):
        return [fault]
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:
        kind = type(getattr(fn, "base_dist", fn)).__name__
        return [f"{start}and its distribution ({kind}) has no finite list of values"]
    return []


def _enumerated(pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace) -> list[str]:
    """What is wrong where enumerated sites take all of their values at once."""
    names = enumeration.to_enumerate(model, guide)
    if not names:
        return []
    said = f"with all values of '{names[0]}' in a dimension of their own, left of the plates, "
    try:
        nesting = enumeration.nesting_of(model, guide)
        model, guide = enumeration.traces(pair, tuple(batch), nesting)
        enumeration.terms(model, guide)
    except UsageError as error:
        return [said + first_line(error)]
    except Exception as error:  # a user's own code may raise anything
        return [f"{said}the pair fails: {type(error).__name__}: {first_line(error)}"]
    n = len(batch[0])
    for where, traced in (("model", model), ("guide", guide)):
        for name, site in sample_sites(traced).items():
            shape = log_prob(site).shape
            if is_local(site) and shape[-1] != n:
                return [f"{said}site '{name}' of the {where} has batch shape {tuple(shape)}"]
    return []


def _shapes(model: Trace, guide: Trace, batch: Sequence[Tensor]) -> list[str]:
    n, errors = len(batch[0]), []
    for where, traced in (("model", model), ("guide", guide)):
        for name, site in (observed(traced) | latents(traced)).items():
            errors += _placement(where, name, site, n, _subsampled(traced))
    errors = errors or _global(model, guide)
    in_model, in_guide = _plates(model), _plates(guide)
    for name in in_model.keys() & in_guide.keys():
        if in_model[name] != in_guide[name]:
            errors.append(
                f"plate '{name}' has size {in_model[name]} in the model and {in_guide[name]} in "
                'the guide: use pyro.plate("data", len(x), dim=-1) in both'
            )
    if errors:
        return errors
    for name, site in latents(guide).items():
        if name not in sample_sites(model):
            continue
        p, q = sample_sites(model)[name]["fn"], site["fn"]
        if p.event_shape != q.event_shape:
            errors.append(
                f"site '{name}' has event shape {tuple(p.event_shape)} in the model and "
                f"{tuple(q.event_shape)} in the guide: they must be one"
            )
    for name, site in observed(model).items():
        shape = site["fn"].batch_shape + site["fn"].event_shape
        if not _matches(site["value"].shape, shape):
            errors.append(
                f"the value observed at site '{name}' has shape {tuple(site['value'].shape)}, its "
                f"distribution is over {tuple(shape)}: they must agree"
            )
    return errors


def _masks(pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace) -> list[str]:
    """What is wrong with the masks and scales of latents."""
    with torch.no_grad():
        found = masks.fault(pair, tuple(batch), model, guide)
    return [fault for fault in (found, masks.scale_fault(model, guide)) if fault]


def _placement(where: str, name: str, site: Site, n: int, subsampled: bool) -> list[str]:
    """What is wrong with the plates around a site."""
    shape = tuple(site["fn"].batch_shape)
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    extra = len(shape) - max((-dim for dim in sizes), default=0)
    outside = site["is_observed"] and not is_local(site) and -1 in sizes
    if outside or (not sizes and (site["is_observed"] or shape == (n,))):
        return [
            f"site '{name}' of the {where} is outside the data plate: put it under "
            'with pyro.plate("data", len(x), dim=-1)'
        ]
    if extra > 0:
        return [
            f"site '{name}' of the {where} has batch shape {shape}, {extra} more than its plates: "
            f"declare the rest on the right as an event by .to_event({extra})"
        ]
    if sizes and -1 not in sizes:
        return [
            f"site '{name}' of the {where} is in a plate at dim={max(sizes)}: the data plate is "
            'pyro.plate("data", len(x), dim=-1)'
        ]
    if is_local(site) and sizes[-1] not in (n, NO_SIZE) and not subsampled:
        return [
            f"the data plate of the {where} has size {sizes[-1]}, the batch {n} rows: "
            'use pyro.plate("data", len(x), dim=-1)'
        ]
    return []


def _global(model: Trace, guide: Trace) -> list[str]:
    """What is wrong with latents outside the data plate, of which all data have one."""
    in_model = sample_sites(model)
    for name, site in latents(guide).items():
        outside = [not is_local(at) for at in (site, in_model.get(name, site))]
        if outside[0] != outside[1]:
            where, other = ("guide", "model") if outside[0] else ("model", "guide")
            return [
                f"site '{name}' of the {where} is outside the data plate, and under it in the "
                f'{other}: put it under with pyro.plate("data", len(x), dim=-1) in both'
            ]
        if outside[0] and (_subsampled(model) or _subsampled(guide)):
            return [
                f"site '{name}' is outside a data plate that takes the batch for a part of the "
                "data: fit itself cuts minibatches and weighs such a site's KL by them; use "
                'pyro.plate("data", len(x), dim=-1)'
            ]
    return []


def _matches(value: torch.Size, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(value, shape) == value
    except RuntimeError:
        return False


def _plates(traced: Trace) -> dict[str, int]:
    """The whole size of each plate, before any subsampling."""
    return {
        frame.name: frame.full_size or frame.size
        for site in sample_sites(traced).values()
        for frame in site["cond_indep_stack"]
    }


def _subsampled(trace: Trace) -> bool:
    return any(
        frame.full_size is not None and frame.full_size != frame.size
        for site in sample_sites(trace).values()
        for frame in site["cond_indep_stack"]
    )


def _parameters(pair: nn.Module, model: Trace, guide: Trace) -> tuple[list[str], list[str]]:
    loss: Any = 0.0
    for site in sample_sites(model).values():
        loss = loss + log_prob(site).sum()
    for site in sample_sites(guide).values():
        loss = loss - log_prob(site).sum()
    reached = _leaves(loss) if isinstance(loss, Tensor) else []
    known = {id(parameter): name for name, parameter in pair.named_parameters()}
    foreign = [leaf for leaf in reached if id(leaf) not in known]
    errors = [
        f"the loss depends on a parameter of shape {tuple(leaf.shape)} that is not one of "
        "pair.parameters(): keep networks as attributes (lists of them as nn.ModuleList), not in "
        "a plain list, dict or global"
        for leaf in foreign[:1]
    ]
    touched = {id(leaf) for leaf in reached}
    idle = [
        name
        for name, parameter in pair.named_parameters()
        if parameter.requires_grad and id(parameter) not in touched
    ]
    notes = [
        f"parameter '{name}' has no effect on the loss and will not be trained" for name in idle
    ]
    if not reached and not errors:
        errors.append("the loss depends on no parameter: there is nothing to train")
    return errors, notes


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss would send gradients to."""
    found: dict[int, Tensor] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack += [function for function, _ in node.next_functions]
    return list(found.values())


def _objective(
    pair: nn.Module,
    objective: ELBO | None,
    batch: Sequence[Tensor],
    model: Trace,
    guide: Trace,
) -> list[str]:
    summed = enumeration.to_enumerate(model, guide)
    if objective is None and summed:
        objective = EnumeratedELBO(max_plate_nesting=enumeration.nesting_of(model, guide))
    if objective is None:
        return []
    if summed and not isinstance(objective, TraceEnum_ELBO):
        return [
            f"site '{summed[0]}' is to be summed out (enumerated), which "
            f"{type(objective).__name__} does not do: use pyro_vae.EnumeratedELBO"
        ]
    terms = [name for name, site in sample_sites(guide).items() if site["is_observed"]]
    if terms and not takes_guide_terms(objective):
        stock = "TraceEnum_ELBO" if summed else "Trace_ELBO"
        return [
            f"site '{terms[0]}' that the guide observes is a term of the loss, which "
            f"{type(objective).__name__} does not take: use {stock}"
        ]
    drawn = [name for name in latents(guide) if name not in folding.known(pair).hidden]
    whole = [name for name, site in latents(guide).items() if not is_local(site)]
    joint = (ImportanceWeightedELBO, RenyiELBO, ReweightedWakeSleep)
    if whole and isinstance(objective, joint):
        return [
            f"site '{whole[0]}' is outside the data plate, where {type(objective).__name__} weighs "
            "samples for the whole batch, not for each datum: use Trace_ELBO"
        ]
    order = [name for name in sample_sites(model) if name in latents(guide)]
    if isinstance(objective, TraceMeanField_ELBO) and order != drawn:
        return [
            "the closed-form KL is valid only where guide and model sample in one order; the "
            f"guide samples {', '.join(drawn)}, the model {', '.join(order)}: "
            "use Trace_ELBO"
        ]
    typed, loss = cast(Pair, pair), cast(Any, objective).loss
    try:
        with torch.no_grad():
            loss(typed.model, typed.guide, *batch)
    except UsageError as error:
        return [first_line(error)]
    return []


def explain_nonfinite(pair: nn.Module, batch: Sequence[Tensor]) -> str | None:
    """The first site whose parameters, value or log density are not finite on this batch."""
    with scope(pair), torch.no_grad(), pyro.validation_enabled(False):
        found: list[str] = []

        class Watch(poutine.messenger.Messenger):
            def _pyro_post_sample(self, msg: Any) -> None:
                if site_is_subsample(msg) or found:
                    return
                if not bool(torch.isfinite(log_prob(msg)).all()):
                    found.append(msg["name"])

        try:
            with Watch():
                run_model(pair, batch, run_guide(pair, batch))
        except Exception:
            return found[0] if found else None
        return found[0] if found else None
