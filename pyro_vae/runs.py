"""The run folder: written atomically, read without executing code.

config.json         what rebuilds the pair and repeats the run, versions, checksums of the data
model.safetensors   the pair's parameters and buffers, best on validation
checkpoint.pt       the last state of training: see `pyro_vae.training`
rows.safetensors    a hash of each row that was trained on: see `pyro_vae.held_out_rows`
history.csv         a row for each epoch
metrics.json        what `evaluate` measured
figures/, report.html
"""

import csv
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae
from pyro_vae import seals
from pyro_vae.arrays import DIVISOR, recorded_divisor
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs import adopt, adopted_batch, placement, scope, trace_guide, trace_model
from pyro_vae.rng import kept, seeded
from pyro_vae.seals import checksum as checksum
from pyro_vae.threads import alone

CONFIG, MODEL, CHECKPOINT = "config.json", "model.safetensors", "checkpoint.pt"
ROWS = "rows.safetensors"
HISTORY, METRICS, FIGURES, REPORT = "history.csv", "metrics.json", "figures", "report.html"
TENSORBOARD = "tensorboard"
DIAGNOSIS = "diagnosis-"
"""How the names of the figures of `pyro_vae.diagnose` begin."""
ARRAYS = (
    "codes.npz",
    *(
        f"{name}s.{kind}"
        for name in ("sample", "reconstruction", "interpolation", "traversal")
        for kind in ("npy", "txt")
    ),
)


@alone()
def save(pair: nn.Module, run: str | Path, config: Mapping[str, Any] | None = None) -> Path:
    """Write a pair into a run folder, so that `load` gives it back.

    Arguments:
        pair: any pair. One made of this library's parts, whose constructors keep their arguments
            as attributes of the same names, is rebuilt by ``load(run)``; any other needs its class
            or an instance: ``load(run, MyPair)``.
        run: the folder, made if need be.
        config: what else config.json shall hold.

    >>> import tempfile, pyro_vae as pv
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = pv.save(pv.VAE.mlp((4,), latent_dim=3), run)
    ...     pv.load(run).prior.latent_dim
    3
    """
    run = Path(run)
    write_config(pair, run, config or {})
    write_model(run, state_dict(pair))
    return run


@alone()
def load(run: str | Path, pair: nn.Module | type[nn.Module] | None = None) -> nn.Module:
    """The pair of a run folder, on the CPU, in evaluation mode.

    Arguments:
        run: a folder written by `pyro_vae.fit` or `save`.
        pair: for a pair of your own, its class (made again with the recorded arguments) or an
            instance (whose parameters are overwritten). A run folder never makes Python import a
            module that is not this library's or torch's.

    The caller's random generators stay as they were. Raises `UsageError` that names the folder,
    file or tensor at fault.
    """
    with kept():  # a part that is made draws its first parameters
        return _load(Path(run), pair)


def _load(run: Path, pair: nn.Module | type[nn.Module] | None) -> nn.Module:
    config = read_config(run)
    given, (state, recipe_of_model) = pair, seals.open_tensor_file(_bytes(run / MODEL), run / MODEL)
    try:
        pair = _rebuilt(run, config, given)
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(
            f"{run / CONFIG} does not describe a pair that can be made: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if recipe_of_model not in (None, "", _recipe_checksum(config)):
        raise UsageError(
            f"{run / CONFIG} describes another pair than {run / MODEL} was written for: one of the "
            "two is damaged, edited or of another run"
        )
    floating = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
    if floating:
        pair.to(max(floating.values(), key=lambda dtype: torch.finfo(dtype).bits))
    for name, tensor in _distinct(pair).items():  # others, kept in no file, have the widest type
        if name in floating and tensor.is_floating_point():
            tensor.data = tensor.data.to(floating[name])
    if config.get("adopted_batch"):
        _declare(pair, config["adopted_batch"], run / CONFIG)
    fill(pair, state, run / MODEL)
    if config.get(DIVISOR) in (1, 255):
        setattr(pair, DIVISOR, config[DIVISOR])
    return pair.eval()


def state_dict(pair: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as detached copies on the CPU; one that parts share is there once."""
    return {name: value.detach().cpu().clone() for name, value in _distinct(pair).items()}


def _distinct(pair: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers themselves, each by its first name."""
    own = pair.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(own.items())}
    return {name: value for name, value in own.items() if first[id(value)] == name}


def write_config(pair: nn.Module, run: Path, config: Mapping[str, Any]) -> None:
    """Write config.json: how to rebuild the pair, versions, and what the caller adds."""
    content = {
        "format": 1,
        "pair": recipe(pair),
        "adopted_batch": adopted_batch(pair),
        DIVISOR: recorded_divisor(pair),
        "versions": versions(),
        **config,
    }
    write_json(run / CONFIG, content)


def read_config(run: Path) -> dict[str, Any]:
    """The content of a run's config.json."""
    if not os.path.isdir(run):
        near = run.parent.glob(f"*/{CONFIG}") if os.path.isdir(run.parent) else []
        known = nearest(run.name, sorted(path.parent.name for path in near))
        raise UsageError(f"there is no run '{run}'" + (f"; {known}" if known else ""))
    config = read_json(run / CONFIG)
    if not isinstance(config, dict) or config.get("format") != 1:
        raise UsageError(f"{run / CONFIG} is not the configuration of a run of this version")
    return config


def _recipe_checksum(config: dict[str, Any]) -> str:
    """A checksum of what rebuilds the pair: it binds model.safetensors to config.json."""
    recipe = json.dumps([config.get("pair"), config.get("adopted_batch")], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def write_model(run: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors into model.safetensors; a report of other weights is marked as such."""
    recipe = ""
    with suppress(UsageError):  # a configuration that is damaged is no reason to lose the weights
        recipe = _recipe_checksum(read_config(run))
    mark_report(run, seals.fingerprint(state))
    write_tensors(run / MODEL, state, recipe)


def read_model(run: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    return read_tensors(run / MODEL)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], more: str = "") -> None:
    """Write a safetensors file with its checksum."""
    with atomic(path) as file:
        file.write(seals.tensor_file(tensors, more))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, held against its checksum."""
    return seals.open_tensor_file(_bytes(path), path)[0]


def fingerprint(pair: nn.Module) -> str:
    """SHA-256 of a pair's parameters and buffers: which weights a number was measured on."""
    return seals.fingerprint(state_dict(pair))


def write_metrics(run: str | Path, pair: nn.Module, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, with the fingerprint of the weights that were measured."""
    write_json(Path(run) / METRICS, {**metrics, "model": fingerprint(pair)})


def read_metrics(run: Path) -> dict[str, Any]:
    """What metrics.json holds, nothing where there is no such file."""
    metrics = read_json(run / METRICS) if (run / METRICS).exists() else {}
    kinds = {"kl_by_unit": dict, "active_units": dict, "diagnostics": dict, "model": str}
    sound = isinstance(metrics, dict) and all(
        isinstance(metrics.get(name), (kind, type(None))) for name, kind in kinds.items()
    )
    if not sound:
        raise UsageError(f"{run / METRICS} is not what evaluate and diagnose write")
    return metrics


_STALE = (
    '<p class="stale"><b>The model of this run has been written anew since this report: numbers '
    "and pictures are of earlier weights. <code>pyro-vae report</code> draws them again.</b></p>"
)


def mark_report(run: Path, model: str) -> None:
    """Say in report.html that it is of earlier weights, unless it is of these."""
    path = run / REPORT
    if not path.is_file():
        return
    page = path.read_text(errors="replace")
    if _STALE not in page and model_mark(model) not in page:
        with atomic(path) as file:
            file.write(page.replace("<body>", f"<body>{_STALE}", 1).encode())


def model_mark(model: str) -> str:
    """How report.html names the weights that it describes."""
    return f'<meta name="model" content="{model}">'


def write_checkpoint(run: Path, state: Mapping[str, Any]) -> None:
    """Write the state of training, with its checksum, into checkpoint.pt."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic(run / CHECKPOINT) as file:
        file.write(seals.sealed_archive(buffer.getvalue()))


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The state of training, of tensors and plain values only."""
    content = _bytes(run / CHECKPOINT)
    # torch writes zip archives; anything else would be a pickle of old.
    if content.startswith(b"PK\x03\x04"):
        seals.require_sealed(content, run / CHECKPOINT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(
                f"{run / CHECKPOINT} holds more than tensors and numbers, or is damaged: refused, "
                "nothing of it ran"
            ) from error
        if not isinstance(state, dict):
            raise UsageError(f"{run / CHECKPOINT} is no checkpoint of a run")
        return state
    if b"PK\x03\x04".startswith(content[:4]):
        raise UsageError(f"{run / CHECKPOINT} is cut short")
    raise UsageError(f"{run / CHECKPOINT} is no checkpoint of a run: refused, nothing of it ran")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; numbers that are not finite as "Infinity", "-Infinity", "NaN".

    JSON has no such numbers. `read_json` gives them back.
    """
    with atomic(path) as file:
        file.write(
            (
                json.dumps(json_ready(content), indent=2, default=str, allow_nan=False) + "\n"
            ).encode()
        )


def read_json(path: Path) -> Any:
    """Read JSON, naming the file where it is none."""
    content = _bytes(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is cut short or no JSON ({error})") from error
    return _mapped(found, lambda v: float(v) if v in _NAMED.values() else v)


_NAMED = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
"""How numbers that are not finite are written in JSON."""


def json_ready(content: Any) -> Any:
    """The content with numbers that are not finite as the words for them, which any JSON holds.

    >>> json_ready({"a": [1.0, float("-inf")]})
    {'a': [1.0, '-Infinity']}
    """
    return _mapped(content, lambda v: _NAMED[str(float(v))] if _is_odd(v) else v)


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    """Lists and dictionaries with every value in them changed."""
    if isinstance(content, Mapping):
        return {key: _mapped(value, change) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_mapped(value, change) for value in content]
    return change(content)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of one set of columns, atomically."""
    rows = list(rows)
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


@contextmanager
def atomic(path: Path) -> Iterator[Any]:
    """A binary file that appears under its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def start(run: Path, overwrite: bool = False) -> None:
    """Make a run folder ready for a new run; one that holds a run is refused, or cleared."""
    files = [CONFIG, MODEL, CHECKPOINT, HISTORY, METRICS, REPORT]
    held = [name for name in files if os.path.exists(run / name)]
    if os.path.exists(run) and not run.is_dir():
        raise UsageError(f"{run} is a file, a folder is expected")
    if held and not overwrite:
        raise UsageError(
            f"{run} holds another run ({held[0]}): choose another folder, go on with --resume "
            "(resume=True), or replace it with --overwrite (overwrite=True)"
        )
    for name in (*held, *((ROWS, *ARRAYS) if held else ())):
        (run / name).unlink(missing_ok=True)
    if held and (run / FIGURES).is_dir():
        for figure in (run / FIGURES).glob("*.png"):
            figure.unlink()
    if held and (run / TENSORBOARD).is_dir():
        shutil.rmtree(run / TENSORBOARD)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {run} cannot be made: {error.strerror}") from error


def begun(run: Path) -> bool:
    """Whether a run was stopped before its first checkpoint: it has nothing to go on from."""
    held = [name for name in (MODEL, CHECKPOINT, HISTORY) if os.path.exists(run / name)]
    return not held and os.path.exists(run / CONFIG)


def versions() -> dict[str, str]:
    """The versions of what a run depends on."""
    found = {"python": python_version()}
    for name in ("pyro-vae", "torch", "pyro-ppl", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def recipe(pair: nn.Module) -> dict[str, Any]:
    """How to make a pair again: its class, and its arguments where they can be told."""
    try:
        return describe(pair)
    except UsageError:
        return {"class": _path(type(pair)), "arguments": None}


def describe(value: Any, place: str = "pair", known: dict[int, str] | None = None) -> Any:
    """A value as JSON from which `_built` makes it again: parts by class and arguments.

    A part that was met before, at another place, is named by that place: it is one and the same.
    """
    known = {} if known is None else known
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [describe(item, f"{place}.{i}", known) for i, item in enumerate(value)]
    if isinstance(value, type):
        return {"type": _path(value)}
    if isinstance(value, nn.Module):
        if id(value) in known:
            return {"same": known[id(value)]}
        known[id(value)] = place
        arguments = {}
        # PyroModule's metaclass hides the signature of the class itself.
        parameters = list(inspect.signature(type(value).__init__).parameters.items())[1:]
        for name, parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(
                value, name
            ):
                raise UsageError(f"{_path(type(value))} does not keep its argument '{name}'")
            arguments[name] = describe(getattr(value, name), f"{place}.{name}", known)
        return {"class": _path(type(value)), "arguments": arguments}
    raise UsageError(f"a {type(value).__name__} cannot be described")


def _declare(pair: nn.Module, spec: Any, path: Path) -> None:
    """Run a pair once on rows of these shapes, so that it declares what it has adopted."""
    try:
        batch = [torch.zeros(2, *shape, dtype=_DTYPES[kind]) for shape, kind in spec]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path} holds no batch that can be made: {first_line(error)}") from error
    batch = [tensor.to(placement(pair)[0]) for tensor in batch]
    with scope(pair), torch.no_grad(), seeded(0):
        trace_model(pair, batch, trace_guide(pair, batch))
        adopt(pair, batch)


def _rebuilt(run: Path, config: dict[str, Any], pair: Any) -> nn.Module:
    made = config["pair"]
    if isinstance(pair, nn.Module):
        return pair
    if isinstance(pair, type):
        if made["arguments"] is None:
            raise UsageError(
                f"{run} does not record how {made['class']} was made: pass an instance, "
                "load(run, MyPair(...))"
            )
        return pair(**_arguments(made["arguments"], "pair", {}))
    if made["arguments"] is None or not _ours(made["class"]):
        raise UsageError(
            f"{run} holds a pair of class {made['class']}, which is not this library's: pass "
            "the class or an instance, load(run, MyPair) (--model module:Class)"
        )
    return _built(made, "pair", {})


def _built(value: Any, place: str, made: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_built(item, f"{place}.{i}", made) for i, item in enumerate(value))
    if isinstance(value, dict) and "type" in value:
        return _class(value["type"])
    if isinstance(value, dict) and "same" in value:
        return made[value["same"]]
    if isinstance(value, dict):
        arguments = _arguments(value["arguments"], place, made)
        made[place] = _class(value["class"])(**arguments)
        return made[place]
    return value


def _arguments(values: dict[str, Any], place: str, made: dict[str, Any]) -> dict[str, Any]:
    return {name: _built(value, f"{place}.{name}", made) for name, value in values.items()}


_FORMER = (
    *("bayesian", "exact", "factors", "flows", "guides", "likelihoods", "networks", "posteriors"),
    *("priors", "recurrent", "sequences", "models.hierarchical", "models.mixture"),
    *("models.semisupervised", "models.sequence", "models.vae"),
)
"""The modules by which folders of version 0.1.0 name this library's parts."""

_INNER = {
    **{"Viewed": "networks", "Log1p": "networks", "OneHot": "networks", "Writer": "sequences"},
    **{"Refined": "guides", "Grafted": "guides", "Encoders": "guides"},
    **{"LinearGaussian": "exact", "Spoiled": "exact"},
}
"""Parts that are within others, and no public names, by their modules."""

_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}


def _ours(path: str) -> bool:
    return path.startswith(("pyro_vae:", "pyro_vae.", "torch.nn."))


def _class(path: str) -> type:
    """The part of this name: no name that a folder holds makes Python import another module."""
    module, _, name = path.partition(":")
    kind = _part(name) if module in _HOMES else None
    if module == "torch.nn" or module.startswith("torch.nn."):
        kind = getattr(torch.nn, name, None) if name in dir(torch.nn) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(
            f"'{path}' in config.json is no part that load may build: public parts of pyro_vae "
            "and torch.nn alone are; pass the pair itself, load(run, pair)"
        )
    return kind


_HOMES = ("pyro_vae", *(f"pyro_vae.{module}" for module in _FORMER))


def _part(name: str) -> Any:
    """A part of this library by its name, None where there is no such part."""
    if name in _INNER:
        return getattr(import_module(f"pyro_vae.{_INNER[name]}"), name)
    return getattr(pyro_vae, name) if name in pyro_vae.__all__ else None


def _path(kind: type) -> str:
    """How a class is recorded: a part of ours by its public name, wherever it is defined."""
    module, name = kind.__module__, kind.__qualname__
    ours = module.startswith("pyro_vae.") and _part(name) is kind
    return f"pyro_vae:{name}" if ours else f"{module}:{name}"


def renamed(recipe: str) -> str:
    """A recipe of version 0.1.0 with the names by which parts are recorded now.

    >>> renamed('{"class": "pyro_vae.models.vae:VAE"}')
    '{"class": "pyro_vae:VAE"}'
    """
    return re.sub(r'"pyro_vae\.[\w.]+:(?=\w+")', '"pyro_vae:', recipe)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def fill(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite a pair's tensors with those of a file, if they fit."""
    require_fit(pair, state, path)
    pair.load_state_dict(dict(state), strict=False)  # a tensor that parts share is there once


def require_fit(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UsageError`, which names file and tensor, where a file's tensors do not fit a pair."""
    for name, value in _distinct(pair).items():
        if name not in state:
            raise UsageError(f"{path} lacks tensor '{name}'")
        if state[name].shape != value.shape:
            raise UsageError(
                f"tensor '{name}' of {path} has shape {tuple(state[name].shape)}, the pair "
                f"expects {tuple(value.shape)}"
            )
        if state[name].dtype != value.dtype:
            raise UsageError(
                f"tensor '{name}' of {path} has type {state[name].dtype}, the pair expects "
                f"{value.dtype}"
            )
    own = pair.state_dict()
    extra = [name for name in state if name not in own]
    if extra:
        raise UsageError(f"{path} holds tensor '{extra[0]}', which the pair does not have")
