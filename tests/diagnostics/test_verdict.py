"""Each rule of docs/diagnostics/verdict.md on both sides of its limit, and what is never said."""

import random
from itertools import product

import pytest
import torch
from verdict_helpers import (
    annealed,
    chains,
    checked,
    gaps,
    moments,
    normals,
    ranks,
    trained,
    weights,
)

from pyro_vae.diagnostics import attribution, signs, verdict
from pyro_vae.diagnostics.signs import Sign

ROWS = torch.arange(1000, 2000)


def blamed(**results):
    return [blame.part for blame in verdict.blamed(results)]


def findings(kind, **results):
    _, found = verdict.findings(results, ROWS)
    return {finding.about: finding.words for finding in found if finding.kind == kind}


# Signs of the guide


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (ranks(), []),
        (ranks(mean=0.09), []),
        (ranks(mean=0.16), ["place"]),
        (ranks(mean=-0.16), ["place"]),
        (ranks(spread=1.1), []),
        (ranks(spread=1.25), ["place"]),
        (ranks(spread=0.92), []),
        (ranks(spread=0.8), ["place"]),
        (ranks(joint=0.2), ["shape"]),
        (ranks(mean=0.2, joint=0.2), ["place", "shape"]),
        (ranks(mean=0.2, n=200), []),  # within three errors of 200 ranks
    ],
)
def test_ranks(found, kinds):
    assert [sign.kind for sign in signs.guide_signs({"calibration": found})] == kinds


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ranks(mean=0.3), "z[0] is too low"),
        (ranks(mean=-0.3), "z[0] is too high"),
        (ranks(spread=1.5), "z[0] is too narrow"),
        (ranks(spread=0.7), "z[0] is too wide"),
    ],
)
def test_the_direction_of_ranks(found, words):
    (sign,) = signs.guide_signs({"calibration": found})
    assert words in sign.words


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (moments(), []),
        (moments(shift=0.09), []),
        (moments(shift=0.11), ["place"]),
        (moments(shift=-0.11), ["place"]),
        (moments(scatter=0.29), []),
        (moments(scatter=0.31), ["place"]),
        (moments(ratio=1.14), []),
        (moments(ratio=1.16), ["place"]),
        (moments(ratio=0.88), []),
        (moments(ratio=0.86), ["place"]),
        (moments(correlation=0.14), []),
        (moments(correlation=0.16), ["shape"]),
        (moments(correlation=-0.16), ["shape"]),
    ],
)
def test_moments_at_the_data(found, kinds):
    assert [sign.kind for sign in signs.guide_signs({"local_calibration": found})] == kinds


@pytest.mark.parametrize(
    ("bad", "n", "said"), [(0, 200, 0), (2, 200, 0), (3, 200, 1), (9, 1000, 0), (10, 1000, 1)]
)
def test_unreliable_rows_are_a_sign_from_one_percent_and_three(bad, n, said):
    found = signs.guide_signs({"log_likelihood": weights(unreliable=bad, n=n)})
    assert [sign.kind for sign in found] == ["rows"] * said


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (chains(), []),
        (chains(shift=0.5), []),
        (chains(shift=0.8), ["place"]),
        (chains(ratio=1.2), []),
        (chains(ratio=1.5), ["place"]),
        (chains(ratio=0.6), ["place"]),
        (chains(correlation=0.2), []),
        (chains(correlation=0.5), ["shape"]),
        (chains(ratio=1.5, draws=60), []),  # too few effective draws to judge
    ],
)
def test_nuts_judges_mean_scale_and_correlation(found, kinds):
    assert [sign.kind for sign in signs.guide_signs({"nuts": found})] == kinds


@pytest.mark.parametrize(
    ("scores", "missing"),
    [
        (normals(2000), False),
        (1.2 * normals(2000), False),
        (1.5 * normals(2000), True),
        (normals(2000) + 0.25, False),
        (normals(2000) + 0.5, True),
        (normals(2000) - 0.5, True),
        (2 * normals(40), False),  # too few true values
    ],
)
def test_true_values_far_from_weighted_draws_are_missing_mass(scores, missing):
    found = signs.missing_mass({"model_check": checked(scores=scores[:, None])})
    assert (found is not None) == missing


@pytest.mark.parametrize(
    ("by", "error", "bad", "missing"),
    [
        (0.09, 0.0, 0, False),
        (0.11, 0.0, 0, True),
        (-0.2, 0.0, 0, False),  # annealing is the lower bound: it is not at its best
        (0.2, 0.07, 0, False),  # within three errors
        (0.2, 0.06, 0, True),
        (0.2, 0.0, 15, True),
        (0.2, 0.0, 16, False),  # the weights of these 16 of 20 data say so themselves
    ],
)
def test_annealing_above_reliable_weights_is_missing_mass(by, error, bad, missing):
    results = {"annealing": annealed(by, error), "log_likelihood": weights(bad, error=0.01)}
    assert (signs.missing_mass(results) is not None) == missing


def test_annealing_above_weights_whose_guide_is_off_at_the_data_is_not_missing_mass():
    results = {"annealing": annealed(0.5), "log_likelihood": weights(error=0.01)}
    assert signs.missing_mass(results | {"local_calibration": moments()})
    assert signs.missing_mass(results | {"local_calibration": moments(ratio=0.6)}) is None


@pytest.mark.parametrize(("error", "missing"), [(0.2, True), (0.3, False)])
def test_the_bias_of_weights_is_not_missing_mass(error, missing):
    """Weights of relative error 0.3 are 0.045 too low, or more if their tails are heavy."""
    results = {"annealing": annealed(0.2), "log_likelihood": weights(error=error)}
    found = signs.annealed_difference(results)
    assert (found[0] > 0.1 + 3 * error**2 / 2) == missing
    results["log_likelihood"].standard_errors[:20] = 0.0  # the rows that are compared have none
    assert (signs.missing_mass(results) is not None) == missing


def test_annealing_above_unreliable_rows_alone_is_not_missing_mass():
    found = annealed()
    found.per_datum[:2] += 5.0
    assert (
        signs.missing_mass({"annealing": found, "log_likelihood": weights(2, error=0.01)}) is None
    )
    assert signs.missing_mass({"annealing": found, "log_likelihood": weights(1, error=0.01)})


# Signs of the model


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (checked(), []),
        (checked(codes=0.1, auc=0.7), ["prior"]),
        (checked(codes=0.01, auc=0.7), []),  # less than 0.02 nats
        (checked(codes=0.1, auc=0.7, deviations=3.9), []),
        (checked(scale=0.5), ["likelihood scale"]),
        (checked(scale=-0.5), ["likelihood scale"]),
        (checked(scale=0.5, deviations=3.9), []),
        (checked(scale=0.05), []),  # 6 elements: 0.008 nats
        (checked(scale=0.05, elements=60.0), ["likelihood scale"]),
        (checked(row=0.1), ["likelihood scale"]),
        (checked(row=0.01), []),
        (checked(column=0.1), ["likelihood scale"]),
        (checked(column=0.1, deviations=3.9), []),
        (checked(dependence=0.1), ["decoder"]),
        (checked(dependence=0.01), []),
        (checked(regression=0.1), ["decoder"]),
        (checked(regression=0.1, deviations=3.9), []),
        (checked(p=2e-4), []),
        (checked(p=5e-5), ["decoder"]),
        (checked(p=5e-5, codes=0.1, auc=0.7), ["prior"]),  # which explains the difference
    ],
)
def test_the_model_check(found, kinds):
    assert [sign.kind for sign in signs.model_signs({"model_check": found})] == kinds


@pytest.mark.parametrize(
    ("scale", "words"),
    [(-0.5, "too wide: residuals are 0.78 times"), (0.5, "too narrow: residuals are 1.28 times")],
)
def test_the_direction_of_the_scale(scale, words):
    (sign,) = signs.model_signs({"model_check": checked(scale=scale)})
    assert words in sign.words
    # 6 elements whose mean square is c times too large: 3 (c - 1 - log c) nats
    c = torch.tensor(scale).exp().item()
    assert sign.nats == pytest.approx(3 * (c - 1 - scale))


@pytest.mark.parametrize(("by", "error", "said"), [(0.1, 0.02, 1), (0.1, 0.03, 0), (0.015, 0, 0)])
def test_training_data_that_are_better_are_too_few(by, error, said):
    assert blamed(train_gap=trained(by, error)) == ["data"] * said


# Attribution


@pytest.mark.parametrize(
    ("results", "parts"),
    [
        ({}, []),
        ({"calibration": ranks(mean=0.3)}, ["encoder"]),
        ({"calibration": ranks(joint=0.3)}, ["family"]),
        ({"local_calibration": moments(correlation=0.4)}, ["family"]),
        ({"local_calibration": moments(correlation=0.4, shift=0.3)}, ["encoder"]),
        ({"log_likelihood": weights(unreliable=10)}, ["encoder"]),
        ({"gaps": gaps(encoder=0.5, family=0.3)}, ["encoder", "family"]),
        ({"gaps": gaps(encoder=0.3, family=0.5)}, ["family", "encoder"]),
        ({"gaps": gaps(encoder=0.5, family=0.09)}, ["encoder"]),  # less than a fifth
        ({"gaps": gaps(encoder=0.5, family=0.11)}, ["encoder", "family"]),
        ({"gaps": gaps(encoder=0.015, family=0.015)}, []),
        ({"gaps": gaps(encoder=0.1, error=0.03)}, []),  # within three errors
        ({"gaps": gaps(encoder=0.1, error=0.02)}, ["encoder"]),
        ({"gaps": gaps(family=0.3), "calibration": ranks(mean=0.3)}, ["family"]),
        ({"gaps": gaps(family=0.3, n=20), "calibration": ranks(mean=0.3)}, ["encoder"]),
        ({"gaps": gaps(family=0.3, n=20), "calibration": ranks(joint=0.3)}, ["family"]),
        ({"gaps": gaps(family=0.099)}, ["family"]),
        ({"gaps": gaps(family=0.099), "calibration": ranks(mean=0.3)}, ["encoder"]),
        ({"gaps": gaps(family=0.101), "calibration": ranks(mean=0.3)}, ["family"]),
        ({"gaps": gaps(family=0.099), "calibration": ranks(joint=0.3)}, ["family"]),
        ({"gaps": gaps(encoder=0.03, family=0.05), "calibration": ranks(mean=0.3)}, ["encoder"]),
        (
            {"gaps": gaps(encoder=0.05, family=0.03), "calibration": ranks(mean=0.3)},
            ["encoder", "family"],
        ),
        (
            {"gaps": gaps(encoder=0.5), "model_check": checked(missed=0.5)},
            ["family"],
        ),
        ({"model_check": checked(codes=0.5, auc=0.8, scale=0.2)}, ["prior", "likelihood scale"]),
        ({"model_check": checked(codes=0.1, auc=0.7, scale=1.0)}, ["likelihood scale", "prior"]),
        (
            {"model_check": checked(dependence=0.3, regression=0.1, row=0.2)},
            ["decoder", "likelihood scale"],
        ),
        (
            {"model_check": checked(codes=0.3, auc=0.8), "gaps": gaps(encoder=0.5)},
            ["encoder", "prior"],
        ),
        (
            {"model_check": checked(codes=0.7, auc=0.8), "gaps": gaps(encoder=0.5)},
            ["prior", "encoder"],
        ),
    ],
)
def test_the_right_part_is_blamed_first(results, parts):
    assert blamed(**results) == parts


def test_the_size_is_the_gap_of_the_most_rows_in_the_shares_of_the_refined_ones():
    results = {"gaps": gaps(0.3, 0.1, n=50), "log_likelihood": weights(gap=0.8)}
    assert {b.part: b.nats for b in verdict.blamed(results)} == {
        "encoder": pytest.approx(0.6),
        "family": pytest.approx(0.2),
    }
    assert attribution.inference_gap({"gaps": gaps(0.3, 0.1)}) == pytest.approx(0.4)


def test_codes_beside_the_prior_by_kl_parts_count_only_without_a_model_check():
    sign = Sign("prior", "information", "codes are 2 nats from the prior", 2.0)
    assert [b.part for b in verdict.blamed({}, [sign])] == ["prior"]
    assert not verdict.blamed({"model_check": checked()}, [sign])
    collapsed = Sign("decoder", "latents", "'z' has collapsed")
    assert [b.part for b in verdict.blamed({"model_check": checked()}, [collapsed])] == ["decoder"]


# What is said about each quantity


def test_log_p_is_trusted_with_an_error_that_holds_its_bias():
    found = weights(error=0.5, n=10_000)
    assert found.standard_error == pytest.approx(0.005)
    # log of a mean of weights of relative error s is too low by s^2 / 2 = 0.125
    assert found.total_error == pytest.approx((0.005**2 + 0.125**2) ** 0.5)
    assert f"{found.value:.3f} ± 0.125 nats per example" in str(found)  # as in the verdict
    said = findings("trust", log_likelihood=found, model_check=checked())
    assert said["log p(x)"].startswith("log p(x) = -10.000 ± 0.125 nats per example (10000 data)")


def test_a_mean_with_one_unreliable_row_is_not_trusted_and_names_it():
    assert "log p(x)" in findings("trust", log_likelihood=weights(), model_check=checked())
    results = {"log_likelihood": weights(unreliable=1), "model_check": checked()}
    assert not findings("trust", **results).keys() & {"log p(x)", "ELBO"}
    assert "of 1 data are not reliable (rows 1000)" in findings("doubt", **results)["log p(x)"]
    many = findings("doubt", log_likelihood=weights(unreliable=7))["log p(x)"]
    assert "(rows 1000, 1001, 1002, 1003, 1004 ...)" in many


def test_steady_weights_are_reliable_whatever_the_shape_of_their_tail():
    assert not weights(unreliable=5, error=1e-4).unreliable.any()
    assert weights(unreliable=5, error=1e-3).unreliable.sum() == 5


def test_infinite_weights_are_doubted():
    said = findings("doubt", log_likelihood=weights(infinite=2))
    assert said["log p(x)"].startswith("log p(x) of 2 data: weights are infinite")


def test_missing_mass_takes_the_trust_from_log_p():
    results = {
        "log_likelihood": weights(gap=0.1),
        "model_check": checked(missed=0.5),
    }
    assert not findings("trust", **results).keys() & {"log p(x)", "ELBO", "guide"}
    assert "misses a part of the posterior" in findings("doubt", **results)["log p(x)"]


@pytest.mark.parametrize(("gap", "kind"), [(0.9, "trust"), (1.1, "doubt")])
def test_a_gap_of_a_nat_is_too_large(gap, kind):
    said = findings(kind, log_likelihood=weights(gap=gap), model_check=checked())["ELBO"]
    assert said.startswith(f"the ELBO is {gap:.2f} nats per example below log p(x)")


def test_the_guide_is_trusted_only_if_a_tool_has_judged_it():
    assert "guide" not in findings("trust", log_likelihood=weights())
    assert "guide" in findings("trust", calibration=ranks())
    assert "guide" not in findings("trust", calibration=ranks(mean=0.3))
    assert "guide" not in findings("trust", calibration=ranks(), gaps=gaps(0.5))


def test_the_model_is_trusted_only_if_data_and_own_data_agree():
    assert "model" in findings("trust", model_check=checked())
    assert "model" not in findings("trust", model_check=checked(codes=0.3, auc=0.8))
    few = findings("unchecked", model_check=checked(p=float("nan")))
    assert "too few rows" in few["model"]
    assert "model" not in findings("trust", model_check=checked(p=float("nan")))


def test_annealing_that_agrees_is_told_beside_log_p():
    def said(by, error):
        results = {"annealing": annealed(by, error), "log_likelihood": weights(error=0.0)}
        results |= {"model_check": checked()}
        return "annealing agrees" in findings("trust", **results)["log p(x)"]

    assert [said(0.05, 0.0), said(0.05, 0.12), said(0.05, 0.13)] == [True, True, False]


def test_annealing_below_the_weights_is_doubted():
    results = {"annealing": annealed(-0.5), "log_likelihood": weights(error=0.0)}
    assert "importance weights give a higher bound" in findings("doubt", **results)["annealing"]
    assert "log p(x)" in findings("unchecked", **results)
    assert "log p(x)" in findings("trust", **results, model_check=checked())


CHOICES = {
    "calibration": [ranks(), ranks(mean=0.3), ranks(joint=0.3), None],
    "local_calibration": [moments(), moments(ratio=0.6), moments(correlation=0.5), None],
    "log_likelihood": [weights(), weights(unreliable=20, gap=2.0), weights(gap=1.5), None],
    "gaps": [gaps(), gaps(0.5, 0.4), gaps(family=0.4, n=20), None],
    "annealing": [annealed(), annealed(0.5), annealed(-0.5), None],
    "model_check": [
        checked(),
        checked(codes=0.4, auc=0.8),
        checked(missed=0.5),
        None,
    ],
}


def test_no_report_contradicts_itself():
    """Combinations of results: one kind of finding for each quantity, and vetoes hold."""
    combinations = list(product(*CHOICES.values()))
    for chosen in random.Random(0).sample(combinations, 1000):  # a quarter of them, for time
        results = {k: v for k, v in zip(CHOICES, chosen, strict=True) if v is not None}
        blames, found = verdict.findings(results, ROWS)
        parts = {blame.part for blame in blames}
        kinds = {}
        for finding in found:
            if finding.kind in ("fault", "trust", "doubt"):
                kinds.setdefault(finding.about, set()).add(finding.kind)
        assert all(len(some) == 1 for some in kinds.values())
        trusted = {about for about, some in kinds.items() if "trust" in some}
        assert not (parts & {"encoder", "family"} and "guide" in trusted)
        assert not (parts & {"prior", "likelihood scale", "decoder"} and "model" in trusted)
        assert len(parts) == len(blames)
        if "log_likelihood" in results and results["log_likelihood"].unreliable.any():
            assert not trusted & {"log p(x)", "ELBO"}
        looked = "model_check" in results or results.get("calibration") is CHOICES["calibration"][0]
        if not looked:
            assert not trusted & {"log p(x)", "ELBO", "guide"}
        if results.get("annealing") is CHOICES["annealing"][1] and "log_likelihood" in results:
            assert not trusted & {"log p(x)", "ELBO"}
        if any(sign.kind == "mass" for blame in blames for sign in blame.evidence):
            assert blames[0].part == "family"
            assert not trusted & {"log p(x)", "ELBO"}
