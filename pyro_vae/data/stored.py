"""Arrays on disk as a source of minibatches: rows are read by index, and a thread reads ahead.

An epoch reads blocks of rows in a random order, some blocks at a time, and shuffles the rows of
these blocks together: see `pyro_vae.data.order`. So the memory in use is small and does not grow.

The thread that reads ahead works with NumPy. An operation of torch would start a team of OpenMP for
this thread, and the threads of OpenMP sleep between operations as soon as they are more than the
cores: training then took twice as long.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.disk import DiskArray
from pyro_vae.data.order import Place, Window, order, windows
from pyro_vae.data.streams import Arriving
from pyro_vae.errors import UsageError
from pyro_vae.pairs.pair import Batch

WINDOW_BLOCKS = 128
"""The number of blocks whose rows are shuffled together, about 32 MiB of x."""

PART_BYTES = 2**22
"""About the size of the shuffled rows that are made at once."""


class _Portion(NamedTuple):
    """Minibatches that have been read."""

    batches: list[Batch]
    holes: bool
    """Whether x has a missing entry in them."""
    start: int
    outside: bool = False
    """Whether x has a value in them that the likelihood may be unable to score."""


class Stored(Arriving):
    """Rows of x on disk, with context on disk or in memory.

    Arguments:
        arrays: x, which is a `DiskArray`, and its context.
    """

    def __init__(
        self,
        arrays: Sequence[DiskArray | Tensor],
        dtype: torch.dtype | None = None,
        pair: nn.Module | None = None,
    ) -> None:
        super().__init__(dtype, pair)
        x = arrays[0]
        assert isinstance(x, DiskArray)
        self.arrays, self.x = tuple(arrays), x
        if not len(x):
            raise UsageError(f"x is empty: got an array of shape {tuple(x.shape)}")
        for i, array in enumerate(arrays[1:], 1):
            if len(array) != len(x):
                raise UsageError(
                    f"context {i} has {len(array)} rows but x has {len(x)}; they must match"
                )

    def __len__(self) -> int:
        return len(self.x)

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
        """Do nothing: the number of rows on disk is known."""

    def first(self, n: int) -> Batch:
        """Evenly spaced rows, at most n, because the first rows of a file may be alike."""
        index = torch.linspace(0, len(self) - 1, min(n, len(self)), dtype=torch.float64).long()
        found = tuple(array[index] for array in self.arrays)
        for i, part in enumerate(found):
            if part.is_floating_point() and not bool(part.isfinite().all()):
                for row, value in zip(index.tolist(), part.split(1), strict=True):
                    self.require_sound(value, f"context {i}" if i else "x", row, "")
        return found

    def sample(self) -> list[Tensor]:
        """A sample of the rows for the checksum of the data, and the number of all rows."""
        arrays = [a.sample() if isinstance(a, DiskArray) else a for a in self.arrays]
        return [torch.tensor([len(self)]), *arrays]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Minibatches of unprepared rows, in their order."""
        at_once = max(1, WINDOW_BLOCKS * self.x.block // batch_size) * batch_size
        starts = range(0, len(self), at_once)
        parts = (self._between(start, min(start + at_once, len(self))) for start in starts)
        return self._served(_read(parts, batch_size, 0))

    def epoch(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """This process's part of each remaining minibatch of an epoch, in a random order."""
        done = place.batches * batch_size
        for batch in self._served(_read(self._shuffled(batch_size, place, done), batch_size, done)):
            yield tuple(place.team.of(part) for part in batch)

    def numbers(self, batch_size: int, place: Place) -> Tensor:
        """The numbers of the rows of this process's part of the next minibatch."""
        found = torch.empty(0, dtype=torch.long)
        for window, mixed in self._orders(place, place.batches * batch_size):
            rows = torch.cat([torch.arange(*span) for span in self._spans(window)])
            found = torch.cat([found, rows[mixed]])
            if len(found) >= batch_size:
                break
        return place.team.of(found[:batch_size])

    def _shuffled(self, batch_size: int, place: Place, done: int) -> Iterator[Batch]:
        """The shuffled rows of an epoch in parts of some minibatches, without the first ``done``.

        All windows are read into the same memory. New memory for each would take longer than the
        copies.
        """
        most = min(len(self), WINDOW_BLOCKS * self.x.block)
        memory = [_empty(array, most) for array in self.arrays]
        row_bytes = max(1, memory[0].nbytes // most)
        at_once = max(1, PART_BYTES // (batch_size * row_bytes)) * batch_size
        served = 0
        for window, mixed in self._orders(place, done):
            at = 0
            for start, stop in self._spans(window):
                for array, kept in zip(self.arrays, memory, strict=True):
                    _into(array, kept[at : at + stop - start], start, stop)
                at += stop - start
            index = mixed.numpy()
            while len(index):
                some, index = np.split(index, [at_once - served % batch_size])
                served += len(some)
                yield tuple(torch.from_numpy(kept[some]) for kept in memory)

    def _orders(self, place: Place, done: int) -> Iterator[tuple[Window, Tensor]]:
        """Each window with the order of its rows, without the first ``done`` rows of all."""
        found = windows(place.seed, place.epoch, len(self), self.x.block, WINDOW_BLOCKS)
        for window in found:
            if window.start + window.length <= done:
                continue
            mixed = order(place.seed, place.epoch, window.length, window.number)
            yield window, mixed[max(0, done - window.start) :]

    def _spans(self, window: Window) -> list[tuple[int, int]]:
        """The rows of each block of a window: the first one, and the one after the last."""
        size = self.x.block
        return [(b * size, min((b + 1) * size, len(self))) for b in map(int, window.blocks)]

    def _between(self, start: int, stop: int) -> Batch:
        return tuple(
            a.between(start, stop) if isinstance(a, DiskArray) else a[start:stop]
            for a in self.arrays
        )

    def _served(self, found: Iterator[_Portion]) -> Iterator[Batch]:
        """Minibatches that are read ahead and checked; only this thread may run the pair."""
        for read in _ahead(self._sound(found)):
            row = read.start
            for batch in read.batches:
                if read.holes and self.pair is not None:
                    self.require_served(self.pair, batch, row)
                if read.outside:
                    self.require_inside(batch, row)
                row += len(batch[0])
                yield batch

    def _sound(self, found: Iterator[_Portion]) -> Iterator[_Portion]:
        for read in found:
            row, holes, outside, allowed = read.start, False, False, self.allowed
            for batch in read.batches:
                outside = outside or not (allowed is None or allowed.holds(batch[0]))
                for i, part in enumerate(batch):
                    if self._is_clean(part, i == 0):
                        continue
                    if i or not self._has_only_holes(part):
                        self.require_sound(part, f"context {i}" if i else "x", row)
                    holes = holes or (i == 0 and bool(np.isnan(part.numpy()).any()))
                row += len(batch[0])
            yield read._replace(holes=holes, outside=outside)

    def _is_clean(self, part: Tensor, is_x: bool) -> bool:
        """Whether no value of an array is missing, infinite or too large; else look closer."""
        values = part.numpy()
        if not values.size:
            return True
        if not part.is_floating_point():
            return not is_x or self.greatest is None or int(values.max()) <= self.greatest
        most = torch.finfo(self.dtype or part.dtype).max
        return float(max(values.max(), -values.min())) <= most  # NaN is not

    def _has_only_holes(self, part: Tensor) -> bool:
        """Whether the values of x that are not clean are missing ones, which the pair may serve."""
        values = part.numpy()
        if self.pair is None or not part.is_floating_point():
            return False
        greatest = float(max(np.fmax.reduce(values, None), -np.fmin.reduce(values, None)))
        return greatest != greatest or greatest <= torch.finfo(self.dtype or part.dtype).max


def _empty(array: DiskArray | Tensor, length: int) -> np.ndarray:
    """Memory for some rows of an array."""
    dtype = torch.empty(0, dtype=array.dtype).numpy().dtype
    return np.empty((length, *array.shape[1:]), dtype)


def _into(array: DiskArray | Tensor, found: np.ndarray, start: int, stop: int) -> None:
    """Read rows that follow each other into memory."""
    if isinstance(array, DiskArray):
        array.into(found, start, stop)
    else:
        found[:] = array[start:stop].numpy()


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([part.numpy() for part in parts])


def _read(parts: Iterator[Batch], size: int, start: int) -> Iterator[_Portion]:
    """Cut parts of any length into minibatches; rows at the end of a part go to the next one."""
    rest: Batch | None = None
    for part in parts:
        both = zip(rest or (), part, strict=False)
        whole = part if rest is None else tuple(torch.from_numpy(_joined(pair)) for pair in both)
        n = len(whole[0])
        full = n - n % size
        cut = [tuple(t[i : i + size] for t in whole) for i in range(0, full, size)]
        yield _Portion(cut, False, start)
        start += full
        rest = tuple(torch.from_numpy(t[full:].numpy().copy()) for t in whole) if full < n else None
    if rest is not None:
        yield _Portion([rest], False, start)


_END = object()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items of an iterator, which a thread makes while the caller uses the item before."""
    found: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
    stopped = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                return found.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:
            put(_END, error)

    thread = threading.Thread(target=work, name="pyro_vae reads ahead", daemon=True)
    thread.start()
    try:
        while (item := found.get())[0] is not _END:
            yield item[0]
        if item[1] is not None:
            raise item[1]
    finally:
        stopped.set()
        thread.join()
