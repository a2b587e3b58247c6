"""If log p(x) of data and own data differ, a smaller difference of a part tells the part."""

from dataclasses import replace

import pytest
from verdict_helpers import checked

from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.two_samples import Separation

CERTAIN, USUAL = 0.9e-4, 1e-4
"""p-values of log p(x) below the limit and at it."""


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("scale", "likelihood scale"),
        ("row", "likelihood scale"),
        ("column", "likelihood scale"),
        ("dependence", "decoder"),
        ("regression", "decoder"),
    ],
)
def test_the_part_needs_three_deviations_if_log_p_differs_and_four_otherwise(name, part):
    def told(deviations, p):
        found = checked(**{name: 0.5}, deviations=deviations, p=p)
        return [
            (sign.kind, sign.nats is None) for sign in signs.model_signs({"model_check": found})
        ]

    assert told(3.1, CERTAIN) == [(part, False)]
    assert told(3.0, CERTAIN) == [("decoder", True)]
    assert told(3.9, USUAL) == []
    assert told(4.1, USUAL) == told(4.1, CERTAIN) == [(part, False)]


def test_codes_are_told_from_three_deviations_on_if_log_p_differs():
    def told(deviations, p, nats=0.5):
        found = replace(checked(p=p), codes={"z": Separation(0.7, deviations, nats)})
        return [blame.part for blame in verdict.blamed({"model_check": found})]

    assert told(3.1, CERTAIN) == ["prior"]
    assert told(3.0, CERTAIN) == ["decoder"]
    assert told(3.1, CERTAIN, nats=0.02) == ["decoder"]
    assert told(3.1, USUAL) == []


def test_a_difference_that_exceeds_four_deviations_leaves_out_the_smaller_ones():
    """Three deviations of six statistics happen by chance in 1 % of the runs."""
    found = replace(
        checked(row=0.5, p=CERTAIN), dependence=checked(dependence=0.5, deviations=3.5).dependence
    )
    assert [b.part for b in verdict.blamed({"model_check": found})] == ["likelihood scale"]
