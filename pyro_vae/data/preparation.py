"""How a minibatch is prepared for a pair: device, type, and the binarization of gray
intensities."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.data.sources import Arrays, Rows, Source, Stream, mixed_eight_bit, source
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs import masks
from pyro_vae.pairs.arrays import DIVISOR, recorded_divisor
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site, placement
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import x_site

BINARIZE = ("dynamic", "fixed", "none")


@dataclass(frozen=True)
class Preparation:
    """What is done to each minibatch on its way to the pair.

    uint8 intensities become floats in [0, 1], unless they are ``whole`` numbers, such as counts or
    0 and 1; then, where ``binarize``, each pixel is drawn as Bernoulli(intensity), anew at each
    visit (Salakhutdinov & Murray, 2008). Floating context takes the pair's type.
    """

    device: torch.device
    dtype: torch.dtype
    binarize: bool = False
    whole: bool = False

    def __call__(self, batch: Sequence[Tensor]) -> Batch:
        x, *context = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        grey = x.dtype == torch.uint8 and not self.whole
        x = x.to(self.dtype) / 255 if grey else x.to(self.dtype)
        if self.binarize:
            x = (torch.rand_like(x) < x).to(x.dtype)  # as torch.bernoulli, in half the time
        return (x, *(c.to(self.dtype) if c.is_floating_point() else c for c in context))


def preparation(pair: nn.Module, rows: Source, binarize: str = "dynamic") -> Preparation:
    """How these rows are prepared for this pair, found by running it on a few of them.

    Where the pair observes the data under a distribution on {0, 1}, intensities in between are
    drawn (``dynamic``), or pass as they are only when asked for by ``none``. Where it observes
    them under one on whole numbers, uint8 data are such numbers, and no intensities. Other uint8
    data are what those were that the pair was fitted to (`recorded_divisor`), else 0 and 1 where
    they hold these alone, else intensities.

    Raises `UsageError` for values outside the support of the data's distribution, and for uint8
    data that are neither 0 and 1 nor spread over 256 levels.
    """
    if binarize not in BINARIZE:
        raise UsageError(f"binarize is '{binarize}'; {nearest(binarize, BINARIZE)}")
    plain = Preparation(*placement(pair))
    raw = rows.first(16)
    batch = plain(raw)
    site = _observation(pair, batch)
    if site is None:
        return plain
    value, support = site["value"], _support(site)
    # Else the pair makes its own observation of x.
    as_given = value.numel() == batch[0].numel() and torch.equal(
        value.flatten(), batch[0].flatten()
    )
    plain = _with_eight_bit(plain, pair, rows, raw[0], support if as_given else None)
    if not as_given or support.event_dim > 0:
        return plain
    batch = plain(raw)
    # Of a stream the first minibatch has to stand for all.
    parts = map(plain, rows.batches(4096)) if isinstance(rows, Arrays) else [batch]
    own = any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(support).values())
    grey = False
    for part in parts:
        x = part[0]
        inside = _inside(pair, part) if own else support.check(x)
        if support is constraints.boolean and not bool(inside.all()):
            grey, inside = True, (x >= 0) & (x <= 1)
        if not bool(inside.all()):
            whole = rows.tensors[0] if isinstance(rows, Arrays) else x
            raise UsageError(_outside(x[~inside][0].item(), whole, site))
    return replace(plain, binarize=grey and binarize != "none")


def _observation(pair: nn.Module, batch: Batch) -> Site | None:
    """The site that observes x in a batch."""
    with using(pair, seed=0), pyro.validation_enabled(False):
        return x_site(_run(pair, batch))


def _inside(pair: nn.Module, batch: Batch) -> Tensor:
    """Which values of x are in the support, where its bounds differ from row to row."""
    site: Any = _observation(pair, batch)
    return cast(Tensor, _support(site).check(site["value"]).reshape(batch[0].shape))


def _support(site: Site) -> Any:
    """The support of one element of a site."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _with_eight_bit(
    plain: Preparation, pair: nn.Module, rows: Source, few: Tensor, support: Any
) -> Preparation:
    """The preparation with what 8-bit data are: whole numbers, or intensities."""
    if few.dtype != torch.uint8:
        return plain
    if isinstance(support, _WHOLE):
        return replace(plain, whole=True)
    seen = rows.tensors[0] if isinstance(rows, Arrays) else rows.first(256)[0]
    greatest, divisor = int(seen.max()), recorded_divisor(pair)
    if divisor is None and 1 < greatest < FEWEST_LEVELS:
        raise UsageError(
            f"x is uint8 and goes to {greatest} only, where 8-bit intensities go to 255: pass "
            f"floats, x / {greatest} for levels 0 to {greatest}, x / 255 for dark pixels"
        )
    if divisor == 1 and greatest > 1:
        raise UsageError(mixed_eight_bit(greatest))
    whole = greatest <= 1 if divisor is None else divisor == 1
    if greatest == 1 and (not whole or (divisor is None and support is not constraints.boolean)):
        taken = "0 and 1, as they are" if whole else "8-bit intensities k/255, as in training"
        warnings.warn(f"x is uint8 and holds 0 and 1 alone: taken for {taken}", stacklevel=2)
    if whole and isinstance(rows, Stream):
        rows.greatest = 1
    return replace(plain, whole=whole)


def record_divisor(pair: nn.Module, rows: Source, prepare: Preparation) -> None:
    """Keep in the pair what its 8-bit training data were divided by, 255 or 1, for later data.

    A few rows cannot tell: those of an almost black image hold 0 and 1 alone.
    """
    x = rows.first(256)[0] if isinstance(rows, Stream) else rows.tensors[0]
    if x.dtype == torch.uint8 and recorded_divisor(pair) is None and bool(x.any()):
        setattr(pair, DIVISOR, 1 if prepare.whole else 255)


FEWEST_LEVELS = 64
"""8-bit data that go less far, and further than 1, may be other things than intensities."""


def _run(pair: nn.Module, batch: Batch) -> Trace:
    """The trace of the model, replayed against the guide, of a pair that may not fit the data."""
    try:
        return trace_model(pair, batch, trace_guide(pair, batch))
    except UsageError:
        raise
    except Exception as error:  # a user's own code may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
        raise UsageError(
            f"{type(pair).__name__} fails on a batch of shapes {shapes}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def held_out(rows: Source, prepare: Preparation) -> tuple[Source, Preparation]:
    """Rows for evaluation: binarised once with a fixed seed instead of at each visit."""
    if prepare.binarize and isinstance(rows, Arrays):
        return rows.binarized(), Preparation(prepare.device, prepare.dtype)
    return rows, prepare


def held_rows(
    pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str = "dynamic"
) -> tuple[Source, Preparation]:
    """Rows for evaluation and how they are prepared, from data as they came."""
    with seeded(0):  # a loader draws as it begins
        rows = source(x, context, pair)
        rows, prepare = held_out(rows, preparation(pair, rows, binarize))
    require_masks(pair, rows, prepare)
    return rows, prepare


def require_masks(pair: nn.Module, rows: Source, prepare: Preparation) -> None:
    """`pyro_vae.pairs.masks.require` of rows in memory; of a stream the first have to stand for
    all."""
    with seeded(0):
        parts = rows.batches(500) if isinstance(rows, Arrays) else iter([rows.first(500)])
        masks.require(pair, map(prepare, parts))


# The supports of counts and of tokens; torch's {0, 1} is another.
_WHOLE = (type(constraints.nonnegative_integer), constraints.integer_interval)

_FAMILIES = {
    "TruncatedExponential": "ContinuousBernoulli",
    "LevelCategorical": "Categorical",
    "LevelLogistic": "DiscretizedLogistic",
    "MixtureSameFamily": "mixture",
    "ExactPoisson": "Poisson",
    "ExactNegativeBinomial": "NegativeBinomial",
    "ZeroInflatedDistribution": "zero-inflated",
}


def _outside(value: float, x: Tensor, site: dict[str, Any]) -> str:
    eight_bit, x = x.dtype == torch.uint8, x.double()
    low, high = x.min().item(), x.max().item()
    whole = bool((x == x.round()).all())
    if eight_bit or (low >= 0 and high <= 1):
        fit = "a ContinuousBernoulli or Gaussian likelihood would fit values in [0, 1]"
    elif whole and low >= 0 and high <= 255:
        fit = "whole numbers up to 255 look like 8-bit pixels: pass them as uint8"
    elif whole and low >= 0:
        fit = "a Poisson or NegativeBinomial likelihood would fit counts"
    else:
        fit = "a Gaussian likelihood would fit real values"
    name = type(getattr(site["fn"], "base_dist", site["fn"])).__name__
    name = _FAMILIES.get(name, name)
    return (
        f"x holds {value:g}, outside the support of the {name} likelihood of site "
        f"'{site['name']}' (data range {low:g} to {high:g}); {fit}"
    )
