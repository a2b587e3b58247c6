"""The groups of options in the help of a command."""

from typing import Any

from cyclopts import Group, Parameter

_TITLES = ("Data", "Model", "Likelihood", "Inference", "Training", "Output")
DATA, MODEL, LIKELIHOOD, INFERENCE, TRAINING, OUTPUT = (
    Group(title, sort_key=place) for place, title in enumerate(_TITLES)
)

OF_DATA, OF_MODEL, OF_LIKELIHOOD, OF_INFERENCE, OF_TRAINING, OF_OUTPUT = (
    Parameter(group=group) for group in (DATA, MODEL, LIKELIHOOD, INFERENCE, TRAINING, OUTPUT)
)

NONE = "none"
"""The word for an empty list of numbers."""


def widths(_: Any, tokens: Any) -> tuple[int, ...]:
    """The widths of hidden layers, or the word none."""
    words = [token.value for token in tokens]
    if words in ([NONE], [""]):  # the second is an empty list of a file
        return ()
    for word in words:
        if not word.lstrip("-").isdecimal():
            # The parser puts the message of a ValueError into its own error.
            raise ValueError(f"--hidden must be whole numbers or {NONE}, got {' '.join(words)}")
    return tuple(map(int, words))


WIDTHS = Parameter(group=MODEL, converter=widths)
