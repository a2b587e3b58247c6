"""Kinds for censored values are refused in words that say what to do instead."""

import pytest

import pyro_vae as pv
from pyro_vae.data.schema import read_schema

WORDS = (
    "column 'lead' cannot be {}, because a table holds one number for each cell: write a pair of "
    "your own with the bounds as context, as in the page 'Your own data', section "
    "'Interval-censored values'"
)


@pytest.mark.parametrize("kind", ["interval-censored", "left-censored", "censored", "interval"])
@pytest.mark.parametrize("change", [lambda kind: kind, lambda kind: {"kind": kind}])
def test_in_python(kind, change):
    with pytest.raises(pv.UsageError) as caught:
        pv.read_table({"lead": [0.5, 1.5, 2.5]}, {"lead": change(kind)})
    assert str(caught.value) == WORDS.format(kind)


def test_in_a_file(tmp_path):
    path = tmp_path / "columns.toml"
    path.write_text('[columns.lead]\nkind = "interval-censored"\n')
    with pytest.raises(pv.UsageError) as caught:
        pv.read_table({"lead": [0.5, 1.5, 2.5]}, read_schema(path))
    assert str(caught.value) == WORDS.format("interval-censored")


def test_other_wrong_kinds_still_name_the_nearest():
    with pytest.raises(pv.UsageError, match="unknown kind 'ordinl'; did you mean 'ordinal'"):
        pv.read_table({"lead": [0.5, 1.5, 2.5]}, {"lead": {"kind": "ordinl"}})
