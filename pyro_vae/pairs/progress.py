"""Progress bars: on standard error, or as a widget in a notebook that can show widgets."""

import sys
import warnings
from functools import cache
from typing import Any

from tqdm import TqdmWarning, tqdm

from pyro_vae.pairs.waiting import sign_of_life

_LINE = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"


def bar(shown: bool, total: int, title: str, initial: int = 0, delay: float = 0) -> tqdm:
    """A progress bar of ``total`` steps, shown after ``delay`` seconds.

    Each step tells other processes, which may wait for this one, that it works.

    If the output is neither a terminal nor a notebook, the bar is printed at most every ten
    seconds.
    """
    kind = _kind()
    quick = kind is not tqdm or _in_notebook() or sys.stderr.isatty()
    made = kind(
        total=total,
        initial=initial,
        disable=not shown,
        desc=title,
        leave=False,
        delay=delay,
        mininterval=0.2 if quick else 10,
        bar_format=_LINE if kind is tqdm else None,
    )
    show = made.update

    def update(number: float | None = 1) -> bool | None:
        sign_of_life()
        return show(number)

    made.update = update
    return made


@cache
def _kind() -> Any:
    """The class of tqdm's widget, or of its line of text where a notebook has no widgets."""
    if not _in_notebook():
        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # it asks for ipywidgets
        from tqdm.autonotebook import tqdm as chosen
    return chosen


def _in_notebook() -> bool:
    """Whether the program runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
