"""Data: from tensors, data sets and loaders to prepared minibatches.

Data are held as they came (uint8 stays uint8); each minibatch is prepared on its way to the pair.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_vae import masks
from pyro_vae.arrays import DIVISOR, as_tensor, plain_fault, recorded_divisor, require_finite
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


class Arrays:
    """Rows held in memory, cut into minibatches without a loader."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def num_data(self) -> int:
        """How many data there are, of which each has its share of what all data have in common."""
        return len(self)

    def batch_size(self, batch_size: int) -> int:
        """Rows of a full minibatch where this many are asked for."""
        return batch_size

    def steps(self, batch_size: int) -> int:
        """Minibatches of an epoch."""
        return -(-len(self) // batch_size)

    def require_length(self, counted: int) -> None:
        """Rows in memory are as many as they are."""

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
    """A torch ``Dataset`` or ``DataLoader`` as a source of minibatches.

    Its length is the rows that an epoch gives, ``num_data`` the different ones it gives over all
    epochs: a sampler may leave rows out, or give them twice.
    """

    def __init__(
        self, rows: Dataset | DataLoader, width: int | None, dtype: torch.dtype | None = None
    ) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self.greatest: int | None = None
        """The greatest value that 8-bit data may have; None for any."""
        _require_plain_items(rows)
        self.length, self.num_data, self.exact = _lengths(rows)
        if self.length < 1:
            raise UsageError(
                "the loader gives no minibatch; with drop_last=True it needs batch_size rows or "
                "more"
            )

    def __len__(self) -> int:
        return self.length

    def batch_size(self, batch_size: int) -> int:
        """Rows of a full minibatch where this many are asked for; a loader has its own number."""
        own = self.rows.batch_size if isinstance(self.rows, DataLoader) else batch_size
        return own or batch_size

    def steps(self, batch_size: int) -> int:
        """Minibatches of an epoch."""
        if isinstance(self.rows, DataLoader) and self.rows.batch_size is None:
            return len(self.rows)
        return -(-len(self) // self.batch_size(batch_size))

    def require_length(self, counted: int) -> None:
        """Raise `UsageError` where an epoch gave so many rows, and others were announced."""
        if not self.exact and counted != len(self):
            raise UsageError(
                f"the data set has a length of {len(self)} rows, and gave {counted} in an epoch: "
                "__len__ must be right, as schedules and the KL of latents outside the data plate "
                "go by it"
            )

    def first(self, n: int) -> Batch:
        """The first n rows, or as many as a loader gives."""
        batch = next(iter(self.batches(max(1, min(n, len(self))))), None)
        if batch is None:
            raise UsageError(f"the data set has a length of {len(self)} rows, and gave none")
        return batch

    def batches(self, batch_size: int, shuffle: bool = False) -> Iterator[Batch]:
        """Minibatches; a ``DataLoader`` keeps its own batch size and order."""
        loader, row = self.rows, 0
        if not isinstance(loader, DataLoader):
            loader = DataLoader(loader, batch_size=batch_size, shuffle=shuffle)
        for batch in self._collated(loader):
            batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            batch = batch[: self.width]
            for i, item in enumerate(batch):
                self._require_sound(item, f"context {i}" if i else "x", row)
            row += len(batch[0])
            yield batch

    def _require_sound(self, item: Any, name: str, row: int) -> None:
        if not isinstance(item, Tensor):
            raise UsageError(f"the data set must give tensors, it gave {type(item).__name__}")
        if fault := plain_fault(item):
            raise UsageError(f"{name} {fault}")
        require_finite(item, name, self.dtype, row, " of the epoch")
        if name == "x" and self.greatest is not None and int(item.max()) > self.greatest:
            raise UsageError(_mixed_eight_bit(int(item.max())))

    @staticmethod
    def _collated(loader: DataLoader) -> Iterator[Any]:
        try:
            yield from loader
        except TypeError as error:
            raise UsageError(f"the data set must give tensors: {first_line(error)}") from error
        except RuntimeError as error:  # rows of unequal shapes, say
            raise UsageError(f"the loader cannot make a minibatch: {first_line(error)}") from error


def _require_plain_items(rows: Dataset | DataLoader) -> None:
    """Refuse what is no array of numbers by a data set's first item: collation drops masks."""
    data: Any = rows.dataset if isinstance(rows, DataLoader) else rows
    if isinstance(data, (IterableDataset, TensorDataset)):
        return
    try:
        item = data[0]
    except Exception:  # what cannot be read is said as minibatches are
        return
    for part in item if isinstance(item, (tuple, list)) else (item,):
        if isinstance(part, np.ma.MaskedArray):  # the first may hide nothing
            raise UsageError("the data set gives masked arrays, which are not served: fill them in")
        if fault := plain_fault(part):
            raise UsageError(f"what the data set gives {fault}")


def _lengths(rows: Dataset | DataLoader) -> tuple[int, int, bool]:
    """The rows of an epoch, how many different ones all epochs have, and whether that is sure."""
    if not isinstance(rows, DataLoader):
        n = _length(rows)
        return n, n, not isinstance(rows, IterableDataset)
    batches: Any = rows.batch_sampler
    if isinstance(rows.dataset, IterableDataset) or batches is None:
        n = _length(rows.dataset)
        return (n - n % rows.batch_size if rows.drop_last and rows.batch_size else n), n, False
    if type(batches) is not BatchSampler:
        drawn = [index for batch in islice(batches, _length(batches)) for index in batch]
        return len(drawn), len(set(drawn)), True
    n, different = _drawn(batches.sampler)
    if batches.drop_last:
        n -= n % batches.batch_size
    # Rows that a fixed order leaves out at its end are left out of every epoch.
    return n, n if isinstance(batches.sampler, SequentialSampler) else different, True


def _drawn(sampler: Any) -> tuple[int, int]:
    """How many rows a sampler gives in an epoch, and how many different ones in all epochs."""
    if type(sampler) in (SequentialSampler, RandomSampler):
        return len(sampler), len(sampler.data_source)
    if type(sampler) is WeightedRandomSampler:
        return len(sampler), int((sampler.weights > 0).sum())
    drawn = list(islice(sampler, _length(sampler)))
    return len(drawn), len(set(drawn))


def _length(rows: Any) -> int:
    try:
        return len(rows)
    except (TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{type(rows).__name__} has no length: the data set must have __len__"
        ) from error


Source: TypeAlias = "Arrays | Stream"


def source(x: Rows, context: Sequence[Any] = (), pair: nn.Module | None = None) -> Source:
    """Rows and their context as a source of minibatches, checked where they are in memory.

    Raises `UsageError` for data that are empty, of unequal lengths, not finite as the pair's type
    holds them, or no numbers.
    """
    dtype = None if pair is None else placement(pair)[1]
    if isinstance(x, (Dataset, DataLoader)) and not isinstance(x, Tensor):
        width = len(pair.template(1)) if hasattr(pair, "template") else None  # type: ignore
        return Stream(x, width, dtype)
    data = as_tensor(x, "x", dtype)
    if not context and pair is not None:
        context = missing_context(pair, len(data))
    others = [as_tensor(value, f"context {i}", dtype) for i, value in enumerate(context, 1)]
    tensors = [data, *others]
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
    with using(pair, seed=0), pyro.validation_enabled(False):
        batch = plain(raw)
        site = x_site(_run(pair, batch))
    if site is None:
        return plain
    value, support = site["value"], site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    # Else the pair makes its own observation of x.
    as_given = value.numel() == batch[0].numel() and torch.equal(
        value.flatten(), batch[0].flatten()
    )
    plain = _with_eight_bit(plain, pair, rows, raw[0], support if as_given else None)
    if not as_given or support.event_dim > 0:
        return plain
    batch = plain(raw)
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
        raise UsageError(_mixed_eight_bit(greatest))
    whole = greatest <= 1 if divisor is None else divisor == 1
    if greatest == 1 and (not whole or (divisor is None and support is not constraints.boolean)):
        taken = "0 and 1, as they are" if whole else "8-bit intensities k/255, as in training"
        warnings.warn(f"x is uint8 and holds 0 and 1 alone: taken for {taken}", stacklevel=2)
    if whole and isinstance(rows, Stream):
        rows.greatest = 1
    return replace(plain, whole=whole)


def _mixed_eight_bit(greatest: int) -> str:
    return (
        f"x is uint8 and goes to {greatest}, after uint8 data of 0 and 1 alone: pass floats, "
        "x / 255 for intensities"
    )


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


def parts(given: Any) -> tuple[Any, ...]:
    """x and its context, of what is given as x alone or as both."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


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
