"""Tables whose rows are put into whole groups, for multilevel models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_vae.data.groups import in_groups
from pyro_vae.data.schema import Schema, read_schema
from pyro_vae.data.split import Data
from pyro_vae.data.tables import read_table


def grouped(path: str | Path, columns: Any, group: str) -> Data:
    """Read a table, and put its rows into the groups that a column names.

    Arguments:
        path: the file.
        columns: changes of its schema, as `pyro_vae.read_table` takes them.
        group: the column with the id of the group of each row.

    A datum is a group, and its members are rows. Each group is in one part of the data.
    """
    table = read_table(path, _with_role(columns, group))
    data = table.split()
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    ids = table.values(group)
    rows = {name: part.rows for name, part in parts.items() if part.rows is not None}
    found = in_groups(parts, {name: [ids[i] for i in own.tolist()] for name, own in rows.items()})
    for name, part in found.items():
        members = part.members
        assert members is not None
        at = rows[name][members.clamp(min=0)]
        found[name] = part._replace(members=at.where(members >= 0, -1), rows=None)
    train, validation, test = (found[name] for name in ("train", "validation", "test"))
    return Data(table.name, train, validation, test, schema=table.schema, group_ids=ids)


def _with_role(columns: Any, group: str) -> Any:
    """The changes of a schema, with the role of this column."""
    if isinstance(columns, Schema):
        return columns
    changes = read_schema(columns) if isinstance(columns, str | Path) else columns or {}
    assert isinstance(changes, Mapping)
    return {**changes, group: {"role": "group"}}
