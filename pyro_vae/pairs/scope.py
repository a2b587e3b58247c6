"""The parameters of a pair: its own parameter store, and the adoption of ``pyro.param``s."""

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
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.threads import alone


class _Adopted(nn.Module):
    """Parameters that only ``pyro.param`` declares: unconstrained values and constraints."""

    def __init__(self) -> None:
        super().__init__()
        self.constraints: dict[str, Any] = {}

    def state(self) -> dict[str, dict[str, Any]]:
        # get_parameter would reject the tensors that replace parameters while a graph is traced.
        params = {name: self._parameters[_key(name)] for name in self.constraints}
        return {"params": params, "constraints": dict(self.constraints)}


_ADOPTED = "pyro_param"


def _key(name: str) -> str:
    return name.replace(".", "/")


@contextmanager
def scope(pair: nn.Module) -> Iterator[None]:
    """Run inside a parameter store that only this pair uses; other threads wait."""
    with alone(), _store(pair), data_plate.in_use(pair), warnings.catch_warnings():
        # Users freeze parameters on purpose, for example a decoder while a new guide is fitted.
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        # `check` reports these mismatches between model and guide with more explanation.
        warnings.filterwarnings("ignore", message="Found plate statements in guide but not model")
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide but not model")
        with _PerRow():
            yield


class _PerRow(poutine.messenger.Messenger):
    """Removes the scale N / B of ``plate("data", N, subsample_size=B)``.

    The tools report nats per example and weigh the global latents themselves. The loss equals the
    loss of stock Pyro times B / N.
    """

    def _pyro_sample(self, msg: Any) -> None:
        found = data_plate.known()
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
    """Parameters without gradients, by the names under which their PyroModules declare them.

    Without this entry, the store would turn their gradients on at the first use.
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


def make_contiguous(pair: nn.Module) -> str | None:
    """Store each parameter row by row in memory; return what is wrong, if that is impossible.

    Pyro copies a parameter with another layout, such as ``torch.channels_last``, and trains the
    copy.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in pair.named_parameters():
        places.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for parameter in pair.parameters():
        if parameter.is_contiguous():
            continue
        one, *others = places[parameter.untyped_storage().data_ptr()]
        if others:
            return (
                f"parameters '{one}' and '{others[0]}' are parts of one tensor: make each of them "
                "a tensor of its own, by `nn.Parameter(part.clone())`"
            )
        parameter.data = parameter.detach().contiguous()
    return None


def adopt(pair: nn.Module) -> None:
    """Register each parameter that only the current store has as a parameter of the pair."""
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
        store.set_state({"params": {name: parameter}, "constraints": {}})


_RAN_ON = "_ran_on"


def keep_shapes(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Keep row shapes and types of the first batch on which a pair ran, also for its copies.

    A new pair may need such a run to make its parameters, as an AutoGuide does.
    """
    if _RAN_ON not in vars(pair):
        shapes = [[list(t.shape[1:]), str(t.dtype).removeprefix("torch.")] for t in batch]
        setattr(pair, _RAN_ON, shapes)


def ran_on(pair: nn.Module) -> list[list[Any]]:
    """Row shape and type of each tensor of a batch on which the pair ran; empty if it never ran."""
    return list(vars(pair).get(_RAN_ON, []))


def registered(pair: nn.Module, program: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with every trainable parameter of the pair as a param site of its trace.

    Stock ``SVI`` updates only parameters that are param sites; a plain attribute is not a site.
    """

    def run(*batch: Tensor) -> Any:
        for name, parameter in pair.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"pair$$${name}", parameter)
        return program(*batch)

    return run


@contextmanager
def evaluation_mode(pair: nn.Module) -> Iterator[None]:
    """Put every module of the pair in evaluation mode, and restore each mode afterwards."""
    training = [module for module in pair.modules() if module.training]
    pair.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def using(pair: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Use a pair without training: own parameter store, evaluation mode, no gradients, a seed."""
    draws = nullcontext() if seed is None else seeded(seed)
    with alone(), evaluation_mode(pair), scope(pair), torch.no_grad(), draws, _AllRows():
        yield


class _AllRows(poutine.messenger.Messenger):
    """Lets ``plate("data", N, subsample_size=len(x))`` take any number of rows, even more than N.

    The rows of the batch are the subsample; their indices among the N data do not matter.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and not msg["done"]:
            size = msg["fn"].subsample_size
            if size is not None and size > msg["fn"].size:
                msg["value"], msg["done"] = torch.arange(size), True
