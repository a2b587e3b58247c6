"""Progress bars on standard error."""

import sys

from tqdm import tqdm


def bar(shown: bool, total: int, title: str, initial: int = 0, delay: float = 0) -> tqdm:
    """A progress bar of ``total`` steps, shown after ``delay`` seconds.

    If the output is not a terminal, the bar is printed at most every ten seconds.
    """
    return tqdm(
        total=total,
        initial=initial,
        disable=not shown,
        desc=title,
        leave=False,
        delay=delay,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
    )
