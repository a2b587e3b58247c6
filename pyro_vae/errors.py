"""The one exception that the library raises for what a user can mend."""

import difflib
import inspect
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
    """Why a program cannot be run as a graph, in words that go on from "because".

    Arguments:
        at: the line of the user's that is the cause, as `users_line` gives it; "" if unknown.
    """

    def __init__(self, message: str, at: str = "") -> None:
        super().__init__(message)
        self.at = at


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


_LIBRARIES = (
    str(Path(__file__).parent),
    sysconfig.get_path("stdlib"),
    "<frozen",
    "<eval_with_key",  # code that torch generates
)
"""How the paths begin of files that a user of the library did not write."""


def is_users(path: str) -> bool:
    """Whether a file is the user's own: not of this package, of Python or of site-packages."""
    installed = "site-packages" in path or "dist-packages" in path
    return not installed and not path.startswith(_LIBRARIES)


def users_line(error: BaseException | None, program: Any = None) -> str:
    """Where the user's own code caused an error, as " (path:line)"; "" if it is unknown.

    Arguments:
        error: the innermost line of the user in its traceback, and in those of its causes, counts.
        program: a method of the user; its first line counts if the error names no line.
    """
    lines = []
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines += [(frame.filename, frame.lineno) for frame in frames]
        error = error.__cause__
    function = inspect.unwrap(getattr(program, "__func__", program))
    code = getattr(function, "__code__", None)
    if code is not None:
        lines.insert(0, (code.co_filename, code.co_firstlineno))
    own = [f" ({path}:{line})" for path, line in lines if is_users(path)]
    return own[-1] if own else ""


def active_line(until: str) -> str:
    """The user's innermost active line, as " (path:line)".

    Callers of the function ``until`` do not count; "" if the user has no other line.
    """
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_name != until:
        if is_users(frame.f_code.co_filename):
            return f" ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn about the line of the user's that called the library."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
