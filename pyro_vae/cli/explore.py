"""The command that opens a page on a run: explore."""

import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.row_names import ids_of
from pyro_vae.cli.run import (
    SCHEMA,
    binarize_of,
    context_of,
    open_run,
    require_positive,
    schema_of_run,
)
from pyro_vae.cli.score import chosen_part
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from pyro_vae.data.split import Data, Split
    from pyro_vae.explore.server import Server
    from pyro_vae.explore.view import HeldOut


@app.command
def explore(
    run: RunFolder,
    *,
    data: str | None = None,
    part: str | None = None,
    num: int = 2000,
    num_samples: int = 200,
    port: int = 0,
    browser: bool = True,
    model: UserClass = None,
) -> None:
    """Open a page in your browser: the latent plane, data, sliders, refinement, and a table.

    The page is served on 127.0.0.1 only, at an address with a random token, until Ctrl-C. It
    writes nothing into the run folder.

    Parameters
    ----------
    data
        Data to use instead of those of training: a name or a file, as for train.
    part
        Part of the data: train, validation, test or all. The default is test, or all with --data.
    num
        Largest number of data; more are thinned at random, with a fixed seed.
    num_samples
        Importance samples of each datum, for log p(x) and Pareto k.
    port
        Port of the page. 0 picks a free one.
    browser
        Open the page in a browser (--browser), or only print its address (--no-browser).
    """
    require_positive("num", num)
    require_positive("num_samples", num_samples)
    if not 0 <= port <= 65535:
        raise UsageError(f"must be from 0 to 65535, got {port}", argument="port")
    _require_bokeh()
    server = serve(run, data, part, num, num_samples, port, model)
    print(f"{server.address}\nCtrl-C ends the page.", flush=True)
    if browser:
        webbrowser.open(server.address)
    server.run()
    print("\nThe page has ended.", file=sys.stderr)


def serve(
    run: Path,
    data: str | None,
    part: str | None,
    num: int,
    num_samples: int,
    port: int,
    model: str | None,
) -> "Server":
    """The page of a run, served but not yet answering; `Server.run` answers."""
    from pyro_vae.explore.cards import Cards
    from pyro_vae.explore.page import Page
    from pyro_vae.explore.server import Server
    from pyro_vae.explore.view import view

    pair, loaded, given = open_run(run, data, None, model, part)
    held = held_of(loaded, given, chosen_part(loaded, data, part), num)
    schema = schema_of_run(run) if (run / SCHEMA).is_file() else None
    cards = Cards(schema, given.get("vocabulary"))
    shown = view(pair, held, num_samples, progress=True)
    return Server(Page(shown, cards, run.resolve().name), port)


def held_of(data: "Data", given: dict[str, Any], split: "Split", num: int) -> "HeldOut":
    """At most this many rows of a part, with their context, ids and labels."""
    from pyro_vae.explore.levels import thinned
    from pyro_vae.explore.view import HeldOut

    kept = thinned(len(split.x), num)
    ((_, ids),) = ids_of(data, split).items()
    labels = None if split.labels is None else split.labels[kept].tolist()
    return HeldOut(
        split.x[kept],
        [one[kept] for one in context_of(given, data, split)],
        [ids[row] for row in kept.tolist()],
        None if labels is None else [_label(data, label) for label in labels],
        split.lengths[kept] if split.members is not None and split.lengths is not None else None,
        binarize_of(given),
    )


def _label(data: "Data", label: int) -> str:
    """The name of a label: that of a folder, a category of a table, or its number."""
    if label < 0:
        return "missing"
    if data.classes is not None:
        return data.classes[label]
    column = None if data.schema is None else data.schema.one("label")
    if column is not None and column.coded:
        return str(column.categories[label])
    return str(label)


def _require_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "explore needs Bokeh, which is not installed; run pip install 'pyro-vae[explore]'"
        ) from error
