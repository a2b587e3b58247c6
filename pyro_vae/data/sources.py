"""Minibatches from tensors, data sets and loaders.

Data keep their type (uint8 stays uint8). `pyro_vae.data.preparation` prepares each minibatch for
the pair.
"""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_vae.data import group_numbers, holes
from pyro_vae.data.disk import DiskArray, rows_of
from pyro_vae.data.order import Place, order
from pyro_vae.data.padding import without_padding
from pyro_vae.data.stored import Stored
from pyro_vae.data.streams import Stream, by_name
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor, require_finite, with_holes
from pyro_vae.pairs.pair import Batch, Pair, placement
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.template import missing_context

Rows: TypeAlias = "Tensor | np.ndarray | DiskArray | Dataset | DataLoader"


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

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Minibatches of unprepared rows, in their order."""
        for start in range(0, len(self), batch_size):
            # Copies, because a program may change them.
            yield tuple(tensor[start : start + batch_size].clone() for tensor in self.tensors)

    def epoch(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """This process's part of each remaining minibatch of an epoch, in a random order."""
        for batch, _ in self.joined(batch_size, place, 1):
            yield batch

    def joined(self, batch_size: int, place: Place, most: int) -> Iterator[tuple[Batch, int]]:
        """The same with up to ``most`` full minibatches one after the other, and their number."""
        index = order(place.seed, place.epoch, len(self)).to(self.tensors[0].device)
        start = place.batches * batch_size
        while start < len(self):
            count = most if start + most * batch_size <= len(self) else 1
            rows = place.team.of(index[start : start + count * batch_size])
            yield tuple(tensor.index_select(0, rows) for tensor in self.tensors), count
            start += count * batch_size

    def numbers(self, batch_size: int, place: Place) -> Tensor:
        """The numbers of the rows of this process's part of the next minibatch."""
        index, start = order(place.seed, place.epoch, len(self)), place.batches * batch_size
        return place.team.of(index[start : start + batch_size])

    def first(self, n: int) -> Batch:
        """The first n rows, and the rows with the smallest and largest integers of the context."""
        kept = list(range(min(n, len(self))))
        for tensor in self.tensors[1:]:
            if not tensor.is_floating_point():
                by_row = tensor.reshape(len(tensor), -1).long()
                kept += [int(by_row.amin(1).argmin()), int(by_row.amax(1).argmax())]
        return tuple(tensor[kept] for tensor in self.tensors)

    def near(self, device: torch.device) -> "Arrays":
        """Return the same rows on a device, unless they need more than half of its free memory.

        The rows of a minibatch are then gathered on the device itself.
        """
        needed = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0] / 2:
            return self
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


Source: TypeAlias = "Arrays | Stream | Stored"


def source(x: Rows, context: Sequence[Any] = (), pair: nn.Module | None = None) -> Source:
    """Make a source of minibatches from rows and their context.

    Arguments:
        x: data (n, *data_shape), in memory or on disk; a ``Dataset`` or a ``DataLoader``; or,
            instead of x and context, a dictionary by the names of the model's arguments or a tuple.
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
    stored = x if isinstance(x, DiskArray) else rows_of(x)
    if stored is not None:
        more = [as_stored(value, f"context {i}", dtype) for i, value in enumerate(context, 1)]
        return Stored([stored, *more], dtype, pair)
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
    if pair is not None and (fault := group_numbers.negative(pair, tensors)):
        raise UsageError(fault)
    return Arrays(tensors)


def as_stored(value: Any, name: str, dtype: torch.dtype | None) -> DiskArray | Tensor:
    """An array beside x on disk: on disk too if it is large, else a tensor."""
    if isinstance(value, DiskArray):
        return value
    return rows_of(value, name) or as_tensor(value, name, dtype)


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


def _width(pair: nn.Module) -> int:
    """The number of tensors in a batch of a pair; 0 if neither template nor model says it."""
    if hasattr(pair, "template"):
        return len(cast(Any, pair).template(1))
    arguments = signature(cast(Pair, pair).model).parameters.values()
    return 0 if any(of.kind is of.VAR_POSITIONAL for of in arguments) else len(arguments)


def parts(given: Any) -> tuple[Any, ...]:
    """x and its context as a tuple; the caller passes x alone or both."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
