"""The run folder: written atomically, read without executing code.

config.json         what rebuilds the pair and repeats the run, versions, checksums of the data
model.safetensors   the pair's parameters and buffers, best on validation
checkpoint.pt       the last state of training: see `pyro_vae.training.fit`
rows.safetensors    a hash of each row that was trained on: see `pyro_vae.runs.held_out_rows`
history.csv         a row for each epoch
metrics.json        what `evaluate` measured
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
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs.arrays import DIVISOR, recorded_divisor
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import placement
from pyro_vae.pairs.rng import kept, seeded
from pyro_vae.pairs.scope import adopt, adopted_batch, scope
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import seals
from pyro_vae.runs.description import built, built_arguments, is_ours, recipe
from pyro_vae.runs.files import (
    ARRAYS,
    CHECKPOINT,
    CONFIG,
    FIGURES,
    HISTORY,
    METRICS,
    MODEL,
    REPORT,
    ROWS,
    TENSORBOARD,
    atomic,
    read_bytes,
    read_json,
    write_json,
)
from pyro_vae.runs.metrics import mark_report
from pyro_vae.runs.tensors import distinct, fill, state_dict


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
    given, (state, recipe_of_model) = (
        pair,
        seals.open_tensor_file(read_bytes(run / MODEL), run / MODEL),
    )
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
    for name, tensor in distinct(pair).items():  # others, kept in no file, have the widest type
        if name in floating and tensor.is_floating_point():
            tensor.data = tensor.data.to(floating[name])
    if config.get("adopted_batch"):
        _declare(pair, config["adopted_batch"], run / CONFIG)
    fill(pair, state, run / MODEL)
    if config.get(DIVISOR) in (1, 255):
        setattr(pair, DIVISOR, config[DIVISOR])
    return pair.eval()


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
    return seals.open_tensor_file(read_bytes(path), path)[0]


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
        return pair(**built_arguments(made["arguments"], "pair", {}))
    if made["arguments"] is None or not is_ours(made["class"]):
        raise UsageError(
            f"{run} holds a pair of class {made['class']}, which is not this library's: pass "
            "the class or an instance, load(run, MyPair) (--model module:Class)"
        )
    return built(made, "pair", {})


_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
