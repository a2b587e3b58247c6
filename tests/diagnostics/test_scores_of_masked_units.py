"""A unit that is masked in some rows is judged by its other rows."""

from dataclasses import replace

import pytest
import torch
from verdict_helpers import checked, normals

from pyro_vae.diagnostics import signs


def misses(scores):
    found = replace(checked(scores=scores), units=("z[0]", "z[1]"))
    return signs.missing_mass({"model_check": found}) is not None


def test_masked_scores_do_not_count():
    exact, far = normals(400)[:, None], 1.0 + normals(400)[:, None]
    hidden = torch.full((1200, 1), torch.nan).double()
    assert not misses(torch.cat([exact, hidden]))
    assert misses(torch.cat([far, hidden]))  # zeros in place of NaN would give a mean of 0.25
    assert misses(torch.cat([1.6 * exact, hidden]))  # and a standard deviation of 0.8


def test_a_unit_that_is_nearly_always_masked_is_not_judged():
    scores = torch.full((400, 2), torch.nan).double()
    scores[:, 0] = normals(400)
    scores[:49, 1] = 3.0 + normals(49)
    assert not misses(scores)
    scores[:60, 1] = 3.0 + normals(60)
    assert misses(scores)


@pytest.mark.parametrize(("off", "said"), [(-0.003, False), (0.003, True)])
def test_the_spread_of_few_scores_is_that_of_a_sample(off, said):
    """Of 51 scores, the limit is 1.3 + 3 / sqrt(102)."""
    scores = normals(51)
    scores = (1.3 + 3 / 102**0.5 + off) * (scores - scores.mean()) / scores.std()
    assert misses(scores[:, None]) is said
