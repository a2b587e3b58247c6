"""The one exception that the library raises for what a user can mend."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something asked of the library cannot be done; the message says what was expected and came.

    The command line prints the message as one line and exits with status 2.
    """


class NotTraceable(Exception):
    """Why a program cannot be run as a graph, in words that go on from "because"."""


def first_line(error: BaseException) -> str:
    """An error's message without the lines that Pyro and torch put behind it.

    >>> first_line(UsageError("x is empty\\n Trace Shapes:"))
    'x is empty'
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the nearest of the known words, or all of them; "" if there are none.

    >>> nearest("mnits", ["digits", "mnist"])
    "did you mean 'mnist'?"
    >>> nearest("x", ["digits", "mnist"])
    'known: digits, mnist'
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(known)}" if known else ""
