"""The entry point: it reads the words of the shell and prints each error as one line."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from cyclopts import CycloptsError

from pyro_vae.cli.app import app
from pyro_vae.cli.config_file import run_of
from pyro_vae.cli.make_pair import current_folder
from pyro_vae.cli.options import Model
from pyro_vae.cli.processes import in_first, is_elsewhere, shared
from pyro_vae.errors import UsageError
from pyro_vae.pairs.memory import told_smaller

# isort: off
from pyro_vae.cli import train as _train
from pyro_vae.cli import judge as _judge  # noqa: F401
from pyro_vae.cli import score as _score  # noqa: F401
from pyro_vae.cli import about as _about  # noqa: F401
from pyro_vae.cli import use as _use  # noqa: F401
from pyro_vae.cli import soundness as _soundness  # noqa: F401
from pyro_vae.cli import export as _export  # noqa: F401
from pyro_vae.cli import tune as _tune  # noqa: F401
from pyro_vae.cli import explore as _explore
# isort: on


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A `UsageError` is one line on standard error, with status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        # A class of the user's own may import modules that are next to it whenever it runs.
        here = current_folder() if _names_class(bound.arguments) else nullcontext()
        with (
            told_smaller(lambda: "fewer rows or a smaller pair need less"),
            here,
            _warnings_as_lines(),
            shared(command.__name__),
            _folder_locked(command, bound.arguments),
        ):
            command(*bound.args, **bound.kwargs)
    except UsageError as error:
        _fail(error.spelled(_spell(words)), is_elsewhere(error))
    except CycloptsError as error:
        _fail(str(error), is_elsewhere(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"pyro-vae: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _spell(words: list[str]) -> Callable[[str], str]:
    """How the shell spells a name: as an option, if the typed command has such an option."""
    _, apps, _ = app.parse_commands(words)
    options = {one.field_info.name: one.name for one in apps[-1].assemble_argument_collection()}
    names = {name: option for name, option in options.items() if option.startswith("--")}
    if "objective" in names:
        names |= dict.fromkeys(("Trace_ELBO", "pyro_vae.EnumeratedELBO"), "--objective elbo")
    return lambda name: names.get(name, name)


def _names_class(values: Mapping[str, Any]) -> bool:
    """Whether the values of a command name a class of the user's own, module:Class."""
    model = values.get("model")
    return ":" in (model.model if isinstance(model, Model) else model or "")


@contextmanager
def _folder_locked(command: Callable[..., Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Be the only writer of the run folders of a command, until all its results are written."""
    from pyro_vae.runs.lock import reserved

    runs = [values["run"], *values.get("others", ())] if "run" in values else []
    if command is _train.train:
        runs = [values.get("out") or run_of(values["data"])]
    elif values.get("out") is not None or command is _explore.explore:
        runs = []  # these do not write into the folder
    creates = command is _train.train and not values.get("resume")
    with ExitStack() as locks:

        def lock() -> None:
            for run in dict.fromkeys(runs):
                if creates or run.is_dir():  # other commands report a folder that does not exist
                    locks.enter_context(reserved(run))

        in_first(lock)  # which is the only process that writes
        yield


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each `UserWarning` as one line on standard error."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def one_line(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if category is UserWarning:
                print(f"pyro-vae: {message}", file=sys.stderr)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = one_line
        yield


def _fail(message: str, told: bool = False) -> None:
    if told:
        sys.exit(2)
    print(f"pyro-vae: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
