"""Rows in groups of any size: from rows to whole groups, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.split import Split
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor, plain_fault, with_holes


@dataclass(frozen=True)
class Groups:
    """Rows in groups, which are padded to the same number of members. `by_group` makes it."""

    x: Tensor
    """The data of each member, of shape (groups, members, *data_shape); 0 for padding."""
    sizes: Tensor
    """The number of members of each group, integers (groups,)."""
    context: tuple[Tensor, ...]
    """The context of each member, each of shape (groups, members, *shape)."""
    ids: np.ndarray
    """The id of each group, of shape (groups,)."""
    rows: Tensor
    """The number of the row of each member, integers (groups, members); -1 for padding."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def batch(self) -> tuple[Tensor, ...]:
        """What a `pyro_vae.MultilevelVAE` takes: x, the context, and the sizes."""
        return (self.x, *self.context, self.sizes)

    @property
    def row_numbers(self) -> Tensor:
        """The numbers of the rows in these groups, in increasing order, (rows,)."""
        return self.rows[self.rows >= 0].sort().values

    def member_rows(self, values: Any) -> Tensor:
        """Results for members (groups, members, ...) as results for rows (rows, ...).

        The order is that of `row_numbers`. Raises `UsageError` for results of another shape.
        """
        values = torch.as_tensor(values)
        if values.shape[:2] != self.rows.shape:
            raise UsageError(
                f"must have shape (groups, members, ...), here {tuple(self.rows.shape)}, got "
                f"{tuple(values.shape)}",
                argument="values",
            )
        members = self.rows >= 0
        return values[members][self.rows[members].argsort()]

    def group_rows(self, values: Any) -> Tensor:
        """Results for groups (groups, ...), repeated for each of their rows: (rows, ...).

        The order is that of `row_numbers`. Raises `UsageError` for another number of groups.
        """
        values = torch.as_tensor(values)
        if values.dim() == 0 or len(values) != len(self):
            raise UsageError(
                f"must have a row for each of {len(self)} groups, got shape {tuple(values.shape)}",
                argument="values",
            )
        number = torch.arange(len(self))[:, None].expand_as(self.rows)
        return values[self.member_rows(number)]

    def take(self, index: Tensor) -> "Groups":
        """Some of the groups, by their numbers."""
        context = tuple(tensor[index] for tensor in self.context)
        ids = self.ids[index.numpy()]
        return Groups(self.x[index], self.sizes[index], context, ids, self.rows[index])

    def split(self, *shares: int, seed: int = 0) -> list["Groups"]:
        """Cut the groups into parts of these shares at random; each group is in one part.

        Raises `UsageError` if a share is not positive, or if a part would be empty.

        >>> parts = by_group(torch.zeros(6, 2), [0, 0, 1, 2, 3, 3]).split(3, 1)
        >>> [len(part) for part in parts]
        [3, 1]
        """
        if not shares or min(shares) <= 0:
            raise UsageError(f"must be positive numbers, got {shares}", argument="shares")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        edges = [len(self) * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
        if any(a == b for a, b in pairwise(edges)):
            raise UsageError(
                f"{len(self)} groups are too few for parts of shares {shares}: a part would be "
                "empty"
            )
        return [self.take(order[a:b]) for a, b in pairwise(edges)]


def by_group(x: Any, group: Any, *context: Any, members: int | None = None) -> Groups:
    """Put rows into whole groups, padded to the same number of members.

    Arguments:
        x: the data of each row, (rows, *data_shape). It keeps its type. NaN is a missing entry.
        group: the id of the group of each row, (rows,): numbers or words.
        context: for example covariates of each row, (rows, *shape).
        members: the number of members after padding; by default that of the largest group.

    Groups are in the order of their ids, and members in the order of their rows. Raises
    `UsageError` if an id is missing (NaN or None), if the numbers of rows differ, and if a group
    has more than ``members`` members.

    >>> import pyro_vae as pv
    >>> groups = pv.by_group([[1.0], [2.0], [3.0]], ["b", "a", "b"])
    >>> groups.ids.tolist(), groups.sizes.tolist(), groups.x[..., 0].tolist()
    (['a', 'b'], [1, 2], [[2.0, 0.0], [1.0, 3.0]])
    >>> groups.member_rows(groups.x)[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """
    tensors = [as_tensor(with_holes(x), "x", missing=True)]
    tensors += [as_tensor(value, f"context {i}") for i, value in enumerate(context, 1)]
    ids, number, sizes = _numbered(group)
    for i, tensor in enumerate(tensors):
        if len(tensor) != len(number):
            raise UsageError(
                f"{f'context {i}' if i else 'x'} has {len(tensor)} rows but there are "
                f"{len(number)} group ids; they must match"
            )
    most = int(sizes.max())
    if members is not None and members < most:
        raise UsageError(
            f"must be at least {most}, the size of the largest group, got {members}",
            argument="members",
        )
    rows = torch.from_numpy(_places(number, sizes, members or most))
    padded = [_padded(tensor, rows) for tensor in tensors]
    return Groups(padded[0], torch.from_numpy(sizes), tuple(padded[1:]), ids, rows)


def in_groups(parts: Mapping[str, Split], ids: Mapping[str, Any]) -> dict[str, Split]:
    """Put the rows of each part of a data set into whole groups.

    Arguments:
        parts: the rows of each part, such as "train" and "test".
        ids: the id of the group of each row, by part.

    In the result a row is a group: x and context are padded to the largest group of all parts, and
    ``lengths`` are the sizes, and ``members`` the rows. Labels are kept if the members of each
    group share their label.
    Raises `UsageError` if a group is in two parts, and for rows that are sequences with lengths.
    """
    for name, rows in parts.items():
        if rows.lengths is not None:
            raise UsageError(f"{name or 'x'} has lengths, but members of groups cannot have them")
    made = {
        name: by_group(rows.x, ids[name], *([] if rows.context is None else [rows.context]))
        for name, rows in parts.items()
    }
    _require_apart({name: groups.ids for name, groups in made.items()})
    most = max(groups.x.shape[1] for groups in made.values())
    return {name: _as_split(parts[name], groups, most) for name, groups in made.items()}


def _require_apart(ids: Mapping[str, np.ndarray]) -> None:
    seen: dict[Any, str] = {}
    for part, own in ids.items():
        for one in own.tolist():
            if seen.setdefault(one, part) != part:
                raise UsageError(
                    f"group {one!r} is in {seen[one]} and in {part}, but a group must be in one "
                    "part: give different groups different ids"
                )


def _as_split(rows: Split, groups: Groups, members: int) -> Split:
    x, *context = (_wider(part, members) for part in (groups.x, *groups.context))
    labels = None
    if rows.labels is not None:
        first = rows.labels[groups.rows[:, 0]]
        labels = first if torch.equal(groups.group_rows(first), rows.labels) else None
    rows_of = _wider(groups.rows + 1, members) - 1
    return Split(x, labels, context[0] if context else None, groups.sizes, members=rows_of)


def _wider(tensor: Tensor, members: int) -> Tensor:
    """A tensor (groups, members, ...) with more zeros as padding."""
    more = tensor.new_zeros(len(tensor), members - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, more], 1)


def _numbered(group: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of the groups in order, the number of each row's group, and the groups' sizes."""
    if fault := plain_fault(group):
        raise UsageError(fault, argument="group")
    ids = group.cpu().numpy() if isinstance(group, Tensor) else np.asarray(group)
    if ids.dtype.kind in "US" and isinstance(group, list | tuple):
        ids = np.asarray(group, dtype=object)  # NumPy would make words of NaN and numbers
    if ids.ndim != 1 or len(ids) == 0:
        raise UsageError(
            f"must be one id for each row, got an array of shape {ids.shape}", argument="group"
        )
    missing = [i for i, one in enumerate(_as_list(ids)) if _is_missing(one)]
    if missing:
        raise UsageError(
            f"the group id of row {missing[0]} is missing ({len(missing)} in all): leave out these "
            "rows, or give each of them an id of its own"
        )
    try:
        found, number, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    except TypeError as error:  # objects without an order, such as words and numbers
        raise UsageError(f"group ids must be of one kind, numbers or words: {error}") from error
    return found, number.reshape(-1), sizes.astype(np.int64)


def _as_list(ids: np.ndarray) -> Sequence[Any]:
    """The ids that may be missing: integers and words never are."""
    return ids.tolist() if ids.dtype.kind in "fOcmM" else ()


def _is_missing(one: Any) -> bool:
    if one is None or type(one).__name__ in ("NAType", "NaTType"):  # pandas
        return True
    return bool(one != one)


def _places(number: np.ndarray, sizes: np.ndarray, members: int) -> np.ndarray:
    """The row number of each member, (groups, members), -1 for padding."""
    order = np.argsort(number, kind="stable")
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(number)) - starts[number[order]]
    rows = np.full((len(sizes), members), -1)
    rows[number[order], place] = order
    return rows


def _padded(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows (rows, ...) as members (groups, members, ...), with zeros as padding."""
    found = tensor[rows.clamp(min=0).to(tensor.device)]
    found[rows < 0] = 0
    return found
