"""Calls follow one pattern: the pair, then the data and their context, then names."""

import inspect

import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import UsageError

KEYWORD, SEVERAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
OF_PAIRS = {
    name: list(inspect.signature(getattr(pv, name)).parameters.values())
    for name in pv.__all__
    if inspect.isfunction(getattr(pv, name))
    and "pair" in inspect.signature(getattr(pv, name)).parameters
    and name not in ("load", "save")  # the folder of a run is what they are about
}
WITHOUT_X = {"calibration": [], "global_calibration": [], "tarp": [], "sandwich": []}
INSTEAD_OF_X = {"sample": ["n"], "decode": ["values"], "interpolate": ["start", "end"]}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_call_is_pair_then_data_then_context_then_names(name):
    first, *others = OF_PAIRS[name]
    wanted = (WITHOUT_X | INSTEAD_OF_X).get(name, ["x"])
    assert first.name == "pair"
    assert [one.name for one in others[: len(wanted) + 1]] == [*wanted, "context"]
    assert others[len(wanted)].kind is SEVERAL
    assert all(
        one.kind in (KEYWORD, inspect.Parameter.VAR_KEYWORD) for one in others[len(wanted) + 1 :]
    )


def conditional():
    torch.manual_seed(0)
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), context_shapes=[(3,)])


CALLS = {
    "sample": lambda pair, *c: pv.sample(pair, 5, *c, seed=0),
    "decode": lambda pair, *c: pv.decode(pair, {"z": torch.ones(5, 2)}, *c, seed=0),
    "tarp": lambda pair, *c: pv.tarp(pair, *c, num_simulations=100, num_draws=19).ranks,
    "calibration": lambda pair, *c: (
        pv.calibration(pair, *c, num_simulations=100, num_draws=19, progress=False).ranks
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_list_of_context_works_for_one_more_release(name):
    pair, label = conditional(), pv.one_hot(torch.tensor([1]), 3)
    with pytest.warns(DeprecationWarning, match="pass each tensor as an argument"):
        before = CALLS[name](pair, [label])
    assert torch.equal(before, CALLS[name](pair, label))


def test_a_number_is_not_context():
    with pytest.raises(UsageError):
        pv.sandwich(conditional(), 50, progress=False)
