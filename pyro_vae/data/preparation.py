"""Prepare a minibatch for a pair: its device, its type, and the binarization of intensities."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.compat import version
from pyro_vae.data.sources import Arrays, Rows, Source, source
from pyro_vae.data.streams import mixed_eight_bit
from pyro_vae.data.supports import Allowed, outside
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs import masks
from pyro_vae.pairs.arrays import DIVISOR, as_context, recorded_divisor
from pyro_vae.pairs.contract import changed_in_place, faults_of_shapes
from pyro_vae.pairs.data_plate_search import runs
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import support_of
from pyro_vae.pairs.pair import Batch, Site, placement
from pyro_vae.pairs.processes import Team
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import x_site
from pyro_vae.parts.missing import OrMissing

BINARIZE = ("dynamic", "fixed", "none")


@dataclass(frozen=True)
class Preparation:
    """The function that prepares each minibatch for the pair.

    uint8 intensities become floats in [0, 1]. uint8 data that are ``whole`` numbers, such as counts
    or 0 and 1, keep their values. With ``binarize`` each pixel is then drawn from
    Bernoulli(intensity), with a new draw each time (Salakhutdinov & Murray, 2008). Floating-point
    context gets the type of the pair, and whole numbers become int64, which can index. With
    ``mask_rate``, each entry of x then becomes NaN, which is missing, with this probability.
    """

    device: torch.device
    dtype: torch.dtype
    binarize: bool = False
    whole: bool = False
    mask_rate: float = 0.0
    integers: bool = False
    """Whether x stays int64, because the pair takes integers (`takes_integers`)."""

    def __call__(self, batch: Sequence[Tensor]) -> Batch:
        x, *context = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        gray = x.dtype == torch.uint8 and not self.whole and not self.integers
        x = x.to(torch.int64 if self.integers else self.dtype)
        x = x / 255 if gray else x
        if self.binarize:
            # Like torch.bernoulli, in half the time. A missing entry stays NaN.
            x = torch.where(x.isnan(), x, (torch.rand_like(x) < x).to(x.dtype))
        if self.mask_rate:
            x = torch.where(torch.rand_like(x) < self.mask_rate, torch.nan, x)
        return (x, *(as_context(tensor, self.dtype) for tensor in context))


def plain_preparation(pair: nn.Module, raw: Sequence[Tensor]) -> Preparation:
    """The preparation of these rows that knows only the pair's types."""
    return Preparation(*placement(pair), integers=takes_integers(pair, raw))


_TAKES_INTEGERS: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def takes_integers(pair: nn.Module, raw: Sequence[Tensor]) -> bool:
    """Whether a pair takes integer x as int64, for example to index an embedding.

    The template says it. A pair without a template takes integers if it fails on floats.
    """
    if raw[0].is_floating_point() or raw[0].dtype == torch.bool:
        return False
    if hasattr(pair, "template"):
        like = cast(Any, pair).template(1)[0]
        return not like.is_floating_point() and like.dtype not in (torch.bool, torch.uint8)
    if pair not in _TAKES_INTEGERS:
        floats = Preparation(*placement(pair))
        few = [tensor[:2].clone() for tensor in raw]
        ways = (floats, replace(floats, integers=True))
        _TAKES_INTEGERS[pair] = [runs(pair, way(few)) for way in ways] == [False, True]
    return _TAKES_INTEGERS[pair]


def preparation(pair: nn.Module, rows: Source, binarize: str = "dynamic") -> Preparation:
    """Find the preparation of these rows for this pair by running the pair on a few rows.

    - If the likelihood is on {0, 1}, intensities between 0 and 1 are binarized. With
      ``binarize="none"`` they pass unchanged.
    - If the likelihood is on whole numbers, uint8 data are whole numbers.
    - Other uint8 data are treated like the data that the pair was fitted to (`recorded_divisor`).
      Without such a record, data with only the values 0 and 1 keep them, and all other data are
      intensities.

    Raises `UsageError` for values outside the support of the likelihood, and for uint8 data whose
    largest value is between 2 and 63, because these are probably not 8-bit intensities.
    """
    if binarize not in BINARIZE:
        raise UsageError(
            f"cannot be '{binarize}'; {nearest(binarize, BINARIZE)}", argument="binarize"
        )
    raw = rows.first(16)
    plain = plain_preparation(pair, raw)
    batch = plain(raw)
    site = _observation(pair, batch)
    if site is None:
        return plain
    support, masked = _support(site), masks.is_masked(site)
    as_given = _observes(site, batch[0])
    plain = _with_eight_bit(plain, pair, rows, raw[0], support if as_given else None)
    if not as_given or support.event_dim > 0:
        return plain
    batch = plain(raw)
    # Only the first rows of a stream are checked here, and the others when they arrive.
    parts: Iterable[Batch] = [batch]
    if isinstance(rows, Arrays):
        parts = map(plain, rows.batches(4096))
    elif support is constraints.boolean:  # nearly black images may come first
        few = plain(rows.first(256))
        within = ((few[0] >= 0) & (few[0] <= 1)) | few[0].isnan()
        parts = [batch, few] if bool(within.all()) else parts
    own = any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(support).values())
    gray = False
    for part in parts:
        x = part[0]
        hidden = (_hidden(pair, part) | x.isnan()) if masked else x.isnan()
        inside = (_inside(pair, part) if own else support.check(x)) | hidden
        if not gray and not bool(inside.all()):
            scored = _scored(pair, part)
            if scored is None:  # unlike the first rows, these show that the pair transforms x
                return plain
            inside = inside | scored
        if support is constraints.boolean and not bool(inside.all()):
            gray, inside = True, ((x >= 0) & (x <= 1)) | hidden
        if not bool(inside.all()):
            whole = rows.tensors[0] if isinstance(rows, Arrays) else x
            raise UsageError(outside(x[~inside][0].item(), whole, site))
    if not isinstance(rows, Arrays) and not masked and not own and support is not constraints.real:
        eight_bit = not (plain.whole or plain.integers)
        run = partial(_scored_raw, pair, plain)
        rows.allowed = Allowed(site, support, plain.dtype, plain.integers, eight_bit, gray, run)
    return replace(plain, binarize=gray and binarize != "none")


def _observation(pair: nn.Module, batch: Batch) -> Site | None:
    """The site that observes x in a batch."""
    versions = [version(part) for part in batch]
    with using(pair, seed=0), pyro.validation_enabled(False):
        guide, model = _run(pair, batch)
        if fault := changed_in_place(batch, versions):
            raise UsageError(fault)
        if fault := masks.too_wide(model, "model"):
            raise UsageError(fault)
        if faults := faults_of_shapes(model, guide, batch):
            shapes = ", ".join(str(tuple(tensor.shape[1:])) for tensor in batch)
            raise UsageError(
                f"{faults[0]}; or, if a row of x or of context has a wrong shape, correct it (the "
                f"shapes are {shapes})"
            )
        return x_site(model)


def _observes(site: Site, x: Tensor) -> bool:
    """Whether a site observes x, in all entries that count, and not a function of x."""
    value = site["value"]
    if value.numel() != x.numel():
        return False
    x = x.reshape(value.shape)
    same = (value == x) | (value.isnan() & x.isnan())
    return bool((same | ~masks.scored(site)).all())


def _hidden(pair: nn.Module, batch: Batch) -> Tensor:
    """Which entries of x a mask hides, such as padding; they may have any value."""
    site: Any = _observation(pair, batch)
    return ~masks.scored(site).reshape(batch[0].shape)


def _inside(pair: nn.Module, batch: Batch) -> Tensor:
    """Which values of x are in the support, where its bounds differ from row to row."""
    site: Any = _observation(pair, batch)
    return cast(Tensor, _support(site).check(site["value"]).reshape(batch[0].shape))


def _scored(pair: nn.Module, batch: Batch) -> Tensor | None:
    """Which values of x are in the support, or hidden, in a run of the pair on these very rows.

    None if the pair does not observe x itself.
    """
    try:
        site: Any = _observation(pair, batch)
    except UsageError:  # the pair fails on values outside
        return torch.zeros_like(batch[0], dtype=torch.bool)
    if site is None or not _observes(site, batch[0]):
        return None
    inside = _support(site).check(site["value"])
    hidden = ~masks.scored(site) | site["value"].isnan()
    return cast(Tensor, inside | hidden).reshape(batch[0].shape)


def _scored_raw(pair: nn.Module, plain: Preparation, batch: Batch) -> Tensor | None:
    return _scored(pair, plain(batch))


def _support(site: Site) -> Any:
    """The support of one element of a site."""
    support = support_of(site["fn"])
    while isinstance(support, (constraints.independent, OrMissing)):
        support = support.base_constraint
    return support


def _with_eight_bit(
    plain: Preparation, pair: nn.Module, rows: Source, few: Tensor, support: Any
) -> Preparation:
    """The preparation that treats 8-bit data as whole numbers or as intensities."""
    if few.dtype != torch.uint8 or plain.integers:
        return plain
    if isinstance(support, _WHOLE):
        return replace(plain, whole=True)
    seen = rows.tensors[0] if isinstance(rows, Arrays) else rows.first(256)[0]
    greatest, divisor = int(seen.max()), recorded_divisor(pair)
    if divisor is None and 1 < greatest < FEWEST_LEVELS:
        raise UsageError(
            f"x is uint8 with values up to {greatest}, but 8-bit intensities go up to 255: pass "
            f"floats (x / {greatest} for levels from 0 to {greatest}, x / 255 for dark pixels)"
        )
    if divisor == 1 and greatest > 1:
        raise UsageError(mixed_eight_bit(greatest))
    whole = greatest <= 1 if divisor is None else divisor == 1
    if greatest == 1 and (not whole or (divisor is None and support is not constraints.boolean)):
        taken = (
            "used as they are" if whole else "treated as 8-bit intensities k/255, as in training"
        )
        warnings.warn(f"x is uint8 with only the values 0 and 1: they are {taken}", stacklevel=2)
    if whole and not isinstance(rows, Arrays):
        rows.greatest = 1
    return replace(plain, whole=whole)


def record_divisor(pair: nn.Module, rows: Source, prepare: Preparation) -> None:
    """Record in the pair the divisor of its 8-bit training data, 255 or 1, for later data.

    A few rows are not enough to find it: a nearly black image may have only the values 0 and 1.
    """
    x = rows.tensors[0] if isinstance(rows, Arrays) else rows.first(256)[0]
    if x.dtype == torch.uint8 and recorded_divisor(pair) is None and bool(x.any()):
        setattr(pair, DIVISOR, 1 if prepare.whole else 255)


FEWEST_LEVELS = 64
"""8-bit data whose largest value is below this, and above 1, are probably not intensities."""


def _run(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    """The traces of guide and model; the pair may fail on these data."""
    try:
        guide = trace_guide(pair, batch)
        return guide, trace_model(pair, batch, guide)
    except UsageError:
        raise
    except Exception as error:  # the code of a user may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
        raise UsageError(
            f"{type(pair).__name__} fails on a batch of shapes {shapes}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def held_out(rows: Source, prepare: Preparation) -> tuple[Source, Preparation]:
    """Rows for evaluation, which are binarized once with a fixed seed instead of at each use."""
    if prepare.binarize and isinstance(rows, Arrays):
        return rows.binarized(), Preparation(prepare.device, prepare.dtype)
    return rows, prepare


def masking(
    pair: nn.Module, prepare: Preparation, batch: Sequence[Tensor], mask_rate: float
) -> Preparation:
    """A preparation that also hides entries; raises `UsageError` if the pair scores NaN as data."""
    made = replace(prepare, mask_rate=mask_rate)
    if mask_rate:
        x, *context = prepare(batch)
        hidden = x.clone()
        hidden.reshape(len(x), -1)[:, 0] = torch.nan
        if not masks.scores_missing(pair, (hidden, *context)):
            raise UsageError(
                "needs a likelihood that leaves out missing entries, such as "
                "pyro_vae.Missing(pyro_vae.Gaussian) or pyro_vae.Columns",
                argument="mask_rate",
            )
    return made


def held_rows(
    pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str = "dynamic"
) -> tuple[Source, Preparation]:
    """Held-out rows and their preparation, from the data that the caller passed."""
    with seeded(0):  # a loader uses a random generator when it starts
        rows = source(x, context, pair)
        rows, prepare = held_out(rows, preparation(pair, rows, binarize))
    require_masks(pair, rows, prepare)
    return rows, prepare


def shared_rows(
    team: Team, pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str = "dynamic"
) -> tuple[Source, Preparation]:
    """`held_rows` in each process of a team.

    Raises `UsageError` in all processes if one has other rows.
    """
    rows, prepare = team.together(lambda: held_rows(pair, x, context, binarize))
    if team.count == 1:
        return rows, prepare

    def sums() -> list[float]:
        columns = rows.tensors if isinstance(rows, Arrays) else rows.first(16)
        return [len(rows), *(t.double().abs().nansum().item() for t in columns)]

    found = team.gather(sums)
    for rank, other in enumerate(found):
        # Another kind of CPU may add up in another order.
        if len(other) != len(found[0]) or not np.allclose(other, found[0], rtol=1e-9, atol=0.0):
            raise UsageError(
                f"process {rank} has other data than process 0: give the same data to each "
                "process, which then takes its part of the rows"
            )
    return rows, prepare


ROWS_AT_ONCE = 1000
"""Number of rows that are prepared at a time."""


def joined(rows: Source, prepare: Preparation) -> Batch:
    """All rows as one prepared batch."""
    parts = [prepare(part) for part in rows.batches(ROWS_AT_ONCE)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def whole(pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str = "dynamic") -> Batch:
    """All held-out rows that the caller passed, as one prepared batch."""
    return joined(*held_rows(pair, x, context, binarize))


def require_masks(pair: nn.Module, rows: Source, prepare: Preparation) -> None:
    """Compare the masks of model and guide on all rows in memory, or on the first of a stream."""
    with seeded(0):
        parts = rows.batches(500) if isinstance(rows, Arrays) else iter([rows.first(500)])
        masks.require(pair, map(prepare, parts))


# The supports of counts and of tokens; the support {0, 1} is another class in torch.
_WHOLE = (type(constraints.nonnegative_integer), constraints.integer_interval)
