"""The one exception that the library raises for what a user can mend."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something asked of the library cannot be done; the message says what was expected and came.

    The command line prints the message as one line and exits with status 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the nearest of the known words, or all of them.

    >>> nearest("mnits", ["digits", "mnist"])
    "did you mean 'mnist'?"
    >>> nearest("x", ["digits", "mnist"])
    'known: digits, mnist'
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
