"""The run folder: written atomically, read without executing code.

config.json         what rebuilds the pair and repeats the run, versions, a checksum of the data
model.safetensors   the pair's parameters and buffers, best on validation
checkpoint.pt       the last state of training: see `pyro_vae.training`
history.csv         a row for each epoch
metrics.json        what `evaluate` measured
figures/, report.html
"""

import csv
import hashlib
import importlib
import inspect
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs import adopt, adopted_batch, placement, scope, trace_guide, trace_model
from pyro_vae.rng import seeded
from pyro_vae.threads import alone

CONFIG, MODEL, CHECKPOINT = "config.json", "model.safetensors", "checkpoint.pt"
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

    Raises `UsageError` that names the folder, file or tensor at fault.
    """
    run = Path(run)
    config = read_config(run)
    given, state = pair, read_model(run)
    try:
        pair = _rebuilt(run, config, given)
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(
            f"{run / CONFIG} does not describe a pair that can be made: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    floating = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
    if floating:
        pair.to(max(floating.values(), key=lambda dtype: torch.finfo(dtype).bits))
    for name, tensor in _distinct(pair).items():  # others, kept in no file, have the widest type
        if name in floating and tensor.is_floating_point():
            tensor.data = tensor.data.to(floating[name])
    if config.get("adopted_batch"):
        _declare(pair, config["adopted_batch"], run / CONFIG)
    fill(pair, state, run / MODEL)
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


def write_model(run: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors into model.safetensors."""
    with atomic(run / MODEL) as file:
        file.write(safetensors.torch.save({k: v.contiguous() for k, v in state.items()}))


def read_model(run: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    try:
        return safetensors.torch.load(_bytes(run / MODEL))
    except SafetensorError as error:
        raise UsageError(f"{run / MODEL} is cut short or no safetensors file ({error})") from error


def write_checkpoint(run: Path, state: Mapping[str, Any]) -> None:
    """Write the state of training into checkpoint.pt."""
    with atomic(run / CHECKPOINT) as file:
        torch.save(dict(state), file)


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The state of training, of tensors and plain values only."""
    content = _bytes(run / CHECKPOINT)
    # torch writes zip archives; anything else would be a pickle of old.
    if zipfile.is_zipfile(io.BytesIO(content)):
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
    """Write JSON, atomically."""
    with atomic(path) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON, naming the file where it is none."""
    content = _bytes(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} is cut short or no JSON ({error})") from error


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
    for name in (*held, *(ARRAYS if held else ())):
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


def versions() -> dict[str, str]:
    """The versions of what a run depends on."""
    found = {"python": python_version()}
    for name in ("pyro-vae", "torch", "pyro-ppl", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        batch = [torch.zeros(2, *shape, dtype=getattr(torch, kind)) for shape, kind in spec]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
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


def _ours(path: str) -> bool:
    return path.startswith(("pyro_vae.", "torch.nn."))


def _class(path: str) -> type:
    module, _, name = path.partition(":")
    kind = getattr(importlib.import_module(module), name, None) if _ours(path) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"'{path}' in config.json is no part that load may build")
    return kind


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


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
    own = pair.state_dict()
    extra = [name for name in state if name not in own]
    if extra:
        raise UsageError(f"{path} holds tensor '{extra[0]}', which the pair does not have")
