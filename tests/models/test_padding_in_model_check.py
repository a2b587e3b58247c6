"""The padding of groups in `model_check`: its latents belong to no datum, so they say nothing."""

import pytest
import torch
from multilevel_helpers import Effects

import pyro_vae as pv
from pyro_vae.diagnostics import signs
from pyro_vae.diagnostics.model_sides import through_inference
from pyro_vae.pairs.scope import using

MEMBERS = 4
SIZES = [1 + i % MEMBERS for i in range(80)]


@pytest.fixture(scope="module")
def batch():
    return pv.by_group(*Effects().groups(SIZES)).batch


@pytest.fixture(scope="module")
def found(batch):
    return pv.model_check(Effects().pair(members=MEMBERS), *batch, num_samples=30, progress=False)


def test_an_exact_guide_misses_no_part_of_padded_groups(found):
    assert signs.missing_mass({"model_check": found}) is None
    assert not signs.model_signs({"model_check": found})


def test_the_units_of_the_padding_have_no_score(found):
    of = torch.tensor([name.startswith("z") for name in found.units])
    hidden = found.weighted_scores.isnan()
    members = torch.arange(2 * MEMBERS) < 2 * torch.tensor(SIZES)[:, None]
    assert torch.equal(hidden[:, of], ~members)  # no row is left out
    assert not hidden[:, ~of].any()


def test_codes_of_the_padding_are_equal_for_all_rows(batch):
    pair = Effects().pair(members=MEMBERS)
    with using(pair, 0):
        codes = through_inference(pair, batch, {}, 30).codes["z"].reshape(80, MEMBERS, 2)
    outside = torch.arange(MEMBERS) >= batch[-1][:, None]
    assert not codes[outside].any()
    assert bool((codes[~outside] != 0).all())
