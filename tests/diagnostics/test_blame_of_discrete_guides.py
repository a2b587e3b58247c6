"""Encoder or family, if no tool can refine the guide (`gaps` does not apply)."""

import pytest
import torch
from verdict_helpers import checked, ranks, weights

from pyro_vae.diagnostics import verdict
from pyro_vae.diagnostics.class_gap import ClassGap

NO_GAPS = ("gaps",)


def class_gap(value):
    return ClassGap(torch.full((100,), value).double(), ("y",), 20)


def blames(not_applicable=NO_GAPS, **results):
    return verdict.blamed(results, (), not_applicable)


@pytest.mark.parametrize(
    ("gap", "error", "faults"),
    [(0.5, 0.0, 1), (0.021, 0.0, 1), (0.02, 0.0, 0), (0.1, 0.15, 1), (0.1, 0.2, 0), (-1, 0, 0)],
)
def test_a_distance_of_elbo_and_log_likelihood_is_the_encoders(gap, error, faults):
    """The limit is 0.02 nats plus three errors, of both estimates."""
    found = blames(log_likelihood=weights(gap=gap, error=error))
    assert len(found) == faults
    for blame in found:
        assert (blame.part, blame.nats) == ("encoder", pytest.approx(gap))
        (sign,) = blame.evidence
        assert (sign.kind, sign.tool) == ("place", "log_likelihood")
        both = (2 * error**2 / 200 + (error**2 / 2) ** 2) ** 0.5
        assert sign.words == f"the ELBO is {gap:.2f} ± {both:.2f} nats below log p(x)"


def test_the_distance_is_no_sign_if_gaps_applies():
    assert blames((), log_likelihood=weights(gap=0.5)) == []
    assert blames(("annealing",), log_likelihood=weights(gap=0.5)) == []


@pytest.mark.parametrize("bad", [{"unreliable": 1}, {"infinite": 1}])
def test_the_distance_is_no_sign_if_log_likelihood_is_not_reliable(bad):
    assert blames(log_likelihood=weights(gap=0.5, **bad)) == []


def test_bad_weights_of_most_rows_are_the_encoders():
    (blame,) = blames(log_likelihood=weights(unreliable=150, gap=0.5))
    assert (blame.part, blame.nats) == ("encoder", None)
    assert verdict.blamed({"log_likelihood": weights(unreliable=150)})[0].part == "family"


def test_a_wrong_density_alone_is_the_familys():
    shape = {"calibration": ranks(joint=0.3)}
    assert [blame.part for blame in blames(**shape)] == ["family"]
    (both,) = blames(calibration=ranks(mean=0.3, joint=0.3))
    assert both.part == "encoder"
    (far,) = blames(**shape, log_likelihood=weights(gap=0.5))
    assert (far.part, far.nats) == ("encoder", 0.5)
    assert [sign.tool for sign in far.evidence] == ["log_likelihood", "calibration"]


def test_a_missed_part_is_the_familys_with_its_size():
    found = {"model_check": checked(missed=0.7), "log_likelihood": weights(gap=0.5)}
    (blame,) = blames(**found)
    assert (blame.part, blame.nats) == ("family", pytest.approx(0.7))
    assert [sign.kind for sign in blame.evidence] == ["mass"]


def test_the_error_of_the_elbo_counts():
    found = weights(gap=0.3)._replace(elbo_standard_error=0.1)
    assert blames(log_likelihood=found) == []
    assert len(blames(log_likelihood=found._replace(elbo_standard_error=0.05))) == 1


def test_findings_know_that_gaps_does_not_apply():
    results = {"log_likelihood": weights(gap=0.5)}
    found, _ = verdict.findings(results, torch.arange(200), not_applicable=NO_GAPS)
    assert [blame.part for blame in found] == ["encoder"]
    assert verdict.findings(results, torch.arange(200))[0] == []


def test_classes_and_other_latents_add_up():
    """Importance weights sum over the class, so its part is not in their distance."""
    both = {"log_likelihood": weights(gap=0.5), "class_gap": class_gap(1.5)}
    (blame,) = blames(**both)
    assert (blame.part, blame.nats) == ("encoder", pytest.approx(2.0))
    (missed,) = blames(**both, model_check=checked(missed=1.7))
    assert (missed.part, missed.nats) == ("family", pytest.approx(1.7))


@pytest.mark.parametrize(
    ("results", "advice"),
    [
        (
            {"log_likelihood": weights(gap=0.5)},
            "a larger encoder in your guide, fitted again; if only some rows are wrong, look at "
            "their inputs",
        ),
        ({"calibration": ranks(joint=0.3)}, "a richer family of the local latents in your guide"),
    ],
)
def test_the_advice_names_no_tool_that_refuses_the_pair(results, advice):
    assert blames(**results)[0].next == advice
    found, said = verdict.findings(results, torch.arange(200), not_applicable=NO_GAPS)
    assert found[0].next == advice
    assert any(one.words.endswith(f"Try {advice}") for one in said)
