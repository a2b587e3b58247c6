"""Minibatches from tensors, data sets and loaders.

Data keep their type (uint8 stays uint8). `pyro_vae.data.preparation` prepares each minibatch for
the pair.
"""

from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter, signature
from itertools import islice
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
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

from pyro_vae.data import holes
from pyro_vae.data.padding import without_padding
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.arrays import as_tensor, plain_fault, require_finite, with_holes
from pyro_vae.pairs.pair import Batch, Pair, placement
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.template import missing_context

Rows: TypeAlias = "Tensor | np.ndarray | Dataset | DataLoader"


class Arrays:
    """Rows in memory, which are cut into minibatches without a loader."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def num_data(self) -> int:
        """The number of different data, over which the KL of global latents is shared."""
        return len(self)

    def batch_size(self, batch_size: int) -> int:
        """The number of rows of a full minibatch if the caller asks for ``batch_size``."""
        return batch_size

    def steps(self, batch_size: int) -> int:
        """The number of minibatches of an epoch."""
        return -(-len(self) // batch_size)

    def require_length(self, counted: int) -> None:
        """Do nothing: the number of rows in memory is known."""

    def batches(self, batch_size: int, shuffle: bool = False) -> Iterator[Batch]:
        """Minibatches of unprepared rows; the global generator of torch shuffles them."""
        device = self.tensors[0].device
        order = torch.randperm(len(self)).to(device) if shuffle else None
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            index = rows if order is None else order[rows]
            yield tuple(tensor[index] for tensor in self.tensors)

    def first(self, n: int) -> Batch:
        """The first n rows, and the rows with the smallest and largest integers of the context."""
        kept = list(range(min(n, len(self))))
        for tensor in self.tensors[1:]:
            if not tensor.is_floating_point():
                by_row = tensor.reshape(len(tensor), -1).long()
                kept += [int(by_row.amin(1).argmin()), int(by_row.amax(1).argmax())]
        return tuple(tensor[kept] for tensor in self.tensors)

    def to(self, device: torch.device) -> "Arrays":
        """Return the same rows on another device."""
        return Arrays([tensor.to(device) for tensor in self.tensors])

    def binarized(self, seed: int = 0) -> "Arrays":
        """Draw x once from Bernoulli(intensity) with a fixed seed, and keep it as booleans."""
        x, *context = self.tensors
        with seeded(seed):
            scale = 255 if x.dtype == torch.uint8 else 1
            drawn = [_binary(part.float() / scale) for part in x.split(4096)]
        return Arrays([torch.cat(drawn), *context])


def _binary(intensities: Tensor) -> Tensor:
    """Draws from Bernoulli(intensity); entries that are hidden may be NaN or outside of [0, 1]."""
    drawn = torch.bernoulli(intensities.nan_to_num(0.0).clamp(0, 1))
    hidden = intensities.isnan()
    return torch.where(hidden, torch.nan, drawn) if bool(hidden.any()) else drawn.bool()


class Stream:
    """A torch ``Dataset`` or ``DataLoader`` as a source of minibatches.

    Its length is the number of rows of an epoch. ``num_data`` is the number of different rows over
    all epochs. They may differ, because a sampler may leave rows out or repeat them.
    """

    def __init__(
        self,
        rows: Dataset | DataLoader,
        width: int | None,
        dtype: torch.dtype | None = None,
        pair: nn.Module | None = None,
    ) -> None:
        self.rows, self.width, self.dtype, self.pair = rows, width, dtype, pair
        self.greatest: int | None = None
        """The largest value that 8-bit data may have; None for an unlimited range."""
        self.serves = False
        """Whether x had missing entries (NaN), which the pair leaves out."""
        _require_plain_items(rows)
        self.length, self.num_data, self.exact = _lengths(rows)
        if self.length < 1:
            raise UsageError(
                "the loader gives no minibatch; with drop_last=True it needs at least batch_size "
                "rows"
            )

    def __len__(self) -> int:
        return self.length

    def batch_size(self, batch_size: int) -> int:
        """The number of rows of a full minibatch; a loader has its own batch size."""
        own = self.rows.batch_size if isinstance(self.rows, DataLoader) else batch_size
        return own or batch_size

    def steps(self, batch_size: int) -> int:
        """The number of minibatches of an epoch."""
        if isinstance(self.rows, DataLoader) and self.rows.batch_size is None:
            return len(self.rows)
        return -(-len(self) // self.batch_size(batch_size))

    def require_length(self, counted: int) -> None:
        """Raise `UsageError` if an epoch gave another number of rows than the length."""
        if not self.exact and counted != len(self):
            raise UsageError(
                f"the data set has a length of {len(self)} rows but gave {counted} in an epoch: "
                "correct its __len__, because schedules and the KL of global latents depend on it"
            )

    def first(self, n: int) -> Batch:
        """The first n rows, or the first minibatch of a loader."""
        batch = next(iter(self.batches(max(1, min(n, len(self))))), None)
        if batch is None:
            raise UsageError(f"the data set has a length of {len(self)} rows but gave no rows")
        return batch

    def batches(self, batch_size: int, shuffle: bool = False) -> Iterator[Batch]:
        """Minibatches of unprepared rows; a ``DataLoader`` keeps its own batch size and order."""
        loader, row = self.rows, 0
        if not isinstance(loader, DataLoader):
            loader = DataLoader(loader, batch_size=batch_size, shuffle=shuffle)
        for batch in self._collated(loader):
            if isinstance(batch, Mapping) and self.pair is not None:
                batch = by_name(self.pair, batch)
            batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            batch = batch[: self.width]
            for i, item in enumerate(batch):
                self._require_sound(item, f"context {i}" if i else "x", row)
            if self.pair is not None:
                self._require_served(self.pair, batch, row)
            row += len(batch[0])
            yield batch

    def _require_served(self, pair: nn.Module, batch: Batch, row: int) -> None:
        """Raise `UsageError` for missing entries of x that the pair cannot use."""
        told = None if self.serves else holes.unserved(pair, batch, row)
        if told := told or holes.unseen(pair, batch, row):
            raise UsageError(told)
        self.serves = self.serves or len(holes.rows(batch[0])) > 0

    def _require_sound(self, item: Any, name: str, row: int) -> None:
        if not isinstance(item, Tensor):
            raise UsageError(f"the data set must give tensors, got {type(item).__name__}")
        if fault := plain_fault(item):
            raise UsageError(f"{name} {fault}")
        missing = name == "x" and self.pair is not None
        require_finite(item, name, self.dtype, row, " of the epoch", missing=missing)
        if name == "x" and self.greatest is not None and int(item.max()) > self.greatest:
            raise UsageError(mixed_eight_bit(int(item.max())))

    @staticmethod
    def _collated(loader: DataLoader) -> Iterator[Any]:
        try:
            yield from loader
        except TypeError as error:
            raise UsageError(f"the data set must give tensors: {first_line(error)}") from error
        except RuntimeError as error:  # for example, rows of different shapes
            raise UsageError(f"the loader cannot make a minibatch: {first_line(error)}") from error


def _require_plain_items(rows: Dataset | DataLoader) -> None:
    """Check that the first item of a data set has plain arrays, because collation drops masks."""
    data: Any = rows.dataset if isinstance(rows, DataLoader) else rows
    if isinstance(data, (IterableDataset, TensorDataset)):
        return
    try:
        item = data[0]
    except Exception:  # reading the minibatches reports this error
        return
    item = tuple(item.values()) if isinstance(item, Mapping) else item
    for part in item if isinstance(item, (tuple, list)) else (item,):
        if isinstance(part, np.ma.MaskedArray):  # even if its mask hides nothing
            raise UsageError(
                "the data set gives masked arrays, which are not supported: fill in the values"
            )
        if fault := plain_fault(part):
            raise UsageError(f"an item of the data set {fault}")


def _lengths(rows: Dataset | DataLoader) -> tuple[int, int, bool]:
    """The numbers of rows of an epoch and of different rows, and whether both are exact."""
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
    # With a fixed order, drop_last leaves out the same rows in every epoch.
    return n, n if isinstance(batches.sampler, SequentialSampler) else different, True


def _drawn(sampler: Any) -> tuple[int, int]:
    """The number of rows of a sampler in an epoch, and of different rows in all epochs."""
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
        raise UsageError(f"{type(rows).__name__} has no length: define its __len__") from error


Source: TypeAlias = "Arrays | Stream"


def source(x: Rows, context: Sequence[Any] = (), pair: nn.Module | None = None) -> Source:
    """Make a source of minibatches from rows and their context.

    Arguments:
        x: data (n, *data_shape), a ``Dataset`` or a ``DataLoader``; or, instead of x and context,
            a dictionary by the names of the model's arguments, or a tuple.
        context: arrays with n rows.
        pair: the pair that uses the rows; its type and its `template` determine what is checked.

    Raises `UsageError` for data that are empty, not numbers, or not finite in the type of the pair,
    and for context with another number of rows. A stream is checked when it is read.
    """
    dtype = None if pair is None else placement(pair)[1]
    x, context = spread(pair, x, context)
    if isinstance(x, (Dataset, DataLoader)) and not isinstance(x, Tensor):
        width = len(pair.template(1)) if hasattr(pair, "template") else None  # type: ignore
        return Stream(x, width, dtype, pair)
    data = as_tensor(x if pair is None else with_holes(x), "x", finite=False)
    if not context and pair is not None:
        context = missing_context(pair, len(data))
    others = [as_tensor(value, f"context {i}", dtype) for i, value in enumerate(context, 1)]
    tensors = [data, *others]
    if pair is not None:
        tensors = without_padding(pair, tensors)
    require_finite(tensors[0], "x", dtype, missing=pair is not None)
    for i, tensor in enumerate(tensors):
        if len(tensor) != len(tensors[0]):
            raise UsageError(
                f"context {i} has {len(tensor)} rows but x has {len(tensors[0])}; they must match"
            )
    if pair is not None and (fault := holes.unserved(pair, tensors)):
        as_tensor(x, "x", finite=False)  # raises for a masked array
        raise UsageError(fault)
    if pair is not None and (fault := holes.unseen(pair, tensors)):
        raise UsageError(fault)
    return Arrays(tensors)


def spread(pair: nn.Module | None, x: Any, context: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """x and its context, from a dictionary by the names of the model's arguments, or from a tuple.

    A tuple is a batch if it has as many arrays as the model takes; otherwise it is x itself.
    """
    if pair is None or context or not isinstance(x, (Mapping, tuple)):
        return x, tuple(context)
    if isinstance(x, Mapping):
        first, *others = by_name(pair, x)
        return first, tuple(others)
    arrays = all(isinstance(part, (Tensor, np.ndarray)) and part.ndim > 0 for part in x)
    if arrays and len(x) == _width(pair) > 1:
        return x[0], x[1:]
    return x, ()


def by_name(pair: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of a dictionary, in the order of the arguments of the pair's model.

    Raises `UsageError` if a name is missing or unknown.
    """
    arguments = signature(cast(Pair, pair).model).parameters
    present = [name for name in arguments if name in batch]
    needed = [name for name, of in arguments.items() if _is_needed(of)]
    # An argument with a default may be missing only if all arguments after it are missing too.
    if present != list(arguments)[: len(batch)] or not set(needed) <= set(present):
        raise UsageError(
            f"a dictionary must have the arguments of {type(pair).__name__}.model "
            f"({', '.join(arguments)}), got {', '.join(map(str, batch))}"
        )
    values: list[Any] = []
    for name in present:
        several = arguments[name].kind is Parameter.VAR_POSITIONAL
        several = several and isinstance(batch[name], (tuple, list))
        values += batch[name] if several else [batch[name]]
    return tuple(values)


def _is_needed(argument: Parameter) -> bool:
    several = argument.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return not several and argument.default is Parameter.empty


def _width(pair: nn.Module) -> int:
    """The number of tensors in a batch of a pair; 0 if neither template nor model says it."""
    if hasattr(pair, "template"):
        return len(cast(Any, pair).template(1))
    arguments = signature(cast(Pair, pair).model).parameters.values()
    return 0 if any(of.kind is of.VAR_POSITIONAL for of in arguments) else len(arguments)


def mixed_eight_bit(greatest: int) -> str:
    """The message for uint8 data that are not 0 and 1, as earlier uint8 data were."""
    return (
        f"x is uint8 with values up to {greatest}, but earlier uint8 data had only the values 0 "
        "and 1: pass floats (x / 255 for intensities)"
    )


def parts(given: Any) -> tuple[Any, ...]:
    """x and its context as a tuple; the caller passes x alone or both."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
