"""The application, to which commands are added."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

Flat = Parameter(name="*")

RunFolder = Annotated[Path, Parameter(help="A run folder.")]

UserClass = Annotated[
    str | None, Parameter(help="module:Class, where the run's pair is one of your own.")
]


def _default(value: Any) -> str | None:
    """A default as it would be typed; of one that is None, the help says what it means."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return None if value is None else str(value)


MANY = Parameter(consume_multiple=True, show_default=_default)

app = App(
    name="pyro-vae",
    help="Variational autoencoders as Pyro programs: train, evaluate, use.",
    default_parameter=MANY,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
