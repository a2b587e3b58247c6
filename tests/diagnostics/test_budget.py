"""The budget of `diagnose` holds for studies that cost more than expected."""

from functools import partial

import pytest
import torch
from exact import linear_gaussian

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis, sizing
from pyro_vae.diagnostics.study import Rung, Study
from pyro_vae.errors import UsageError


class Clock:
    """A clock that only the studies advance, by the time that they claim."""

    now = 0.0

    def __call__(self):
        return self.now


def ran(monkeypatch, budget, *studies, weights=(1,), order=None):
    """Diagnose by studies whose sizes have these expected and true seconds.

    Returns the true seconds of the largest size of each study, and of all of them. ``order`` gets
    the seconds of each run. A size whose seconds are an error raises it.
    """
    clock = Clock()
    monkeypatch.setattr(sizing, "now", clock)

    def pretend(true):
        if order is not None:
            order.append(true)
        if isinstance(true, Exception):
            raise true
        clock.now += true
        return true

    made = [
        Study(str(i), weights[i], [Rung(cost, partial(pretend, true)) for cost, true in sizes])
        for i, sizes in enumerate(studies)
    ]
    monkeypatch.setattr(diagnosis, "STUDIES", [lambda bench, one=one: one for one in made])
    found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=budget, progress=False)
    return [found.results.get(study.name) for study in made], clock.now


@pytest.mark.parametrize("factor", [0.5, 1, 10])
def test_a_study_that_costs_more_than_expected_stays_in_its_budget(monkeypatch, factor):
    """The first size alone does not tell whether its time grows; the next size does."""
    sizes = [(cost, factor * cost) for cost in (0.1, 0.8, 3.6, 9.0)]
    largest, seconds = ran(monkeypatch, 20, sizes)
    assert seconds <= 20
    assert largest == [{0.5: 4.5, 1: 9, 10: 8}[factor]]


def test_a_start_that_does_not_grow_does_not_stop_the_climb(monkeypatch):
    sizes = [(cost, 5 + cost) for cost in (0.1, 0.8, 3.6, 9.0)]
    assert ran(monkeypatch, 30, sizes) == ([14], pytest.approx(5.1 + 5.8 + 14))


def test_a_first_run_that_is_slower_than_the_second_does_not_tell_how_time_grows(monkeypatch):
    """The first run compiles: 5 of its 6 seconds come once. Then 1.25 seconds for each of cost."""
    sizes = [(0.1, 6), (0.8, 1), (3.6, 4.5), (9.0, 11.25)]
    assert ran(monkeypatch, 15, sizes) == ([4.5], 11.5)
    assert ran(monkeypatch, 30, sizes) == ([11.25], 18.25)


def test_sizes_of_equal_cost_are_tried_one_after_another(monkeypatch):
    """Costs are equal if the time of a pass is measured to be the same for any number of rows."""
    sizes = [(1, 1), (1, 2), (1, 4), (1, 100)]
    assert ran(monkeypatch, 8, sizes) == ([4], 7)


def test_what_the_shares_leave_goes_to_the_next_sizes_that_fit(monkeypatch):
    """The second study has nine tenths of the time, and a next size that does not fit."""
    small, large = [(1, 1), (2, 2), (3, 3), (9, 9)], [(1, 1), (100, 100)]
    assert ran(monkeypatch, 8, small, large, weights=(1, 9)) == ([3, 1], 7)
    assert ran(monkeypatch, 8, large, small, weights=(9, 1)) == ([1, 3], 7)


def test_sizes_of_equal_cost_run_one_after_another(monkeypatch):
    """Few rows may make two sizes equal in cost, though not in what they compute."""
    sizes = [(1, 1), (1, 1), (1, 2), (3, 3)]
    assert ran(monkeypatch, 20, sizes, [(1, 1), (100, 100)], weights=(1, 40)) == ([3, 1], 8)
    assert sizing.predicted([(2, 3.0), (2, 4.0)], 4) == pytest.approx(6)
    assert sizing.predicted([(2, 1.0)], 4) == pytest.approx(2)


def test_what_the_shares_leave_goes_to_the_cheapest_size_first(monkeypatch):
    """One size of 4 seconds would fit, but not beside the other of 3 seconds."""
    others = [(1, 1), (4, 4)], [(1, 1), (3, 3)], [(1, 1), (100, 100)]
    assert ran(monkeypatch, 9, *others, weights=(1, 1, 20)) == ([1, 3, 1], 6)


def test_what_the_shares_leave_goes_first_to_what_costs_least_for_its_weight(monkeypatch):
    """A size of 4 seconds and weight 2 comes before one of 3 seconds and weight 1."""
    others = [(1, 1), (4, 4)], [(1, 1), (3, 3)], [(1, 1), (100, 100)]
    assert ran(monkeypatch, 9, *others, weights=(2, 1, 40)) == ([4, 1, 1], 7)
    assert ran(monkeypatch, 10, *others, weights=(2, 1, 40)) == ([4, 3, 1], 10)


def test_a_study_whose_first_size_exceeds_its_share_runs_in_the_time_left(monkeypatch):
    """A first size may take a fifth of the time, or its share; here it needs more of both."""
    late, long = [(3, 3)], [(1, 1), (100, 100)]
    assert ran(monkeypatch, 10, late, long, weights=(1, 9)) == ([3, 1], 4)
    assert ran(monkeypatch, 3.5, late, long, weights=(1, 9)) == ([None, 1], 1)


def test_a_first_size_may_take_a_fifth_of_the_time_or_its_share(monkeypatch):
    """Before or after the other study has had its share: then it leaves too little."""
    other = [(1, 1), (7.5, 7.5)]
    assert ran(monkeypatch, 10, [(1.9, 1.9)], other, weights=(1, 99)) == ([1.9, 1], 2.9)
    assert ran(monkeypatch, 10, [(2.1, 2.1)], other, weights=(1, 99)) == ([None, 7.5], 8.5)
    order = []
    ran(monkeypatch, 10, [(3, 3), (4, 4)], [(2.9, 2.9)], weights=(9, 1), order=order)
    assert order == [3, 2.9, 4]


def test_shares_are_those_of_the_time_that_is_left(monkeypatch):
    small, large = [(1, 1), (1.1, 1.1)], [(1, 1), (7, 7)]
    assert ran(monkeypatch, 10, small, large, weights=(1, 9)) == ([1, 7], 9)
    small, large = [(1, 1), (2, 2)], [(1, 1), (4, 4), (5, 5)]
    assert ran(monkeypatch, 10, small, large, weights=(2, 8)) == ([2, 5], 9)


def test_a_share_that_another_study_has_taken_is_not_spent_again(monkeypatch):
    slow, other = [(1, 1), (3, 6)], [(1, 1), (4, 4)]
    assert ran(monkeypatch, 10, slow, other, weights=(5, 5)) == ([6, 1], 8)


def test_sizes_that_take_exactly_the_time_that_is_left_fit(monkeypatch):
    assert ran(monkeypatch, 10, [(10, 10)]) == ([10], 10)
    assert ran(monkeypatch, 5, [(1, 1), (2, 2), (4, 4)]) == ([4], 5)


@pytest.mark.parametrize("error", [UsageError("not this study"), ValueError("a bug")])
def test_a_study_that_fails_runs_once(monkeypatch, error):
    order = []
    failing, other = [(1, error), (2, 2)], [(1, 1), (3, 3)]
    assert ran(monkeypatch, 20, failing, other, weights=(1, 1), order=order)[0] == [None, 3]
    assert order == [error, 1, 3]


def test_a_study_that_fails_is_told_with_the_error_of_its_pair(monkeypatch):
    def fail():
        raise ValueError("a bug\n Trace Shapes:")

    study = Study("mine", 1, [Rung(1, fail)])
    monkeypatch.setattr(diagnosis, "STUDIES", [lambda bench: study])
    found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=20, progress=False)
    assert found.failed == {"mine": "ValueError: a bug"}


def test_more_rows_and_more_draws_always_cost_more(monkeypatch):
    """On this clock 500 rows take as long as one, and draws take no time."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(sizing, "now", lambda: float(next(ticks)))
    benches = []
    monkeypatch.setattr(diagnosis, "STUDIES", [lambda bench: benches.append(bench)])
    pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=1e6, progress=False)
    (bench,) = benches
    assert bench.overhead == 1
    assert bench.cost(1, 500) == pytest.approx(1.1, rel=0.01)
    assert bench.draws(1, 500, 10) == pytest.approx(1.2, rel=0.02)
