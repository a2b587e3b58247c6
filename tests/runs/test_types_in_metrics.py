"""metrics.json of another program: an entry of the wrong type ends in one line that names it."""

import json

import pytest
from cli_helpers import command

import pyro_vae as pv
from pyro_vae.runs.metrics import read_metrics

SOUND = {"elbo": -1.5, "log_likelihood": None, "global_kl": {"w": 2.5}, "baseline": None}

WRONG = {
    "global_kl": [2.5],
    "kl_by_site": "z",
    "kl_by_unit": [[1.0]],
    "active_units": 2,
    "num_units": 2,
    "baseline": -3.0,
    "not_computed": ["accuracy"],
    "diagnostics": [],
    "model": 7,
}


def test_sound_entries_and_nulls_are_read(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(SOUND))
    assert read_metrics(tmp_path) == SOUND


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_is_named(tmp_path, name):
    (tmp_path / "metrics.json").write_text(json.dumps(SOUND | {name: WRONG[name]}))
    with pytest.raises(pv.UsageError) as caught:
        read_metrics(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/metrics.json does not have the format that evaluate and diagnose write: "
        f"{name!r} must not be {WRONG[name]!r}"
    )


def test_a_list_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(pv.UsageError, match="must be a JSON object, got a list"):
        read_metrics(tmp_path)


ERRORS = ("log_likelihood_standard_error", "log_likelihood_total_error")


@pytest.mark.parametrize("name", ["elbo", "log_likelihood", *ERRORS])
def test_info_names_an_entry_that_must_be_a_number(tmp_path, capsys, name):
    pv.save(pv.VAE.mlp((2,), latent_dim=1, hidden=()), tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(SOUND | {name: "high"}))
    with pytest.raises(SystemExit):
        command("info {run}", run=tmp_path / "run")
    assert f"metrics.json: '{name}' must be a number, got 'high'" in capsys.readouterr().err
