"""The budget of `diagnose` holds for studies that cost more than expected."""

from functools import partial

import pytest
import torch
from exact import linear_gaussian

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis
from pyro_vae.diagnostics.study import Rung, Study


class Clock:
    """A clock that only the studies advance, by the time that they claim."""

    now = 0.0

    def __call__(self):
        return self.now


def ran(monkeypatch, budget, sizes):
    """Diagnose by one study whose sizes have these expected and true seconds."""
    clock = Clock()
    monkeypatch.setattr(diagnosis, "_now", clock)

    def pretend(true):
        clock.now += true
        return true

    rungs = [Rung(expected, partial(pretend, true)) for expected, true in sizes]
    monkeypatch.setattr(diagnosis, "STUDIES", [lambda bench: Study("one", 1, rungs)])
    found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=budget, progress=False)
    return found.results["one"], clock.now


@pytest.mark.parametrize("factor", [0.5, 1, 10])
def test_a_study_that_costs_more_than_expected_stays_in_its_budget(monkeypatch, factor):
    """The first size alone does not tell whether its time grows; the next size does."""
    sizes = [(cost, factor * cost) for cost in (0.1, 0.8, 3.6, 9.0)]
    largest, seconds = ran(monkeypatch, 20, sizes)
    assert seconds <= 20
    assert largest == {0.5: 4.5, 1: 9, 10: 8}[factor]


def test_a_start_that_does_not_grow_does_not_stop_the_climb(monkeypatch):
    sizes = [(cost, 5 + cost) for cost in (0.1, 0.8, 3.6, 9.0)]
    assert ran(monkeypatch, 30, sizes) == (14, pytest.approx(5.1 + 5.8 + 14))
