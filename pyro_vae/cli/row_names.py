"""The rows of data as the user knows them: ids of a table, paths of images, numbers in the file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.data.split import Data, Split
    from pyro_vae.training.nonfinite import NamedRows


def ids_of(data: "Data", split: "Split") -> dict[str, list[Any]]:
    """The ids of the rows of a split: of groups, of the table, paths of images, or numbers."""
    if split.members is not None and data.group_ids is not None:
        return {"group": [data.group_ids[row] for row in split.members[:, 0].tolist()]}
    if split.rows is None:
        return {"row": list(range(len(split.x)))}
    rows = split.rows.tolist()
    if data.files is not None:
        return {"files": [data.files[row] for row in rows]}
    known = data.table or (data.cells and data.cells.table)
    if known is None:
        return {"row": rows}
    ids = known.ids
    return {known.id_name: [ids[row] for row in rows]}


def training_rows(data: "Data", source: str, numbers: Sequence[int]) -> "NamedRows":
    """Name rows of the training part, given by their numbers there.

    Arguments:
        source: the file or the name of the data, as the user wrote it.
    """
    from pyro_vae.data.disk import DiskArray
    from pyro_vae.training.nonfinite import NamedRows

    split, at = data.train, list(numbers)
    x: Any = split.x
    if isinstance(x, DiskArray) and split.rows is None:
        return NamedRows(x.rows_in_file(at), "row", "rows", f"of {source}, counted from 0")
    if split.members is not None:
        (ids,) = ids_of(data, split._replace(members=split.members[at])).values()
        return NamedRows(ids, "the group", "the groups", f"of {source}")
    if split.rows is None:
        return NamedRows(at, "row", "rows", f"of the training part of {source}, counted from 0")
    ((name, ids),) = ids_of(data, split._replace(rows=split.rows[at])).items()
    if name == "files":
        return NamedRows(ids, "image", "images", f"of {source}")
    if name != "row":
        return NamedRows(ids, f"the row with {name}", f"the rows with {name}", f"of {source}")
    whole = "" if data.test.rows is not None else "the training part of "
    kind = "row" if data.vocabulary is None else "distinct line"
    return NamedRows(ids, kind, f"{kind}s", f"of {whole}{source}, counted from 0")
