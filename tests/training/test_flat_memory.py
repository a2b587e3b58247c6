"""A call of `fit` leaves nothing behind; the fast form of 1,000 calls in `benchmarks/faults.py`."""

import gc
import weakref

import pytest
from bad_input_helpers import binary, small

import pyro_vae as pv

OPTIONS = {"epochs": 1, "batch_size": 4, "progress": False}


def alive():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_fit_keeps_no_objects(engine):
    """A graph that stays would have hundreds of nodes in each call."""
    pair, x = small(), binary()
    for _ in range(2):
        pv.fit(pair, x, engine=engine, **OPTIONS)
    before = alive()
    for _ in range(3):
        pv.fit(pair, x, engine=engine, **OPTIONS)
    assert alive() - before < 3 * 30


def test_a_pair_that_was_fitted_is_freed():
    pair = small()
    pv.fit(pair, binary(), engine="traced", **OPTIONS)
    seen = weakref.ref(pair)
    del pair
    gc.collect()
    assert seen() is None
