"""The application. Other modules add commands to it."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from pyro_vae import __version__
from pyro_vae.cli.groups import DATA, INFERENCE, MODEL, TRAINING

FROM_DATA, FROM_MODEL, FROM_INFERENCE, FROM_TRAINING = (
    Parameter(name="*", group=group) for group in (DATA, MODEL, INFERENCE, TRAINING)
)
"""The fields of a dataclass as options, in this group of the help."""

RunFolder = Annotated[Path, Parameter(help="Run folder.")]

UserClass = Annotated[
    str | None, Parameter(help="module:Class, required if the pair of the run is your own.")
]


def _default(value: Any) -> str | None:
    """A default as a user types it. If the default is None, the help text explains it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return None if value is None or value is False else str(value)


MANY = Parameter(consume_multiple=True, show_default=_default, negative_iterable=())

app = App(
    name="pyro-vae",
    help="Train, evaluate, diagnose and use variational autoencoders, written as Pyro programs.",
    version=__version__,  # that of the metadata is old after an update of an editable install
    default_parameter=MANY,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command()
