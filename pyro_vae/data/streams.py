"""A torch ``Dataset`` or ``DataLoader`` as a source of minibatches, which are checked when read."""

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_vae.data import holes
from pyro_vae.data.order import Place, order
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.arrays import plain_fault, require_finite
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.rng import apart, derived


class Arriving:
    """Minibatches that are checked when they are read, because nobody has seen all rows before."""

    def __init__(self, dtype: torch.dtype | None, pair: nn.Module | None) -> None:
        self.dtype, self.pair = dtype, pair
        self.greatest: int | None = None
        """The largest value that 8-bit data may have; None for an unlimited range."""
        self.allowed: Any = None
        """Tells which values of x the likelihood can score (`supports.Allowed`), if known."""
        self.serves = False
        """Whether x had missing entries (NaN), which the pair leaves out."""

    def require_served(self, pair: nn.Module, batch: Batch, row: int) -> None:
        """Raise `UsageError` for missing entries of x that the pair cannot use."""
        told = None if self.serves else holes.unserved(pair, batch, row)
        if told := told or holes.unseen(pair, batch, row):
            raise UsageError(told)
        self.serves = self.serves or len(holes.rows(batch[0])) > 0

    def require_sound(self, item: Any, name: str, row: int, of: str = " of the epoch") -> None:
        if not isinstance(item, Tensor):
            raise UsageError(f"the data set must give tensors, got {type(item).__name__}")
        if fault := plain_fault(item):
            raise UsageError(f"{name} {fault}")
        missing = name == "x" and self.pair is not None
        require_finite(item, name, self.dtype, row, of, missing=missing)
        if name == "x" and self.greatest is not None and int(item.max()) > self.greatest:
            raise UsageError(mixed_eight_bit(int(item.max())))

    def require_inside(self, batch: Batch, row: int) -> None:
        """Raise `UsageError` for values of x that the likelihood cannot score."""
        if self.allowed is None or self.allowed.holds(batch[0]):
            return
        inside = self.allowed.closer(batch)
        if inside is None:
            self.allowed = None  # the first rows did not show how the pair uses x
        elif not bool(inside.all()):
            raise UsageError(self.allowed.words(batch[0], inside, row, " of the epoch"))


class Stream(Arriving):
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
        super().__init__(dtype, pair)
        self.rows, self.width = rows, width
        _require_plain_items(rows)
        _require_whole(rows)
        self.length, self.num_data, self.exact = _lengths(rows)
        if self.length < 1:
            raise UsageError(
                "the loader gives no minibatch; with drop_last=True it needs at least batch_size "
                "rows"
            )

    def __len__(self) -> int:
        return self.length

    @property
    def unrepeatable(self) -> bool:
        """Whether the order comes from a generator of the loader, which a checkpoint does not hold.

        A ``StatefulDataLoader`` that shuffles has one, even if its user gave none.
        """
        batches = getattr(self.rows, "batch_sampler", None)
        samplers = (getattr(self.rows, "sampler", None), batches, getattr(batches, "sampler", None))
        return any(getattr(one, "generator", None) is not None for one in samplers)

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

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Minibatches of unprepared rows; a ``DataLoader`` keeps its own batch size and order."""
        loader = self.rows
        if not isinstance(loader, DataLoader):
            loader = DataLoader(loader, batch_size=batch_size)
        return self._checked(self._collated(loader), 0)

    def epoch(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """This process's part of each remaining minibatch of an epoch.

        The order of a ``Dataset`` with an index is `pyro_vae.data.order.order`, and only the rows
        of this process are read. A ``DataLoader`` or an ``IterableDataset`` has its own order. It
        draws this order from generators that seed and epoch determine. Each process reads every
        minibatch and keeps its part, and finished minibatches are read again.
        """
        rows, row = self.rows, place.batches * batch_size
        if isinstance(rows, (DataLoader, IterableDataset)):
            return self._replayed(batch_size, place)
        index = order(place.seed, place.epoch, len(self))
        parts = (index[start : start + batch_size] for start in range(row, len(self), batch_size))
        return self._indexed([place.team.of(part).tolist() for part in parts], row)

    def _indexed(self, parts: list[list[int]], row: int) -> Iterator[Batch]:
        # With a generator of its own, the loader does not draw from the caller's. A part without
        # rows needs a row, which shows the shapes.
        read: Any = [part or [0] for part in parts]
        loader = DataLoader(self.rows, batch_sampler=read, generator=torch.Generator())  # type: ignore
        for part, batch in zip(parts, self._checked(self._collated(loader), row), strict=True):
            yield batch if part else tuple(tensor[:0] for tensor in batch)

    def _replayed(self, batch_size: int, place: Place) -> Iterator[Batch]:
        seed = derived(place.seed, "epoch", place.epoch + 1)
        batches = apart(self.batches(batch_size), seed)
        for batch in islice(batches, place.batches, None):
            yield tuple(place.team.of(part) for part in batch)

    def _checked(self, batches: Iterator[Any], row: int) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, Mapping) and self.pair is not None:
                batch = by_name(self.pair, batch)
            batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            batch = batch[: self.width]
            for i, item in enumerate(batch):
                self.require_sound(item, f"context {i}" if i else "x", row)
            if self.pair is not None:
                self.require_served(self.pair, batch, row)
            self.require_inside(batch, row)
            row += len(batch[0])
            yield batch

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


def _require_whole(rows: Dataset | DataLoader) -> None:
    """Check that a loader gives all rows to each process, which then takes its part."""
    if isinstance(getattr(rows, "sampler", None), DistributedSampler):
        raise UsageError(
            "the loader has a DistributedSampler, but each process of `fit` takes its part of each "
            "minibatch itself: pass a loader without it, or the data set"
        )


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


def mixed_eight_bit(greatest: int) -> str:
    """The message for uint8 data that are not 0 and 1, as earlier uint8 data were."""
    return (
        f"x is uint8 with values up to {greatest}, but earlier uint8 data had only the values 0 "
        "and 1: pass floats (x / 255 for intensities)"
    )
