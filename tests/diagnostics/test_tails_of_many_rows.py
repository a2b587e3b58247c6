"""Unreliable weights of some rows are due to the encoder, those of many rows to the tails of q."""

import pytest
from verdict_helpers import N, gaps, moments, ranks, weights

from pyro_vae.diagnostics import signs, verdict


@pytest.mark.parametrize(("bad", "part"), [(10, "encoder"), (39, "encoder"), (40, "family")])
def test_a_fifth_of_the_rows_is_the_limit(bad, part):
    results = {
        "log_likelihood": weights(unreliable=bad, gap=0.06),
        "calibration": ranks(),
        "local_calibration": moments(unreliable=bad),
        "gaps": gaps(n=20),
    }
    assert N == 200
    assert [blame.part for blame in verdict.blamed(results)] == [part]


def test_wrong_means_of_all_rows_and_gaps_decide_first():
    weighed = {"log_likelihood": weights(unreliable=N)}
    assert verdict.blamed(weighed | {"calibration": ranks(mean=0.3)})[0].part == "encoder"
    assert verdict.blamed(weighed | {"gaps": gaps(0.5)})[0].part == "encoder"
    placed = {"calibration": ranks(mean=0.3), "gaps": gaps(family=0.3, n=20)}
    assert verdict.blamed(weighed | placed)[0].part == "encoder"  # few rows, and no wrong shape
    assert [sign.kind for sign in signs.guide_signs(weighed)] == ["tails"]
