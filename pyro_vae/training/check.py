"""The check before training: run a pair once on a batch, and report faults in words."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, ReweightedWakeSleep, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import site_is_subsample, version
from pyro_vae.data.padding import without_padding
from pyro_vae.data.preparation import plain_preparation
from pyro_vae.data.streams import by_name
from pyro_vae.errors import UsageError, first_line, users_line
from pyro_vae.pairs import enumeration, fold_plan, folding, masks
from pyro_vae.pairs.arrays import as_tensor
from pyro_vae.pairs.contract import (
    changed_in_place,
    faults_of_enumeration,
    faults_of_parameters,
    faults_of_shapes,
    faults_of_sites,
    no_pair,
    run_in_words,
)
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.model import trace_model as run_model
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import adopt, evaluation_mode, keep_shapes, make_contiguous, scope
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import by_datum, factors, latents, log_prob, sample_sites
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import trace
from pyro_vae.pairs.weights import structure
from pyro_vae.training.bounds import takes_guide_terms
from pyro_vae.training.elbo import EnumeratedELBO
from pyro_vae.training.importance_bounds import ImportanceWeightedELBO


def run_guide(pair: nn.Module, batch: Sequence[Tensor]) -> Trace:
    """Return the trace of the guide as the user wrote it, before any site is folded."""
    return trace(cast(Pair, pair).guide, batch)


@dataclass(frozen=True)
class Report:
    """The result of `check`. ``errors`` make inference fail or wrong; ``notes`` may be intended."""

    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [f"error: {line}" for line in self.errors] + [
            f"note: {line}" for line in self.notes
        ]
        return "\n".join(lines or ["the pair is sound"])


@alone()
def check(
    pair: nn.Module,
    x: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *context: Any,
    objective: ELBO | None = None,
) -> Report:
    """Run a pair once on a batch, and report each fault with its remedy.

    `check` verifies that model and guide run, and that they have the same latent sites. It verifies
    the shapes of sites, plates and events. Model and guide must mask and scale latents alike, and
    nothing may depend on masked values. Every parameter that the loss depends on must belong to the
    pair. If you pass ``objective``, it must be valid for the pair.

    Arguments:
        pair: any ``nn.Module`` with ``model`` and ``guide``.
        x: the data, with at least two rows. 8-bit intensities become floats in [0, 1], as in
            `pyro_vae.fit`. A tuple of x and context, or a dictionary by the names of the model's
            arguments, takes the place of both.
        context: further tensors with as many rows as x.
        objective: a Pyro ELBO.

    `check` trains nothing. Parameters, random generators and the parameter store stay unchanged.

    >>> import torch, pyro_vae as pv
    >>> print(check(pv.VAE.mlp((4,)), torch.ones(2, 4)))
    the pair is sound
    """
    if objective is not None and not isinstance(objective, ELBO):
        raise UsageError(f"must be a Pyro ELBO, got {objective!r}", argument="objective")
    if any(isinstance(part, ELBO) for part in context):
        raise UsageError("pass the objective by its name: check(pair, x, objective=...)")
    batch = (cast(Any, x), *context) if context else x
    report = _examine(pair, batch, objective)
    return replace(report, errors=tuple(str(UsageError(error)) for error in report.errors))


@alone()
def _examine(
    pair: nn.Module,
    batch: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    objective: ELBO | None = None,
) -> Report:
    """`check`, with errors whose names are in backticks, as `UsageError` takes them."""
    if fault := no_pair(pair) or make_contiguous(pair):
        return Report((fault,))
    given = _tensors(pair, batch)
    if not given or any(part.dim() == 0 or len(part) == 0 for part in given):
        shapes = ", ".join(str(tuple(part.shape)) for part in given) or "nothing"
        return Report((f"`x` and context must have rows in dimension 0, got {shapes}",))
    # As `fit` does: entries that a mask hides may have any value.
    given = tuple(without_padding(pair, given))
    # Copies, because a program may change them.
    batch = tuple(part.clone() for part in plain_preparation(pair, given)(given))
    versions = [version(part) for part in batch]
    with (
        evaluation_mode(pair),
        scope(pair),
        seeded(0),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            find_places(pair, batch)
            guide = run_in_words("guide", lambda: run_guide(pair, batch), batch)
            try:
                model = run_in_words("model", lambda: run_model(pair, batch, guide), batch)
            except UsageError:
                # The model may run without the guide. Then its sites show why the two differ.
                alone = run_in_words("model", lambda: trace(cast(Pair, pair).model, batch), batch)
                found = [*faults_of_sites(alone, guide), *faults_of_shapes(alone, guide, batch)]
                if not found:
                    raise
                return Report(tuple(found))
        except UsageError as error:
            return Report((error.template,))
        if fault := changed_in_place(batch, versions):
            return Report((fault,))
        adopt(pair)
        keep_shapes(pair, batch)
        # New traces contain the adopted parameters as parameters of the pair.
        guide = run_guide(pair, batch)
        model = run_model(pair, batch, guide)
        errors = [*faults_of_sites(model, guide), *faults_of_shapes(model, guide, batch)]
        errors = errors or list(fold_plan.plan(pair, batch).faults)
        errors = errors or faults_of_masks(pair, batch, model, guide)
        errors = errors or folding.misplaced_factors(pair, batch)
        errors = errors or faults_of_enumeration(pair, batch, model, guide)
        notes: list[str] = []
        if not errors:
            errors, notes = faults_of_parameters(pair, model, guide)
            errors += _objective(pair, objective, batch, model, guide)
            notes += _named(pair, batch, model, guide)
    return Report(tuple(errors), tuple(notes))


def _tensors(pair: nn.Module, batch: Any) -> Batch:
    """Return a batch as tensors, from x alone, a sequence, or a dictionary by argument names."""
    given = by_name(pair, batch) if isinstance(batch, Mapping) else batch
    given = given if isinstance(given, (tuple, list)) else (given,)
    names = ("x", *(f"context {i}" for i in range(1, len(given))))[: len(given)]
    return tuple(
        value if isinstance(value, Tensor) else as_tensor(value, name)
        for value, name in zip(given, names, strict=True)
    )


def declare(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Run the programs of a pair, and adopt each ``pyro.param`` that they declare."""
    make_contiguous(pair)
    with scope(pair), pyro.validation_enabled(False):
        run_model(pair, batch, run_guide(pair, batch))
        adopt(pair)


def require(pair: nn.Module, batch: Sequence[Tensor], objective: ELBO | None = None) -> Report:
    """Run `check`, and raise `UsageError` with the first error."""
    report = _examine(pair, batch, objective)
    if report.errors:
        raise UsageError(report.errors[0])
    return report


def _named(pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace) -> list[str]:
    """Return notes about groups, and about numbers that differ from what their names say."""
    notes, found = _groups(pair, batch, model), fold_plan.known(pair)
    if found.local_points:
        notes.append(
            f"the guide of {', '.join(found.local_points)} is a Delta: training maximizes "
            "log p(x, z) at a point estimate, not a bound on log p(x)"
        )
    if found.global_points:
        notes.append(
            f"the guide of {', '.join(found.global_points)} is a Delta: bounds on log p(x) are "
            "conditional on this point estimate"
        )
    notes += [
        f"log p(x) includes the factor '{name}', so its density is not normalized"
        for name in factors(model)
    ]
    notes += [
        f"the guide observes site '{name}': its log density is added to the loss, and it is not "
        "part of q"
        for name, site in sample_sites(guide).items()
        if site["is_observed"]
    ]
    return notes


def _groups(pair: nn.Module, batch: Sequence[Tensor], model: Trace) -> list[str]:
    """Return notes about group latents: latents in plates, but not in the data plate."""
    plates = {
        name: [f"'{f.name}' ({f.size})" for f in site["cond_indep_stack"] if f.vectorized]
        for name, site in latents(model).items()
        if not is_local(site)
    }
    notes = [
        f"latent site '{name}' is a group latent: it has a value for each member of plate "
        f"{' and '.join(sizes)}, and all rows share these values"
        for name, sizes in plates.items()
        if sizes
    ]
    few = tuple(tensor[:2] for tensor in batch)
    if notes and not _broadcasts(pair, few):
        notes.append(
            "the pair does not broadcast over a plate of samples, so log_likelihood draws samples "
            "one at a time, which is slower: put the groups at dim=-1, and index from the right, "
            f"as in u[..., group]{users_line(None, cast(Pair, pair).model)}"
        )
    elif plates and len(plates) < len(latents(model)) and not _broadcasts_given(pair, few):
        notes.append(
            "samples of the local latents do not broadcast with one value of the others, so "
            "global_weights, gaps and diagnose draw samples one at a time, which is slower: expand "
            "to the common shape, such as torch.broadcast_shapes(z.shape[:-1], u[..., group].shape)"
            f"{users_line(None, cast(Pair, pair).model)}"
        )
    return notes


def _broadcasts_given(pair: nn.Module, batch: Batch) -> bool:
    """Return the same for samples of local latents, given one draw of the global ones."""
    try:
        return _broadcasts(at_one_draw(pair, batch, seed=0)[0], batch)
    except UsageError:
        return True


def _broadcasts(pair: nn.Module, batch: Batch) -> bool:
    """Return whether importance samples of a pair can be drawn together."""
    try:
        with torch.no_grad():
            return structure(pair, batch)[1]
    except UsageError:  # without importance weights nothing is slower
        return True


def faults_of_masks(
    pair: nn.Module, batch: Sequence[Tensor], model: Trace, guide: Trace
) -> list[str]:
    """Return the faults of the masks and scales of latents."""
    with torch.no_grad():
        found = masks.fault(pair, tuple(batch), model, guide)
    return [fault for fault in (found, masks.scale_fault(model, guide)) if fault]


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
            f"site '{summed[0]}' is marked for enumeration, but {type(objective).__name__} does "
            "not enumerate; use `pyro_vae.EnumeratedELBO`"
        ]
    terms = [name for name, site in sample_sites(guide).items() if site["is_observed"]]
    if terms and not takes_guide_terms(objective):
        stock = "TraceEnum_ELBO" if summed else "`Trace_ELBO`"
        return [
            f"the guide observes site '{terms[0]}', but {type(objective).__name__} does not add "
            f"such terms to the loss; use {stock}"
        ]
    drawn = [name for name in latents(guide) if name not in fold_plan.known(pair).hidden]
    whole = [name for name, site in latents(guide).items() if not is_local(site)]
    joint = (ImportanceWeightedELBO, RenyiELBO, ReweightedWakeSleep)
    if whole and isinstance(objective, joint):
        return [
            f"site '{whole[0]}' is not a local latent, so {type(objective).__name__} would weigh "
            "samples for the whole batch, not for each datum; use `Trace_ELBO`"
        ]
    order = [name for name in sample_sites(model) if name in latents(guide)]
    if isinstance(objective, TraceMeanField_ELBO) and order != drawn:
        return [
            "the closed-form KL is valid only if guide and model sample in the same order; the "
            f"guide samples {', '.join(drawn)} but the model samples {', '.join(order)}; "
            "use `Trace_ELBO`"
        ]
    typed, loss = cast(Pair, pair), cast(Any, objective).loss
    try:
        with torch.no_grad():
            loss(typed.model, typed.guide, *batch)
    except UsageError as error:
        return [first_line(error)]
    return []


def nonfinite_rows(pair: nn.Module, batch: Sequence[Tensor]) -> tuple[str | None, list[int]]:
    """Return the first site whose log density is not finite on this batch, and its rows.

    The rows are positions in the batch. They are empty if all densities are finite, or if the site
    is not local.
    """
    with scope(pair), torch.no_grad(), pyro.validation_enabled(False):
        found: list[tuple[str, list[int]]] = []

        class Watch(poutine.messenger.Messenger):
            def _pyro_post_sample(self, msg: Any) -> None:
                if site_is_subsample(msg) or found:
                    return
                density = log_prob(msg)
                if not bool(torch.isfinite(density).all()):
                    local = is_local(msg) and density.dim() > 0
                    bad = by_datum(density, particles=False).isfinite().logical_not()
                    rows = bad.nonzero().flatten().tolist() if local else []
                    found.append((msg["name"], rows))

        try:
            with Watch():
                run_model(pair, batch, run_guide(pair, batch))
        except Exception:
            return found[0] if found else (None, [])
        return found[0] if found else (None, [])


def bad_parameter(pair: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite, or None."""
    for name, parameter in pair.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    return None
