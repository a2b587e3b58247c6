"""A call of `fit` leaves nothing behind; the fast form of 1,000 calls in `benchmarks/faults.py`."""

import gc
import logging
import weakref

import pytest
from bad_input_helpers import binary, small

import pyro_vae as pv

OPTIONS = {"epochs": 1, "batch_size": 4, "progress": False}


def alive():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_fit_keeps_no_objects(engine, monkeypatch):
    """A graph that stays would have hundreds of nodes in each call."""
    pair, x = small(), binary()
    for _ in range(2):
        pv.fit(pair, x, engine=engine, **OPTIONS)
    growth = []
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps messages
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    for _ in range(3):  # a leak grows each time; other parts of the process may grow once
        before = alive()
        for _ in range(3):
            pv.fit(pair, x, engine=engine, **OPTIONS)
        growth.append(alive() - before)
    assert min(growth) < 3 * 30


def test_a_pair_that_was_fitted_is_freed():
    pair = small()
    pv.fit(pair, binary(), engine="traced", **OPTIONS)
    seen = weakref.ref(pair)
    del pair
    gc.collect()
    assert seen() is None
