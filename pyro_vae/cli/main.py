"""The entry point: words of the shell in, errors of use as one line on standard error."""

import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.config import Dict as ConfigDict

from pyro_vae.cli.app import app
from pyro_vae.cli.make_pair import current_folder
from pyro_vae.cli.options import Input, Model, Objective, require_heard
from pyro_vae.errors import UsageError, nearest
from pyro_vae.training.settings import Settings

# isort: off
from pyro_vae.cli import train as _train  # noqa: F401  (adds its command, as the next ones do)
from pyro_vae.cli import judge as _judge  # noqa: F401
from pyro_vae.cli import use as _use  # noqa: F401
from pyro_vae.cli import soundness as _soundness  # noqa: F401
# isort: on


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of use is one line on standard error and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words, file = _config_file(words)
        app.config = [*([] if file is None else [file]), _require_typed_class, _require_heard]
        # A class of the user's own may import its neighbors whenever it runs.
        typed_class = any(re.fullmatch(r"(--model=)?[\w.]+:\w+", word) for word in words)
        here = current_folder() if typed_class else nullcontext()
        with here, warnings.catch_warnings():
            show = warnings.showwarning

            def one_line(message: Any, category: Any, *rest: Any, **more: Any) -> None:
                if category is UserWarning:
                    print(f"pyro-vae: {message}", file=sys.stderr)
                else:
                    show(message, category, *rest, **more)

            warnings.showwarning = one_line
            app(words, exit_on_error=False, print_error=False)
    except UsageError as error:
        _fail(_as_options(str(error), words))
    except CycloptsError as error:
        _fail(_one_line(str(error)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"pyro-vae: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _config_file(words: list[str]) -> tuple[list[str], Any]:
    """Take ``--config FILE`` out of the words; its options stand where the words give none."""
    words = [part for word in words for part in _split(word)]
    if words[:1] != ["train"]:
        return words, None
    resumed = "--config" not in words and "--resume" in words
    if resumed:
        words = [*words, *_config_of_run(words)]
    if "--config" not in words:
        return words, None
    at = words.index("--config")
    if at + 1 >= len(words):
        raise UsageError("--config takes a JSON file, none came")
    path = Path(words[at + 1])
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({error})") from error
    options = content.get("train", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise UsageError(f"{path}: an object of options is expected")
    known = [field.name for kind in (Model, Objective, Input, Settings) for field in fields(kind)]
    # A run does not say where it is: a copy of it would write into the first one.
    known += ["data", "num_eval_samples", "report", *(() if resumed else ("out",))]
    # What a run records of its data:
    recorded = ("num_classes", "data_shape", "context_shapes", "vocabulary", "ragged")
    for name in options:
        if name not in (*known, *recorded):
            raise UsageError(f"{path}: there is no option '{name}'; {nearest(name, known)}")
    kept = {k.replace("_", "-"): v for k, v in options.items() if k not in recorded}
    # The name of this option is that of a command too, which the library would skip.
    if kept.pop("report", True) is False and "--report" not in words:
        words = [*words, "--no-report"]
    file = ConfigDict(kept, use_commands_as_keys=False, source=str(path))
    return words[:at] + words[at + 2 :], file


def _require_typed_class(_: App, commands: Sequence[str], arguments: Any) -> None:
    """Refuse a class of a user's own that a file names: only one that is typed is imported."""
    for argument in arguments if tuple(commands) == ("train",) else ():
        for token in argument.tokens if _python(argument.name) == "model" else ():
            if token.source != "cli" and ":" in token.value:
                raise UsageError(
                    f"{token.source} names the class '{token.value}', and no file makes a command "
                    f"import a module: if you trust it, type --model {token.value}"
                )


def _require_heard(_: App, commands: Sequence[str], arguments: Any) -> None:
    """Refuse options that nothing hears of what is chosen, typed as they are by default too."""
    if tuple(commands) != ("train",):
        return
    named = {_python(argument.name): argument for argument in arguments}
    require_heard(
        [name for name, one in named.items() if any(token.source == "cli" for token in one.tokens)],
        {
            name: one.tokens[-1].value if one.tokens else one.field_info.default
            for name, one in named.items()
        },
    )


def _as_options(message: str, words: Sequence[str]) -> str:
    """A message in which arguments of Python stand as the options of the command that give them."""
    command = words[0] if words else ""
    options = app[command].assemble_argument_collection() if command in list(app) else []
    for name in (one.name for one in options if one.name.startswith("--")):
        word = _python(name)
        free = (
            rf"(?<![\w'\"./-]){word}(?![\w'\"./=(])" if "_" in word else rf"^{word}(?= (is|must) )"
        )
        message = re.sub(free, name, message)
    elbo = r"\b(use|or) (Trace_ELBO|pyro_vae\.EnumeratedELBO)\b"
    return re.sub(elbo, r"\1 --objective elbo", message)


def _python(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(("--config=", "--out=")) else [word]


def _config_of_run(words: list[str]) -> list[str]:
    """A resumed run takes the options that are not given from its own configuration."""
    data = next((word for word in words[1:2] if not word.startswith("-")), "")
    run = Path("runs") / Path(data).stem
    if "--out" in words[:-1]:
        run = Path(words[words.index("--out") + 1])
    return ["--config", str(run / "config.json")] if (run / "config.json").is_file() else []


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str) -> None:
    print(f"pyro-vae: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)
