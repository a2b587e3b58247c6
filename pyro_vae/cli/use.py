"""Commands that use a run: sample, reconstruct, interpolate, traverse, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.row_names import ids_of
from pyro_vae.cli.run import (
    SCHEMA,
    binarize_of,
    context_of,
    open_run,
    pair_of_run,
    report_run,
    require_positive,
    schema_of_run,
    test_part,
)
from pyro_vae.cli.score import as_frame, chosen_part, written
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.data.schema import Schema


@app.command
def sample(
    run: RunFolder,
    *,
    num: int = 64,
    label: int | None = None,
    means: bool = False,
    seed: int = 0,
    out: Path | None = None,
    model: UserClass = None,
) -> None:
    """Draw data from the model; write samples.npy and figures/samples.png, or a table.

    Parameters
    ----------
    num
        Number of samples.
    out
        File to write: a table, or the array as a .npy file. The default is samples.csv or
        samples.npy in the run folder.
    label
        Class of the samples, for a pair that is conditional on labels (default: each class in
        turn), or value of the discrete latent. Other context is taken from the test data in turn.
        Then the samples name the row of their context: in the column parent of a table, or in
        samples_parents.npz.
    means
        Write the means of the data given their latents, instead of draws.
    seed
        Random seed.
    """
    from pyro_vae.inference import generation

    require_positive("num", num)
    if not (run / SCHEMA).is_file():
        _require_npy(out)
    pair, given = pair_of_run(run, model)
    conditional = "label" in given.get("condition", ())
    context, parents = _asked(run, given, num, label, model)
    if label is None or conditional:
        images = generation.sample(pair, num, *context, means=means, seed=seed)
    else:
        values = _of_class(run, pair, num, label)
        images = generation.decode(pair, values, *context, means=means, seed=seed)
    if (run / SCHEMA).is_file():
        table = _table(schema_of_run(run), images)
        if parents is not None and len(table) == num:
            table = table.add_column(0, "parent", [parents])
        print(written(table, out or run / "samples.csv"))
        return
    rows = [("", part) for part in images[:100].split(10)]
    _write(run, given, "samples", images, rows, out=out)
    if parents is not None:
        numbers = list(range(num))
        beside = out or run / "samples.npy"
        path = beside.with_name(f"{beside.stem}_parents.npz")
        print(written({"sample": numbers, "parent": parents}, path))


@app.command
def reconstruct(
    run: RunFolder,
    *,
    num: int | None = None,
    data: str | None = None,
    part: str | None = None,
    out: Path | None = None,
    model: UserClass = None,
) -> None:
    """Encode and decode data; write reconstructions.npy and figures/reconstructions.png.

    For a table, the reconstructions are written as a table.

    Parameters
    ----------
    num
        Number of data. The default is 12, or all rows of a table.
    data
        Data to use instead of those of training: a name or a file, as for train.
    part
        Part of the data: train, validation, test or all. The default is test, or all with --data.
    out
        File to write: a table, or the array as a .npy file. The default is reconstructions.csv or
        reconstructions.npy in the run folder.
    """
    from pyro_vae.inference import generation
    from pyro_vae.plots import canvas

    if num is not None:
        require_positive("num", num)
    pair, loaded, given = open_run(run, data, None, model, part)
    split = chosen_part(loaded, data, part)
    if loaded.table is None:
        _require_npy(out)
        num = num or 12
    x, context = split.x, context_of(given, loaded, split)
    if num is not None:
        x, context = x[:num], [one[:num] for one in context]
        split = split._replace(x=x, rows=None if split.rows is None else split.rows[:num])
    if loaded.table is not None:
        made = generation.reconstruct(pair, x, *context)
        print(written(as_frame(loaded, made, split), out or run / "reconstructions.csv"))
        return
    images = generation.reconstruct(pair, x, *context, binarize=binarize_of(given))
    rows = [("data", canvas.intensity(x)[:16]), ("reconstruction", images[:16])]
    _write(run, given, "reconstructions", images, rows, across=True, out=out)


@app.command
def interpolate(run: RunFolder, *, num: int = 6, steps: int = 9, model: UserClass = None) -> None:
    """Decode lines between codes; write interpolations.npy and figures/interpolations.png.

    Parameters
    ----------
    num
        Number of lines. Each line needs two test data.
    steps
        Number of points on each line.
    """
    from pyro_vae.inference import generation

    require_positive("num", num)
    pair, loaded, given = open_run(run, model=model)
    x, context = test_part(loaded, given, 2 * num)
    half = len(x) // 2
    lines = generation.interpolate(
        pair,
        x[:half],
        x[half : 2 * half],
        *(part[:half] for part in context),
        end_context=[part[half : 2 * half] for part in context],
        steps=steps,
        binarize=binarize_of(given),
    )
    _write(run, given, "interpolations", lines, [("", line) for line in lines])


@app.command
def traverse(
    run: RunFolder, *, index: int = 0, span: float = 3.0, steps: int = 11, model: UserClass = None
) -> None:
    """Move one latent unit at a time; write traversals.npy and figures/traversals.png.

    Parameters
    ----------
    index
        Index of the test datum to start from.
    span
        Each unit takes values from minus this number to this number.
    steps
        Number of values of each unit.
    """
    import torch

    from pyro_vae.inference import generation

    require_positive("steps", steps)
    pair, loaded, given = open_run(run, model=model)
    if not 0 <= index < len(loaded.test.x):
        raise UsageError(
            f"must be from 0 to {len(loaded.test.x) - 1}, got {index}", argument="index"
        )
    x, context = test_part(loaded, given, len(loaded.test.x))
    lines = generation.traverse(
        pair,
        x[index : index + 1],
        *(part[index : index + 1] for part in context),
        values=torch.linspace(-span, span, steps).tolist(),
        binarize=binarize_of(given),
    )
    _write(run, given, "traversals", lines, [(f"unit {i}", line) for i, line in enumerate(lines)])


@app.command
def report(run: RunFolder, *, model: UserClass = None) -> None:
    """Write report.html again, with its figures."""
    pair, loaded, given = open_run(run, model=model)
    report_run(run, pair, loaded, given)
    print(run / "report.html")


def _table(schema: "Schema", x: "Tensor") -> Any:
    """Rows (n, columns), or members of groups (n, members, columns), as an Arrow table."""
    from pyro_vae.data.table_values import frame_of

    group = schema.one("group")
    if x.dim() == 2 or group is None:
        return frame_of(schema, x)
    ids = [number for number in range(len(x)) for _ in range(x.shape[1])]
    return frame_of(schema, x.flatten(0, 1), group.name, ids)


def _of_class(run: Path, pair: "nn.Module", num: int, label: int) -> dict[str, "Tensor"]:
    """The first discrete latent of a pair, with the same value in every row."""
    from pyro_vae.pairs.enumeration import values
    from pyro_vae.pairs.template import template

    found = values(pair, template(pair, 2))
    if not found:
        raise UsageError(
            f"--label needs a run with classes, but {run} has no classes; train with "
            "--condition label, --model semi-supervised or --model mixture"
        )
    name, every = next(iter(found.items()))
    if not 0 <= label < len(every):
        raise UsageError(f"must be from 0 to {len(every) - 1}, got {label}", argument="label")
    return {name: every[label].expand(num, *every.shape[1:])}


def _asked(
    run: Path, given: dict[str, Any], num: int, label: int | None, model: str | None
) -> tuple[list["Tensor"], list[Any] | None]:
    """The context of the samples: a label, or each label in turn, and context of test data.

    Also the ids of the test rows from which context is taken; None without such rows.
    """
    import torch

    from pyro_vae.data.datasets import one_hot

    context: list[Tensor] = []
    parents = None
    condition, classes = tuple(given.get("condition", ())), given.get("num_classes", 0)
    if "label" in condition:
        if label is not None and not 0 <= label < classes:
            raise UsageError(f"must be from 0 to {classes - 1}, got {label}", argument="label")
        labels = torch.arange(num) % classes if label is None else torch.full((num,), label)
        context.append(one_hot(labels, classes))
    if "context" in condition or given.get("library_size") or given.get("ragged"):
        data = open_run(run, model=model)[1]
        rows = torch.arange(num) % len(data.test.x)
        others = context_of(given, data, data.test)[len(context) :]
        context += [part[rows] for part in others]
        ((_, ids),) = ids_of(data, data.test).items()
        parents = [ids[row] for row in rows.tolist()]
    return context, parents


def _require_npy(out: Path | None) -> None:
    """Raise `UsageError` for a file that is not one of an array."""
    if out is not None and out.suffix != ".npy":
        raise UsageError(
            f"must end in .npy for data that are not a table, got {out}", argument="out"
        )


def _write(
    run: Path,
    given: dict[str, Any],
    name: str,
    array: "Tensor",
    rows: list[tuple[str, "Tensor"]],
    across: bool = False,
    out: Path | None = None,
) -> None:
    """Write an array as NAME.npy or OUT, and as figures/NAME.png or, for text, as NAME.txt."""
    import io

    import numpy as np
    import torch

    from pyro_vae.pairs.figures import png
    from pyro_vae.plots import canvas
    from pyro_vae.runs import files as run_files

    like = torch.empty(1, *given.get("data_shape", ()))
    array, rows = canvas.alike(array, like), [(label, canvas.alike(x, like)) for label, x in rows]
    buffer = io.BytesIO()
    np.save(buffer, array.cpu().numpy())
    path = out or run / f"{name}.npy"
    with run_files.atomic(path) as file:
        file.write(buffer.getvalue())
    if "vocabulary" in given:
        text = canvas.lines(rows, given["vocabulary"], across)
        with run_files.atomic(run / f"{name}.txt") as file:
            file.write(f"{text}\n".encode())
        print(path)
        print(run / f"{name}.txt", text, sep="\n\n")
        return
    with run_files.atomic(run / run_files.FIGURES / f"{name}.png") as file:
        file.write(png(canvas.grid(rows)))
    print(path)
    print(run / run_files.FIGURES / f"{name}.png")
