"""What the verdict says of pairs with global latents, and of pairs that annealing refuses."""

from dataclasses import replace

import pytest
import torch
from verdict_helpers import annealed, checked, weights

from pyro_vae.diagnostics.attribution import PARTS, Blame
from pyro_vae.diagnostics.signs import annealed_difference
from pyro_vae.diagnostics.verdict import findings

ROWS = torch.arange(200)
ENCODER = (
    "a larger encoder in your guide, fitted again, or pyro_vae.refine for the rows that you "
    "analyze; if only some rows are wrong, look at their inputs"
)
FAMILY = "a richer family of the local latents in your guide"


@pytest.mark.parametrize("part", PARTS)
def test_the_advice_is_a_tool_that_serves_the_pair(part):
    own = {"encoder": ENCODER, "family": FAMILY}.get(part, PARTS[part][1])
    assert Blame(part, 0.5, (), own_guide=True).next == own
    assert Blame(part, 0.5, ()).next == PARTS[part][1]


@pytest.mark.parametrize(
    ("refused", "advice"),
    [
        ("nuts", "pyro_vae.anneal for log p(x)"),
        (
            "annealing",
            "a better guide of the local latents for log p(x); pyro_vae.anneal refuses this pair",
        ),
    ],
)
def test_what_to_try_for_log_p_if_weights_are_not_reliable(refused, advice):
    results = {"log_likelihood": weights(unreliable=1)}
    found = findings(results, ROWS, not_applicable={refused})[1]
    assert [one.words for one in found if one.kind == "next"] == [advice]


def test_a_model_check_at_one_draw_of_globals_does_not_judge_the_model():
    found = replace(checked(), given=("w",))
    told = findings({"model_check": found}, ROWS, shared={"w"})[1]
    words = "the model: its own data are compared with yours only if all latents are local"
    assert [(one.kind, one.words, one.about) for one in told] == [("unchecked", words, "model")]


def test_nothing_is_said_of_a_missed_part_that_could_not_be_measured():
    results = {"log_likelihood": weights(), "model_check": checked(bridged=10)}
    told = [one.words for one in findings(results, ROWS)[1] if one.about == "log p(x)"]
    assert len(told) == 1
    assert "nan" not in told[0]
    assert "would show" not in told[0]


def test_annealing_alone_is_compared_with_nothing():
    assert annealed_difference({"annealing": annealed(1.0)}) is None
