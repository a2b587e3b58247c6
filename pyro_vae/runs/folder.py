"""Save a pair in a run folder and load it, without executing code from the folder.

config.json         how to rebuild the pair and repeat the run, versions, checksums of the data
model.safetensors   parameters and buffers of the pair, best on validation data
checkpoint.pt       the last state of training, see `pyro_vae.training.fit`
checkpoint-older.pt the state before it
nonfinite.npz       the minibatch at which training stopped, if its numbers were not finite
rows.safetensors    a hash of each row used in training, see `pyro_vae.runs.held_out_rows`
history.csv         one row for each epoch
metrics.json        the results of `evaluate` and `diagnose`
figures/, report.html
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, cast

import pyro
import torch
from torch import Tensor, nn

import pyro_vae
from pyro_vae.data.sizes import read_bytes
from pyro_vae.data.temporary import require_no_link
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs.arrays import DIVISOR, recorded_divisor
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, placement
from pyro_vae.pairs.rng import kept, seeded
from pyro_vae.pairs.scope import adopt, keep_shapes, ran_on, scope
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import checksums
from pyro_vae.runs.description import built, built_arguments, is_ours, recipe
from pyro_vae.runs.files import (
    ARRAYS,
    CHECKPOINT,
    CONFIG,
    FIGURES,
    FORMAT,
    HISTORY,
    METRICS,
    MODEL,
    NONFINITE,
    OLDER,
    REPORT,
    ROWS,
    SEALED,
    TENSORBOARD,
    atomic,
    read_json,
    write_json,
)
from pyro_vae.runs.lock import writing
from pyro_vae.runs.memory import WithinMemory
from pyro_vae.runs.metrics import mark_report
from pyro_vae.runs.tensors import distinct, fill, state_dict


@alone()
def save(pair: nn.Module, run: str | Path, config: Mapping[str, Any] | None = None) -> Path:
    """Save a pair in a run folder, from which `load` rebuilds it.

    Arguments:
        pair: any pair. ``load(run)`` rebuilds a pair that is made of parts of this library. For
            another pair, pass its class or an instance, as in ``load(run, MyPair)``.
        run: the folder, which is created if it does not exist.
        config: other entries of config.json.

    Returns the path of the folder. Raises `UsageError` if the folder cannot be written.

    >>> import tempfile, pyro_vae as pv
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = pv.save(pv.VAE.mlp((4,), latent_dim=3), run)
    ...     pv.load(run).prior.latent_dim
    3
    """
    run = Path(run)
    with writing(run):
        write_config(pair, run, config or {})
        write_model(run, state_dict(pair))
    return run


@alone()
def load(run: str | Path, pair: nn.Module | type[nn.Module] | None = None) -> nn.Module:
    """Load the pair of a run folder, on the CPU and in evaluation mode.

    Arguments:
        run: a folder that `pyro_vae.fit` or `save` wrote.
        pair: for your own pair, its class or an instance. A class is called with the recorded
            arguments. The parameters of an instance are overwritten. A run folder never makes
            Python import a module, except modules of this library and torch.

    Your random generators do not change. Raises `UsageError`, which names the folder, file or
    tensor, if the pair cannot be rebuilt.

    >>> import tempfile, pyro_vae as pv
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = pv.save(pv.VAE.mlp((4,), latent_dim=3), run)
    ...     pv.load(run).training
    False
    """
    with kept():  # a new part draws its initial parameters
        return _load(Path(run), pair)


_UNBUILT = (
    *(KeyError, TypeError, AttributeError, ValueError, RuntimeError, ImportError),
    *(IndexError, ArithmeticError, MemoryError),
)
"""What parts raise whose arguments are not as they should be."""


def _load(run: Path, pair: nn.Module | type[nn.Module] | None) -> nn.Module:
    config = read_config(run)
    given, (state, recipe_of_model) = (
        pair,
        checksums.open_tensor_file(read_bytes(run / MODEL), run / MODEL),
    )
    try:
        with WithinMemory(str(run / CONFIG)):
            pair = _rebuilt(run, config, given)
    except UsageError:
        raise
    except _UNBUILT as error:
        raise UsageError(
            f"{run / CONFIG} does not describe a pair that can be built: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if recipe_of_model not in (None, "", _recipe_checksum(config)):
        raise UsageError(
            f"{run / CONFIG} describes another pair than {run / MODEL}: one of the two files is "
            "damaged, edited or from another run"
        )
    floating = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
    if floating:
        pair.to(max(floating.values(), key=lambda dtype: torch.finfo(dtype).bits))
    for name, tensor in distinct(pair).items():  # tensors that no file has keep the widest type
        if name in floating and tensor.is_floating_point():
            tensor.data = tensor.data.to(floating[name])
    _declare(pair, _rows(config.get("adopted_batch") or (), run / CONFIG), state)
    fill(pair, state, run / MODEL)
    if config.get(DIVISOR) in (1, 255):
        setattr(pair, DIVISOR, config[DIVISOR])
    return pair.eval()


def write_config(pair: nn.Module, run: Path, config: Mapping[str, Any]) -> None:
    """Write config.json: how to rebuild the pair, versions, and the entries of the caller."""
    content = {
        "pair": recipe(pair),
        "adopted_batch": ran_on(pair),
        DIVISOR: recorded_divisor(pair),
        "versions": versions(),
        **config,
    }
    write_json(run / CONFIG, content)


def read_config(run: Path) -> dict[str, Any]:
    """Read config.json; raise `UsageError` for an unknown run or another format."""
    if not os.path.isdir(run):
        near = run.parent.glob(f"*/{CONFIG}") if os.path.isdir(run.parent) else []
        known = nearest(run.name, sorted(path.parent.name for path in near))
        raise UsageError(f"there is no run '{run}'" + (f"; {known}" if known else ""))
    config = read_json(run / CONFIG)
    if not isinstance(config, dict) or config.get(FORMAT) not in (1, SEALED):
        raise UsageError(f"{run / CONFIG} is not the configuration of a run of this version")
    return config


def _recipe_checksum(config: dict[str, Any]) -> str:
    """The checksum of the description of the pair, which links model.safetensors to config.json."""
    recipe = json.dumps([config.get("pair"), config.get("adopted_batch")], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def write_model(run: Path, state: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, and mark a report that describes other weights."""
    recipe = ""
    with suppress(UsageError):  # save the weights even if the configuration is damaged
        recipe = _recipe_checksum(read_config(run))
    mark_report(run, checksums.fingerprint(state))
    write_tensors(run / MODEL, state, recipe)


def read_model(run: Path) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors."""
    return read_tensors(run / MODEL)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], more: str = "") -> None:
    """Write a safetensors file with its checksum."""
    with atomic(path) as file:
        file.write(checksums.tensor_file(tensors, more))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file and verify its checksum."""
    return checksums.open_tensor_file(read_bytes(path), path)[0]


def start(run: Path, overwrite: bool = False) -> None:
    """Prepare a folder for a new run; with ``overwrite``, delete the files of an earlier run.

    Raises `UsageError` if the folder already holds a run, or a file cannot be deleted.
    """
    files = [CONFIG, MODEL, OLDER, CHECKPOINT, HISTORY, METRICS, REPORT]
    held = [name for name in files if os.path.lexists(run / name)]
    if held and not overwrite:
        raise UsageError(
            f"{run} already holds a run ({held[0]}): choose another folder, or pass `resume` to "
            "continue this run or `overwrite` to replace it"
        )
    for name in (FIGURES, TENSORBOARD):
        require_no_link(run / name)
    if not held:
        return
    try:
        _delete(run, [*held, ROWS, NONFINITE, *ARRAYS])
    except OSError as error:
        raise UsageError(f"{run} cannot be overwritten: {error.strerror or error}") from error


def _delete(run: Path, names: list[str]) -> None:
    """Delete the files of a run, its figures and its TensorBoard history."""
    for path in (*(run / name for name in names), *(run / FIGURES).glob("*.png")):
        path.unlink(missing_ok=True)
    if (run / TENSORBOARD).is_dir():
        shutil.rmtree(run / TENSORBOARD)


def begun(run: Path) -> bool:
    """Whether a run ended before its first checkpoint, so that it must start again."""
    held = [name for name in (MODEL, CHECKPOINT, OLDER, HISTORY) if os.path.exists(run / name)]
    return not held and os.path.exists(run / CONFIG)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run depends on."""
    found = {"python": python_version(), "pyro-vae": pyro_vae.__version__}
    for name in ("torch", "pyro-ppl", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _rows(spec: Any, path: Path) -> Batch:
    """Two rows of zeros, of the shapes and types in config.json."""
    try:
        with WithinMemory(str(path)):
            return tuple(torch.zeros(2, *shape, dtype=_DTYPES[kind]) for shape, kind in spec)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"{path} describes a batch that cannot be created: {first_line(error)}"
        ) from error


def _declare(pair: nn.Module, rows: Batch, state: Mapping[str, Tensor]) -> None:
    """Run a pair once, if it lacks tensors of the file, so that it makes these parameters.

    It runs on zeros, and on rows of its template if it fails on zeros.
    """
    batches = []
    if rows:
        keep_shapes(pair, rows)
        batches.append(lambda: rows)
    if hasattr(pair, "template"):
        batches.append(lambda: cast(Any, pair).template(2))
    for batch in batches:
        if all(name in pair.state_dict() for name in state):
            return
        # A user's own code may raise anything; `fill` names a tensor that is still missing.
        with suppress(Exception), pyro.validation_enabled(False):
            placed = tuple(tensor.to(placement(pair)[0]) for tensor in batch())
            with scope(pair), torch.no_grad(), seeded(0):
                trace_model(pair, placed, trace_guide(pair, placed))
                adopt(pair)


def _rebuilt(run: Path, config: dict[str, Any], pair: Any) -> nn.Module:
    made = config["pair"]
    if isinstance(pair, nn.Module):
        return pair
    if isinstance(pair, type):
        if made["arguments"] is None:
            raise UsageError(
                f"{run} does not record the arguments of {made['class']}: pass an instance, "
                "load(run, MyPair(...))"
            )
        return pair(**built_arguments(made["arguments"], "pair", {}))
    if made["arguments"] is None and is_ours(made["class"]):
        raise UsageError(
            f"{run} does not record the arguments of {made['class']}: build the pair in the same "
            "way and pass it, load(run, pair)"
        )
    if not is_ours(made["class"]):
        raise UsageError(
            f"{run} holds a pair of class {made['class']}, which is not part of this library: pass "
            "the class or an instance, load(run, MyPair) or --model module:Class"
        )
    return built(made, "pair", {})


_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
