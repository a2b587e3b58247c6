"""Data: from tensors, data sets and loaders to prepared minibatches.

Data are held as they came (uint8 stays uint8); each minibatch is prepared on its way to the pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset

from pyro_vae import masks
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs import (
    Batch,
    missing_context,
    placement,
    trace_guide,
    trace_model,
    using,
    x_site,
)
from pyro_vae.rng import seeded

Rows: TypeAlias = "Tensor | np.ndarray | Dataset | DataLoader"

BINARIZE = ("dynamic", "fixed", "none")


@dataclass(frozen=True)
class Preparation:
    """What is done to each minibatch on its way to the pair.

    uint8 intensities become floats in [0, 1], unless they are ``whole`` numbers, such as counts;
    then, where ``binarize``, each pixel is drawn as Bernoulli(intensity), anew at each visit
    (Salakhutdinov & Murray, 2008). Floating context takes the pair's type.
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


class Arrays:
    """Rows held in memory, cut into minibatches without a loader."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch_size(self, batch_size: int) -> int:
        """Rows of a full minibatch where this many are asked for."""
        return batch_size

    def batches(self, batch_size: int, shuffle: bool = False) -> Iterator[Batch]:
        """Minibatches as they came; shuffled by torch's global generator."""
        device = self.tensors[0].device
        order = torch.randperm(len(self)).to(device) if shuffle else None
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            index = rows if order is None else order[rows]
            yield tuple(tensor[index] for tensor in self.tensors)

    def first(self, n: int) -> Batch:
        """The first n rows, and those where a whole number of the context is least and greatest."""
        kept = list(range(min(n, len(self))))
        for tensor in self.tensors[1:]:
            if not tensor.is_floating_point():
                by_row = tensor.reshape(len(tensor), -1).long()
                kept += [int(by_row.amin(1).argmin()), int(by_row.amax(1).argmax())]
        return tuple(tensor[kept] for tensor in self.tensors)

    def to(self, device: torch.device) -> "Arrays":
        """The same rows on another device."""
        return Arrays([tensor.to(device) for tensor in self.tensors])

    def binarized(self, seed: int = 0) -> "Arrays":
        """The data drawn once as Bernoulli(intensity) with a seed, and held as booleans."""
        x, *context = self.tensors
        with seeded(seed):
            drawn = [
                torch.bernoulli(part.float() / (255 if x.dtype == torch.uint8 else 1)).bool()
                for part in x.split(4096)
            ]
        return Arrays([torch.cat(drawn), *context])


class Stream:
    """A torch ``Dataset`` or ``DataLoader`` as a source of minibatches."""

    def __init__(self, rows: Dataset | DataLoader, width: int | None) -> None:
        self.rows, self.width = rows, width

    def __len__(self) -> int:
        rows: Any = self.rows.dataset if isinstance(self.rows, DataLoader) else self.rows
        try:
            return len(rows)
        except TypeError as error:
            raise UsageError(
                f"{type(rows).__name__} has no length: the data set must have __len__"
            ) from error

    def batch_size(self, batch_size: int) -> int:
        """Rows of a full minibatch where this many are asked for; a loader has its own number."""
        own = self.rows.batch_size if isinstance(self.rows, DataLoader) else batch_size
        return own or batch_size

    def first(self, n: int) -> Batch:
        """The first n rows, or as many as a loader gives."""
        return next(iter(self.batches(min(n, len(self)))))

    def batches(self, batch_size: int, shuffle: bool = False) -> Iterator[Batch]:
        """Minibatches; a ``DataLoader`` keeps its own batch size and order."""
        loader = self.rows
        if not isinstance(loader, DataLoader):
            loader = DataLoader(loader, batch_size=batch_size, shuffle=shuffle)
        for batch in self._collated(loader):
            batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            for item in batch[: self.width]:
                if not isinstance(item, Tensor):
                    raise UsageError(
                        f"the data set must give tensors, it gave {type(item).__name__}"
                    )
            yield batch[: self.width]

    @staticmethod
    def _collated(loader: DataLoader) -> Iterator[Any]:
        try:
            yield from loader
        except TypeError as error:
            raise UsageError(f"the data set must give tensors: {first_line(error)}") from error


Source: TypeAlias = "Arrays | Stream"


def source(x: Rows, context: Sequence[Any] = (), pair: nn.Module | None = None) -> Source:
    """Rows and their context as a source of minibatches, checked where they are in memory.

    Raises `UsageError` for data that are empty, of unequal lengths, not finite, or no numbers.
    """
    if isinstance(x, (Dataset, DataLoader)) and not isinstance(x, Tensor):
        width = len(pair.template(1)) if hasattr(pair, "template") else None  # type: ignore
        return Stream(x, width)
    data = as_tensor(x, "x")
    if not context and pair is not None:
        context = missing_context(pair, len(data))
    tensors = [data, *(as_tensor(value, f"context {i}") for i, value in enumerate(context, 1))]
    for i, tensor in enumerate(tensors):
        if len(tensor) != len(tensors[0]):
            raise UsageError(
                f"context {i} has {len(tensor)} rows, x has {len(tensors[0])}: as many are expected"
            )
    return Arrays(tensors)


def preparation(pair: nn.Module, rows: Source, binarize: str = "dynamic") -> Preparation:
    """How these rows are prepared for this pair, found by running it on a few of them.

    Where the pair observes the data under a distribution on {0, 1}, intensities in between are
    drawn (``dynamic``), or pass as they are only when asked for by ``none``. Where it observes
    them under one on whole numbers, uint8 data are such numbers, and no intensities.

    Raises `UsageError` for values outside the support of the data's distribution.
    """
    if binarize not in BINARIZE:
        raise UsageError(f"binarize is '{binarize}'; {nearest(binarize, BINARIZE)}")
    plain = Preparation(*placement(pair))
    with using(pair, seed=0), pyro.validation_enabled(False):
        batch = plain(rows.first(16))
        site = x_site(_run(pair, batch))
    if site is None:
        return plain
    value = site["value"]
    if value.numel() != batch[0].numel() or not torch.equal(value.flatten(), batch[0].flatten()):
        return plain  # the pair makes its own observation of x
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    plain = replace(plain, whole=isinstance(support, _WHOLE))
    if support.event_dim > 0:
        return plain
    # Of a stream the first minibatch has to stand for all.
    parts = (plain(part)[0] for part in rows.batches(4096)) if isinstance(rows, Arrays) else None
    grey = False
    for x in parts or [batch[0]]:
        inside = support.check(x)
        if support is constraints.boolean and not bool(inside.all()):
            grey, inside = True, (x >= 0) & (x <= 1)
        if not bool(inside.all()):
            whole = rows.tensors[0] if isinstance(rows, Arrays) else x
            raise UsageError(_outside(x[~inside][0].item(), whole, site))
    return replace(plain, binarize=grey and binarize != "none")


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
    """`pyro_vae.masks.require` of rows in memory; of a stream the first have to stand for all."""
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


def as_tensor(value: Any, name: str) -> Tensor:
    """An array as a tensor; `UsageError` names one that is empty, not finite or no numbers."""
    try:
        if isinstance(value, np.ndarray):
            odd = not (value.dtype.isnative and value.flags.writeable)
            if odd or any(stride < 0 for stride in value.strides):
                value = value.astype(value.dtype.newbyteorder("="), order="C")
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(value, "dtype", type(value).__name__)
        raise UsageError(f"{name} must be an array of numbers, one of {kind} came") from error
    if tensor.dim() == 0 or len(tensor) == 0 or tensor.numel() == 0:
        raise UsageError(f"{name} is empty: an array of shape {tuple(tensor.shape)} came")
    if tensor.is_complex():
        raise UsageError(f"{name} must be real, an array of {tensor.dtype} came")
    if tensor.is_floating_point():
        for start, part in zip(range(0, len(tensor), 4096), tensor.split(4096), strict=True):
            bad = ~torch.isfinite(part)
            if bool(bad.any()):
                row = start + int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
                raise UsageError(
                    f"{name} holds values that are not finite (NaN or infinite), first in row {row}"
                )
    return tensor
