"""Probabilities of classes that are wrong: what they hide, and what refinement cannot tell."""

from types import SimpleNamespace

import pytest
import torch
from verdict_helpers import checked, gaps, normals, ranks, weights

from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.calibration import JOINT, LIKELIHOOD, Calibration
from pyro_vae.diagnostics.class_gap import ClassGap
from pyro_vae.diagnostics.signs import Sign


def enumerated(value):
    return ClassGap(torch.full((100,), value).double(), ("k",), 20)


FAR = checked(scores=3.0 * normals(2000)[:, None])
LOW = checked(missed=0.7, missed_error=0.01)
"""True latents are far from weighted draws, or show that log p(x) is too low."""


def kinds(results):
    _, said = verdict.findings(results, torch.arange(200))
    return {one.about: one.kind for one in said}


@pytest.mark.parametrize("seen", [FAR, LOW])
def test_wrong_probabilities_of_an_enumerated_class_explain_far_true_latents(seen):
    """The draws contain the class; log p(x) sums over it. So it is neither proved nor trusted."""
    results = {"log_likelihood": weights(error=0.0), "gaps": gaps(), "model_check": seen}
    assert verdict.blamed(results)[0].part == "family"
    assert kinds(results)["log p(x)"] == "doubt"
    results["class_gap"] = enumerated(2.0)
    (blame,) = verdict.blamed(results)
    assert (blame.part, blame.nats) == ("encoder", pytest.approx(2.0))
    assert kinds(results) == {
        "encoder": "fault",
        "model": "trust",
        "log p(x)": "unchecked",
        "ELBO": "doubt",
    }
    _, said = verdict.findings(results, torch.arange(200))
    (words,) = (one.words for one in said if one.about == "log p(x)")
    assert words.endswith(
        "but the probabilities of the classes are so wrong that no tool can tell whether the guide "
        "misses a part of the posterior of the other latents"
    )


@pytest.mark.parametrize(("value", "part"), [(0.6, "family"), (0.8, "encoder")])
def test_classes_explain_no_more_than_their_gap(value, part):
    """True latents show 0.7 nats. What q(y | x) misses is less than its KL from the best one."""
    results = {"log_likelihood": weights(error=0.0), "gaps": gaps(), "model_check": LOW}
    results["class_gap"] = enumerated(value)
    assert verdict.blamed(results)[0].part == part
    assert kinds(results)["log p(x)"] == ("doubt" if part == "family" else "unchecked")


@pytest.mark.parametrize("seen", [FAR, LOW])
def test_right_probabilities_explain_nothing(seen):
    results = {"log_likelihood": weights(error=0.0), "model_check": seen}
    assert verdict.blamed(results | {"class_gap": enumerated(0.01)})[0].part == "family"


def test_wrong_probabilities_leave_the_trust_if_true_latents_are_near():
    results = {"log_likelihood": weights(error=0.0), "model_check": checked()}
    results["class_gap"] = enumerated(0.3)
    assert not signs.masked_by_classes(results)
    assert kinds(results)["log p(x)"] == "trust"


@pytest.mark.parametrize("seen", [FAR, checked()])
def test_replicates_do_not_count_if_they_rest_on_wrong_classes(seen):
    """They are made from the same weighted draws."""
    sign = Sign("decoder", "predictive", "replicates differ")
    results = {"model_check": seen, "class_gap": enumerated(2.0)}
    parts = {blame.part for blame in verdict.blamed(results, [sign])}
    assert parts == ({"encoder"} if seen is FAR else {"encoder", "decoder"})


def refined(*sites, **sizes):
    """Gaps of a refinement that changes these sites only."""
    pair = SimpleNamespace(places=[SimpleNamespace(site=site) for site in sites])
    return gaps(**sizes)._replace(refinement=SimpleNamespace(pair=pair))


def ranked(names, means):
    scores = torch.stack([mean + normals(20_000) for mean in (*means, 0.3, 0.3)], 1)
    found = (torch.special.ndtr(scores) * 100).long().clamp(0, 99)
    return Calibration((*names, JOINT, LIKELIHOOD), found, 99, 0.05, {})


@pytest.mark.parametrize(
    ("means", "sites", "parts"),
    [
        ((0.3, 0.0), ["z"], ["encoder"]),  # refinement changes z only, and k is off
        ((0.0, 0.3), ["z"], ["family"]),
        ((0.0, 0.0), ["z"], ["family"]),  # log p(x, z) is off
        ((0.3, 0.0), ["k", "z"], ["family"]),
    ],
)
def test_what_refinement_leaves_of_a_drawn_class_is_the_encoders(means, sites, parts):
    results = {"gaps": refined(*sites, family=0.5), "calibration": ranked(("k", "z[0]"), means)}
    found = verdict.blamed(results)
    assert [blame.part for blame in found] == parts
    assert found[0].nats == pytest.approx(0.5)


def test_both_gaps_are_the_encoders_if_a_drawn_class_is_off():
    results = {"gaps": refined("z", encoder=0.3, family=0.5)}
    results["calibration"] = ranked(("k", "z[0]"), (0.3, 0.0))
    (blame,) = verdict.blamed(results)
    assert (blame.part, blame.nats) == ("encoder", pytest.approx(0.8))


def test_an_enumerated_class_is_not_in_the_gaps():
    """They sum over it, so it does not explain what refinement leaves."""
    results = {"gaps": refined("z", family=0.5), "class_gap": enumerated(0.0)}
    results["calibration"] = ranked(("k", "z[0]"), (0.3, 0.0))
    assert [blame.part for blame in verdict.blamed(results)] == ["family"]


def test_gaps_stay_as_they_are_without_ranks():
    results = {"gaps": refined("z", family=0.5), "log_likelihood": weights(unreliable=150)}
    assert [blame.part for blame in verdict.blamed(results)] == ["family"]


def test_small_gaps_stay_no_fault():
    results = {"gaps": refined("z", family=0.01)}
    results["calibration"] = ranked(("k", "z[0]"), (0.3, 0.0))
    (blame,) = verdict.blamed(results)
    assert [sign.tool for sign in blame.evidence] == ["calibration", "calibration"]


def test_what_is_off_is_what_the_signs_name():
    assert signs.units_off(ranks()).tolist() == [False] * 3
    assert signs.units_off(ranks(mean=0.3)).tolist() == [True, False, False]
    assert signs.units_off(ranks(spread=1.3, joint=0.3)).tolist() == [True, True, False]


@pytest.mark.parametrize("part", ["prior", "likelihood scale", "decoder", "encoder", None])
def test_a_model_that_no_tool_has_compared_is_not_checked(part):
    blames = [] if part is None else [SimpleNamespace(part=part)]
    found = verdict.on_unseen_model({}, blames, {"model_check": "it did not run"})
    assert len(found) == (part in ("encoder", None))
    for one in found:
        words = "the model: its own data were not compared with yours: it did not run"
        assert one == ("unchecked", words, "model")
    assert verdict.on_unseen_model({"model_check": checked()}, blames, {"model_check": "why"}) == []
    assert verdict.on_unseen_model({}, blames, {}) == []
