"""From latents to data: sample, decode, reconstruct, interpolate, traverse."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.passes import (
    ROWS_AT_ONCE,
    generate,
    guide_of,
    in_chunks,
    latent_values,
    prepared_batches,
    require_known_groups,
    require_no_rows,
)
from pyro_vae.pairs import masks
from pyro_vae.pairs.arrays import as_tensor, each_context
from pyro_vae.pairs.contract import run_in_words
from pyro_vae.pairs.given_globals import global_values
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model, unconditioned
from pyro_vae.pairs.moments import support_of
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import (
    data_first,
    data_site,
    latents,
    require_normalized,
    sample_sites,
    x_site,
)
from pyro_vae.pairs.template import template
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import trace

SHARED_DRAWS = 100
"""Number of parts into which `sample` splits its rows; each has its own draw of global latents."""


@alone()
def sample(
    pair: nn.Module,
    n: int,
    *context: Any,
    means: bool = False,
    site: str | None = None,
    seed: int | None = None,
) -> Tensor:
    """Draw n data from the model: local latents from their priors, then data given them.

    Global latents, such as the weights of a decoder, are drawn from the guide, which is their
    approximate posterior. So the data are those that the fitted model predicts. There are up to a
    hundred draws of the global latents, and n / 100 of the rows share each of them.

    Arguments:
        pair: a pair with ``template(n)``.
        n: number of data.
        context: the context tensors of a conditional pair, with n rows or with one row for all
            data.
        means: return the mean of each datum given its latents instead of a draw. For data that
            are classes, return the most probable class.
        site: the observed site; the first by default.
        seed: random seed. Without it, the draws continue torch's own generator.

    Returns a tensor of shape (n, *data_shape). Raises `UsageError` if n is below 1, for a model
    with a ``pyro.factor``, which has no independent draws, and for a guide that computes global
    latents from rows.

    >>> import pyro_vae as pv
    >>> sample(pv.VAE.mlp((1, 8, 8)), 3, seed=0).unique()
    tensor([0., 1.])
    """
    if not isinstance(n, Integral) or n < 1:
        raise UsageError(f"must be a whole number and at least 1, got {n}", argument="n")
    context = each_context(context)
    batch = template(pair, int(n), context)
    require_known_groups(pair, batch)
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, seed):
        drawn = run_in_words("model", lambda: trace(unconditioned(pair), few), few)
        require_normalized(drawn, "only MCMC can draw from it (pyro_vae.nuts)")
    shared = global_latents(pair, batch)
    size = min(ROWS_AT_ONCE, -(-n // SHARED_DRAWS)) if shared else ROWS_AT_ONCE
    parts = []
    with using(pair, seed=0):
        require_no_rows(pair, batch, shared, "sample")
    with using(pair, seed):
        for part in in_chunks(batch, size):
            own = _global_values(pair, part, False, shared)
            parts.append(generate(pair, part, own, means, site))
    return torch.cat(parts)


@alone()
def decode(
    pair: nn.Module,
    values: Mapping[str, Tensor],
    *context: Any,
    means: bool = True,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the data that the model gives for these latents, as means or as draws.

    Arguments:
        pair: a pair with ``template(n)``.
        values: an array (n, *event_shape) for each latent site; global latents have no dimension
            n. Sites that you leave out are drawn. Global latents take the guide's means if
            ``means`` is true, and draws of the guide otherwise.
        context: the context tensors, with n rows or with one row for all data.
        means: return means (see `reconstruct`) instead of draws.
        site: the observed site; the first by default.

    Returns a tensor of shape (n, *data_shape). Raises `UsageError` if ``values`` is empty or
    names a site that the model does not have.

    >>> import torch, pyro_vae as pv
    >>> decode(pv.VAE.mlp((1, 8, 8), latent_dim=3), {"z": torch.zeros(5, 3)}).shape
    torch.Size([5, 1, 8, 8])
    """
    if not isinstance(values, Mapping):
        raise UsageError(
            f"must be a dictionary from latent sites to arrays, got {type(values).__name__}",
            argument="values",
        )
    if not values:
        raise UsageError("must give at least one latent site, got none", argument="values")
    context = tuple(as_tensor(part, "context") for part in each_context(context))
    few = template(pair, 1, tuple(part[:1] for part in context))
    shared = global_latents(pair, few)
    given = _placed(pair, few, values, shared)
    rows = {name: len(value) for name, value in given.items() if name not in shared}
    if len(set(rows.values())) > 1:
        raise UsageError(
            f"must have as many rows at each local latent, got {rows}", argument="values"
        )
    sizes = rows.values() or [len(part) for part in context]
    batch = template(pair, max(sizes, default=1), context)
    require_known_groups(pair, batch)
    with using(pair, seed=0):
        require_no_rows(pair, batch, [name for name in shared if name not in given], "decode")
    with using(pair, seed):
        own = _global_values(pair, batch, means, shared)
        return generate(pair, batch, own | given, means, site)


@alone()
def reconstruct(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    means: bool = True,
    site: str | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
) -> Tensor:
    """Encode data and decode them again, with means throughout or draws throughout.

    Global latents take their means too, or one draw for each thousand rows. `pyro_vae.uncertainty`
    measures the effect of their spread. Data that are classes (categories, tokens) have no mean;
    the result is then the most probable class. If a class is a row of zeros with a one
    (``OneHotCategorical``), the result is the probability of each class.

    Returns a tensor of shape (n, *data_shape).

    >>> import torch, pyro_vae as pv
    >>> reconstruct(pv.VAE.mlp((1, 8, 8)), torch.ones(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """
    parts = []
    with using(pair, seed):
        for batch in prepared_batches(pair, x, context, binarize):
            parts.append(generate(pair, batch, latent_values(pair, batch, means), means, site))
    return torch.cat(parts)


@alone()
def hidden(pair: nn.Module, x: Rows, *context: Any) -> Tensor:
    """Return which entries of the data the model masks: booleans of the shape of x.

    All are False if the model observes something of another size in place of x.
    """
    parts = []
    with using(pair, seed=0):
        for batch in prepared_batches(pair, x, context, "dynamic"):
            site = data_site(trace_model(pair, batch, trace_guide(pair, batch)))
            same = site["value"].numel() == batch[0].numel()
            parts.append((masks.seen(site, batch[0]) if same else batch[0]).isnan())
    return torch.cat(parts)


@alone()
def observes_x(pair: nn.Module, x: Tensor, *context: Tensor) -> bool:
    """Return whether one site of the model observes x, and not several sites its parts."""
    with using(pair, seed=0):
        batch = next(iter(prepared_batches(pair, x[:2], [part[:2] for part in context], "dynamic")))
        return x_site(trace_model(pair, batch, trace_guide(pair, batch))) is not None


@alone()
def interpolate(
    pair: nn.Module,
    start: Tensor,
    end: Tensor,
    *context: Any,
    end_context: Sequence[Any] = (),
    steps: int = 9,
    site: str | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
) -> Tensor:
    """Decode points on the straight lines between the codes of two sets of data.

    Arguments:
        start, end: data of n rows each.
        context: the context of ``start``, with which all points of the line are decoded.
        end_context: the context with which ``end`` is encoded; that of ``start`` by default.
        steps: number of points on each line, including both ends.

    Latents that are not real numbers take the values of the nearer end. Returns a tensor of shape
    (n, steps, *data_shape). Raises `UsageError` if the numbers of rows differ or ``steps`` is
    below 2.

    >>> import torch, pyro_vae as pv
    >>> interpolate(pv.VAE.mlp((4,)), torch.ones(2, 4), torch.zeros(2, 4), steps=5).shape
    torch.Size([2, 5, 4])
    """
    if len(start) != len(end):
        raise UsageError(f"`start` has {len(start)} rows but `end` has {len(end)}; they must match")
    if steps < 2:
        raise UsageError(f"must be at least 2, got {steps}", argument="steps")
    with using(pair, seed):
        (batch,) = prepared_batches(pair, start, context, binarize, at_once=True)
        of_end = tuple(end_context) or context
        (other,) = prepared_batches(pair, end, of_end, binarize, at_once=True)
        first, last = (latent_values(pair, part, True) for part in (batch, other))
        shared = global_latents(pair, batch)
        real = [name for name, of in supports_of(pair, batch).items() if not of.is_discrete]
        frames = []
        for t in torch.linspace(0, 1, steps).tolist():
            values = {
                name: torch.lerp(a, last[name], t)
                if name in real and name not in shared
                else (a if t < 0.5 else last[name])
                for name, a in first.items()
            }
            frames.append(generate(pair, batch, values, True, site))
    return torch.stack(frames, 1)


@alone()
def traverse(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    latent: str | None = None,
    units: Sequence[int] | None = None,
    site: str | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
) -> Tensor:
    """Decode the code of one datum with one latent unit at a time set to each of these values.

    Arguments:
        x, context: one row.
        values: the values of the unit, within the support of the latent.
        latent: the latent site; by default the first with real numbers.
        units: the units of this site; all by default.

    Returns a tensor of shape (units, values, *data_shape). Raises `UsageError` for more than one
    row, for a pair without local latents, and for a value outside the support.

    >>> import torch, pyro_vae as pv
    >>> traverse(pv.VAE.mlp((4,), latent_dim=3), torch.ones(1, 4)).shape
    torch.Size([3, 7, 4])
    """
    if len(values) < 1:
        raise UsageError("must contain at least one number, got none", argument="values")
    with using(pair, seed):
        (batch,) = prepared_batches(pair, x, context, binarize, at_once=True)
        if len(batch[0]) != 1:
            raise UsageError(f"must contain one datum, got {len(batch[0])}", argument="x")
        shared = global_latents(pair, batch)
        given = latent_values(pair, batch, True)
        codes = {name: value for name, value in given.items() if name not in shared}
        supports = supports_of(pair, batch)
        real = [name for name in codes if name in supports and not supports[name].is_discrete]
        if not codes:
            raise UsageError(
                f"{type(pair).__name__} has no local latent, so traverse has no units to move"
            )
        chosen = latent or (real or list(codes))[0]
        if chosen not in codes:
            raise UsageError(
                f"must be one of {', '.join(codes)}, got '{chosen}'", argument="latent"
            )
        width = codes[chosen].numel()
        units = range(width) if units is None else units
        if any(not 0 <= unit < width for unit in units):
            raise UsageError(
                f"of site '{chosen}' must be between 0 and {width - 1}, got {list(units)}",
                argument="units",
            )
        n = len(units) * len(values)
        moved = codes[chosen].reshape(1, -1).repeat(n, 1).double()
        moved[torch.arange(n), torch.tensor(units).repeat_interleave(len(values))] = (
            torch.tensor(values, dtype=moved.dtype).repeat(len(units)).to(moved.device)
        )
        moved = moved.reshape(n, *codes[chosen].shape[1:])
        require_inside(chosen, supports.get(chosen), moved)
        wide = {name: code.expand(n, *code.shape[1:]) for name, code in codes.items()}
        wide[chosen] = moved.to(codes[chosen].dtype)
        wide |= {name: given[name] for name in shared}
        repeated = tuple(tensor.expand(n, *tensor.shape[1:]) for tensor in batch)
        images = generate(pair, repeated, wide, True, site)
    return images.reshape(len(units), len(values), *images.shape[1:])


def _placed(
    pair: nn.Module, few: Batch, values: Mapping[str, Any], shared: Sequence[str]
) -> dict[str, Tensor]:
    """Return values of latent sites as tensors of the site's type; local latents have rows.

    Raises `UsageError` for a site that the model does not have, and for a wrong shape.
    """
    with using(pair, 0):
        sites = sample_sites(trace(unconditioned(pair), few))
    placed = {}
    for name, value in values.items():
        if name not in sites:
            raise UsageError(f"the model has no site '{name}'")
        site, local = sites[name], name not in shared
        like = data_first(site["value"], site) if local else site["value"]
        if not like.dim():  # one number, as an array of one row
            value = value[None] if isinstance(value, Tensor | np.ndarray) else [value]
        tensor = as_tensor(value, f"the value of '{name}'").to(like.device, like.dtype)
        tensor = tensor if like.dim() else tensor[0]
        if tensor.shape[local:] != like.shape[local:]:
            wanted = ", ".join(["n"] * local + [str(size) for size in like.shape[local:]])
            raise UsageError(
                f"the value of '{name}' must have shape ({wanted}), got {tuple(tensor.shape)}"
            )
        placed[name] = tensor
    return placed


def supports_of(pair: nn.Module, batch: Batch) -> dict[str, Any]:
    """The support of each latent of the model, by site."""
    found = latents(trace(cast(Pair, pair).model, batch))
    return {name: support_of(site["fn"]) for name, site in found.items()}


def require_inside(name: str, support: Any, values: Tensor) -> None:
    """Raise `UsageError` if values are outside the support of a latent."""
    if support is not None and not bool(support.check(values).all()):
        raise UsageError(
            f"must be within the support of latent '{name}', which is "
            f"{'discrete' if support.is_discrete else str(support)}",
            argument="values",
        )


def _global_values(
    pair: nn.Module, batch: Batch, means: bool, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the guide's means or draws of these global latents."""
    return global_values(guide_of(pair, batch, means), names) if names else {}
