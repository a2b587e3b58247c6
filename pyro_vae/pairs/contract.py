"""What a pair must keep, and the words for what it breaks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import full_size, leaf_of, plate_mismatch
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import enumeration, masks, summing
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.places import NO_SIZE, is_local
from pyro_vae.pairs.sites import is_auxiliary, latents, log_prob, observed, sample_sites


def no_pair(pair: Any) -> str | None:
    """Why this is no pair at all, or None."""
    name = type(pair).__name__
    if not isinstance(pair, nn.Module):
        return f"a pair is an nn.Module with model and guide, {name} is none"
    for method in ("model", "guide"):
        if not callable(getattr(pair, method, None)):
            return f"{name} has no method '{method}(*batch)'"
    return None


def run_in_words(what: str, run: Callable[[], Trace], batch: Sequence[Tensor]) -> Trace:
    try:
        return run()
    except UsageError:
        raise
    except Exception as error:  # a user's own code may raise anything
        message, n = first_line(error), len(batch[0])
        found = plate_mismatch(message)
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


def faults_of_sites(model: Trace, guide: Trace) -> list[str]:
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


def faults_of_enumeration(
    pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace
) -> list[str]:
    """What is wrong where enumerated sites take all of their values at once."""
    names = enumeration.to_enumerate(model, guide)
    if not names:
        return []
    said = f"with all values of '{names[0]}' in a dimension of their own, left of the plates, "
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
    return []


def _matches(value: torch.Size, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(value, shape) == value
    except RuntimeError:
        return False


def _plates(traced: Trace) -> dict[str, int]:
    """The whole size of each plate, before any subsampling."""
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
        leaf = leaf_of(node)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack += [function for function, _ in node.next_functions]
    return list(found.values())
