"""A unit that is masked in some rows is judged by its other rows."""

from dataclasses import replace

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
