"""Progress bars: on standard error, quiet where nobody looks."""

import sys

from tqdm import tqdm


def bar(shown: bool, total: int, title: str, initial: int = 0, delay: float = 0) -> tqdm:
    """A progress bar of so many steps, shown after so many seconds; a line every ten seconds where
    the output is no terminal."""
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
