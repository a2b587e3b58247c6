"""The rules that a pair must follow, and the messages for each violation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import full_size, leaf_of, plate_mismatch, version
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import enumeration, masks, summing
from pyro_vae.pairs.data_plate import NO_SIZE, is_local
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.sites import (
    is_auxiliary,
    latents,
    log_prob,
    observed,
    sample_sites,
    x_site,
)


def no_pair(pair: Any) -> str | None:
    """Say why an object is not a pair; None if it is one."""
    name = type(pair).__name__
    if not isinstance(pair, nn.Module):
        return f"a pair must be an nn.Module with model and guide, got {name}"
    for method in ("model", "guide"):
        if not callable(getattr(pair, method, None)):
            return f"{name} has no method '{method}(*batch)'"
    return None


def run_in_words(what: str, run: Callable[[], Trace], batch: Sequence[Tensor]) -> Trace:
    """Run a program of a pair, and turn any exception into a `UsageError` that explains it.

    Arguments:
        what: "model" or "guide", for the message.
        run: runs the program and returns its trace.
        batch: the batch on which the program runs.
    """
    try:
        return run()
    except UsageError:
        raise
    except Exception as error:  # a user's own code may raise anything
        message, n = first_line(error), len(batch[0])
        found = plate_mismatch(message)
        if found and int(found[3]) == n:
            raise UsageError(
                f"site '{found[2]}' of the {what} has size {found[4]} but the plate "
                f"'{found[1]}' has size {n}: declare the dimensions to the right of the data plate "
                "as event dimensions with .to_event(1)"
            ) from error
        if found:
            raise UsageError(
                f"the data plate of the {what} has size {found[3]} but the batch has {n} rows: "
                'use pyro.plate("data", len(x), dim=-1)'
            ) from error
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
        raise UsageError(
            f"the {what} fails on a batch of shapes {shapes}: {type(error).__name__}: {message}"
        ) from error


def faults_of_sites(model: Trace, guide: Trace) -> list[str]:
    """Errors in the sets of sites: sites without a partner, and sites observed by mistake."""
    errors = []
    if not observed(model):
        errors.append("the model does not observe data: pass obs=x to one pyro.sample")
    in_model, in_guide = sample_sites(model), latents(guide)
    x = x_site(model)
    for name, site in sample_sites(guide).items():
        if name not in in_guide and (
            name in latents(model)
            or (x is not None and name == x["name"] and not is_auxiliary(site))
        ):
            errors.append(
                f"the guide observes site '{name}', but a guide samples latents: remove obs=; for "
                "a term that only the loss contains, use a site name that is neither a latent of "
                "the model nor its site of x"
            )
    summed = enumeration.to_enumerate(model, guide)
    for name in summed:
        errors += _summable((latents(model) | latents(guide))[name], guide)
    for name in latents(model):
        if name not in in_guide and name not in summed and not errors:
            errors.append(masks.missing(name, model))
    for name, site in latents(guide).items():
        if name not in in_model and not site["infer"].get("is_auxiliary"):
            errors.append(
                f"site '{name}' of the guide is missing from the model: add it to the model, or "
                "remove it from the guide"
            )
        elif name in in_model and in_model[name]["is_observed"]:
            errors.append(
                f"the guide samples site '{name}' but the model observes it: remove it from the "
                "guide, or remove obs= from the model"
            )
    return errors


def _summable(site: Site, guide: Trace) -> list[str]:
    """Errors of a site that is marked for enumeration but cannot be summed out."""
    name, fn = site["name"], site["fn"]
    start = f"latent site '{name}' is marked for enumeration, "
    if site["infer"].get("is_auxiliary"):
        return [start + "but only the guide has it: remove the mark, or add it to the model"]
    if fault := enumeration.misplaced(site, guide):
        return [fault]
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:
        kind = type(getattr(fn, "base_dist", fn)).__name__
        return [
            f"{start}but its distribution ({kind}) does not have a finite list of values: remove "
            "the mark, or use a discrete distribution such as Categorical"
        ]
    return []


def faults_of_enumeration(
    pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace
) -> list[str]:
    """Errors that occur when each enumerated site takes all of its values at once."""
    names = enumeration.to_enumerate(model, guide)
    if not names:
        return []
    said = f"with all values of '{names[0]}' in an extra dimension to the left of the plates, "
    try:
        nesting = enumeration.nesting_of(model, guide)
        model, guide = enumeration.traces(pair, tuple(batch), nesting)
        summing.terms(model, guide)
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


def faults_of_shapes(model: Trace, guide: Trace, batch: Sequence[Tensor]) -> list[str]:
    """Errors in plates and shapes: of each site, and between the model and the guide."""
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
                f"{tuple(q.event_shape)} in the guide; they must match"
            )
    for name, site in observed(model).items():
        shape = site["fn"].batch_shape + site["fn"].event_shape
        if not _matches(site["value"].shape, shape):
            errors.append(
                f"the value observed at site '{name}' has shape {tuple(site['value'].shape)} but "
                f"its distribution has shape {tuple(shape)}; they must match"
            )
    return errors


def _placement(where: str, name: str, site: Site, n: int, subsampled: bool) -> list[str]:
    """Errors in the plates around a site."""
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
            f"site '{name}' of the {where} has batch shape {shape}, which has {extra} more "
            "dimensions than its plates: declare the rightmost dimensions as event dimensions with "
            f".to_event({extra})"
        ]
    if sizes and -1 not in sizes and site["is_observed"]:
        return [
            f"site '{name}' of the {where} is in a plate at dim={max(sizes)}: the data plate must "
            'be pyro.plate("data", len(x), dim=-1)'
        ]
    if is_local(site) and sizes[-1] not in (n, NO_SIZE) and not subsampled:
        return [
            f"the data plate of the {where} has size {sizes[-1]} but the batch has {n} rows: "
            'use pyro.plate("data", len(x), dim=-1)'
        ]
    return []


def _global(model: Trace, guide: Trace) -> list[str]:
    """Errors of global latents: latents outside all data plates."""
    in_model = sample_sites(model)
    for name, site in latents(guide).items():
        outside = [not is_local(at) for at in (site, in_model.get(name, site))]
        if outside[0] != outside[1]:
            where, other = ("guide", "model") if outside[0] else ("model", "guide")
            return [
                f"site '{name}' is outside the data plate in the {where} but inside it in the "
                f'{other}: put it under with pyro.plate("data", len(x), dim=-1) in both'
            ]
    return []


def _matches(value: torch.Size, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(value, shape) == value
    except RuntimeError:
        return False


def _plates(traced: Trace) -> dict[str, int]:
    """The full size of each plate, before subsampling."""
    return {
        frame.name: full_size(frame) or frame.size
        for site in sample_sites(traced).values()
        for frame in site["cond_indep_stack"]
    }


def _subsampled(trace: Trace) -> bool:
    return any(
        full_size(frame) is not None and full_size(frame) != frame.size
        for site in sample_sites(trace).values()
        for frame in site["cond_indep_stack"]
    )


def faults_of_parameters(
    pair: nn.Module, model: Trace, guide: Trace
) -> tuple[list[str], list[str]]:
    """Errors and notes about the parameters that the loss does or does not depend on."""
    loss: Any = 0.0
    for site in sample_sites(model).values():
        loss = loss + log_prob(site).sum()
    for site in sample_sites(guide).values():
        loss = loss - log_prob(site).sum()
    reached = _leaves(loss) if isinstance(loss, Tensor) else []
    known = {id(parameter): name for name, parameter in pair.named_parameters()}
    foreign = [leaf for leaf in reached if id(leaf) not in known]
    errors = [
        f"the loss depends on a parameter of shape {tuple(leaf.shape)} that is not in "
        "pair.parameters(): store networks as attributes (a list of networks as nn.ModuleList), "
        "not in a plain list, a dict or a global variable"
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
        errors.append(
            "the loss does not depend on a parameter, so there is nothing to train: use the "
            "pair's networks or parameters in the model or the guide"
        )
    return errors, notes


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that receive gradients from a loss."""
    found: dict[int, Tensor] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack += [function for function, _ in node.next_functions]
    return list(found.values())


def changed_in_place(batch: Batch, versions: Sequence[int]) -> str | None:
    """What is wrong if programs have changed a batch, and so would change the user's data.

    A tool runs the programs several times on the same rows, so its numbers would be wrong, too.

    Arguments:
        versions: `pyro_vae.compat.version` of each tensor before the programs ran.
    """
    for i, (part, before) in enumerate(zip(batch, versions, strict=True)):
        if version(part) != before:
            name = f"context {i}" if i else "x"
            return (
                f"the model or the guide changes {name} in place, and so your data: use an "
                "operation that returns a new tensor, or a copy (`x = x.clone()`)"
            )
    return None
