"""The names of the schedules, and those of 0.1.0: deprecated in Python, known in checkpoints."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from pyro_vae.runs.files import read_checkpoint, write_checkpoint
from pyro_vae.training.schedules import present_names

OLD = Path(__file__).parents[1] / "runs" / "run_0.1.0"
NAMES = {"Linear": "LinearSchedule", "Cyclical": "CyclicalSchedule", "Cosine": "CosineSchedule"}


@pytest.fixture
def unused(monkeypatch):
    """The package as if no deprecated name had been used yet."""
    for name in NAMES:
        monkeypatch.delitem(vars(pv), name, raising=False)
    yield
    for name in NAMES:
        vars(pv).pop(name, None)


@pytest.mark.parametrize(("old", "new"), NAMES.items())
@pytest.mark.usefixtures("unused")
def test_an_old_name_is_the_new_class_and_warns_once(old, new):
    said = f"^pyro_vae.{old} is deprecated and will be removed in the next release; use .*{new}$"
    with pytest.warns(DeprecationWarning, match=said) as caught:
        assert getattr(pv, old) is getattr(pv, new)
    assert (len(caught), caught[0].filename) == (1, __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(pv, old)(4) == getattr(pv, new)(4)
    assert old not in pv.__all__


@pytest.mark.usefixtures("unused")
def test_an_old_name_can_be_imported():
    with pytest.warns(DeprecationWarning, match="use pyro_vae.CosineSchedule"):
        from pyro_vae import Cosine
    assert Cosine is pv.CosineSchedule


@dataclass(frozen=True)
class Linear:
    """A user's own schedule with the name of one of 0.1.0."""

    epochs: int

    def __call__(self, epoch):
        return min(1.0, epoch / self.epochs)


@dataclass(frozen=True)
class Delayed:
    """A user's schedule around another one."""

    schedule: pv.LinearSchedule

    def __call__(self, epoch):
        return self.schedule(epoch - 1) if epoch > 1 else 0.0


def resumed(folder, beta, *, was, rate="None"):
    """Resume the run of 0.1.0 whose checkpoint says that its weight on the KL was ``was``."""
    run = shutil.copytree(OLD, folder)
    state = read_checkpoint(run)
    assert state["job"].keys() >= {"beta", "learning_rate_schedule"}
    state["job"] |= {"beta": was, "learning_rate_schedule": rate}
    write_checkpoint(run, state)
    x = torch.tensor(json.loads((OLD / "expected.json").read_text())["x"])
    options = {"batch_size": 16, "engine": "eager", "progress": False, "out": run, "resume": True}
    options["learning_rate_schedule"] = pv.CosineSchedule(9)
    return pv.fit(pv.load(run), x[:32], validation=x[32:], epochs=4, beta=beta, **options)


COSINE = "Cosine(epochs=9, start=1.0, end=0.0)"
LINEAR = "Linear(epochs=8, start=0.0, end=1.0)"


@pytest.mark.parametrize(
    ("was", "beta"),
    [
        (LINEAR, pv.LinearSchedule(8)),
        ("Cyclical(period=8, rise=0.5, start=0.0, end=1.0)", pv.CyclicalSchedule(8)),
        (f"Delayed(schedule={LINEAR})", Delayed(pv.LinearSchedule(8))),
        ("Linear(epochs=8)", Linear(8)),
    ],
)
def test_a_checkpoint_with_old_names_resumes(was, beta, tmp_path):
    history = resumed(tmp_path / "run", beta, was=was, rate=COSINE)
    assert history.epochs[-1].beta == beta(3.5)  # the second of two steps of the fourth epoch


@pytest.mark.parametrize(
    ("was", "beta"),
    [
        (LINEAR, pv.LinearSchedule(7)),
        (LINEAR, pv.CosineSchedule(8, start=0.0, end=1.0)),
        ("Linear(epochs=8)", Linear(9)),
    ],
)
def test_another_schedule_than_that_of_the_checkpoint_is_refused(was, beta, tmp_path):
    with pytest.raises(pv.UsageError, match=r"was made with another beta: Linear.*keeps its job"):
        resumed(tmp_path / "run", beta, was=was, rate=COSINE)


def test_only_calls_of_the_old_names_are_replaced():
    words = "MyLinear(2), Linear, LinearSchedule(3), a.Cosine(4)"
    assert present_names(words) == "MyLinear(2), Linear, LinearSchedule(3), a.CosineSchedule(4)"
