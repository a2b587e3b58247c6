"""Schedules at chosen epochs: within, at and after their ends."""

from dataclasses import FrozenInstanceError, fields
from math import pi, sin

import pytest

import pyro_vae as pv


def test_a_line_goes_from_start_to_end_and_stays():
    schedule = pv.LinearSchedule(8, start=3.0, end=-1.0)
    found = [schedule(epoch) for epoch in (0, 2, 4, 8, 9, 100)]
    assert found == [3.0, 2.0, 1.0, -1.0, -1.0, -1.0]
    assert pv.LinearSchedule(4)(1) == 0.25  # from 0 to 1 by default


def test_cycles_rise_in_their_part_of_each_period():
    schedule = pv.CyclicalSchedule(period=8, rise=0.25, start=0.5, end=2.5)
    found = [schedule(epoch) for epoch in (0, 1, 2, 5, 7.5, 8, 9, 18, 24)]
    assert found == [0.5, 1.5, 2.5, 2.5, 2.5, 0.5, 1.5, 2.5, 0.5]
    assert pv.CyclicalSchedule(8)(3) == 0.75  # half of each period by default, from 0 to 1
    assert pv.CyclicalSchedule(8)(7) == 1.0


def test_half_a_cosine_goes_from_start_to_end_and_stays():
    schedule = pv.CosineSchedule(6, start=5.0, end=1.0)
    found = [schedule(epoch) for epoch in (0, 2, 3, 4, 6, 7, 60)]
    assert found == pytest.approx([5, 4, 3, 2, 1, 1, 1])
    assert pv.CosineSchedule(10)(1) == pytest.approx(
        1 - sin(pi / 20) ** 2
    )  # from 1 to 0 by default


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_are_over_at_once(epochs):
    assert pv.LinearSchedule(epochs, start=3.0, end=2.0)(0) == 2.0
    assert pv.CosineSchedule(epochs, start=3.0, end=2.0)(0) == 2.0
    assert pv.LinearSchedule(1, start=3.0, end=2.0)(0.5) == 2.5


@pytest.mark.parametrize(
    "schedule", [pv.LinearSchedule(3), pv.CyclicalSchedule(3), pv.CosineSchedule(3)]
)
def test_a_schedule_cannot_be_changed_under_a_run(schedule):
    field = fields(schedule)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, field, 5)
    assert schedule == type(schedule)(3)
    assert hash(schedule) == hash(type(schedule)(3))
