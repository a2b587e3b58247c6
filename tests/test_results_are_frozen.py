"""What a tool found cannot be changed by mistake: every public record is immutable."""

import dataclasses
import inspect

import pytest

import pyro_vae as pv
from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.outliers import OutlierScores
from pyro_vae.diagnostics.uncertainty import Uncertainty

OTHERS = (Calibration, OutlierScores, Uncertainty)
RECORDS = {
    thing
    for thing in (*(getattr(pv, name) for name in pv.__all__), *OTHERS)
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing)
}


@pytest.mark.parametrize("record", sorted(RECORDS, key=lambda record: record.__name__))
def test_a_record_is_frozen(record):
    made = object.__new__(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(record)[0].name, None)
