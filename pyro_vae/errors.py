"""The one exception that the library raises for what a user can mend."""

import difflib
import re
from collections.abc import Callable, Iterable

_ARGUMENT = re.compile(r"`([\w.]+)`")


class UsageError(ValueError):
    """The user asked for something that cannot be done.

    The message says what was expected, what was given and what to do. The command line prints it
    as one line and exits with status 2.

    Arguments:
        message: the message. Names in backticks, such as those of arguments, are spelled as the
            reader writes them.
        argument: the argument that the message is about; its name comes first.

    >>> error = UsageError("must be at least 1, got 0", argument="num_samples")
    >>> str(error)
    'num_samples must be at least 1, got 0'
    >>> error.spelled(lambda name: "--" + name.replace("_", "-"))
    '--num-samples must be at least 1, got 0'
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        self.argument = argument
        self.template = message if argument is None else f"`{argument}` {message}"
        super().__init__(self.spelled(lambda name: name))

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message, with the names in backticks as ``spell`` gives them."""
        return _ARGUMENT.sub(lambda found: spell(found[1]), self.template)


class NotTraceable(Exception):
    """Why a program cannot be run as a graph, in words that go on from "because"."""


def first_line(error: BaseException) -> str:
    """The message of an error without the lines that Pyro and torch append.

    A `UsageError` keeps the backticks around its arguments, so that the line can be the message of
    another one.

    >>> first_line(UsageError("x is empty\\n Trace Shapes:"))
    'x is empty'
    >>> first_line(UsageError("must be at least 1, got 0", argument="num_samples"))
    '`num_samples` must be at least 1, got 0'
    """
    message = error.template if isinstance(error, UsageError) else str(error)
    lines = message.strip().splitlines()
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
