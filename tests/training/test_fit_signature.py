"""The arguments of `fit` are named, and those of its settings are the fields of `Settings`."""

import inspect
from dataclasses import fields
from typing import Never, get_type_hints

import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.training.settings import Settings

PARAMETERS = inspect.signature(pv.fit).parameters


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_a_setting_is_an_argument_of_fit_with_its_type_and_default(field):
    assert PARAMETERS[field.name].default == field.default
    assert PARAMETERS[field.name].annotation == get_type_hints(Settings)[field.name]
    assert f"        {field.name}: " in pv.fit.__doc__


def test_a_type_checker_rejects_every_other_argument():
    assert PARAMETERS["unknown"].annotation is Never


@pytest.mark.parametrize("wrong", ["epoch", "learning_rte", "valdation"])
def test_a_misspelled_argument_gets_the_nearest_name(wrong):
    near = {"epoch": "epochs", "learning_rte": "learning_rate", "valdation": "validation"}[wrong]
    with pytest.raises(UsageError, match=f"no option '{wrong}'; did you mean '{near}'"):
        pv.fit(pv.VAE.mlp((4,)), torch.ones(4, 4), **{wrong: 1})
