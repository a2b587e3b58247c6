"""Commands whose results go back into a table: encode, reconstruct, score, impute."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.config_file import CELLS
from pyro_vae.cli.row_names import ids_of
from pyro_vae.cli.run import binarize_of, context_of, open_run, require_positive
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.data.split import Data, Split
    from pyro_vae.inference.imputation import Imputation
    from pyro_vae.inference.scoring import RowScores


@app.command
def score(
    run: RunFolder,
    *,
    data: str | None = None,
    part: str | None = None,
    out: Path | None = None,
    num_samples: int = 500,
    model: UserClass = None,
    seed: int = 0,
) -> None:
    """Write log p(x) of each row, its Pareto k, and the columns that make the row strange.

    For text there is the line instead of these columns.

    nats_1 to nats_3 say how strange these columns are. They are not reliable where their Pareto k,
    pareto_k_1 to pareto_k_3, is over 0.63, the limit for 500 samples. The limit for K samples is
    1 - 1 / log10(K), and at most 0.7.

    Parameters
    ----------
    data
        Data to use instead of those of training: a name or a file, as for train.
    part
        Part of the data: train, validation, test or all. The default is test, or all with --data.
    out
        File to write: .csv, .parquet, .feather or .npz. The default is scores.csv in the run folder
        for a table, and scores.npz for other data.
    num_samples
        Importance samples of each row.
    seed
        Random seed.
    """
    from pyro_vae.data.text import as_text
    from pyro_vae.inference import importance, scoring, weighted
    from pyro_vae.pairs.processes import here

    require_positive("num_samples", num_samples)
    weighted.require_samples(num_samples)
    pair, loaded, given = open_run(run, data, None, model, part)
    split = chosen_part(loaded, data, part)
    rows = (split.x, *context_of(given, loaded, split))
    how: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": True}
    how["binarize"] = binarize_of(given)
    if loaded.vocabulary is not None:  # a line does not split into characters
        of_lines = importance.log_likelihood(pair, *rows, **how)
        columns = _scored_rows(loaded, split, of_lines.per_datum, of_lines.pareto_k)
        columns["text"] = as_text(split.x, loaded.vocabulary)
    else:
        found = scoring.score(pair, *rows, **how)
        columns = _scored_rows(loaded, split, found.log_likelihood, found.pareto_k)
        columns |= _strangest(found, names_of(loaded))
    if not here().first:
        return
    path = written(columns, out or run / f"scores{_usual(loaded)}")
    values = columns["log_likelihood"]
    few = sorted(range(len(values)), key=values.__getitem__)[:5]
    last = "strangest" if loaded.vocabulary is None else "text"
    head = f"{'row':<12}{'log p(x)':>12}{'Pareto k':>10}  {last}"
    print(head, *(_line(columns, row) for row in few), path, sep="\n")


def _scored_rows(
    data: "Data", split: "Split", log_likelihood: "Tensor", pareto_k: "Tensor"
) -> dict[str, Any]:
    numbers = {"log_likelihood": log_likelihood.tolist(), "pareto_k": pareto_k.tolist()}
    return ids_of(data, split) | numbers


def _strangest(found: "RowScores", names: list[str]) -> dict[str, Any]:
    """The columns of the three entries that make each row strange."""
    columns: dict[str, Any] = {}
    rows = range(len(found.log_likelihood))
    for place in range(min(3, len(names))):
        entries = [found.entries(row, place + 1)[place] for row in rows]
        columns[f"strangest_{place + 1}"] = [names[entry] for entry in entries]
        for name, values in (("nats", found.strangeness), ("pareto_k", found.entry_pareto_k)):
            columns[f"{name}_{place + 1}"] = [
                values[row].flatten()[entry].item() for row, entry in enumerate(entries)
            ]
    return columns


def _line(columns: dict[str, Any], row: int) -> str:
    ids = next(iter(columns.values()))
    words = ", ".join(
        f"{columns[f'strangest_{i}'][row]} ({columns[f'nats_{i}'][row]:.1f})"
        for i in (1, 2, 3)
        if f"strangest_{i}" in columns
    )
    words = columns["text"][row] if "text" in columns else words
    value, k = columns["log_likelihood"][row], columns["pareto_k"][row]
    return f"{ids[row]!s:<12}{value:>12.3f}{k:>10.2f}  {words}"


@app.command
def impute(
    run: RunFolder,
    data: str | None = None,
    *,
    part: str | None = None,
    out: Path | None = None,
    method: Literal["importance", "refine", "nuts"] = "importance",
    draws: int = 20,
    num_samples: int = 1000,
    level: float = 0.9,
    model: UserClass = None,
    seed: int = 0,
) -> None:
    """Fill in the missing entries; write means or modes, draws, intervals and their reliability.

    For OUT filled.csv, three files are written. filled.csv is the table, whose empty cells hold
    posterior means or the most probable category. filled_draws.csv has all draws in the long form
    of R's mice: .imp is 0 for the table with holes and 1, 2, ... for the draws, and .id is the
    row. filled_cells.csv has a line for each cell that was empty: its mean, its interval, and the
    effective sample size and the Pareto k (for nuts, the R-hat) of its row. Other data are written
    as one .npz file.

    Parameters
    ----------
    data
        Data with missing entries, a name or a file, as for train. The default is the data of
        training.
    part
        Part of the data: train, validation, test or all (the default).
    out
        File to write. The default is filled.csv in the run folder for a table, and filled.npz for
        other data.
    method
        How to draw the latents of a row: by importance sampling with the guide (importance), after
        a refinement of the guide for each row (refine), or by NUTS, which takes seconds for each
        row (nuts).
    draws
        Number of draws of each missing entry.
    num_samples
        Importance samples of each row, or draws of its chains.
    level
        Probability of the intervals.
    seed
        Random seed.
    """
    from pyro_vae.inference import imputation
    from pyro_vae.pairs.processes import here

    require_positive("draws", draws)
    pair, loaded, given = open_run(run, data, None, model, part)
    split = chosen_part(loaded, data, part or "all")
    path = out or run / f"filled{_usual(loaded)}"
    if loaded.table is None:
        _require_npz(path)
    if split.members is not None and not bool(split.x.isnan().any()):
        raise UsageError("the data have no missing entry, so nothing is to be imputed")
    found = imputation.impute(
        pair,
        split.x,
        *context_of(given, loaded, split),
        method=method,
        draws=draws,
        num_samples=num_samples,
        level=level,
        binarize=binarize_of(given),
        seed=seed,
        progress=True,
    )
    if not here().first:
        return
    if loaded.table is None:
        arrays = {"mean": found.mean, "draws": found.draws, "missing": found.missing}
        arrays |= {"low": found.low, "high": found.high, "pareto_k": found.pareto_k}
        arrays |= {"effective_sample_size": found.effective_sample_size, "r_hat": found.r_hat}
        arrays |= {} if split.rows is None else {"rows": split.rows}
        print(_npz({name: value.numpy() for name, value in arrays.items()}, path))
    else:
        for file, table in _imputed_tables(loaded, split, found).items():
            print(written(table, path.with_name(f"{path.stem}{file}{path.suffix}")))
    print(found)


def _imputed_tables(data: "Data", split: "Split", found: "Imputation") -> dict[str, Any]:
    """The filled table, its draws in long form, and the cells, by the end of the file's name."""
    assert split.rows is not None
    table = data.table.rows(split.rows)
    return {
        "": table.filled(found.mean),
        "_draws": table.long(found.draws),
        "_cells": table.cells(found),
    }


@app.command
def encode(
    run: RunFolder,
    *,
    data: str | None = None,
    part: str | None = None,
    out: Path | None = None,
    model: UserClass = None,
) -> None:
    """Encode data; write posterior means and scales of each latent site, labels and row ids.

    For --model multilevel, the array members has the row of the data file of each member of a
    group, and -1 for padding.

    SITE_mean and SITE_scale of a local latent have a row for each datum. Those of global and group
    latents have none; the array global_latents holds the names of these sites.

    Parameters
    ----------
    data
        Data to use instead of those of training: a name or a file, as for train.
    part
        Part of the data: train, validation, test or all. The default is test, or all with --data.
    out
        File to write: .npz, .csv, .parquet or .feather. The default is codes.npz in the run folder.
        For data in a .h5ad file also .h5ad: a copy of the file, all cells in its order, with the
        posterior means of each local latent in obsm["X_SITE"], for example obsm["X_z"].
    """
    from pyro_vae.inference import encoding
    from pyro_vae.pairs.processes import here

    path = out or run / "codes.npz"
    pair, loaded, given = open_run(run, data, None, model, part)
    if path.suffix in CELLS:
        part = _all_cells(loaded, part, str(data or given["data"]), path)
    split = chosen_part(loaded, data, part)
    context = context_of(given, loaded, split)
    by_row: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for what in ("mean", "scale"):
        local, shared = encoding.encode_parts(pair, split.x, context, what, binarize_of(given))
        for found, kept in ((local, by_row), (shared, others)):
            kept |= {f"{name}_{what}": code.cpu().numpy() for name, code in found.items()}
        if what == "mean" and shared:
            others["global_latents"] = list(shared)
    if not here().first:
        return
    if split.labels is not None:
        by_row["labels"] = split.labels.numpy()
    if split.members is not None:
        by_row["members"] = split.members.numpy()
    if path.suffix in CELLS:
        print(_with_codes(data or given["data"], by_row, path))
        return
    if path.suffix == ".npz":
        print(_npz(_npz_ids(loaded, split) | by_row | others, path))
        return
    columns: dict[str, Any] = ids_of(loaded, split)
    for name, array in by_row.items():
        flat = array.reshape(len(array), -1)
        units = [name] if flat.shape[1] == 1 else [f"{name}_{j}" for j in range(flat.shape[1])]
        columns |= {unit: flat[:, j].tolist() for j, unit in enumerate(units)}
    print(written(columns, path))


def _all_cells(data: "Data", part: str | None, source: str, out: Path) -> str:
    """The part of a copy of a .h5ad file: all cells."""
    if ".zarr" in (out.suffix, Path(source).suffix):
        raise UsageError(
            "must be a .npz, .csv, .parquet or .feather file, because codes are not written into "
            f"copies of .zarr stores; got {out}",
            argument="out",
        )
    if data.cells is None:
        raise UsageError(f"can be a .h5ad file only for such data, got {data.name}", argument="out")
    if part not in (None, "all"):
        raise UsageError(f"must be all for --out in a .h5ad file, got {part}", argument="part")
    return "all"


def _with_codes(source: str, by_row: dict[str, Any], path: Path) -> Path:
    from pyro_vae.runs.cells import write_codes

    means = {name.removesuffix("_mean"): code for name, code in by_row.items() if "_mean" in name}
    write_codes(source, means, path)
    return path


def chosen_part(data: "Data", other: str | None, part: str | None) -> "Split":
    """The rows of a command: a part in the order of the file, the test rows or all by default."""
    from pyro_vae.data.split import part_of

    return part_of(data, part or ("test" if other is None else "all"))


def _npz_ids(data: "Data", split: "Split") -> dict[str, Any]:
    import numpy as np

    ((name, ids),) = ids_of(data, split).items()
    if name == "files" and split.rows is not None:
        return {"rows": split.rows.numpy(), "files": np.array(ids)}
    return {"rows": np.array(ids)}


def names_of(data: "Data") -> list[str]:
    """The name of each entry of a datum: its column, its member and column, or its indices."""
    if data.table is not None:
        return list(data.table.schema.names)
    if data.cells is not None:
        return list(data.cells.names)
    from itertools import product

    axes: list[Any] = [range(size) for size in data.shape]
    if data.schema is not None:  # a table in groups
        axes[-1] = data.schema.names
    return [",".join(map(str, entry)) for entry in product(*axes)]


def written(table: Any, path: Path) -> Path:
    """Write columns or an Arrow table to a file; raise `UsageError` for an unknown ending."""
    from pyro_vae.data.table_files import arrow
    from pyro_vae.runs.tables import write_table

    if isinstance(table, dict):
        if path.suffix == ".npz":
            import numpy as np

            return _npz({name: np.array(values) for name, values in table.items()}, path)
        table = arrow().table(table)
    write_table(table, path)
    return path


def _npz(arrays: dict[str, Any], path: Path) -> Path:
    import io

    import numpy as np

    from pyro_vae.runs.files import atomic

    _require_npz(path)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with atomic(path) as file:
        file.write(buffer.getvalue())
    return path


def _require_npz(path: Path) -> None:
    if path.suffix != ".npz":
        raise UsageError(
            f"must end in .npz for data that are not a table, got {path}", argument="out"
        )


def _usual(data: "Data") -> str:
    return ".npz" if data.table is None else ".csv"


def as_frame(data: "Data", x: "Tensor", split: "Split | None" = None) -> Any:
    """Rows as an Arrow table in the form of the data, with the ids of a split."""
    if split is None:
        return data.table.frame(x)
    ((_, ids),) = ids_of(data, split).items()
    return data.table.frame(x, ids)
