"""The state of a training run. A checkpoint holds this state and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs import rng
from pyro_vae.training.history import Epoch, is_finite
from pyro_vae.training.settings import ENGINES
from pyro_vae.training.validation import Bound

Sums: TypeAlias = dict[str, dict[str, float]]
"""Sums over an epoch, by the kind of number and by site."""


def no_sums() -> Sums:
    """Return the sums at the start of an epoch."""
    return {kind: {} for kind in ("loss", "norm", "reconstruction", "kl", *_LATER)}


_FORMER_FIELDS = 10
"""Number of fields of an epoch of version 0.1.0."""

_LATER = ("greatest", "skipped")
"""Numbers of an epoch that checkpoints of version 0.1.0 lack."""


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_job(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        return False
    words = [value[name] for name in value if name != "settings"]
    return all(each is None or isinstance(each, str) for each in words)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_epoch(value: Any) -> bool:
    """Whether these are the fields of an `Epoch`, as `Epoch.plain` gives them."""
    if not isinstance(value, (list, tuple)) or len(value) not in (
        _FORMER_FIELDS,
        len(Epoch._fields),
    ):
        return False
    epoch = Epoch(*value)
    numbers = epoch._replace(kl={}, validation=None)
    bound = epoch.validation
    return (
        all(_is_number(v) for v in numbers if v not in (None, {}))
        and _are_numbers(epoch.kl)
        and (bound is None or _is_bound(bound))
    )


def _is_bound(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == len(Bound._fields)
        and all(_is_number(each) or _are_numbers(each) for each in value)
        and isinstance(Bound(*value).kl, dict)
    )


_SOUND: dict[str, Callable[[Any], bool]] = {
    "job": _is_job,
    "parameters": _are_tensors,
    "best": lambda value: value is None or _are_tensors(value),
    "optimizer": lambda value: isinstance(value, dict),
    "engine": lambda value: value in ENGINES,
    "generators": rng.is_state,
    "more_generators": lambda value: isinstance(value, list) and all(map(rng.is_state, value)),
    "epochs": lambda value: isinstance(value, list) and all(map(_is_epoch, value)),
    **dict.fromkeys(("best_epoch", "batches", "examples"), _is_count),
    "sums": lambda value: (
        isinstance(value, dict)
        and value.keys() | set(_LATER) == no_sums().keys()
        and all(map(_are_numbers, value.values()))
    ),
    "seconds": _is_number,
}
"""Whether the value of each field has the type and form that the loop needs."""


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    The training loop changes the counts and the results. ``parameters``, ``optimizer``, ``engine``
    and ``generators`` are copies, because the originals live in torch and in the pair.

    >>> now = rng.state()
    >>> state = TrainState({"settings": {}}, {}, {}, "eager", now, batches=3)
    >>> TrainState.of_checkpoint(state.to_checkpoint(), Path("checkpoint.pt")) == state
    True
    """

    job: dict[str, Any]
    """The options of the run, in words."""
    parameters: dict[str, Tensor]
    """Parameters and buffers at the last checkpoint or at the start of the epoch."""
    optimizer: dict[str, Any]
    engine: str
    generators: dict[str, Any]
    """The random generators of the first process at the last checkpoint."""
    more_generators: list[dict[str, Any]] = field(default_factory=list)
    """Those of the other processes."""
    epochs: list[Epoch] = field(default_factory=list)
    """The complete epochs."""
    best: dict[str, Tensor] | None = None
    """Parameters and buffers of the best epoch; None without validation data."""
    best_epoch: int = 0
    batches: int = 0
    """Number of minibatches so far in this epoch."""
    examples: int = 0
    """Number of examples so far in this epoch."""
    sums: Sums = field(default_factory=no_sums)
    """Sums over this epoch so far."""
    seconds: float = 0.0
    """Seconds of this epoch so far."""

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        plain = {_key(f.name): getattr(self, f.name) for f in fields(self)}
        return plain | {"epochs": [epoch.plain() for epoch in self.epochs]}

    @classmethod
    def of_checkpoint(cls, plain: dict[str, Any], path: Path) -> "TrainState":
        """Return the state that `to_checkpoint` gave. Errors name ``path``."""
        plain = _present(plain, path)
        names = [f.name for f in fields(cls)]
        for name in names:
            if _key(name) not in plain:
                raise UsageError(f"{path} lacks '{_key(name)}': it is not a checkpoint of a run")
        own = {name: plain[_key(name)] for name in names}
        for name, value in own.items():
            if not _SOUND[name](value):
                raise UsageError(f"{path} has an unexpected '{_key(name)}', so it is not read")
        if own["best_epoch"] > len(own["epochs"]):
            raise UsageError(f"{path} has an unexpected 'best_epoch', so it is not read")
        epochs = [Epoch.of(epoch) for epoch in plain["epochs"]]
        return cls(**own | {"epochs": epochs, "sums": no_sums() | own["sums"]})

    @property
    def where(self) -> str:
        """The place in training, for messages."""
        return f"epoch {len(self.epochs) + 1}, step {self.batches}"

    def has_run_out(self, patience: int | None) -> bool:
        """Whether the validation bound has not improved for ``patience`` epochs."""
        if patience is None:
            return False
        improved = self.best_epoch if self.best_epoch and is_finite(self.best_bound) else 0
        return len(self.epochs) - improved >= patience

    @property
    def best_bound(self) -> Bound | None:
        """The validation bound of the best epoch; None before the first epoch."""
        return self.epochs[self.best_epoch - 1].validation if self.best_epoch else None


def _present(plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint in the present form, from one of 0.1.0, which had the order of its epoch."""
    if "generators_of_epoch" not in plain:
        return plain
    if plain.get("batches"):
        raise UsageError(
            f"{path} is from version 0.1.0 and within an epoch, whose order of rows later versions "
            "do not have: continue this epoch with 0.1.0, or train again (overwrite)"
        )
    return {name: value for name, value in plain.items() if name != "generators_of_epoch"} | {
        "more_generators": []
    }


def _key(name: str) -> str:
    """Return the key of a field in the file."""
    return "pair" if name == "parameters" else name
