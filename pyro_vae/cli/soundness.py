"""Commands that ask whether things are sound: a pair of one's own, this machine."""

import sys
from pathlib import Path
from typing import Literal

from pyro_vae.cli.app import app
from pyro_vae.cli.make_pair import make_pair
from pyro_vae.cli.options import Model
from pyro_vae.cli.run import context_of
from pyro_vae.errors import UsageError


@app.command
def check(
    model: str,
    *,
    data: str = "digits",
    data_dir: Path | None = None,
    condition: tuple[Literal["label", "context"], ...] = (),
) -> None:
    """Run a pair of your own once on data, and explain in words what would go wrong.

    Parameters
    ----------
    model
        module:Class.
    data
        The data it is for.
    data_dir
        Folder of torchvision's files.
    condition
        What is given as context: labels, the "context" of the data file, or both.
    """
    from pyro_vae.data.datasets import load_data
    from pyro_vae.training.check import check as run_check

    loaded = load_data(data, data_dir)
    if ":" not in model:
        raise UsageError(f"a pair is named module:Class, '{model}' came")
    pair = make_pair(Model(model=model, condition=condition), loaded)
    given = {"condition": condition, "num_classes": loaded.num_classes}
    x, context = loaded.train.x[:16], context_of(given, loaded, loaded.train)
    found = run_check(pair, (x, *(part[:16] for part in context)))
    if found.errors:
        raise UsageError("; ".join(found.errors))
    print(found)


@app.command
def selftest() -> None:
    """Hold every estimator against exact answers on this machine; status 1 where one is wrong."""
    from pyro_vae.diagnostics.selftest import selftest as run_selftest

    found = run_selftest()
    print(found)
    if not found.passed:
        sys.exit(1)
