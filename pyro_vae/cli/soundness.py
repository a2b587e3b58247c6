"""Commands that test a pair of the user's own (check) and the estimators (selftest)."""

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
    """Run a pair of your own once on data, and explain what to fix.

    Parameters
    ----------
    model
        Your pair, as module:Class.
    data
        Data for the pair: a name or a file, as for train.
    data_dir
        Folder of the torchvision data sets.
    condition
        Context that the pair receives: the labels as one-hot vectors (label), the array "context"
        of the data file (context), or both.
    """
    from pyro_vae.data.datasets import load_data
    from pyro_vae.training.check import check as run_check

    loaded = load_data(data, data_dir)
    if ":" not in model:
        raise UsageError(f"a pair of your own has the form module:Class, got '{model}'")
    pair = make_pair(Model(model=model, condition=condition), loaded)
    given = {"condition": condition, "num_classes": loaded.num_classes}
    x, context = loaded.train.x[:16], context_of(given, loaded, loaded.train)
    found = run_check(pair, x, *(part[:16] for part in context))
    if found.errors:
        raise UsageError("; ".join(found.errors))
    print(found)


@app.command
def selftest() -> None:
    """Compare every estimator with exact answers on this machine; exit with 1 if one is wrong."""
    from pyro_vae.diagnostics.selftest import selftest as run_selftest

    found = run_selftest()
    print(found)
    if not found.passed:
        sys.exit(1)
