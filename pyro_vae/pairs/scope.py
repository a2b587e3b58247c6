"""The parameters of a pair: a store of its own, and the adoption of what only the store knows."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.compat import full_name, full_size, is_unconstrained, parameters_of, site_is_subsample
from pyro_vae.pairs import places
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.threads import alone


class _Adopted(nn.Module):
    """Parameters declared by ``pyro.param`` alone, unconstrained, and their constraints."""

    def __init__(self) -> None:
        super().__init__()
        self.constraints: dict[str, Any] = {}
        self.batch: list[tuple[list[int], str]] = []

    def state(self) -> dict[str, dict[str, Any]]:
        # Not get_parameter, which refuses what stands in for a parameter in a graph.
        params = {name: self._parameters[_key(name)] for name in self.constraints}
        return {"params": params, "constraints": dict(self.constraints)}


_ADOPTED = "pyro_param"


def _key(name: str) -> str:
    return name.replace(".", "/")


@contextmanager
def scope(pair: nn.Module) -> Iterator[None]:
    """Run inside a parameter store that belongs to this pair alone, while other threads wait."""
    with alone(), _store(pair), places.in_use(pair), warnings.catch_warnings():
        # What is frozen is frozen on purpose: a decoder, while another guide is fitted to it.
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        # `check` says in words where model and guide do not go together.
        warnings.filterwarnings("ignore", message="Found plate statements in guide but not model")
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide but not model")
        with _PerRow():
            yield


class _PerRow(poutine.messenger.Messenger):
    """Scales no row by N / B in ``plate("data", N, subsample_size=B)``.

    The tools report nats per example, and weigh the global latents by N themselves. The loss is
    that of stock Pyro times B / N.
    """

    def _pyro_sample(self, msg: Any) -> None:
        found = places.known()
        if found is None or found.num_data is None:
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name in found.plates:
                msg["scale"] = msg["scale"] * (frame.size / (full_size(frame) or frame.size))


def _store(pair: nn.Module) -> Any:
    states = [module.state() for module in pair.modules() if isinstance(module, _Adopted)]
    frozen = _frozen(pair)
    states.append({"params": frozen, "constraints": dict.fromkeys(frozen, constraints.real)})
    state = {kind: _union(states, kind) for kind in ("params", "constraints")}
    return pyro.get_param_store().scope(cast(Any, state))


def _frozen(pair: nn.Module) -> dict[str, Any]:
    """Parameters that take no gradients, by the names under which their PyroModules declare them.

    The store would make them take gradients as it first meets them.
    """
    return {
        full_name(module, name): parameter
        for module in pair.modules()
        if isinstance(module, PyroModule)
        for name, parameter in parameters_of(module).items()
        if parameter is not None and not parameter.requires_grad and not is_unconstrained(name)
    }


def _union(states: Sequence[dict[str, dict[str, Any]]], kind: str) -> dict[str, Any]:
    return {name: value for state in states for name, value in state[kind].items()}


def adopt(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Make every parameter of the current store, which only the store knows, one of the pair.

    The row shapes of the batch are kept, for `adopted_batch`.
    """
    store = pyro.get_param_store()
    state, known = store.get_state(), {id(p) for p in pair.parameters()}
    for name, value in state["params"].items():
        if id(value) in known:
            continue
        if not hasattr(pair, _ADOPTED):
            pair.add_module(_ADOPTED, _Adopted())
        adopted, parameter = getattr(pair, _ADOPTED), nn.Parameter(value.detach())
        adopted.register_parameter(_key(name), parameter)
        adopted.constraints[name] = state["constraints"][name]
        adopted.batch = row_shapes(batch)
        store.set_state({"params": {name: parameter}, "constraints": {}})


def adopted_batch(pair: nn.Module) -> list[tuple[list[int], str]]:
    """Row shapes and types of a batch on which running the pair declares what it has adopted."""
    adopted, found = getattr(pair, _ADOPTED, None), places.known(pair)
    if isinstance(adopted, _Adopted):
        return adopted.batch
    return [] if found is None else list(found.declares)


def row_shapes(batch: Sequence[Tensor]) -> list[tuple[list[int], str]]:
    """The row shape and the type of each tensor of a batch."""
    return [(list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in batch]


def registered(pair: nn.Module, program: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with every trainable parameter of the pair made a param site of its trace.

    Stock ``SVI`` steps only parameters that it sees as sites; a plain attribute is none.
    """

    def run(*batch: Tensor) -> Any:
        for name, parameter in pair.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"pair$$${name}", parameter)
        return program(*batch)

    return run


@contextmanager
def evaluation_mode(pair: nn.Module) -> Iterator[None]:
    """Every module of the pair in evaluation mode, and then each as it was."""
    training = [module for module in pair.modules() if module.training]
    pair.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def using(pair: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Use a pair without training it: its own scope, evaluation mode, no gradients, a seed."""
    draws = nullcontext() if seed is None else seeded(seed)
    with alone(), evaluation_mode(pair), scope(pair), torch.no_grad(), draws, _AllRows():
        yield


class _AllRows(poutine.messenger.Messenger):
    """``plate("data", N, subsample_size=len(x))`` takes any number of rows, more than N too.

    The rows that a tool gives are the subsample; which of the N data they are does not matter.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and not msg["done"]:
            size = msg["fn"].subsample_size
            if size is not None and size > msg["fn"].size:
                msg["value"], msg["done"] = torch.arange(size), True
